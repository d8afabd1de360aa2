//! Saving and loading the device's state through a descriptor that the front-end gives.
//!
//! The front-end hands over one end of a pipe, works on the other until it is closed, and then asks whether that
//! went well. So bytes move in a thread of their own: it ends with the bytes, with the next transfer or with the
//! session, and nobody waits for it longer than [`CHECK_LIMIT`].

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::retry_on_intr;
use vhost::vhost_user::Result as VhostResult;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures,
};

use super::{FrontEnd, refuse};
use crate::device_state::DeviceState;
use crate::queue::QueueUpdate;

/// How long a front-end that asks for the result of a transfer is kept waiting: it has closed its end by then.
const CHECK_LIMIT: Duration = Duration::from_secs(2);
/// Most bytes that are read of a state.
const MOST: usize = 4096;

/// Bytes on their way.
#[derive(Debug)]
pub(super) struct Transfer {
    direction: VhostTransferStateDirection,
    /// Ends the thread when it is written to.
    end: OwnedFd,
    /// What was read, nothing when something was written.
    result: Receiver<io::Result<Vec<u8>>>,
}

impl Transfer {
    fn start(
        direction: VhostTransferStateDirection,
        file: File,
        state: Vec<u8>,
    ) -> io::Result<Self> {
        let end = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let ended = end.try_clone()?;
        let (done, result) = channel();
        std::thread::Builder::new()
            .name("device-state".to_owned())
            .spawn(move || {
                let moved = match direction {
                    VhostTransferStateDirection::SAVE => write(file, &ended, &state),
                    VhostTransferStateDirection::LOAD => read(file, &ended),
                };
                // Nobody may be interested any more.
                let _ = done.send(moved);
            })?;
        Ok(Self {
            direction,
            end,
            result,
        })
    }

    /// What became of it, once the front-end has done its part.
    fn finish(&self) -> io::Result<Vec<u8>> {
        match self.result.recv_timeout(CHECK_LIMIT) {
            Ok(moved) => moved,
            Err(RecvTimeoutError::Timeout) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the other end is still open after {CHECK_LIMIT:?}"),
            )),
            Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("its thread is gone")),
        }
    }
}

impl Transfer {
    /// Has the thread end, if the descriptor lets it.
    fn cancel(&self) {
        // A counter that is not at its limit takes one more.
        let _ = rustix::io::write(&self.end, &1_u64.to_ne_bytes());
    }

    /// True when the thread does not end though it was told to.
    fn is_stuck(&self) -> bool {
        self.cancel();
        let result = self.result.recv_timeout(CHECK_LIMIT);
        matches!(result, Err(RecvTimeoutError::Timeout))
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Waits until `file` can be read or written, or has failed.
fn wait(file: &File, events: PollFlags, end: &OwnedFd) -> io::Result<()> {
    let mut descriptors = [PollFd::new(file, events), PollFd::new(end, PollFlags::IN)];
    retry_on_intr(|| poll(&mut descriptors, None))?;
    match descriptors[1].revents().is_empty() {
        true => Ok(()),
        false => Err(io::ErrorKind::Interrupted.into()),
    }
}

/// True for errors after which the descriptor is to be waited for again.
fn passes(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

fn write(mut file: File, end: &OwnedFd, mut bytes: &[u8]) -> io::Result<Vec<u8>> {
    while !bytes.is_empty() {
        wait(&file, PollFlags::OUT, end)?;
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if passes(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Vec::new())
}

fn read(mut file: File, end: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; MOST + 1];
    let mut len = 0;
    loop {
        wait(&file, PollFlags::IN, end)?;
        match file.read(&mut bytes[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if passes(&error) => {}
            Err(error) => return Err(error),
        }
        if len > MOST {
            return Err(io::Error::other(format!("it has more than {MOST} bytes")));
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}

impl FrontEnd {
    /// Begins to save or to load the state.
    pub(super) fn begin_transfer(
        &mut self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        file: File,
    ) -> VhostResult<()> {
        let VhostTransferStatePhase::STOPPED = phase;
        let begun = self.transfer_of(direction, file);
        // The library answers, and keeps the reason to itself.
        begun.map_err(|reason| {
            self.complain(&format!("cannot {}: {reason}", verb(direction)));
            refuse(reason)
        })
    }

    fn transfer_of(
        &mut self,
        direction: VhostTransferStateDirection,
        file: File,
    ) -> Result<(), String> {
        if self.protocol_features & VhostUserProtocolFeatures::DEVICE_STATE.bits() == 0 {
            return Err("the feature was not negotiated".to_owned());
        }
        if let Some(running) = self.vrings.iter().position(|vring| vring.running) {
            return Err(format!("ring {running} is running"));
        }
        // One at a time: whoever plays tricks with a descriptor has one thread, not many.
        if self.transfer.as_ref().is_some_and(Transfer::is_stuck) {
            return Err("the transfer before has not ended".to_owned());
        }
        if direction == VhostTransferStateDirection::SAVE {
            // Whoever loads it goes on with the disk.
            self.settle();
        }
        let state = DeviceState::of(&self.device, self.writeback).to_bytes();
        let transfer = Transfer::start(direction, file, state.to_vec());
        self.transfer = Some(transfer.map_err(|error| error.to_string())?);
        Ok(())
    }

    /// Says whether the transfer went well, and puts a state that was loaded in force.
    pub(super) fn end_transfer(&mut self) -> VhostResult<()> {
        let ended = self.transfer.take().map(|transfer| {
            let moved = transfer.finish();
            let late = matches!(&moved, Err(error) if error.kind() == io::ErrorKind::TimedOut);
            let direction = transfer.direction;
            if late {
                transfer.cancel();
                self.transfer = Some(transfer);
            }
            match (direction, moved) {
                (_, Err(error)) => Err(format!("cannot {}: {error}", verb(direction))),
                (VhostTransferStateDirection::SAVE, Ok(_)) => Ok(()),
                (VhostTransferStateDirection::LOAD, Ok(bytes)) => self
                    .load(&bytes)
                    .map_err(|reason| format!("it does not belong to this disk: {reason}")),
            }
        });
        let ended = ended.unwrap_or_else(|| Err("none was transferred".to_owned()));
        ended.map_err(|reason| {
            self.complain(&reason);
            refuse(reason)
        })
    }

    fn load(&mut self, bytes: &[u8]) -> Result<(), crate::device_state::StateError> {
        let Some(saved) = DeviceState::parse(bytes)? else {
            return Ok(());
        };
        let here = DeviceState::of(&self.device, self.writeback);
        saved.check(&here)?;
        self.set_cache_mode(saved.writeback);
        self.update_all(&QueueUpdate::WriteThrough(self.write_through()));
        if saved.capacity != here.capacity {
            // The guest has seen the disk when it was smaller.
            self.device.set_capacity(here.capacity);
        }
        Ok(())
    }

    fn complain(&self, reason: &str) {
        if self.complaints.allow() {
            tracing::error!(reason, "the device's state is refused");
        }
    }
}

fn verb(direction: VhostTransferStateDirection) -> &'static str {
    match direction {
        VhostTransferStateDirection::SAVE => "save it",
        VhostTransferStateDirection::LOAD => "load it",
    }
}
