//! The two system calls of the data path: one that sends vectors, one that receives into them.

#![expect(unsafe_code, reason = "sendmsg and readv take raw vectors")]

use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use memdesc::{MemSink, MemSource};

/// Vectors that one call takes: below IOV_MAX (1024).
pub(super) const MAX_VECTORS: usize = 1000;

/// Storage for vectors, kept between calls so that none allocates.
#[derive(Debug, Default)]
pub(super) struct Storage(Vec<libc::iovec>);

// SAFETY: the vectors are meaningful only while a `Gather` or `Scatter` borrows the storage; both
// empty it first.
unsafe impl Send for Storage {}

/// Memory to send, in order.
pub(super) struct Gather<'a> {
    list: &'a mut Vec<libc::iovec>,
    len: usize,
    memory: PhantomData<&'a [u8]>,
}

/// Memory to receive into, in order.
pub(super) struct Scatter<'a> {
    list: &'a mut Vec<libc::iovec>,
    len: usize,
    memory: PhantomData<&'a mut [u8]>,
}

impl Storage {
    pub(super) fn gather(&mut self) -> Gather<'_> {
        self.0.clear();
        Gather {
            list: &mut self.0,
            len: 0,
            memory: PhantomData,
        }
    }

    pub(super) fn scatter(&mut self) -> Scatter<'_> {
        self.0.clear();
        Scatter {
            list: &mut self.0,
            len: 0,
            memory: PhantomData,
        }
    }
}

impl<'a> Gather<'a> {
    /// Bytes gathered.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Vectors that still fit.
    pub(super) fn room(&self) -> usize {
        MAX_VECTORS.saturating_sub(self.list.len())
    }

    pub(super) fn bytes(&mut self, bytes: &'a [u8]) {
        if !bytes.is_empty() {
            let base = bytes.as_ptr().cast_mut().cast();
            self.list.push(libc::iovec {
                iov_base: base,
                iov_len: bytes.len(),
            });
            self.len += bytes.len();
        }
    }

    /// Adds a range of a source; false when not all of it fitted.
    pub(super) fn source(&mut self, source: &'a MemSource, range: Range<usize>) -> bool {
        let wanted = range.len();
        let covered = source.iovecs(range, self.room(), self.list).unwrap_or(0);
        self.len += covered;
        covered == wanted
    }

    /// Sends; returns how many bytes the kernel took.
    pub(super) fn send(self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: all-zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.list.as_mut_ptr();
        message.msg_iovlen = self.list.len() as _;
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: every vector describes memory borrowed for `'a`, readable until the call returns:
        // slices by their lifetime, segments by the promise made in `Segment::new`.
        let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &message, flags) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// The first `most` bytes, as a simulated kernel takes them.
    #[cfg(feature = "sim")]
    pub(super) fn copy(self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; most.min(self.len)];
        let mut at = 0;
        for vector in self.list {
            let take = vector.iov_len.min(bytes.len() - at);
            // SAFETY: as in `send`, every vector describes readable memory; `bytes` is private and has
            // room for `take` bytes from `at` on.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    vector.iov_base.cast::<u8>(),
                    bytes.as_mut_ptr().add(at),
                    take,
                );
            }
            at += take;
        }
        bytes
    }
}

impl<'a> Scatter<'a> {
    /// Bytes of room.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn bytes(&mut self, bytes: &'a mut [u8]) {
        self.list.push(libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        });
        self.len += bytes.len();
    }

    /// Adds a range of a sink; false when not all of it fitted.
    pub(super) fn sink(&mut self, sink: &'a mut MemSink, range: Range<usize>) -> bool {
        let wanted = range.len();
        let room = MAX_VECTORS.saturating_sub(self.list.len() + 1);
        let covered = sink.iovecs(range, room, self.list).unwrap_or(0);
        self.len += covered;
        covered == wanted
    }

    /// Receives; returns how many bytes were written, 0 at the end of the stream.
    pub(super) fn receive(self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: every vector describes memory borrowed mutably for `'a`, writable until the call
        // returns: slices by their lifetime, segments by the promise made in `Segment::new`. The
        // socket is non-blocking.
        let received =
            unsafe { libc::readv(fd.as_raw_fd(), self.list.as_ptr(), self.list.len() as _) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// Places bytes as a simulated kernel does; returns how many found room.
    #[cfg(feature = "sim")]
    pub(super) fn place(self, bytes: &[u8]) -> usize {
        let mut at = 0;
        for vector in self.list {
            let take = vector.iov_len.min(bytes.len() - at);
            // SAFETY: as in `receive`, every vector describes writable memory; `bytes` has `take` more
            // from `at` on, and is private, so the two cannot overlap.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    bytes.as_ptr().add(at),
                    vector.iov_base.cast::<u8>(),
                    take,
                );
            }
            at += take;
        }
        at
    }
}
