//! The in-flight region of a session, and rings that stop with requests left in it.

use std::fs::File;

use vhost::vhost_user::Result as VhostResult;
use vhost::vhost_user::message::{
    VhostUserInflight, VhostUserProtocolFeatures, VhostUserVringState,
};

use super::{FrontEnd, refuse};
use crate::device::GET_VRING_BASE_SKIP_DRAIN;
use crate::inflight::{BadInflight, Part, Region, RegionShape, Tail};
use crate::vring::Kick;

/// Which region rings are started with.
#[derive(Debug, Default)]
pub(super) enum InflightRegion {
    /// None yet.
    #[default]
    None,
    /// The front-end's was refused. What it says of requests in flight is not known, so nothing may
    /// be taken from a ring: it could have been answered.
    Refused,
    /// None of the front-end's, when a ring was started. Each has its books in private memory, and so is
    /// what stands for the tail.
    Private,
    /// The front-end's.
    Kept(Region),
}

impl FrontEnd {
    /// Makes a region for the front-end, which hands it over later to have it used.
    pub(super) fn make_region(
        &mut self,
        asked: &VhostUserInflight,
    ) -> VhostResult<(VhostUserInflight, File)> {
        let (shape, file) = Region::make(asked.num_queues, asked.queue_size).map_err(refuse)?;
        let made = VhostUserInflight::new(shape.len, shape.offset, shape.rings, shape.entries);
        Ok((made, file))
    }

    /// Goes on with a region of the front-end's.
    pub(super) fn take_region(&mut self, told: &VhostUserInflight, file: File) -> VhostResult<()> {
        if let Some(at) = self.vrings.iter().position(|vring| vring.running) {
            return Err(refuse(format!(
                "ring {at} is running with another in-flight region"
            )));
        }
        let shape = RegionShape {
            len: told.mmap_size,
            offset: told.mmap_offset,
            rings: told.num_queues,
            entries: told.queue_size,
        };
        match Region::open(shape, file) {
            Ok(region) => {
                let tail = region.tail();
                self.recall_cache_mode(&tail);
                self.use_region(InflightRegion::Kept(region), Some(tail));
                self.start_all_ready();
                Ok(())
            }
            Err(error) => {
                self.use_region(InflightRegion::Refused, None);
                Err(refuse(error))
            }
        }
    }

    /// Puts another region in force, and its tail. No ring may be running.
    fn use_region(&mut self, region: InflightRegion, tail: Option<Tail>) {
        let before = std::mem::replace(&mut self.inflight, region);
        let had_tail = matches!(before, InflightRegion::Private | InflightRegion::Kept(_));
        if had_tail || tail.is_some() {
            self.rings.region(tail);
        }
    }

    /// Lets the region go, at the end of the session.
    pub(super) fn drop_region(&mut self) {
        self.use_region(InflightRegion::None, None);
    }

    /// Makes the region one that no ring has run on, as a reset wants it: the front-end may go on with
    /// it and need not hand over another one.
    pub(super) fn reset_region(&mut self) {
        match &self.inflight {
            InflightRegion::Kept(region) => region.forget(),
            InflightRegion::Refused => self.inflight = InflightRegion::None,
            InflightRegion::None | InflightRegion::Private => {}
        }
    }

    /// The part of the region that ring `at`, of `size` entries, starts with.
    pub(super) fn part(&mut self, at: usize, size: u16) -> VhostResult<Part> {
        if matches!(self.inflight, InflightRegion::None) {
            let tail = Tail::elsewhere(true, false).map_err(refuse)?;
            self.use_region(InflightRegion::Private, Some(tail));
        }
        match &self.inflight {
            InflightRegion::None | InflightRegion::Private => Part::private(size).map_err(refuse),
            InflightRegion::Kept(region) => {
                let none = || refuse(format!("ring {at}: {}", BadInflight::NoPart));
                region.part(at, size).ok_or_else(none)
            }
            InflightRegion::Refused => Err(refuse(format!(
                "ring {at} cannot start: the in-flight region was refused"
            ))),
        }
    }

    /// The front-end keeps the region, so that requests can be left in it.
    fn keeps_region(&self) -> bool {
        matches!(self.inflight, InflightRegion::Kept(_))
    }

    /// The front-end accepted `features`, and those that they mean nothing without.
    fn negotiated(&self, features: u64) -> bool {
        let needed = VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT;
        let features = features | needed.bits();
        self.protocol_features & features == features
    }

    /// True when there is a request that stops a ring without waiting for its requests.
    pub(crate) fn may_skip_drain(&self) -> bool {
        self.negotiated(GET_VRING_BASE_SKIP_DRAIN)
    }

    /// True when GET_VRING_BASE leaves requests in flight. It does not where there is another request
    /// for that.
    pub(super) fn base_leaves_requests(&self) -> bool {
        self.negotiated(0) && !self.may_skip_drain()
    }

    /// Stops ring `at` and leaves its requests in the region, where the front-end keeps that; otherwise
    /// it waits for them.
    pub(super) fn suspend(&mut self, at: usize) {
        if !self.keeps_region() {
            self.stop(at);
            return;
        }
        let Some(vring) = self.vrings.get_mut(at) else {
            return;
        };
        if std::mem::replace(&mut vring.running, false) {
            match self.rings.suspend(at) {
                Some(queue) => vring.base = queue.next_avail(),
                None => tracing::error!(ring = at, "a running ring did not come back"),
            }
        }
    }

    /// Waits until nothing is carried out late, before the guest goes on elsewhere: once the last ring has stopped.
    pub(super) fn settle(&self) {
        if self.vrings.iter().all(|vring| !vring.running) {
            self.rings.settle();
        }
    }

    /// Stops ring `at`, whose guest may be about to go on elsewhere. `leave`: as [`Self::suspend`].
    fn halt(&mut self, at: usize, leave: bool) {
        let ran = self.vrings.get(at).is_some_and(|vring| vring.running);
        if leave {
            self.suspend(at);
        } else {
            self.stop(at);
        }
        // A region goes with the guest, and its tail with what has to be known.
        if ran && self.is_logging() && !(leave && self.keeps_region()) {
            self.settle();
        }
    }

    /// Stops ring `at` for SET_VRING_ENABLE. QEMU disables all rings before it asks for their bases, so this is
    /// where they stop, as they would there; a ring that is enabled again takes up what was left.
    pub(super) fn disable(&mut self, at: usize) {
        self.halt(at, self.base_leaves_requests());
    }

    /// As [`Self::suspend`], for all rings.
    pub(super) fn suspend_all(&mut self) {
        for at in 0..self.vrings.len() {
            self.suspend(at);
        }
    }

    /// Stops a ring for GET_VRING_BASE, or its like that leaves requests in flight, and says where it
    /// stopped. A ring that does not exist stands at 0: there is no way to refuse these requests.
    pub(crate) fn stop_at_base(&mut self, index: u32, leave: bool) -> VhostUserVringState {
        let Ok((at, _)) = self.vring(index) else {
            if self.complaints.allow() {
                tracing::warn!(ring = index, "no such ring to give the base of");
            }
            return VhostUserVringState::new(index, 0);
        };
        self.halt(at, leave);
        self.vrings[at].kick = Kick::Stopped;
        VhostUserVringState::new(index, u32::from(self.vrings[at].base))
    }
}
