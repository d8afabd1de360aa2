//! What the next life of a disk has to know, as bytes in the private tail of the front-end's in-flight region: who may
//! still write where, and until when.
//!
//! The tail has two copies, each with a number and a checksum, which are written in turn: a process that ends in the
//! middle of one leaves the other. Both come back from the front-end and may be anything, so all of a copy is checked
//! before any of it is believed; what it then says can harm nobody but the front-end's own guest.

use nvmf::spec::ControllerInstance;

use super::fence::{EARLIER, Fence, Fences, Owner};

/// "vnvmfrec" in the order of the bytes.
const MAGIC: u64 = u64::from_le_bytes(*b"vnvmfrec");
/// Of the layout below. Magic and version stay where they are in every version.
const VERSION: u64 = 1;

/// Numbers before the fences: magic, version, number of the copy, checksum, fences, flags, quiet time, and two each
/// for region, boot and disk.
const HEAD: usize = 13;
/// Numbers of one fence: first block, blocks, deadline, request, ring and whether there is an owner.
const FENCE: usize = 5;
/// Where the checksum is.
const CHECKSUM: usize = 3;

/// What follows the fences: "vnvmfasc", number of the copy, checksum, two for the party, associations.
///
/// It came later than the rest, and has a checksum of its own: programs that do not know it read the rest, and what
/// they write has none.
const ASSOCIATIONS: u64 = u64::from_le_bytes(*b"vnvmfasc");
const ASSOCIATIONS_HEAD: usize = 6;
/// Numbers of one association: controller ID and uniquifier, random number.
const ASSOCIATION: usize = 2;
/// Where the checksum is there.
const ASSOCIATIONS_CHECKSUM: usize = 2;
/// More are not told.
pub(crate) const MAX_ASSOCIATIONS: usize = 64;

/// The one flag: see [`Record::sending`].
const SENDING: u64 = 1;
/// Set beside the number of the ring.
const OWNED: u64 = 1 << 16;

/// See the module. Times are in milliseconds.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// Names the region: the requests in it have numbers of their own.
    pub(crate) region: u128,
    /// Names the run of the machine whose clock the deadlines are of; 0 is none.
    pub(crate) boot: u128,
    /// Names the namespace; 0 where it has no name.
    pub(crate) disk: u128,
    /// Requests may be under way to a controller beyond those that are fenced.
    pub(crate) sending: bool,
    /// How long those may be carried out when whoever sent them is gone.
    pub(crate) quiet: u64,
    /// By the clock of that machine since it was started, suspended or not.
    pub(crate) fences: Fences,
    /// Whose commands all of these are; `None` when that is not known of all.
    pub(crate) associations: Option<Associations>,
}

/// Associations that may still carry commands out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Associations {
    /// Names the host and the subsystem of all.
    pub(crate) party: u128,
    /// Their controllers, at most [`MAX_ASSOCIATIONS`].
    pub(crate) controllers: Vec<ControllerInstance>,
}

/// Why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoRecord {
    /// Neither copy is one.
    #[error("it has no record of this program's")]
    Nonsense,
    /// One is of another version.
    #[error("its record is of version {0} of the layout, and version {VERSION} is known")]
    Foreign(u64),
}

/// Bytes of one copy in a tail of `len` bytes.
fn copy_len(len: usize) -> usize {
    len / 2 / 64 * 64
}

/// Most fences that a copy of so many bytes has room for.
fn capacity(copy: usize) -> usize {
    (copy / 8).saturating_sub(HEAD) / FENCE
}

fn halves(number: u128) -> [u64; 2] {
    [number as u64, (number >> 64) as u64]
}

fn whole(low: u64, high: u64) -> u128 {
    u128::from(high) << 64 | u128::from(low)
}

