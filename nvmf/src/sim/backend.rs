//! The simulated media as a backend of a target lane.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::media::Work;
use crate::backend::{Backend, BackendIo, BackendOp, Counters, Done, Geometry};
use crate::spec::Status;
use crate::transport::Transfer;

#[derive(Default)]
struct State {
    /// Handed in, and not seen by the world.
    submitted: VecDeque<(u32, Work)>,
    /// The memory of what is in work.
    transfers: BTreeMap<u32, Transfer>,
    done: VecDeque<Done>,
    violation: Option<String>,
}

/// What a lane has in work, shared with the world.
#[derive(Clone, Default)]
pub(crate) struct Mailbox(Arc<Mutex<State>>);

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next operation that is done.
    pub(crate) fn take(&self) -> Option<Done> {
        self.lock().done.pop_front()
    }

    /// Operations whose end was not taken.
    pub(crate) fn in_flight(&self) -> usize {
        let state = self.lock();
        state.transfers.len() + state.done.len()
    }

    /// A descriptor would say that something is done.
    pub(super) fn is_news(&self) -> bool {
        !self.lock().done.is_empty()
    }

    /// The next operation for the media.
    pub(super) fn next(&self) -> Option<(u32, Work)> {
        self.lock().submitted.pop_front()
    }

    /// An operation is over.
    pub(super) fn finish(&self, token: u32, result: Result<Vec<u8>, Status>) -> Result<(), String> {
        let mut state = self.lock();
        let transfer = state.transfers.remove(&token);
        let mut transfer = transfer.ok_or("an operation ended that was not in work")?;
        if let (Transfer::In(sink), Ok(bytes)) = (&mut transfer, &result) {
            sink.copy_from(0, bytes)
                .map_err(|error| error.to_string())?;
        }
        let result = result.map(drop);
        state.done.push_back(Done {
            token,
            transfer,
            result,
        });
        Ok(())
    }

    /// What went wrong.
    pub(super) fn take_violation(&self) -> Option<String> {
        self.lock().violation.take()
    }
}

/// See the module.
pub(super) struct SimulatedBackend {
    pub(super) mailbox: Mailbox,
    pub(super) geometry: Geometry,
    pub(super) counters: Counters,
}

impl SimulatedBackend {
    fn blocks(&self, offset: u64, len: u64) -> (u64, u32) {
        let size = u64::from(self.geometry.block_size);
        (offset / size, (len / size) as u32)
    }
}

impl Backend for SimulatedBackend {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn submit(&self, io: &mut BackendIo, op: BackendOp, token: u32) {
        io.simulate(&self.mailbox);
        let (work, transfer) = match op {
            BackendOp::Read { offset, sink } => {
                let (lba, count) = self.blocks(offset, sink.len() as u64);
                (Work::Read { lba, count }, Transfer::In(sink))
            }
            BackendOp::Write {
                offset,
                source,
                fua,
            } => {
                let mut data = vec![0; source.len()];
                let copied = source.copy_to(0, &mut data);
                debug_assert!(copied.is_ok(), "the source has this length");
                let lba = self.blocks(offset, 0).0;
                (Work::Write { lba, data, fua }, Transfer::Out(source))
            }
            BackendOp::WriteZeroes {
                offset, len, fua, ..
            } => {
                let (lba, count) = self.blocks(offset, len);
                (Work::Zeroes { lba, count, fua }, Transfer::None)
            }
            BackendOp::Flush => (Work::Flush, Transfer::None),
            // A hint, and nobody gives it.
            BackendOp::Deallocate { .. } => {
                return io.finish(token, Transfer::None, Err(Status::INVALID_OPCODE));
            }
        };
        let mut state = self.mailbox.lock();
        if state.transfers.insert(token, transfer).is_some() {
            let what = format!("token {token} was given to two operations at a time");
            state.violation.get_or_insert(what);
        }
        state.submitted.push_back((token, work));
    }
}
