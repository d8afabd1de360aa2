//! First inputs of the corpora, made of the captured connections in `nvmf/tests/wire`, and by hand for what a guest
//! and its VMM say.
//!
//! `cargo test -p fuzz-targets --test seeds -- --ignored` writes them anew, after a change of what the
//! bytes mean.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]

use std::path::Path;

/// A captured PDU.
struct Pdu {
    from_host: bool,
    bytes: Vec<u8>,
}

/// Reads a fixture; its format is described in `nvmf/tests/wire/README.md`.
fn parse(text: &str) -> Vec<Pdu> {
    let mut pdus: Vec<Pdu> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if line.starts_with(['>', '<']) {
            let from_host = line.starts_with('>');
            let bytes = Vec::new();
            pdus.push(Pdu { from_host, bytes });
            continue;
        }
        let bytes = &mut pdus.last_mut().unwrap().bytes;
        let byte = |hex: &str| u8::from_str_radix(hex, 16).unwrap();
        for word in line.split_whitespace() {
            if let Some((value, times)) = word.split_once('*') {
                bytes.extend(std::iter::repeat_n(byte(value), times.parse().unwrap()));
            } else {
                bytes.extend((0..word.len()).step_by(2).map(|at| byte(&word[at..at + 2])));
            }
        }
    }
    pdus
}

/// What begins the input of a machine: digests as negotiated, the smallest alignment, limits that
/// the captures keep to.
fn limits(digests: u8, admin: bool) -> Vec<u8> {
    vec![digests | u8::from(admin) << 2, 0, 0, 3, 2, 3]
}

/// As raw bytes: a decision that says so, a length, and, where the target asks, how to cut.
fn raw(bytes: &[u8], decision: u8, most: usize, cut: Option<u8>) -> Vec<u8> {
    let mut program = Vec::new();
    for piece in bytes.chunks(most) {
        program.extend([decision, piece.len() as u8]);
        program.extend(piece);
        program.extend(cut);
    }
    program
}

/// Longest seed in bytes: what fuzzing works on is shorter still.
const MAX_LEN: usize = 8192;

fn write(target: &str, name: &str, input: &[u8]) {
    let input = &input[..input.len().min(MAX_LEN)];
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    std::fs::create_dir_all(root.join(target)).unwrap();
    std::fs::write(root.join(target).join(name), input).unwrap();
}

/// A chain in the ring's own table: places and lengths by their number in the target, or a length as it is.
fn chain(buffers: &[(u8, Len, u8)]) -> Vec<u8> {
    let mut program = Vec::new();
    for (at, (place, len, flags)) in (0..).zip(buffers) {
        program.extend([4, 0, at, 0, *place]);
        match len {
            Len::Number(number) => program.extend([0, *number]),
            Len::Bytes(bytes) => {
                program.push(0xf0);
                program.extend(bytes.to_le_bytes());
            }
        }
        program.extend([*flags, at + 1]);
    }
    // Offered, taken, finished, published.
    program.extend([8, 0, 14, 11, 0, 13]);
    program
}

#[derive(Clone, Copy)]
enum Len {
    Number(u8),
    Bytes(u32),
}

