//! The limit: a plain relay of the bridge's shape, without NVMe and without virtio.
//!
//! Two processes besides the bench: the relay, between the hop and a TCP connection, and the responder behind that
//! connection. Each direction carries as many bytes as NVMe/TCP would: a 72-byte command; in front of data, in either
//! direction, a header of 24 bytes, except for the data of a write of at most 8 KiB, which follows its command as it is;
//! 24 bytes for the answer to a write, and 24 more where a controller would have sent R2T. A read needs no answer
//! besides its data.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{SendFlags, send};
use vm_memory::{ReadVolatile as _, WriteVolatile as _};

use crate::bell::Bell;
use crate::hop::{Answering, Asked, buffer};
use crate::link::{MAX_DEPTH, MAX_LEN};
use crate::memory::Memory;

const COMMAND: usize = 72;
const HEADER: usize = 24;
const IN_CAPSULE: usize = 8192;
/// Up to here a copy costs less than a system call of its own would.
const STAGED: usize = 16 << 10;
const STAGING: usize = 64 << 10;
/// Bytes that are sent and still kept, at most.
const SENT_MOST: usize = 1 << 20;

const KICK: u64 = 0;
const SOCKET: u64 = 1;

/// Bytes that follow the command of a write.
const fn after_command(len: usize) -> usize {
    if len <= IN_CAPSULE { len } else { HEADER + len }
}

/// Bytes that answer a request; the data of a read follows its header.
const fn answer_len(write: bool, len: usize) -> usize {
    match (write, len <= IN_CAPSULE) {
        (false, _) => HEADER + len,
        (true, true) => HEADER,
        (true, false) => 2 * HEADER,
    }
}