impl Record {
    /// The bytes of copy number `number`, and where in a tail of `len` bytes they belong. Fences that there is no room
    /// for are merged; `None` when there is no room at all.
    pub(crate) fn encode(&self, number: u64, len: usize) -> Option<(usize, Vec<u8>)> {
        let copy = copy_len(len);
        let most = capacity(copy);
        if most == 0 {
            return None;
        }
        let associations = self.encode_associations(number);
        let taken = associations.len().div_ceil(FENCE);
        // Fences come first.
        let (room, associations) = match most.checked_sub(taken) {
            Some(room) if room > most / 2 => (room, associations),
            _ => (most, Vec::new()),
        };
        let mut fences = self.fences.clone();
        fences.squeeze(room);
        let mut numbers = vec![MAGIC, VERSION, number, 0, fences.len() as u64];
        numbers.extend([if self.sending { SENDING } else { 0 }, self.quiet]);
        numbers.extend(
            [self.region, self.boot, self.disk]
                .into_iter()
                .flat_map(halves),
        );
        for fence in fences.iter() {
            let owner = fence.owner;
            let ring = owner.map_or(0, |owner| OWNED | u64::from(owner.ring));
            let request = owner.map_or(0, |owner| owner.request);
            numbers.extend([fence.slba, fence.blocks, fence.deadline, request, ring]);
        }
        let checksum = checksum(&numbers);
        if let Some(at) = numbers.get_mut(CHECKSUM) {
            *at = checksum;
        }
        numbers.extend(associations);
        let at = if number.is_multiple_of(2) { 0 } else { copy };
        Some((
            at,
            numbers
                .iter()
                .flat_map(|number| number.to_le_bytes())
                .collect(),
        ))
    }

    fn encode_associations(&self, number: u64) -> Vec<u64> {
        let told = self.associations.as_ref();
        let Some(told) = told.filter(|told| told.controllers.len() <= MAX_ASSOCIATIONS) else {
            return Vec::new();
        };
        let mut numbers = vec![ASSOCIATIONS, number, 0];
        numbers.extend(halves(told.party));
        numbers.push(told.controllers.len() as u64);
        for controller in &told.controllers {
            let id = u64::from(controller.cntlid) | u64::from(controller.ciu) << 16;
            numbers.extend([id, controller.cirn]);
        }
        let checksum = checksum(&numbers);
        if let Some(at) = numbers.get_mut(ASSOCIATIONS_CHECKSUM) {
            *at = checksum;
        }
        numbers
    }

    /// The newer copy in a tail, and its number.
    ///
    /// # Errors
    /// [`NoRecord`]: whatever may be in force is not known.
    pub(crate) fn decode(tail: &[u8]) -> Result<(u64, Self), NoRecord> {
        let copy = copy_len(tail.len());
        let mut newest: Option<(u64, Self)> = None;
        for bytes in tail.chunks_exact(copy.max(64)).take(2) {
            let (numbers, _) = bytes.as_chunks::<8>();
            let numbers: Vec<u64> = numbers
                .iter()
                .map(|&bytes| u64::from_le_bytes(bytes))
                .collect();
            if let [MAGIC, version, ..] = numbers[..]
                && version != VERSION
            {
                return Err(NoRecord::Foreign(version));
            }
            let Some((number, record)) = Self::decode_copy(&numbers) else {
                continue;
            };
            if newest.as_ref().is_none_or(|(newer, _)| *newer < number) {
                newest = Some((number, record));
            }
        }
        newest.ok_or(NoRecord::Nonsense)
    }

    fn decode_copy(numbers: &[u64]) -> Option<(u64, Self)> {
        let &[
            MAGIC,
            VERSION,
            number,
            sum,
            count,
            flags,
            quiet,
            ref names @ ..,
        ] = numbers
        else {
            return None;
        };
        let count = usize::try_from(count).ok()?;
        let used = count.checked_mul(FENCE)?.checked_add(HEAD)?;
        let mut covered = numbers.get(..used)?.to_vec();
        *covered.get_mut(CHECKSUM)? = 0;
        if checksum(&covered) != sum || flags & !SENDING != 0 {
            return None;
        }
        let &[region, region_high, boot, boot_high, disk, disk_high, ..] = names else {
            return None;
        };
        let mut fences = Fences::default();
        let (records, _) = covered.get(HEAD..)?.as_chunks::<FENCE>();
        for &[slba, blocks, deadline, request, ring] in records {
            let owner = (ring & OWNED != 0).then_some(Owner {
                ring: ring as u16,
                request,
            });
            fences.add(Fence {
                slba,
                blocks,
                owner,
                generation: EARLIER,
                deadline,
            });
        }
        let associations = numbers.get(used..);
        let associations = associations.and_then(|rest| decode_associations(rest, number));
        Some((
            number,
            Self {
                region: whole(region, region_high),
                boot: whole(boot, boot_high),
                disk: whole(disk, disk_high),
                sending: flags & SENDING != 0,
                quiet,
                fences,
                associations,
            },
        ))
    }
}