/// Rings at the edges of what is allowed.
fn write_chains() {
    const NEXT: u8 = 1;
    const WRITE: u8 = 2;
    let start = [0, 0, 0];
    let status = (2, Len::Number(1), WRITE);
    for kind in 0..8 {
        for segments in 0..6 {
            let mut buffers = vec![(0, Len::Number(0), NEXT)];
            buffers.resize(1 + segments, (1, Len::Number(0), NEXT));
            buffers.push(status);
            let said = [6, kind, 1, 0, 7, 1, 1, 0, 0];
            let program = [&start[..], &said, &chain(&buffers)].concat();
            write(
                "chain",
                &format!("kind-{kind}-segments-{segments}"),
                &program,
            );
        }
    }
    for len in [u32::MAX - 17, u32::MAX - 16, u32::MAX] {
        let long = (1, Len::Bytes(len), NEXT);
        let buffers = [(0, Len::Number(0), NEXT), long, status];
        let program = [&start[..], &chain(&buffers)].concat();
        write("chain", &format!("length-{len:x}"), &program);
    }
    for len in [16, 64, 0x000f_fff0, 0x0010_0000] {
        let table = (3, Len::Bytes(len), 4);
        let program = [&start[..], &chain(&[table])].concat();
        write("chain", &format!("table-{len:x}"), &program);
    }
    // Every request that a driver makes, in the ring and in a table, and again before it is answered.
    for kind in 0..8 {
        let good = |indirect| [0, kind, 1, indirect, 1, 2, 2, 14];
        let both = [good(0), good(1)].concat();
        let program = [&start[..], &both, &[8, 0, 14, 11, 0, 13, 14]].concat();
        write("chain", &format!("good-{kind}"), &program);
    }
}

/// Sessions with a running ring, and every request behind that.
fn write_sessions() {
    let run = [0, 0, 0xff];
    for request in 0..50 {
        // Right, asked to be acknowledged, with a descriptor that has no place there.
        let choice = 0x96 + request;
        let message = [choice, 0, 0, 0, 0, 0, 1, 0, 0];
        let program = [&[0][..], &run, &message, &run, &message].concat();
        write("session", &format!("request-{request}"), &program);
    }
}

#[test]
#[ignore = "writes into the tree"]
fn written_anew() {
    let wire = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nvmf/tests/wire");
    for entry in std::fs::read_dir(wire).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap();
        let Some(name) = file.strip_suffix(".hex") else {
            continue;
        };
        let pdus = parse(&std::fs::read_to_string(&path).unwrap());
        let (req, resp) = (&pdus[0].bytes, &pdus[1].bytes);
        let asked = req[11];
        // Whole PDUs in place of our own, of the digests that were asked for.
        let ours = [asked, 3, 2, 1];
        let handshake = |choice: u8, pdu: &[u8]| [&[choice], &ours[..], &ours[..], pdu].concat();
        write("handshake", &format!("{name}-req"), &handshake(8, req));
        write("handshake", &format!("{name}-resp"), &handshake(12, resp));

        let start = limits(resp[11], name.contains("admin"));
        let (mut framer, mut host, mut controller) = (start.clone(), start.clone(), start);
        // A controller, cut in pieces of 1, 7, 24 and 72 bytes.
        framer.extend([0, 0, 6, 23, 71]);
        host.push(6);
        controller.extend([6, 0]);
        for pdu in &pdus[2..] {
            if pdu.from_host {
                framer.extend(raw(&pdu.bytes, 0xff, 99, None));
                controller.extend(raw(&pdu.bytes, 4, 199, Some(0x8f)));
                // Take the command, answer it, and send that.
                controller.extend([5, 8, 0, 0, 9, 3, 10, 0]);
            } else {
                host.extend(raw(&pdu.bytes, 7, 199, Some(0x8f)));
                host.extend([3, 10, 1, 0x80, 0, 1]);
            }
        }
        write("framer", name, &framer);
        write("host", name, &host);
        write("controller", name, &controller);
    }
    write_chains();
    write_sessions();
    // A good Connect, and then commands: properties read and set, Identify, log pages, features.
    let good = [0, 0, 0];
    let enable = [1, 1, 0, 1, 0, 0];
    write("connect", "good", &good);
    for (at, command) in (0..6u8).flat_map(|it| [(it, [1, it, 1, 0]), (it, [2, it, 6, 2])]) {
        let program = [
            &good[..],
            &enable,
            &command,
            &enable,
            &command,
            &[8, 0, 0, 0],
        ]
        .concat();
        write(
            "connect",
            &format!("commands-{at}-{}", command[0]),
            &program,
        );
    }
}
