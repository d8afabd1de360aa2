//! The load generator: keeps so many requests in flight, and times each.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::kernel;
use crate::link::{Link, MAX_LEN};
use crate::rows::{Requests, Row};
use crate::statistics::Histogram;

/// A request that takes longer means that the contender is stuck.
const STUCK: Duration = Duration::from_secs(10);

/// When a phase is over.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Until {
    /// After this time.
    Elapsed(Duration),
    /// After so many requests.
    Finished(u64),
}

/// A row that runs on a link. After an error the link is of no more use.
pub(crate) struct Load<'a> {
    link: &'a mut dyn Link,
    requests: Requests,
    started: Vec<Instant>,
    idle: Vec<usize>,
    in_flight: usize,
}

impl<'a> Load<'a> {
    /// Nothing in flight yet.
    pub(crate) fn new(link: &'a mut dyn Link, row: Row, sectors: u64, seed: u64) -> Self {
        let sectors = sectors.min(link.sectors());
        Self {
            link,
            requests: Requests::new(row, sectors, seed),
            started: vec![Instant::now(); row.depth],
            idle: (0..row.depth).rev().collect(),
            in_flight: 0,
        }
    }

    /// Runs for a while; requests stay in flight at its end.
    ///
    /// # Errors
    /// A request failed or hangs, or the user wants an end.
    pub(crate) fn run(&mut self, until: Until) -> Result<Histogram> {
        let mut times = Histogram::new();
        let start = Instant::now();
        loop {
            self.fill()?;
            let now = self.finish(&mut times)?;
            let over = match until {
                Until::Elapsed(time) => now - start >= time,
                Until::Finished(count) => times.count() >= count,
            };
            if over {
                return Ok(times);
            }
        }
    }

    /// Lets what is in flight finish.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) fn drain(&mut self) -> Result<Histogram> {
        let mut times = Histogram::new();
        while self.in_flight > 0 {
            self.finish(&mut times)?;
        }
        Ok(times)
    }

    fn fill(&mut self) -> io::Result<()> {
        if self.idle.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        while let Some(slot) = self.idle.pop() {
            self.started[slot] = now;
            self.link.submit(slot, self.requests.take());
            self.in_flight += 1;
        }
        self.link.publish()
    }

    /// Waits for at least one request, takes all that are finished, and says when.
    fn finish(&mut self, times: &mut Histogram) -> Result<Instant> {
        let mut asked = None;
        loop {
            let mut finished = self.link.finished()?;
            if finished.is_some() {
                let now = Instant::now();
                while let Some(slot) = finished {
                    let started = self
                        .started
                        .get(slot)
                        .context("a slot that was not in use")?;
                    times.add(u64::try_from((now - *started).as_nanos()).unwrap_or(u64::MAX));
                    self.idle.push(slot);
                    self.in_flight -= 1;
                    finished = self.link.finished()?;
                }
                return Ok(now);
            }
            let since = *asked.get_or_insert_with(Instant::now);
            ensure!(
                since.elapsed() < STUCK,
                "no request has finished for {STUCK:?}"
            );
            match self.link.wait(STUCK) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(error.into());
                }
                _ => ensure!(!kernel::interrupted(), "interrupted"),
            }
        }
    }
}

