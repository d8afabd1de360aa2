//! Calls and kicks: when the driver is called, and when it is asked to kick.

use super::*;
use crate::guest::{ADDRESSES, EVENT_IDX, features};

#[test]
fn several_answers_are_published_at_once_and_call_once() {
    let mut guest = Guest::new();
    let (call, called) = signal();
    let mut queue = queue_with(&guest, |setup| setup.call = Some(call));
    for _ in 0..3 {
        post(&mut guest, FLUSH, 0, &[]);
    }
    let tokens: Vec<_> = (0..3).map(|_| take(&mut queue).token).collect();
    for token in tokens.into_iter().rev() {
        queue.finish(token, &Operation::Flush, BlkStatus::Ok);
    }
    assert_eq!((guest.used_idx(), raised(&called)), (0, 0));
    assert!(queue.flush());
    assert_eq!(raised(&called), 1);
    assert_eq!(guest.used(), [(4, 1), (2, 1), (0, 1)]);
    assert!(!queue.flush(), "nothing new");
    assert_eq!(raised(&called), 0);
}

/// Finishes one flush request and says whether the driver was called for it.
fn called_for_one(guest: &mut Guest, queue: &mut Queue) -> bool {
    post(guest, FLUSH, 0, &[]);
    let request = take(queue);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    queue.flush()
}

#[test]
fn with_event_idx_the_driver_is_called_when_its_index_is_passed() {
    let mut guest = Guest::new();
    let (call, _called) = signal();
    let mut queue = queue_with(&guest, |setup| setup.call = Some(call));
    guest.set_used_event(2);
    assert!(called_for_one(&mut guest, &mut queue), "the first, always");
    assert!(!called_for_one(&mut guest, &mut queue), "to 2");
    assert!(called_for_one(&mut guest, &mut queue), "to 3");
    assert!(!called_for_one(&mut guest, &mut queue), "to 4");
}

#[test]
fn indexes_wrap_at_65536() {
    let mut guest = Guest::new();
    let start = 65530;
    guest.set_avail(start);
    guest.used_seen = start;
    guest.write(ADDRESSES.used + 2, &start.to_le_bytes());
    let (call, _called) = signal();
    let mut queue = queue_with(&guest, |setup| {
        setup.call = Some(call);
        setup.base = start;
    });
    guest.set_used_event(1);
    let calls: Vec<_> = (0..12)
        .map(|_| called_for_one(&mut guest, &mut queue))
        .collect();
    let mut expected = [false; 12];
    expected[0] = true; // the first, always
    expected[7] = true; // 65536 + 2
    assert_eq!(calls, expected);
    assert_eq!(guest.used().len(), 12);
    assert_eq!((queue.next_avail(), guest.used_idx()), (6, 6));
}

#[test]
fn what_waits_is_counted_across_the_end_of_the_index_and_is_no_more_than_the_ring_holds() {
    let mut guest = Guest::new();
    let start = 65534;
    guest.set_avail(start);
    guest.write(ADDRESSES.used + 2, &start.to_le_bytes());
    let mut queue = queue_with(&guest, |setup| setup.base = start);
    assert_eq!(queue.waiting(), 0);
    for _ in 0..3 {
        post(&mut guest, FLUSH, 0, &[]);
    }
    assert_eq!(queue.waiting(), 3);
    let first = take(&mut queue);
    assert_eq!(queue.waiting(), 2);
    queue.finish(first.token, &first.operation, BlkStatus::Ok);
    assert_eq!(queue.waiting(), 2);
    guest.set_avail(start - 1);
    assert_eq!(queue.waiting(), SIZE);
}

#[test]
fn without_event_idx_the_driver_s_flag_decides() {
    let mut guest = Guest::new();
    let (call, _called) = signal();
    let mut queue = queue_with(&guest, |setup| {
        setup.call = Some(call);
        setup.features = features(&setup.device, &[EVENT_IDX]);
    });
    assert!(called_for_one(&mut guest, &mut queue));
    guest.write(ADDRESSES.available, &[1, 0]);
    assert!(!called_for_one(&mut guest, &mut queue));
    guest.write(ADDRESSES.available, &[0, 0]);
    assert!(called_for_one(&mut guest, &mut queue));
}

#[test]
fn kicks_are_off_while_the_ring_is_scanned_and_on_when_it_is_rearmed() {
    let mut guest = Guest::new();
    let mut queue = queue_with(&guest, |setup| {
        setup.features = features(&setup.device, &[EVENT_IDX]);
    });
    take_nothing(&mut queue);
    assert_eq!(guest.word(ADDRESSES.used), 1, "VRING_USED_F_NO_NOTIFY");
    assert!(!queue.rearm());
    assert_eq!(guest.word(ADDRESSES.used), 0);
    take_nothing(&mut queue);
    post(&mut guest, FLUSH, 0, &[]);
    assert!(
        queue.rearm(),
        "a request came before the driver saw the flag"
    );
    let request = take(&mut queue);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
}

#[test]
fn rearming_with_event_idx_asks_for_a_kick_at_the_next_request() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    post(&mut guest, FLUSH, 0, &[]);
    let request = take(&mut queue);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    assert_eq!(guest.avail_event(), 0, "not while busy");
    assert!(!queue.rearm());
    assert_eq!(guest.avail_event(), 1);
    post(&mut guest, FLUSH, 0, &[]);
    assert!(queue.rearm());
    let request = take(&mut queue);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
}

#[test]
fn descriptors_to_call_can_be_replaced_and_taken_away() {
    let mut guest = Guest::new();
    let (first, first_raised) = signal();
    let (second, second_raised) = signal();
    let mut queue = queue_with(&guest, |setup| setup.call = Some(first));
    guest.set_used_event(u16::MAX);
    queue.apply(QueueUpdate::Call(Some(second)));
    assert!(called_for_one(&mut guest, &mut queue));
    assert_eq!((raised(&first_raised), raised(&second_raised)), (0, 1));
    queue.apply(QueueUpdate::Call(None));
    guest.set_used_event(1);
    assert!(!called_for_one(&mut guest, &mut queue));
    assert_eq!(raised(&second_raised), 0);
}

#[test]
fn a_full_event_descriptor_does_not_block_the_worker() {
    use std::io::Write;
    let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("eventfd");
    let mut file = File::from(fd);
    file.write_all(&(u64::MAX - 1).to_ne_bytes()).expect("fill");
    let call = Signal::new(file);
    call.raise();
}
