//! Rings that go on from an earlier life: what is taken again, in which order, and who is called.

use super::*;
use crate::inflight::{Part, Region, RegionShape};

/// A region that a front-end keeps.
struct Kept {
    shape: RegionShape,
    file: File,
}

impl Kept {
    fn new() -> Self {
        let (shape, file) = Region::make(4, 128).expect("region");
        Self { shape, file }
    }

    fn part(&self) -> Part {
        let file = self.file.try_clone().expect("clone");
        let region = Region::open(self.shape, file).expect("a good region");
        region.part(3, SIZE).expect("part of ring 3")
    }

    fn queue(&self, guest: &Guest) -> Queue {
        self.queue_with(guest, |_| {})
    }

    fn queue_with(&self, guest: &Guest, change: impl FnOnce(&mut QueueSetup)) -> Queue {
        queue_with(guest, |setup| {
            setup.part = self.part();
            setup.index = 3;
            change(setup);
        })
    }

    /// The used index in the part.
    fn used(&self) -> u16 {
        let mut bytes = [0; 2];
        // Parts of 128 entries have 16 + 128 * 16 bytes, and are aligned to 64.
        let at = 3 * 2112 + 14;
        rustix::io::pread(&self.file, &mut bytes, at).expect("read");
        u16::from_le_bytes(bytes)
    }
}

/// Ends the life of a queue in the middle of things.
fn kill(mut queue: Queue, requests: Vec<Request>) {
    for request in requests {
        queue.leave(request.token);
    }
}

#[test]
fn requests_of_an_earlier_life_come_first_and_in_their_order() {
    let kept = Kept::new();
    let mut guest = Guest::new();
    for _ in 0..4 {
        post(&mut guest, FLUSH, 0, &[]);
    }
    let mut queue = kept.queue(&guest);
    let mut requests: Vec<_> = (0..3).map(|_| take(&mut queue)).collect();
    let ids: Vec<_> = requests.iter().map(|request| request.id).collect();
    assert!(requests.iter().all(|request| !request.recovered));
    let second = requests.remove(1);
    queue.finish(second.token, &second.operation, BlkStatus::Ok);
    queue.flush();
    kill(queue, requests);

    let mut queue = kept.queue(&guest);
    assert_eq!(queue.recovering(), 2);
    let again: Vec<_> = (0..3).map(|_| take(&mut queue)).collect();
    take_nothing(&mut queue);
    let recovered: Vec<_> = again.iter().map(|request| request.recovered).collect();
    assert_eq!(recovered, [true, true, false]);
    assert_eq!([again[0].id, again[1].id], [ids[0], ids[2]]);
    assert!(again[2].id > ids[2]);
    for request in again {
        queue.finish(request.token, &request.operation, BlkStatus::Ok);
    }
    queue.flush();
    assert_eq!(guest.used(), [(2, 1), (0, 1), (4, 1), (6, 1)]);
}

#[test]
fn the_base_does_not_matter_where_a_region_is_kept() {
    let kept = Kept::new();
    let mut guest = Guest::new();
    post(&mut guest, FLUSH, 0, &[]);
    post(&mut guest, FLUSH, 0, &[]);
    for base in [0, 1, 2, 77] {
        let mut queue = kept.queue_with(&guest, |setup| setup.base = base);
        let first = take(&mut queue);
        assert_eq!(queue.next_avail(), 1, "base {base}");
        kill(queue, vec![first]);
    }
}

#[test]
fn a_fresh_region_begins_at_the_used_index_of_the_ring() {
    let kept = Kept::new();
    let mut guest = Guest::new();
    let used = 0xfffe_u16;
    guest.write(crate::guest::ADDRESSES.used + 2, &used.to_le_bytes());
    guest.used_seen = used;
    guest.set_avail(used);
    let head = post(&mut guest, FLUSH, 0, &[]);
    let mut queue = kept.queue_with(&guest, |setup| setup.base = used);
    assert_eq!(kept.used(), used);
    // Killed before the first answer, it has one request in flight, and not one that is answered.
    let request = take(&mut queue);
    kill(queue, vec![request]);
    let mut queue = kept.queue(&guest);
    assert_eq!(queue.recovering(), 1);
    let request = take(&mut queue);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    queue.flush();
    assert_eq!(guest.used(), [(u32::from(head), 1)]);
    assert_eq!(kept.used(), used.wrapping_add(1));
}

#[test]
fn a_region_of_one_life_and_another_ring_size_goes_on() {
    // A driver may use fewer descriptors than the front-end asked room for.
    let kept = Kept::new();
    let mut guest = Guest::new();
    post(&mut guest, FLUSH, 0, &[]);
    let mut queue = kept.queue(&guest);
    let request = take(&mut queue);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    queue.flush();
    drop(queue);
    let queue = kept.queue_with(&guest, |setup| setup.size = 8);
    assert_eq!(queue.recovering(), 0);
}