/// Writes the whole disk, so that nothing is allocated later, and checks that what is read was written.
///
/// # Errors
/// A request failed, or the disk returned something else.
pub(crate) fn prepare(link: &mut dyn Link, sectors: u64, keeps_data: bool) -> Result<()> {
    use crate::link::{Direction, Request, SECTOR};
    let row = Row {
        direction: Direction::Write,
        random: false,
        len: MAX_LEN,
        depth: 32,
    };
    let count = sectors.min(link.sectors()) * SECTOR / MAX_LEN as u64;
    let mut load = Load::new(link, row, sectors, 0);
    load.run(Until::Finished(count))?;
    load.drain()?;
    if !keeps_data {
        return Ok(());
    }
    let pattern: Vec<u8> = (0..4096_u32).map(|i| (i * 7 + i / 256) as u8).collect();
    link.fill(0, &pattern);
    link.fill(1, &[0; 4096]);
    for (slot, direction) in [(0, Direction::Write), (1, Direction::Read)] {
        let request = Request {
            direction,
            sector: 64,
            len: pattern.len(),
        };
        link.submit(slot, request);
        link.publish()?;
        let start = Instant::now();
        while link.finished()?.is_none() {
            ensure!(start.elapsed() < STUCK, "a request hangs");
            link.wait(STUCK)?;
        }
    }
    let mut read = vec![0; pattern.len()];
    link.read(1, &mut read);
    ensure!(read == pattern, "the disk does not return what was written");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::{Direction, Request};

    /// Finishes the newest request first, some at each look.
    struct Stack {
        stack: Vec<usize>,
        published: usize,
        most: usize,
        data: Vec<u8>,
        buffers: Vec<Vec<u8>>,
    }

    impl Link for Stack {
        fn sectors(&self) -> u64 {
            2048
        }
        fn submit(&mut self, slot: usize, request: Request) {
            assert!(!self.stack.contains(&slot), "{slot} is in flight");
            assert!(request.sector * 512 + request.len as u64 <= 2048 * 512);
            self.stack.push(slot);
            match request.direction {
                Direction::Write => self.data = self.buffers[slot].clone(),
                Direction::Read => self.buffers[slot] = self.data.clone(),
            }
        }
        fn publish(&mut self) -> io::Result<()> {
            self.published = self.stack.len();
            self.most = self.most.max(self.published);
            Ok(())
        }
        fn finished(&mut self) -> io::Result<Option<usize>> {
            self.published = self.published.saturating_sub(1);
            if self.published % 3 == 2 {
                return Ok(None);
            }
            Ok(self.stack.pop())
        }
        fn wait(&mut self, _: Duration) -> io::Result<()> {
            Ok(())
        }
        fn fill(&mut self, slot: usize, bytes: &[u8]) {
            self.buffers[slot] = bytes.to_vec();
        }
        fn read(&self, slot: usize, bytes: &mut [u8]) {
            bytes.copy_from_slice(&self.buffers[slot]);
        }
    }

    fn stack() -> Stack {
        Stack {
            stack: Vec::new(),
            published: 0,
            most: 0,
            data: Vec::new(),
            buffers: vec![Vec::new(); 128],
        }
    }

    #[test]
    fn each_row_keeps_its_depth_and_leaves_nothing_behind() {
        for row in crate::rows::all() {
            let mut link = stack();
            let mut load = Load::new(&mut link, row, u64::MAX, 1);
            let mut count = load.run(Until::Finished(1000)).expect("runs").count();
            assert!(count >= 1000);
            count += load.drain().expect("drains").count();
            assert!(count >= 1000 && load.in_flight == 0);
            assert_eq!(link.most, row.depth);
            assert!(link.stack.is_empty());
        }
    }

    #[test]
    fn a_disk_that_forgets_is_found_out() {
        prepare(&mut stack(), u64::MAX, true).expect("it keeps one buffer");
        let mut link = stack();
        link.buffers.truncate(128);
        struct Forgetful(Stack);
        impl Link for Forgetful {
            fn sectors(&self) -> u64 {
                self.0.sectors()
            }
            fn submit(&mut self, slot: usize, request: Request) {
                self.0.submit(slot, request);
                self.0.data.clear();
                self.0.data.resize(4096, 0);
            }
            fn publish(&mut self) -> io::Result<()> {
                self.0.publish()
            }
            fn finished(&mut self) -> io::Result<Option<usize>> {
                self.0.finished()
            }
            fn wait(&mut self, timeout: Duration) -> io::Result<()> {
                self.0.wait(timeout)
            }
            fn fill(&mut self, slot: usize, bytes: &[u8]) {
                self.0.fill(slot, bytes);
            }
            fn read(&self, slot: usize, bytes: &mut [u8]) {
                self.0.read(slot, bytes);
            }
        }
        assert!(prepare(&mut Forgetful(stack()), u64::MAX, true).is_err());
        prepare(&mut Forgetful(stack()), u64::MAX, false).expect("as it may");
    }
}
