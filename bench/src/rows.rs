//! The rows of the table: patterns of requests.

use crate::link::{Direction, MAX_LEN, Request, SECTOR};

/// A pattern of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    /// Which way data goes.
    pub(crate) direction: Direction,
    /// At random positions, or one after the other.
    pub(crate) random: bool,
    /// Bytes of each request.
    pub(crate) len: usize,
    /// Requests in flight.
    pub(crate) depth: usize,
}

impl Row {
    /// As in `randread-4k-d32`.
    pub(crate) fn name(&self) -> String {
        let order = if self.random { "rand" } else { "" };
        let direction = match self.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        };
        format!("{order}{direction}-{}k-d{}", self.len >> 10, self.depth)
    }
}

/// All rows, in the order of the table.
pub(crate) fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    for direction in [Direction::Read, Direction::Write] {
        rows.extend([1, 8, 32, 128].map(|depth| Row {
            direction,
            random: true,
            len: 4 << 10,
            depth,
        }));
    }
    rows.extend([Direction::Read, Direction::Write].map(|direction| Row {
        direction,
        random: false,
        len: MAX_LEN,
        depth: 32,
    }));
    rows
}

/// The requests of a row over a disk, without end.
#[derive(Debug)]
pub(crate) struct Requests {
    row: Row,
    /// Requests that fit the disk.
    places: u64,
    next: u64,
}

impl Requests {
    /// The same requests for the same seed.
    pub(crate) fn new(row: Row, sectors: u64, seed: u64) -> Self {
        let places = (sectors * SECTOR / row.len as u64).max(1);
        let next = if row.random { seed | 1 } else { 0 };
        Self { row, places, next }
    }

    /// The next request.
    pub(crate) fn take(&mut self) -> Request {
        let place = if self.row.random {
            // xorshift64*
            self.next ^= self.next >> 12;
            self.next ^= self.next << 25;
            self.next ^= self.next >> 27;
            let random = self.next.wrapping_mul(0x2545_f491_4f6c_dd1d);
            ((u128::from(random) * u128::from(self.places)) >> 64) as u64
        } else {
            let place = self.next;
            self.next = (place + 1) % self.places;
            place
        };
        Request {
            direction: self.row.direction,
            sector: place * (self.row.len as u64 / SECTOR),
            len: self.row.len,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_named_for_what_they_do() {
        let names: Vec<String> = all().iter().map(Row::name).collect();
        assert_eq!(names.len(), 10);
        assert_eq!(names[0], "randread-4k-d1");
        assert_eq!(names[6], "randwrite-4k-d32");
        assert_eq!(names[9], "write-128k-d32");
    }

    #[test]
    fn requests_stay_on_the_disk_and_reach_all_of_it() {
        for row in all() {
            let sectors = 16 * MAX_LEN as u64 / SECTOR + 3;
            let mut requests = Requests::new(row, sectors, 7);
            let places = sectors * SECTOR / row.len as u64;
            let mut seen = vec![false; places as usize];
            for _ in 0..places * 20 {
                let request = requests.take();
                assert_eq!(request.sector * SECTOR % row.len as u64, 0);
                seen[(request.sector * SECTOR / row.len as u64) as usize] = true;
            }
            assert!(seen.iter().all(|seen| *seen), "{}", row.name());
        }
    }
}