/// What a command or an answer begins with.
fn encode(asked: Asked) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[0] = asked.slot as u8;
    bytes[1] = u8::from(asked.write);
    bytes[4..].copy_from_slice(&(asked.len as u32).to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Result<Asked> {
    let asked = Asked {
        slot: usize::from(bytes[0]),
        write: bytes[1] != 0,
        len: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize,
    };
    ensure!(asked.slot < MAX_DEPTH && asked.len <= MAX_LEN, "{asked:?}");
    Ok(asked)
}

/// Runs the relay: standard input is the hop's kick, standard output its call.
///
/// # Errors
/// An end has gone.
pub(crate) fn relay(memory: &Path, responder: SocketAddr) -> Result<()> {
    let kick = io::stdin().as_fd().try_clone_to_owned()?;
    let call = io::stdout().as_fd().try_clone_to_owned()?;
    let socket = TcpStream::connect(responder).context("no responder")?;
    socket.set_nodelay(true)?;
    socket.set_nonblocking(true)?;
    let bell = Bell::new()?;
    bell.add(&kick, false, KICK)?;
    bell.add(&socket, true, SOCKET)?;
    let mut sending = Sending::default();
    let mut receiving = Receiving::default();
    let mut hop = Answering::new(Memory::open(memory)?, call);
    loop {
        while let Some(asked) = hop.asked() {
            sending.queue(asked, hop.memory());
        }
        sending.send(&socket, hop.memory())?;
        receiving.receive(&socket, &mut hop)?;
        hop.publish()?;
        if hop.arm() {
            bell.wait(None, |which| {
                receiving.readable |= which == SOCKET;
            })
            .or_else(|error| match error.kind() {
                ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            })?;
        }
    }
}

/// What is still to be sent, in this order: staged bytes, then the payload of a slot, then staged bytes again.
#[derive(Default)]
struct Sending {
    staged: Vec<u8>,
    sent: usize,
    parts: VecDeque<Part>,
}

enum Part {
    /// So many staged bytes.
    Staged(usize),
    /// So many bytes at an offset of the memory.
    Payload(usize, usize),
}

impl Sending {
    fn queue(&mut self, asked: Asked, memory: &Memory) {
        let start = self.staged.len();
        self.staged.extend_from_slice(&encode(asked));
        let mut staged = COMMAND;
        if asked.write {
            staged += after_command(asked.len) - asked.len;
        }
        let direct = asked.write && asked.len > STAGED;
        if asked.write && !direct {
            let data = start + staged;
            staged += asked.len;
            self.staged.resize(start + staged, 0);
            memory.read(buffer(asked.slot), &mut self.staged[data..]);
        }
        self.staged.resize(start + staged, 0);
        match self.parts.back_mut() {
            Some(Part::Staged(len)) => *len += staged,
            _ => self.parts.push_back(Part::Staged(staged)),
        }
        if direct {
            let payload = Part::Payload(buffer(asked.slot), asked.len);
            self.parts.push_back(payload);
        }
    }

    fn send(&mut self, socket: &TcpStream, memory: &Memory) -> Result<()> {
        loop {
            let more = self.parts.len() > 1;
            let Some(part) = self.parts.front_mut() else {
                break;
            };
            let wanted = match part {
                Part::Staged(len) | Part::Payload(_, len) => *len,
            };
            let result = match *part {
                Part::Staged(len) => {
                    let flags = if more {
                        SendFlags::MORE
                    } else {
                        SendFlags::empty()
                    };
                    let bytes = &self.staged[self.sent..self.sent + len];
                    send(socket, bytes, flags | SendFlags::NOSIGNAL).map_err(io::Error::from)
                }
                Part::Payload(at, len) => (&mut &*socket)
                    .write_volatile(&memory.slice(at, len))
                    .map_err(volatile),
            };
            let count = match result {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("sending"),
            };
            match part {
                Part::Staged(len) => {
                    *len -= count;
                    self.sent += count;
                }
                Part::Payload(at, len) => {
                    *len -= count;
                    *at += count;
                }
            }
            if count == wanted {
                self.parts.pop_front();
            }
        }
        if self.sent == self.staged.len() || self.sent > SENT_MOST {
            self.staged.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }
}

/// What is being received.
struct Receiving {
    readable: bool,
    staging: Vec<u8>,
    /// Bytes of `staging` that are received and not looked at yet.
    held: std::ops::Range<usize>,
    /// A slot, where the next byte of its data belongs, and how many are missing.
    data: Option<(usize, usize, usize)>,
}

impl Default for Receiving {
    fn default() -> Self {
        Self {
            readable: false,
            staging: vec![0; STAGING],
            held: 0..0,
            data: None,
        }
    }
}

impl Receiving {
    fn receive(&mut self, socket: &TcpStream, hop: &mut Answering) -> Result<()> {
        while self.readable {
            let (wanted, result) = match self.data {
                Some((_, at, missing)) if missing > STAGED && self.held.is_empty() => {
                    let mut slice = hop.memory().slice(at, missing);
                    let result = (&mut &*socket).read_volatile(&mut slice).map_err(volatile);
                    (missing, result)
                }
                _ => {
                    self.staging.copy_within(self.held.clone(), 0);
                    self.held = 0..self.held.len();
                    let space = &mut self.staging[self.held.end..];
                    (space.len(), (&mut &*socket).read(space))
                }
            };
            let count = match result {
                Ok(0) => bail!("the responder has gone"),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error).context("receiving"),
            };
            // Whoever got less than was asked for has it all; the edge tells of more.
            self.readable = count == wanted;
            match &mut self.data {
                Some((slot, at, missing)) if *missing > STAGED && self.held.is_empty() => {
                    *at += count;
                    *missing -= count;
                    if *missing == 0 {
                        hop.answer(*slot);
                        self.data = None;
                    }
                }
                _ => self.held.end += count,
            }
            self.look(hop)?;
        }
        Ok(())
    }

    fn look(&mut self, hop: &mut Answering) -> Result<()> {
        loop {
            if let Some((slot, at, missing)) = &mut self.data {
                let count = self.held.len().min(*missing);
                let bytes = &self.staging[self.held.start..self.held.start + count];
                hop.memory().write(*at, bytes);
                self.held.start += count;
                *at += count;
                *missing -= count;
                if *missing != 0 {
                    return Ok(());
                }
                hop.answer(*slot);
                self.data = None;
            }
            if self.held.len() < HEADER {
                return Ok(());
            }
            let asked = decode(&self.staging[self.held.start..])?;
            let header =
                answer_len(asked.write, asked.len) - if asked.write { 0 } else { asked.len };
            if self.held.len() < header {
                return Ok(());
            }
            self.held.start += header;
            if asked.write {
                hop.answer(asked.slot);
            } else {
                self.data = Some((asked.slot, buffer(asked.slot), asked.len));
            }
        }
    }
}

/// Runs the responder: prints its address, takes one connection, and ends with it.
///
/// # Errors
/// The connection broke.
pub(crate) fn responder() -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let mut out = io::stdout();
    writeln!(out, "{}", listener.local_addr()?)?;
    out.flush()?;
    let (socket, _) = listener.accept()?;
    socket.set_nodelay(true)?;
    respond(&socket)
}

