//! A queue against a driver that behaves, and against drivers that do not.

use super::*;
use crate::guest::{
    Desc, Guest, INDIRECT, NEXT, SIZE, WRITE, header, into, options, out, raised, signal, take,
    take_broken, take_nothing,
};

mod broken;
mod crashes;
mod hostile_region;
mod lifetimes;
mod notifications;
mod recovery;
mod requests;

const READ: u32 = 0;
const WRITE_TO_DISK: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const HEADER_AT: u64 = 0x4000;
const DATA_AT: u64 = 0x6000;
const STATUS_AT: u64 = 0x5000;
const UNTOUCHED: u8 = 0xaa;

fn queue_with(guest: &Guest, change: impl FnOnce(&mut QueueSetup)) -> Queue {
    let mut setup = Guest::setup(&Device::new(options()), &guest.map);
    change(&mut setup);
    Queue::new(setup).expect("valid ring")
}

/// Posts a request in the usual three parts.
fn post(guest: &mut Guest, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> u16 {
    guest.write(HEADER_AT, &header(kind, sector));
    guest.write(STATUS_AT, &[UNTOUCHED]);
    let mut buffers = vec![out(HEADER_AT, 16)];
    buffers.extend(data);
    buffers.push(into(STATUS_AT, 1));
    guest.post(&buffers)
}

#[test]
fn flags_of_this_file_are_those_of_virtio() {
    use virtio_bindings::bindings::virtio_ring::{
        VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    };
    let flags = [NEXT, WRITE, INDIRECT].map(u32::from);
    assert_eq!(
        flags,
        [VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT]
    );
}
