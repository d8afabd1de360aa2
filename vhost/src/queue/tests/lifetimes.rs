//! What outlives what: memory generations, requests in flight, tokens, queues.

use super::*;
use crate::guest::{REGIONS, map_of, spec};

#[test]
fn a_request_in_flight_keeps_its_generation_of_memory() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let data = REGIONS[2];
    guest.write(HEADER_AT, &header(READ, 0));
    guest.post(&[out(HEADER_AT, 16), into(data, 512), into(data + 0x800, 1)]);
    let mut request = take(&mut queue);
    let without = guest.map.without(spec(data)).expect("remove");
    queue.apply(QueueUpdate::Memory(Arc::new(without)));
    let Operation::Read { ref mut sink, .. } = request.operation else {
        panic!("{:?}", request.operation);
    };
    sink.fill(0..512, 0x42).expect("inside");
    let old = Arc::downgrade(&guest.map);
    guest.map = Arc::new(map_of(&guest.files));
    assert!(old.upgrade().is_some(), "still mapped for the request");
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    queue.flush();
    assert!(old.upgrade().is_none(), "unmapped with the last request");
    assert_eq!(guest.read(data, 512), [0x42; 512]);
    assert_eq!(guest.read(data + 0x800, 1), [0]);
    assert_eq!(guest.used(), [(0, 513)]);
    // New requests see the new table.
    guest.post(&[out(HEADER_AT, 16), into(data, 512), into(data + 0x800, 1)]);
    assert!(matches!(
        take_broken(&mut queue),
        BrokenRing::OutsideMemory { .. }
    ));
}

#[test]
fn a_ring_whose_memory_vanishes_is_suspended_until_it_is_back() {
    let mut guest = Guest::new();
    let (err, errors) = signal();
    let mut queue = queue_with(&guest, |setup| setup.err = Some(err));
    post(&mut guest, FLUSH, 0, &[]);
    let request = take(&mut queue);
    let without = guest.map.without(spec(0)).expect("remove");
    queue.apply(QueueUpdate::Memory(Arc::new(without)));
    assert_eq!(raised(&errors), 1);
    post(&mut guest, FLUSH, 0, &[]);
    take_nothing(&mut queue);
    assert!(!queue.rearm());
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    queue.flush();
    assert_eq!(guest.used(), [(0, 1)]);
    queue.apply(QueueUpdate::Memory(Arc::new(map_of(&guest.files))));
    let request = take(&mut queue);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    queue.flush();
    assert_eq!(guest.used(), [(2, 1)]);
}

#[test]
fn a_queue_may_be_dropped_before_or_after_its_tokens() {
    for queue_first in [true, false] {
        let mut guest = Guest::new();
        let mut queue = guest.queue();
        post(&mut guest, READ, 0, &[into(DATA_AT, 512)]);
        let mut request = take(&mut queue);
        if queue_first {
            drop(queue);
            // What the kernel may still be writing to is not unmapped under it.
            let Operation::Read { ref mut sink, .. } = request.operation else {
                panic!("{:?}", request.operation);
            };
            let files = guest.files;
            drop(guest.map);
            sink.fill(0..512, 1).expect("inside");
            assert_eq!(files.len(), 3);
            drop(request.token);
        } else {
            drop(request);
            drop(queue);
        }
    }
}

#[test]
#[cfg_attr(debug_assertions, should_panic(expected = "dropped unfinished"))]
fn a_token_dropped_unfinished_is_noticed_at_the_next_flush() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    post(&mut guest, FLUSH, 0, &[]);
    drop(take(&mut queue));
    queue.flush();
    assert_eq!(queue.in_flight(), 1, "and never answered");
}

#[test]
#[cfg_attr(debug_assertions, should_panic(expected = "wrong ring"))]
fn a_token_of_another_ring_is_not_taken() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let mut other = Guest::new().queue();
    post(&mut guest, FLUSH, 0, &[]);
    let request = take(&mut queue);
    other.finish(request.token, &request.operation, BlkStatus::Ok);
    assert_eq!((queue.in_flight(), other.in_flight()), (1, 0));
}