#[test]
fn the_driver_is_called_once_more_after_an_earlier_life_ended() {
    let kept = Kept::new();
    let guest = Guest::new();
    let (call, calls) = signal();
    let mut queue = kept.queue_with(&guest, |setup| setup.call = Some(call));
    queue.flush();
    assert_eq!(raised(&calls), 0, "nothing is owed on a fresh region");
    drop(queue);
    // The earlier life may have been killed between an answer and the call for it.
    let (call, calls) = signal();
    let mut queue = kept.queue_with(&guest, |setup| setup.call = Some(call));
    assert!(queue.flush());
    assert_eq!(raised(&calls), 1);
    assert!(!queue.flush());
    assert_eq!(raised(&calls), 0);
    // The descriptor of before may have been one that nobody listens to yet.
    let (call, calls) = signal();
    queue.apply(QueueUpdate::Call(Some(call)));
    assert!(queue.flush());
    assert_eq!(raised(&calls), 1);
}

#[test]
fn requests_that_were_left_can_be_taken_again_from_the_same_queue() {
    let mut guest = Guest::new();
    for _ in 0..3 {
        post(&mut guest, FLUSH, 0, &[]);
    }
    let mut queue = guest.queue();
    let requests: Vec<_> = (0..3).map(|_| take(&mut queue)).collect();
    let ids: Vec<_> = requests.iter().map(|request| request.id).collect();
    for request in requests.into_iter().rev() {
        queue.leave(request.token);
    }
    assert_eq!(queue.in_flight(), 0);
    take_nothing(&mut queue);
    assert_eq!(queue.recovering(), 0);
    queue.reopen();
    assert_eq!(queue.recovering(), 3);
    for (at, id) in ids.iter().enumerate() {
        let request = take(&mut queue);
        assert_eq!((request.id, request.recovered), (*id, true));
        // One is left once more.
        match at {
            1 => queue.leave(request.token),
            _ => queue.finish(request.token, &request.operation, BlkStatus::Ok),
        }
    }
    queue.reopen();
    assert_eq!(guest.used().len(), 2, "what was finished is shown");
    let request = take(&mut queue);
    assert_eq!(request.id, ids[1]);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    queue.flush();
    assert_eq!(guest.used().len(), 1);
}

#[test]
fn a_request_that_was_left_keeps_its_place_in_the_ring() {
    let mut guest = Guest::new();
    let head = post(&mut guest, FLUSH, 0, &[]);
    let mut queue = guest.queue();
    let request = take(&mut queue);
    queue.leave(request.token);
    queue.flush();
    guest.offer(head);
    assert_eq!(take_broken(&mut queue), BrokenRing::HeadInFlight { head });
}

#[test]
fn memory_of_requests_that_were_left_is_let_go() {
    let mut guest = Guest::new();
    let before = Arc::downgrade(&guest.map);
    post(&mut guest, FLUSH, 0, &[]);
    let mut queue = guest.queue();
    let request = take(&mut queue);
    queue.leave(request.token);
    guest.map = Arc::new(crate::guest::map_of(&guest.files));
    queue.apply(QueueUpdate::Memory(Arc::clone(&guest.map)));
    assert!(before.upgrade().is_none(), "an old table is still held");
    queue.reopen();
    let request = take(&mut queue);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    queue.flush();
    assert_eq!(guest.used_idx(), 1);
}

#[test]
fn a_chain_of_an_earlier_life_that_is_broken_now_breaks_the_ring() {
    let kept = Kept::new();
    let mut guest = Guest::new();
    let head = post(&mut guest, FLUSH, 0, &[]);
    let mut queue = kept.queue(&guest);
    let request = take(&mut queue);
    kill(queue, vec![request]);
    let looped = Desc {
        addr: HEADER_AT,
        len: 16,
        flags: NEXT,
        next: head,
    };
    guest.desc(head, looped);
    let mut queue = kept.queue(&guest);
    assert_eq!(take_broken(&mut queue), BrokenRing::Endless { head });
}

#[test]
fn a_ring_that_broke_leaves_nothing_behind_once_it_was_stopped() {
    let kept = Kept::new();
    let mut guest = Guest::new();
    post(&mut guest, FLUSH, 0, &[]);
    let mut queue = kept.queue(&guest);
    let request = take(&mut queue);
    queue.break_ring(BrokenRing::RingLayout);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    queue.flush();
    queue.close();
    assert_eq!(kept.queue(&guest).recovering(), 0);
}

#[test]
fn indirect_chains_of_an_earlier_life_are_read_as_those_of_this_one() {
    let kept = Kept::new();
    let mut guest = Guest::new();
    let data = b"what is written twice is the same";
    guest.write(DATA_AT, data);
    guest.write(HEADER_AT, &header(WRITE_TO_DISK, 9));
    let chain = [out(HEADER_AT, 16), out(DATA_AT, 512), into(STATUS_AT, 1)];
    guest.post_indirect(0x7000, &chain);
    let mut queue = kept.queue(&guest);
    let first = take(&mut queue);
    let describe = |operation: &Operation| match operation {
        Operation::Write { sector, source, .. } => (*sector, source.len()),
        other => panic!("not what was posted: {other:?}"),
    };
    assert_eq!(describe(&first.operation), (9, 512));
    kill(queue, vec![first]);
    let mut queue = kept.queue(&guest);
    let again = take(&mut queue);
    assert_eq!(describe(&again.operation), (9, 512));
    kill(queue, vec![again]);
}
