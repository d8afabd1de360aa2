//! The cache mode that the driver has chosen: kept with the requests in flight, since a driver that was told that its
//! writes are durable is not asked again when its back-end is another one.

use super::FrontEnd;
use super::inflight::InflightRegion;
use crate::inflight::Tail;

impl FrontEnd {
    /// The driver has chosen it.
    pub(super) fn set_cache_mode(&mut self, writeback: u8) {
        self.writeback = writeback;
        if let InflightRegion::Kept(region) = &self.inflight {
            region.tail().keep_cache_mode(writeback);
        }
    }

    /// Goes on with what was chosen in an earlier life, if this region is of one.
    pub(super) fn recall_cache_mode(&mut self, tail: &Tail) {
        match tail.cache_mode() {
            Some(writeback) => self.writeback = writeback,
            None => tail.keep_cache_mode(self.writeback),
        }
    }
}
