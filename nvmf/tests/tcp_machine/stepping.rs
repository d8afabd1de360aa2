//! Steps a machine without a socket: what it sends as bytes, and bytes fed to it in pieces.

use nvmf::tcp::{FatalError, QPair, Role, TxPayload, TxPdu, Want, crc32c};

/// One PDU as it travels, payload taken from `data(slot)`.
pub(crate) fn on_the_wire(pdu: &TxPdu, data: impl Fn(u16) -> Vec<u8>) -> Vec<u8> {
    let mut bytes = pdu.header().to_vec();
    if let Some(TxPayload { slot, offset, len }) = pdu.payload {
        let payload = &data(slot)[offset as usize..(offset + len) as usize];
        bytes.extend_from_slice(payload);
        if pdu.data_digest {
            bytes.extend_from_slice(&crc32c(0, payload).to_le_bytes());
        }
    }
    assert_eq!(bytes.len(), pdu.wire_len());
    bytes
}

/// What a machine sends, payload taken from `data(slot)`.
pub(crate) fn sent<R: Role>(machine: &mut QPair<R>, data: impl Fn(u16) -> Vec<u8>) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(pdu) = machine.transmit() {
        bytes.extend_from_slice(&on_the_wire(&pdu, &data));
        if let Some(payload) = pdu.payload {
            machine.transmitted(payload);
        }
    }
    bytes
}

/// Feeds a stream in pieces; payload goes to `place(slot, offset, bytes)`. `seen` is called when the
/// machine waits for its events to be taken.
pub(crate) fn feed_pieces<'a, R: Role>(
    machine: &mut QPair<R>,
    pieces: impl IntoIterator<Item = &'a [u8]>,
    mut seen: impl FnMut(&mut QPair<R>),
    mut place: impl FnMut(u16, u32, &[u8]),
) -> Result<(), FatalError> {
    let mut crc = 0;
    for mut bytes in pieces {
        while !bytes.is_empty() {
            let used = match machine.want() {
                Want::Header(_) => {
                    crc = 0;
                    machine.feed(bytes)?
                }
                Want::Payload { slot, offset, len } => {
                    let take = bytes.len().min(len as usize);
                    crc = crc32c(crc, &bytes[..take]);
                    place(slot, offset, &bytes[..take]);
                    machine.payload_moved(take as u32);
                    take
                }
                Want::Discard(len) => {
                    let take = bytes.len().min(len as usize);
                    machine.payload_moved(take as u32);
                    take
                }
                Want::DataDigest(_) => machine.digest(bytes, crc),
                Want::Consumer => {
                    seen(machine);
                    0
                }
                Want::Nothing => return Ok(()),
            };
            bytes = &bytes[used..];
        }
    }
    Ok(())
}

/// Feeds a stream cut into `chunk` bytes.
pub(crate) fn feed<R: Role>(
    machine: &mut QPair<R>,
    stream: &[u8],
    chunk: usize,
    seen: impl FnMut(&mut QPair<R>),
    place: impl FnMut(u16, u32, &[u8]),
) -> Result<(), FatalError> {
    feed_pieces(machine, stream.chunks(chunk), seen, place)
}

/// Bytes that differ from those a few places on.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 256) as u8).collect()
}
