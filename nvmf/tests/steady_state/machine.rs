//! The machine by itself, both roles, its bytes going from one to the other through one buffer.

use nvmf::spec::{Cqe, Sqe};
use nvmf::tcp::{
    Controller, ControllerEvent, Digests, Direction, Host, Limits, QPair, Role, Want, crc32c,
};

use crate::{COUNTED, COUNTED_LARGE, LARGE, QUEUE_SIZE, SMALL, WARM_UP, counting};

fn limits(digests: Digests) -> Limits {
    Limits {
        rx_align: 4,
        tx_align: 4,
        max_h2c_data: 32 * 1024,
        max_r2t: 2,
        in_capsule_limit: 8192,
        digests,
        admin: false,
    }
}

/// Puts what a machine sends into `wire`; all payload is the same.
fn transmit<R: Role>(machine: &mut QPair<R>, payload: &[u8], wire: &mut Vec<u8>) {
    while let Some(pdu) = machine.transmit() {
        wire.extend_from_slice(pdu.header());
        if let Some(part) = pdu.payload {
            let bytes = &payload[..part.len as usize];
            wire.extend_from_slice(bytes);
            if pdu.data_digest {
                wire.extend_from_slice(&crc32c(0, bytes).to_le_bytes());
            }
            machine.transmitted(part);
        }
    }
}

/// Feeds what is in `wire`; `seen` takes the events that are waited for.
fn feed<R: Role>(machine: &mut QPair<R>, wire: &mut Vec<u8>, mut seen: impl FnMut(&mut QPair<R>)) {
    let (mut at, mut crc) = (0, 0);
    while at < wire.len() {
        let bytes = &wire[at..];
        at += match machine.want() {
            Want::Header(_) => {
                crc = 0;
                machine.feed(bytes).unwrap()
            }
            Want::Payload { len, .. } | Want::Discard(len) => {
                let take = bytes.len().min(len as usize);
                crc = crc32c(crc, &bytes[..take]);
                machine.payload_moved(take as u32);
                take
            }
            Want::DataDigest(_) => machine.digest(bytes, crc),
            Want::Consumer => {
                seen(machine);
                0
            }
            Want::Nothing => panic!("over"),
        };
    }
    seen(machine);
    wire.clear();
}

/// A controller that takes every write and answers every read.
fn serve(controller: &mut QPair<Controller>) {
    while let Some(event) = controller.event() {
        match event {
            ControllerEvent::Command {
                slot,
                sqe,
                data_len,
                in_capsule,
            } => match sqe.opcode {
                1 if in_capsule => {}
                1 => controller.fetch(slot, 0, data_len).unwrap(),
                _ => {
                    controller.send(slot, 0, data_len, true).unwrap();
                    controller.respond(slot, Cqe::default());
                }
            },
            ControllerEvent::Fetched { slot, intact } => {
                assert!(intact);
                controller.respond(slot, Cqe::default());
            }
        }
    }
}

struct Pair {
    host: QPair<Host>,
    controller: QPair<Controller>,
    wire: Vec<u8>,
    payload: Vec<u8>,
}

impl Pair {
    fn run(&mut self, writing: bool, len: usize, count: usize) {
        let (mut begun, mut ended) = (0, 0);
        while ended < count {
            while begun < count && self.host.room() > 0 {
                let (sqe, direction) = if writing {
                    (Sqe::write(1, 0, 8, false), Direction::Out)
                } else {
                    (Sqe::read(1, 0, 8), Direction::In)
                };
                self.host.submit(sqe, direction, len as u32).unwrap();
                begun += 1;
            }
            transmit(&mut self.host, &self.payload, &mut self.wire);
            feed(&mut self.controller, &mut self.wire, serve);
            transmit(&mut self.controller, &self.payload, &mut self.wire);
            feed(&mut self.host, &mut self.wire, |_| ());
            while let Some(done) = self.host.completed() {
                assert!(done.cqe.status().is_success(), "{}", done.cqe.status());
                ended += 1;
            }
        }
    }
}

#[test]
fn the_machine_alone_in_either_role() {
    for (header, data) in [(false, false), (true, true)] {
        for flow_control in [false, true] {
            let limits = limits(Digests { header, data });
            let size = u32::from(QUEUE_SIZE);
            let mut pair = Pair {
                host: QPair::host(size, limits),
                controller: QPair::controller(size, flow_control, limits),
                wire: Vec::new(),
                payload: vec![0x5a; LARGE],
            };
            for (len, count) in [(SMALL, COUNTED), (LARGE, COUNTED_LARGE)] {
                for writing in [true, false] {
                    pair.run(writing, len, WARM_UP);
                    let what = format!("{limits:?}, {len} bytes, writing: {writing}");
                    counting::none(&what, || pair.run(writing, len, count));
                }
            }
        }
    }
}
