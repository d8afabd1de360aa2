//! What a descriptor chain asks of the device: header, payload and memory made into an operation.

use memdesc::{MemSink, MemSource, Segment};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES};

use crate::blk::request::{
    BlkStatus, HEADER, Header, Kind, Operation, RangeBytes, RangeLimits, SectorRanges, is_transfer,
};
use crate::chain::{BrokenRing, Chain, Half};
use crate::device::{Device, has};
use crate::memory::GuestMap;

/// Why a chain does not become a request for the worker.
pub(crate) enum NotTaken {
    /// It is answered here with a status, after this many bytes were written besides that.
    Answer(BlkStatus, u32),
    Broken(BrokenRing),
}

impl From<BrokenRing> for NotTaken {
    fn from(reason: BrokenRing) -> Self {
        Self::Broken(reason)
    }
}

impl From<BlkStatus> for NotTaken {
    fn from(status: BlkStatus) -> Self {
        Self::Answer(status, 0)
    }
}

/// One chain, and all that its meaning depends on.
pub(crate) struct Parser<'a> {
    pub(crate) chain: &'a Chain,
    pub(crate) map: &'a GuestMap,
    pub(crate) device: &'a Device,
    /// Features that the driver accepted.
    pub(crate) features: u64,
    /// Writes have to be durable before they are answered.
    pub(crate) write_through: bool,
}

impl Parser<'_> {
    /// Makes out what the chain asks. `lists` gives storage for segments.
    ///
    /// The header and the payload of a request that is not a transfer are copied out once, here,
    /// and never looked at in guest memory again.
    pub(crate) fn parse(
        &self,
        lists: &mut impl FnMut() -> Vec<Segment>,
    ) -> Result<Operation, NotTaken> {
        let readable = self.chain.len(Half::Readable);
        let to_device = readable
            .checked_sub(HEADER as u64)
            .ok_or(BlkStatus::IoError)?;
        let from_device = self.chain.len(Half::Writable).saturating_sub(1);
        let mut header = [0; HEADER];
        self.chain.copy_out(self.map, 0, &mut header)?;
        let Header { kind, sector } = Header::parse(&header);
        let kind = kind
            .filter(|kind| self.offers(*kind))
            .ok_or(BlkStatus::Unsupported)?;
        let options = self.device.options();
        let changes = matches!(kind, Kind::Write | Kind::Discard | Kind::WriteZeroes);
        if options.read_only && changes {
            return Err(BlkStatus::IoError.into());
        }
        let fua = self.write_through;
        Ok(match kind {
            Kind::Read if is_transfer(sector, from_device) => {
                let list = self.segments(Half::Writable, 0, from_device, lists())?;
                let sink = MemSink::from_segments(list);
                Operation::Read { sector, sink }
            }
            Kind::Write if is_transfer(sector, to_device) => {
                let list = self.segments(Half::Readable, HEADER as u64, to_device, lists())?;
                let source = MemSource::from_segments(list);
                Operation::Write {
                    sector,
                    source,
                    fua,
                }
            }
            Kind::Read | Kind::Write => return Err(BlkStatus::IoError.into()),
            Kind::Flush => Operation::Flush,
            Kind::GetId => return Err(self.identify(from_device)?),
            Kind::Discard => Operation::Discard(self.ranges(
                to_device,
                RangeLimits {
                    segments: options.max_discard_seg,
                    sectors: options.max_discard_sectors,
                    may_unmap: false,
                },
            )?),
            Kind::WriteZeroes => {
                let limits = RangeLimits {
                    segments: options.max_write_zeroes_seg,
                    sectors: options.max_write_zeroes_sectors,
                    may_unmap: true,
                };
                let ranges = self.ranges(to_device, limits)?;
                Operation::WriteZeroes { ranges, fua }
            }
        })
    }

    /// False for the kinds that a driver must negotiate and did not.
    fn offers(&self, kind: Kind) -> bool {
        match kind {
            Kind::Discard => has(self.features, VIRTIO_BLK_F_DISCARD),
            Kind::WriteZeroes => has(self.features, VIRTIO_BLK_F_WRITE_ZEROES),
            Kind::Read | Kind::Write | Kind::Flush | Kind::GetId => true,
        }
    }

    fn segments(
        &self,
        half: Half,
        skip: u64,
        len: u64,
        mut list: Vec<Segment>,
    ) -> Result<Vec<Segment>, BrokenRing> {
        list.clear();
        self.chain.segments(self.map, half, skip, len, &mut list)?;
        Ok(list)
    }

    /// Writes as much of the serial as there is room for, and says how to answer a GET_ID.
    fn identify(&self, room: u64) -> Result<NotTaken, BrokenRing> {
        let serial = &self.device.options().serial;
        let len = usize::try_from(room).map_or(serial.len(), |room| room.min(serial.len()));
        if len == 0 {
            return Ok(BlkStatus::IoError.into());
        }
        self.chain.copy_in(self.map, &serial[..len])?;
        let written = u32::try_from(len).unwrap_or(u32::MAX);
        Ok(NotTaken::Answer(BlkStatus::Ok, written))
    }

    /// The segments of a discard or write-zeroes, in `len` bytes behind the header.
    fn ranges(&self, len: u64, limits: RangeLimits) -> Result<SectorRanges, NotTaken> {
        let mut bytes = RangeBytes::with_len(len, limits).ok_or(BlkStatus::IoError)?;
        self.chain
            .copy_out(self.map, HEADER as u64, bytes.as_mut_slice())?;
        Ok(bytes.parse(limits)?)
    }
}
