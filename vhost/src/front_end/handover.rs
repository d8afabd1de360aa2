//! What a session has come to, as the messages that lead there, and rings that pause meanwhile.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};

use super::FrontEnd;
use super::inflight::InflightRegion;
use crate::blk::config::WRITEBACK;
use crate::device::protocol_features;
use crate::handover::{Record, Recorded};
use crate::inflight::RegionShape;
use crate::memory::RegionSpec;
use crate::queue::Queue;
use crate::vring::{Kick, Vring};

/// In place of a descriptor, where the front-end gave none.
const NO_DESCRIPTOR: u64 = 1 << 8;
/// The version of the protocol, and no flag.
const FLAGS: u32 = 1;

/// A message with its files.
fn message(request: FrontendReq, body: &[u8], files: Vec<Arc<File>>) -> Recorded {
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let header = [request as u32, FLAGS, size].map(u32::to_le_bytes);
    Recorded {
        bytes: [header.as_flattened(), body].concat(),
        files,
    }
}

fn number(request: FrontendReq, value: u64) -> Recorded {
    message(request, &value.to_le_bytes(), Vec::new())
}

fn ring_state(request: FrontendReq, ring: u32, value: u32) -> Recorded {
    let body = [ring, value].map(u32::to_le_bytes);
    message(request, body.as_flattened(), Vec::new())
}

/// A descriptor of a ring; none where the front-end gave none.
fn ring_file(request: FrontendReq, ring: u32, file: Option<Arc<File>>) -> Recorded {
    let none = if file.is_none() { NO_DESCRIPTOR } else { 0 };
    let body = (u64::from(ring) | none).to_le_bytes();
    message(request, &body, file.into_iter().collect())
}

fn region(spec: &RegionSpec) -> [u8; 32] {
    let words = [spec.guest_addr, spec.size, spec.user_addr, spec.file_offset];
    let mut bytes = [0; 32];
    bytes.copy_from_slice(words.map(u64::to_le_bytes).as_flattened());
    bytes
}

impl FrontEnd {
    /// Stops all rings that run, with nothing in flight. From then on nothing is written to the in-flight region.
    ///
    /// # Errors
    /// Why they cannot; they run on then.
    pub(crate) fn pause(&mut self) -> Result<Vec<Queue>, String> {
        let running = self.vrings.iter().enumerate();
        let running = running.filter(|(_, vring)| vring.running);
        let running: Vec<usize> = running.map(|(at, _)| at).collect();
        let parked = self.rings.pause(&running)?;
        for queue in &parked {
            if let Some(vring) = self.vrings.get_mut(queue.index()) {
                vring.base = queue.next_avail();
            }
        }
        if matches!(self.inflight, InflightRegion::Kept(_)) {
            self.rings.region(None);
        }
        Ok(parked)
    }

    /// Has rings run again that were paused.
    pub(crate) fn resume(&mut self, parked: Vec<Queue>) {
        if let InflightRegion::Kept(region) = &self.inflight {
            self.rings.region(Some(region.tail()));
        }
        for queue in parked {
            self.rings.start(queue.index(), queue);
        }
    }

    /// Lets go of everything without a word to anybody: it is another process's.
    pub(crate) fn forget(&mut self) {
        self.vrings.fill_with(Vring::default);
        self.inflight = InflightRegion::None;
    }