/// What follows the fences of copy `number`, if it is what belongs there.
fn decode_associations(rest: &[u64], number: u64) -> Option<Associations> {
    let &[ASSOCIATIONS, of, sum, low, high, count, ..] = rest else {
        return None;
    };
    let count = usize::try_from(count).ok()?;
    if of != number || count > MAX_ASSOCIATIONS {
        return None;
    }
    let mut covered = rest
        .get(..ASSOCIATIONS_HEAD + count * ASSOCIATION)?
        .to_vec();
    *covered.get_mut(ASSOCIATIONS_CHECKSUM)? = 0;
    if checksum(&covered) != sum {
        return None;
    }
    let (controllers, _) = covered.get(ASSOCIATIONS_HEAD..)?.as_chunks::<ASSOCIATION>();
    let controllers = controllers.iter().map(|&[id, cirn]| ControllerInstance {
        cntlid: id as u16,
        ciu: (id >> 16) as u8,
        cirn,
    });
    Some(Associations {
        party: whole(low, high),
        controllers: controllers.collect(),
    })
}

fn checksum(numbers: &[u64]) -> u64 {
    let bytes = numbers.iter().map(|number| number.to_le_bytes());
    u64::from(bytes.fold(0, |sum, bytes| crc32c::crc32c_append(sum, &bytes)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEN: usize = 64 << 10;

    fn record(fences: u64) -> Record {
        let mut record = Record {
            region: 0x1234_5678_9abc_def0_1122_3344_5566_7788,
            boot: u128::MAX - 5,
            disk: 7,
            sending: true,
            quiet: 15_000,
            fences: Fences::default(),
            associations: Some(associations(3)),
        };
        for at in 0..fences {
            record.fences.add(Fence {
                slba: 8 * at,
                blocks: 4,
                owner: (at % 3 > 0).then_some(Owner {
                    ring: at as u16,
                    request: u64::MAX - at,
                }),
                generation: 0,
                deadline: 1000 + at,
            });
        }
        record
    }

    fn associations(count: u16) -> Associations {
        let controller = |at| ControllerInstance {
            cntlid: at,
            ciu: 255 - at as u8,
            cirn: u64::MAX - u64::from(at),
        };
        Associations {
            party: u128::MAX - 77,
            controllers: (0..count).map(controller).collect(),
        }
    }

    #[test]
    fn associations_are_told_where_there_is_room_and_only_by_the_copy_that_they_belong_to() {
        let mut tail = vec![0; LEN];
        let mut told = record(700);
        for count in [0, 1, MAX_ASSOCIATIONS as u16] {
            told.associations = Some(associations(count));
            put(&mut tail, &told, 2);
            let (_, read) = Record::decode(&tail).unwrap();
            assert_eq!(read.associations, told.associations);
            assert_eq!(fences(&read), fences(&told));
        }
        // Of a copy that was there before, or torn, nothing is believed.
        let after = |fences: usize| (HEAD + FENCE * fences) * 8;
        let mut stale = tail.clone();
        told.associations = None;
        put(&mut stale, &told, 4);
        assert_eq!(Record::decode(&stale).unwrap().1.associations, None);
        for at in [0, 8, 16, 24, 40, 48, 48 + 16 * MAX_ASSOCIATIONS - 1] {
            let mut torn = tail.clone();
            torn[after(700) + at] ^= 1;
            let (_, read) = Record::decode(&torn).unwrap();
            assert_eq!(read.associations, None, "byte {at}");
            assert_eq!(read.fences.len(), 700);
        }
        told.associations = Some(associations(MAX_ASSOCIATIONS as u16 + 1));
        put(&mut tail, &told, 6);
        assert_eq!(Record::decode(&tail).unwrap().1.associations, None);
        // Fences come first where there is little room.
        let mut little = vec![0; 1024];
        told.associations = Some(associations(20));
        put(&mut little, &told, 6);
        let (_, read) = Record::decode(&little).unwrap();
        assert!(read.associations.is_none() && read.fences.len() > 1);
    }

    fn put(tail: &mut [u8], record: &Record, number: u64) {
        let (at, bytes) = record.encode(number, tail.len()).unwrap();
        tail[at..at + bytes.len()].copy_from_slice(&bytes);
    }

    fn fences(record: &Record) -> Vec<Fence> {
        record.fences.iter().copied().collect()
    }

    #[test]
    fn what_is_written_is_read_and_the_newer_copy_counts() {
        let mut tail = vec![0; LEN];
        let (older, newer) = (record(5), record(700));
        put(&mut tail, &older, 8);
        put(&mut tail, &newer, 9);
        let (number, read) = Record::decode(&tail).unwrap();
        assert_eq!(number, 9);
        assert_eq!(fences(&read), fences(&newer));
        assert_eq!(
            (read.region, read.boot, read.disk),
            (newer.region, newer.boot, 7)
        );
        assert_eq!((read.sending, read.quiet), (true, 15_000));
        put(&mut tail, &older, 10);
        assert_eq!(fences(&Record::decode(&tail).unwrap().1), fences(&older));
    }

    #[test]
    fn a_process_that_ends_while_it_writes_leaves_the_copy_before() {
        let mut tail = vec![0; LEN];
        put(&mut tail, &record(5), 1);
        put(&mut tail, &record(6), 2);
        let (at, bytes) = record(300).encode(3, LEN).unwrap();
        for written in 0..bytes.len() {
            let mut torn = tail.clone();
            torn[at..at + written].copy_from_slice(&bytes[..written]);
            let (number, read) = Record::decode(&torn).unwrap();
            // The last bytes may be the same.
            let whole = number == 3 && read.fences.len() == 300;
            assert!(
                whole || (number == 2 && read.fences.len() == 6),
                "{written} bytes"
            );
        }
    }

    #[test]
    fn another_version_and_nonsense_are_told_apart_and_neither_is_believed() {
        let mut tail = vec![0; LEN];
        assert_eq!(Record::decode(&tail).unwrap_err(), NoRecord::Nonsense);
        assert_eq!(Record::decode(&[]).unwrap_err(), NoRecord::Nonsense);
        put(&mut tail, &record(5), 4);
        tail[200] ^= 1;
        assert_eq!(Record::decode(&tail).unwrap_err(), NoRecord::Nonsense);
        put(&mut tail, &record(5), 4);
        put(&mut tail, &record(5), 5);
        tail[LEN / 2 + 8] = 2;
        assert_eq!(Record::decode(&tail).unwrap_err(), NoRecord::Foreign(2));
    }

    #[test]
    fn more_fences_than_there_is_room_for_become_wider_and_none_is_lost() {
        let mut tail = vec![0; LEN];
        let all = record(4000);
        put(&mut tail, &all, 1);
        let (_, read) = Record::decode(&tail).unwrap();
        assert!(read.fences.len() <= capacity(LEN / 2));
        let stranger = Owner {
            ring: 0,
            request: 0,
        };
        for fence in all.fences.iter() {
            assert!(read.fences.forbid(stranger, &(fence.slba..fence.slba + 4)));
        }
        assert!(record(1).encode(0, 512).is_some());
        assert!(record(1).encode(0, 128).is_none());
    }

    proptest! {
        #[test]
        fn no_bytes_do_any_harm(
            (start, bytes) in (0..400usize, prop::collection::vec(any::<u8>(), 0..400)),
            whole in any::<bool>(),
        ) {
            let mut tail = vec![0; 4096];
            if whole {
                put(&mut tail, &record(9), 6);
            }
            tail[start..start + bytes.len()].copy_from_slice(&bytes);
            drop(Record::decode(&tail));
            drop(Record::decode(&bytes));
        }
    }
}
