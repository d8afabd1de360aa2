//! Generations of guest memory that a queue still needs: the newest, and older ones with requests.

use std::sync::Arc;

use crate::memory::GuestMap;

/// A generation, and the requests in flight whose memory it holds.
#[derive(Debug)]
struct Generation {
    number: u32,
    map: Arc<GuestMap>,
    in_flight: u32,
}

/// The generations of one queue.
#[derive(Debug)]
pub(crate) struct Generations {
    current: Generation,
    old: Vec<Generation>,
}

impl Generations {
    pub(crate) fn new(map: Arc<GuestMap>) -> Self {
        Self {
            current: Generation {
                number: 0,
                map,
                in_flight: 0,
            },
            old: Vec::new(),
        }
    }

    /// The newest generation.
    pub(crate) fn current(&self) -> &GuestMap {
        &self.current.map
    }

    /// Puts a new generation in force. The one before stays while it has requests in flight.
    pub(crate) fn replace(&mut self, map: Arc<GuestMap>) {
        let next = Generation {
            number: self.current.number.wrapping_add(1),
            map,
            in_flight: 0,
        };
        let before = std::mem::replace(&mut self.current, next);
        if before.in_flight > 0 {
            self.old.push(before);
        }
    }

    /// Number of the newest generation.
    pub(crate) fn number(&self) -> u32 {
        self.current.number
    }

    /// Counts one more request against the newest generation.
    pub(crate) fn acquire(&mut self) {
        self.current.in_flight += 1;
    }

    /// The generation of a request in flight.
    pub(crate) fn get(&self, number: u32) -> Option<&GuestMap> {
        if number == self.current.number {
            return Some(&self.current.map);
        }
        let old = self.old.iter().find(|old| old.number == number)?;
        Some(&old.map)
    }

    /// Counts a request as over.
    pub(crate) fn release(&mut self, number: u32) {
        if number == self.current.number {
            self.current.in_flight = self.current.in_flight.saturating_sub(1);
            return;
        }
        if let Some(at) = self.old.iter().position(|old| old.number == number) {
            let old = &mut self.old[at];
            old.in_flight = old.in_flight.saturating_sub(1);
            if old.in_flight == 0 {
                self.old.swap_remove(at);
            }
        }
    }

    /// Requests in flight, of all generations.
    pub(crate) fn in_flight(&self) -> usize {
        let old = self.old.iter().map(|old| old.in_flight);
        old.chain([self.current.in_flight])
            .map(|count| count as usize)
            .sum()
    }

    /// Keeps mapped for ever what requests in flight may still be read from or written to.
    pub(crate) fn leak(&mut self) {
        for generation in self.old.drain(..).filter(|old| old.in_flight > 0) {
            std::mem::forget(generation.map);
        }
        if self.current.in_flight > 0 {
            std::mem::forget(Arc::clone(&self.current.map));
        }
    }
}