    /// What the session has come to, with these rings paused.
    ///
    /// # Errors
    /// What cannot be written down.
    pub(crate) fn record(&self, parked: &[Queue]) -> Result<Record, String> {
        // Its end is near, and whoever wants the disk can come again.
        if self.is_logging() || self.transfer.is_some() {
            return Err("its VM is being migrated".to_owned());
        }
        let mut setup = Vec::new();
        if self.offered {
            setup.push(message(FrontendReq::GET_FEATURES, &[], Vec::new()));
        }
        // Others were refused, though the library took them.
        let accepted = self.protocol_features & protocol_features().bits();
        if accepted != 0 {
            setup.push(number(FrontendReq::SET_PROTOCOL_FEATURES, accepted));
        }
        if let Some(features) = self.features {
            setup.push(number(FrontendReq::SET_FEATURES, features));
        }
        let has = |feature: VhostUserProtocolFeatures| accepted & feature.bits() != 0;
        self.record_memory(
            has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS),
            &mut setup,
        );
        if self.writeback != 1 && has(VhostUserProtocolFeatures::CONFIG) {
            let offset = u32::try_from(WRITEBACK).unwrap_or(u32::MAX);
            let words = [offset, 1, VhostUserConfigFlags::WRITABLE.bits()].map(u32::to_le_bytes);
            let body = [words.as_flattened(), &[self.writeback]].concat();
            setup.push(message(FrontendReq::SET_CONFIG, &body, Vec::new()));
        }
        if let Some(channel) = self.device.backend_channel_file() {
            let channel = channel.map_err(|error| format!("the back-end's channel: {error}"))?;
            let files = vec![Arc::new(channel)];
            setup.push(message(FrontendReq::SET_BACKEND_REQ_FD, &[], files));
        }
        self.record_region(&mut setup)?;
        let mut start = Vec::new();
        for (vring, ring) in self.vrings.iter().zip(0..) {
            let broken = parked.iter().any(|queue| {
                queue.index() == usize::try_from(ring).unwrap_or(usize::MAX)
                    && queue.broken().is_some()
            });
            self.record_ring(ring, vring, &mut setup)?;
            // A ring that broke stays so.
            match &vring.kick {
                _ if broken => {}
                Kick::Stopped => {}
                kick => start.push(ring_file(
                    FrontendReq::SET_VRING_KICK,
                    ring,
                    kick.descriptor(),
                )),
            }
            let told = self.features.is_some_and(|features| {
                features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
            });
            if vring.enabled && told {
                start.push(ring_state(FrontendReq::SET_VRING_ENABLE, ring, 1));
            }
        }
        Ok(Record { setup, start })
    }

    fn record_memory(&self, slots: bool, setup: &mut Vec<Recorded>) {
        let regions = self.memory.recorded();
        if slots {
            for (spec, file) in regions {
                let body = [&[0; 8][..], &region(&spec)].concat();
                setup.push(message(FrontendReq::ADD_MEM_REG, &body, vec![file]));
            }
        } else if !regions.is_empty() {
            let count = u64::try_from(regions.len()).unwrap_or(u64::MAX);
            let mut body = count.to_le_bytes().to_vec();
            body.extend(regions.iter().flat_map(|(spec, _)| region(spec)));
            let files = regions.into_iter().map(|(_, file)| file).collect();
            setup.push(message(FrontendReq::SET_MEM_TABLE, &body, files));
        }
    }

    fn record_region(&self, setup: &mut Vec<Recorded>) -> Result<(), String> {
        match &self.inflight {
            InflightRegion::None | InflightRegion::Private => Ok(()),
            InflightRegion::Refused => {
                Err("the front-end's in-flight region was refused".to_owned())
            }
            InflightRegion::Kept(region) => {
                let (shape, file) = region.shape();
                let RegionShape {
                    len,
                    offset,
                    rings,
                    entries,
                } = shape;
                let file = file.ok_or("the in-flight region has no file")?;
                let mut body = [len, offset].map(u64::to_le_bytes).as_flattened().to_vec();
                body.extend([rings, entries].map(u16::to_le_bytes).as_flattened());
                body.extend([0; 4]);
                setup.push(message(FrontendReq::SET_INFLIGHT_FD, &body, vec![file]));
                Ok(())
            }
        }
    }

    /// What was said of a ring; nothing where it is as at the beginning.
    fn record_ring(
        &self,
        ring: u32,
        vring: &Vring,
        setup: &mut Vec<Recorded>,
    ) -> Result<(), String> {
        if vring.size != 0 {
            setup.push(ring_state(
                FrontendReq::SET_VRING_NUM,
                ring,
                vring.size.into(),
            ));
        }
        if vring.base != 0 {
            setup.push(ring_state(
                FrontendReq::SET_VRING_BASE,
                ring,
                vring.base.into(),
            ));
        }
        if let Some(addresses) = vring.addresses {
            let user = |addr| {
                let user = self.memory.user_addr(addr);
                user.ok_or_else(|| format!("ring {ring} is outside of guest memory now"))
            };
            let head = [ring, 0].map(u32::to_le_bytes);
            let words = [
                user(addresses.descriptors)?,
                user(addresses.used)?,
                user(addresses.available)?,
                0,
            ];
            let body = [
                head.as_flattened(),
                words.map(u64::to_le_bytes).as_flattened(),
            ]
            .concat();
            setup.push(message(FrontendReq::SET_VRING_ADDR, &body, Vec::new()));
        }
        let files = [
            (FrontendReq::SET_VRING_CALL, &vring.call),
            (FrontendReq::SET_VRING_ERR, &vring.err),
        ];
        for (request, signal) in files {
            if let Some(signal) = signal {
                setup.push(ring_file(request, ring, Some(signal.file())));
            }
        }
        Ok(())
    }
}
