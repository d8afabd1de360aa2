//! Another socket in the place of one that the message library owns.

#![expect(
    unsafe_code,
    reason = "the library has no way to be given another socket than its first"
)]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::io::{DupFlags, dup3};

/// Has the descriptor of `owner` refer to the same socket as `socket`. What it referred to before is closed.
pub(super) fn replace(owner: &impl AsRawFd, socket: impl AsFd) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `owner` is borrowed, and it is not closed here: the value is
    // never dropped. Its owner finds it open as before, by the same number.
    let descriptor = unsafe { OwnedFd::from_raw_fd(owner.as_raw_fd()) };
    let mut descriptor = ManuallyDrop::new(descriptor);
    Ok(dup3(socket, &mut descriptor, DupFlags::CLOEXEC)?)
}
