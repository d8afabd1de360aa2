//! The alignment of data that each end may ask the other for.

use nvmf::spec::Sqe;
use nvmf::tcp::{Digests, Direction, Limits, QPair};

use crate::stepping::{feed, pattern, sent};
use crate::{QUEUE_SIZE, limits, offence, write_then_read};

const DIGESTS: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

/// What both ends have when the host asks for data aligned to `host` bytes, and the controller for
/// `controller`.
fn agreed(host: u32, controller: u32, digests: Digests) -> (Limits, Limits) {
    let of = |rx_align, tx_align| Limits {
        rx_align,
        tx_align,
        digests,
        ..limits()
    };
    (of(host, controller), of(controller, host))
}

#[test]
fn data_is_aligned_as_either_end_asks_for_every_alignment() {
    for (header, data) in DIGESTS {
        for pda in 0..32 {
            let align = (pda + 1) * 4;
            let (host, controller) = agreed(align, 132 - align, Digests { header, data });
            for len in [1, 1024, 1025, 9000] {
                write_then_read(61, len, host, controller);
            }
        }
    }
}

#[test]
fn padding_is_zero_and_as_short_as_the_alignment_allows() {
    for (header, data) in DIGESTS {
        for pda in 0..32 {
            let align = (pda + 1) * 4;
            let (limits, _) = agreed(4, align, Digests { header, data });
            let mut host = QPair::host(QUEUE_SIZE, limits);
            host.submit(Sqe::write(1, 0, 1, false), Direction::Out, 512)
                .unwrap();
            let stream = sent(&mut host, |_| pattern(512));
            let header_end = 72 + if header { 4 } else { 0 };
            let pdo = usize::from(stream[3]);
            assert!(pdo >= header_end && pdo < header_end + align as usize);
            assert_eq!(pdo % align as usize, 0);
            assert!(stream[header_end..pdo].iter().all(|&pad| pad == 0));
            assert_eq!(stream[pdo..pdo + 512], pattern(512));
        }
    }
}

#[test]
fn data_that_is_aligned_otherwise_is_an_offence_of_either_end() {
    for pda in 1..32u32 {
        let align = (pda + 1) * 4;
        let (of_host, of_controller) = agreed(align, align, Digests::default());
        for pdo in (24..=255u32).step_by(4) {
            if pdo % align == 0 {
                continue;
            }
            let header = |kind: u8, hlen: u8| {
                let mut bytes = vec![kind, 0, hlen, pdo as u8];
                bytes.extend_from_slice(&(pdo + 16).to_le_bytes());
                bytes
            };
            let mut host = QPair::host(QUEUE_SIZE, of_host);
            assert_eq!(offence(&mut host, &header(0x07, 24)), (1, 3));
            let mut controller = QPair::controller(QUEUE_SIZE, false, of_controller);
            assert_eq!(offence(&mut controller, &header(0x06, 24)), (1, 3));
            let mut controller = QPair::controller(QUEUE_SIZE, false, of_controller);
            assert_eq!(offence(&mut controller, &header(0x04, 72)), (1, 3));
        }
        // Further than it has to be is allowed, as long as it is aligned.
        let furthest = 255 / align * align;
        let mut controller = QPair::controller(QUEUE_SIZE, false, of_controller);
        let mut bytes = vec![0x06, 0, 24, furthest as u8];
        bytes.extend_from_slice(&(furthest + 16).to_le_bytes());
        feed(&mut controller, &bytes, 8, |_| (), |_, _, _| ()).unwrap();
    }
}
