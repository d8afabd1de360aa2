//! A namespace without storage: reads are zeroes, writes are dropped. For measuring what is around
//! it.

use memdesc::{MemSource, Segment};

use super::{Backend, BackendIo, BackendOp, Counters, Geometry};
use crate::transport::Transfer;

/// Answers everything at once and keeps nothing.
///
/// A read fills its memory with zeroes, although that costs: memory that is used again may hold what
/// another command left there. A write does not look at its data.
#[derive(Debug)]
pub struct NullBackend {
    geometry: Geometry,
    counters: Counters,
}

/// Why there is no such namespace.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum NullError {
    #[error("null: a size of {size} bytes is not a multiple of the block size {block_size}")]
    Size { size: u64, block_size: u32 },
    #[error("null: a namespace needs a size, for example null:1T")]
    Empty,
    #[error("block size {0} is not supported; it is 512 or 4096")]
    BlockSize(u32),
}

impl NullBackend {
    /// Of `size` bytes.
    ///
    /// # Errors
    /// [`NullError`].
    pub fn new(size: u64, block_size: u32) -> Result<Self, NullError> {
        if !matches!(block_size, 512 | 4096) {
            return Err(NullError::BlockSize(block_size));
        }
        if size == 0 {
            return Err(NullError::Empty);
        }
        if !size.is_multiple_of(u64::from(block_size)) {
            return Err(NullError::Size { size, block_size });
        }
        Ok(Self {
            geometry: Geometry {
                block_size,
                block_count: size / u64::from(block_size),
                read_only: false,
                deallocate: true,
                deallocated_reads_zeroes: true,
                volatile_cache: false,
            },
            counters: Counters::default(),
        })
    }
}

impl Backend for NullBackend {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn submit(&self, io: &mut BackendIo, op: BackendOp, token: u32) {
        let counters = &self.counters;
        if let Err(status) = op.check(&self.geometry) {
            counters.count_error();
            return io.finish(token, op.into_transfer(), Err(status));
        }
        let transfer = match op {
            BackendOp::Read { mut sink, .. } => {
                let len = sink.len();
                let filled = sink.fill(0..len, 0);
                debug_assert!(filled.is_ok(), "the range is all of the sink");
                counters.count_read(len as u64);
                Transfer::In(sink)
            }
            BackendOp::Write { source, fua, .. } => {
                counters.count_write(source.len() as u64, fua);
                Transfer::Out(source)
            }
            BackendOp::Flush => {
                counters.count_flush();
                Transfer::None
            }
            BackendOp::WriteZeroes { .. } => {
                counters.count_write_zeroes();
                Transfer::None
            }
            BackendOp::Deallocate { .. } => {
                counters.count_deallocate();
                Transfer::None
            }
        };
        io.finish(token, transfer, Ok(()));
    }

    fn source(&self, offset: u64, len: usize, list: &mut Vec<Segment>) -> Option<MemSource> {
        self.geometry
            .contains(offset, len as u64)
            .then(|| MemSource::zeroes(len, std::mem::take(list)))
    }
}

#[cfg(test)]
mod tests {
    use memdesc::MemSink;

    use super::super::{Done, Engine};
    use super::*;
    use crate::spec::Status;

    const SIZE: u64 = 1 << 40;

    fn perform(op: BackendOp) -> Done {
        let backend = NullBackend::new(SIZE, 512).unwrap();
        let mut io = BackendIo::new(Engine::Auto);
        backend.submit(&mut io, op, 7);
        assert!(io.descriptor().is_none(), "no engine is made");
        let done = io.done().unwrap();
        assert_eq!((done.token, io.in_flight()), (7, 0));
        done
    }

    #[test]
    fn reads_are_zeroes_whatever_was_in_the_memory() {
        let sink = MemSink::from_bytes(vec![0xa5; 4096]);
        let offset = SIZE - 4096;
        let done = perform(BackendOp::Read { offset, sink });
        assert_eq!(done.result, Ok(()));
        let Transfer::In(sink) = done.transfer else {
            panic!("a read gives its sink back");
        };
        assert_eq!(sink.into_parts().1.unwrap(), [0; 4096]);
    }

    #[test]
    fn what_is_outside_is_refused_and_its_memory_comes_back() {
        let offset = SIZE - 512;
        let sink = MemSink::from_bytes(vec![0xa5; 1024]);
        let done = perform(BackendOp::Read { offset, sink });
        assert_eq!(done.result, Err(Status::LBA_OUT_OF_RANGE.do_not_retry()));
        assert_eq!(done.transfer.len(), 1024);
        let source = MemSource::from_bytes(vec![1; 1024]);
        let fua = false;
        let done = perform(BackendOp::Write {
            offset,
            source,
            fua,
        });
        assert_eq!(done.result, Err(Status::LBA_OUT_OF_RANGE.do_not_retry()));
        assert_eq!(done.transfer.len(), 1024);
    }

    #[test]
    fn a_size_is_a_whole_number_of_blocks() {
        let size = 4096 + 512;
        assert!(NullBackend::new(size, 512).is_ok());
        assert!(NullBackend::new(size, 4096).is_err());
        assert!(NullBackend::new(0, 512).is_err());
    }
}