fn respond(mut socket: &TcpStream) -> Result<()> {
    let data = vec![0x5a; MAX_LEN];
    let mut staging = vec![0; 256 << 10];
    let mut held = 0..0;
    // Bytes of a write that are still to come, and its answer.
    let mut skip = 0;
    let mut pending: Option<Asked> = None;
    let mut answers: Vec<Asked> = Vec::new();
    loop {
        staging.copy_within(held.clone(), 0);
        held = 0..held.len();
        match socket.read(&mut staging[held.end..])? {
            0 => return Ok(()),
            count => held.end += count,
        }
        loop {
            let count = held.len().min(skip);
            held.start += count;
            skip -= count;
            if skip == 0 {
                answers.extend(pending.take());
            }
            if skip != 0 || held.len() < COMMAND {
                break;
            }
            let asked = decode(&staging[held.start..])?;
            held.start += COMMAND;
            skip = if asked.write {
                after_command(asked.len)
            } else {
                0
            };
            pending = Some(asked);
        }
        write_answers(socket, &answers, &data)?;
        answers.clear();
    }
}

/// Sends all answers with as few system calls as there can be.
fn write_answers(mut socket: &TcpStream, answers: &[Asked], data: &[u8]) -> Result<()> {
    for answers in answers.chunks(128) {
        let mut headers = [[0; 2 * HEADER]; 128];
        for (asked, header) in answers.iter().zip(&mut headers) {
            header[..8].copy_from_slice(&encode(*asked));
        }
        let mut slices = Vec::with_capacity(2 * answers.len());
        for (asked, header) in answers.iter().zip(&headers) {
            let payload = if asked.write { 0 } else { asked.len };
            let header_len = answer_len(asked.write, asked.len) - payload;
            slices.push(IoSlice::new(&header[..header_len]));
            slices.push(IoSlice::new(&data[..payload]));
        }
        let mut rest = &mut slices[..];
        while rest.iter().any(|slice| !slice.is_empty()) {
            let count = socket.write_vectored(rest)?;
            ensure!(count > 0, "the relay has gone");
            IoSlice::advance_slices(&mut rest, count);
        }
    }
    Ok(())
}

fn volatile(error: vm_memory::VolatileMemoryError) -> io::Error {
    match error {
        vm_memory::VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_relay_carries_as_many_bytes_as_nvme_tcp() {
        assert_eq!(answer_len(false, 4096), 24 + 4096);
        assert_eq!(answer_len(true, 4096), 24);
        assert_eq!(after_command(4096), 4096);
        assert_eq!(answer_len(true, 131_072), 48);
        assert_eq!(after_command(131_072), 24 + 131_072);
    }

    #[test]
    fn a_request_survives_its_encoding() {
        let asked = Asked {
            slot: 127,
            write: true,
            len: MAX_LEN,
        };
        assert_eq!(decode(&encode(asked)).expect("valid"), asked);
        assert!(decode(&[128, 0, 0, 0, 0, 0, 0, 0]).is_err());
    }
}
