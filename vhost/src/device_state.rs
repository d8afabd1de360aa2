//! What a device remembers of its driver, as bytes: written by one back-end, read by the one that goes on.
//!
//! | bytes | |
//! | --- | --- |
//! | 0..8 | `vnvmfblk` |
//! | 8..10 | version, 1; a version says what is at which place, and what is behind is ignored |
//! | 10 | cache mode: 0 write-through, 1 write-back |
//! | 11..12 | 0 |
//! | 12..16 | logical block size, bytes |
//! | 16..24 | capacity, sectors of 512 bytes |
//! | 24..44 | serial |
//! | 44..60 | identity of the storage; zeroes: it has none |
//!
//! Numbers are little-endian. The bytes have been in someone else's hands: every one of them is checked.

use crate::device::Device;

/// Bytes of a state.
pub(crate) const STATE_LEN: usize = 60;

const MAGIC: [u8; 8] = *b"vnvmfblk";
const VERSION: u16 = 1;

/// A state that cannot be gone on with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StateError {
    #[error("it is not the state of a disk of this kind")]
    Foreign,
    #[error(
        "it is of version {0}, and this program knows {VERSION}: use the version that saved it, or a newer one"
    )]
    Version(u16),
    #[error("it is cut short, at {0} bytes of {STATE_LEN}")]
    Short(usize),
    #[error("a cache mode of {0}")]
    Writeback(u8),
    #[error(
        "it is of the disk with serial '{}', and this one has '{}'",
        show(saved),
        show(here)
    )]
    Serial { saved: [u8; 20], here: [u8; 20] },
    #[error("it is of another namespace: {saved:032x}, and this one is {here:032x}")]
    Identity { saved: u128, here: u128 },
    #[error("its blocks have {saved} bytes, and those of this disk {here}")]
    BlockSize { saved: u32, here: u32 },
    #[error("its disk has {saved} sectors, and this one only {here}")]
    Smaller { saved: u64, here: u64 },
}

fn show(serial: &[u8; 20]) -> String {
    let end = serial.iter().position(|byte| *byte == 0);
    serial[..end.unwrap_or(serial.len())]
        .escape_ascii()
        .to_string()
}

/// A device's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeviceState {
    /// The cache mode, 0 or 1.
    pub(crate) writeback: u8,
    /// Sectors of 512 bytes.
    pub(crate) capacity: u64,
    block_size: u32,
    serial: [u8; 20],
    /// 0: none.
    identity: u128,
}

impl DeviceState {
    /// The state of a device whose driver chose this cache mode.
    pub(crate) fn of(device: &Device, writeback: u8) -> Self {
        let options = device.options();
        Self {
            writeback,
            capacity: device.capacity(),
            block_size: options.block_size,
            serial: options.serial,
            identity: options.identity.map_or(0, u128::from_be_bytes),
        }
    }

    pub(crate) fn to_bytes(self) -> [u8; STATE_LEN] {
        let mut bytes = [0; STATE_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10] = self.writeback;
        bytes[12..16].copy_from_slice(&self.block_size.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.capacity.to_le_bytes());
        bytes[24..44].copy_from_slice(&self.serial);
        bytes[44..].copy_from_slice(&self.identity.to_be_bytes());
        bytes
    }

    /// Reads a state; `None` when there are no bytes, which says nothing.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Self>, StateError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let Some((magic, rest)) = bytes.split_first_chunk() else {
            return Err(StateError::Foreign);
        };
        if *magic != MAGIC {
            return Err(StateError::Foreign);
        }
        if let Some(version) = rest.first_chunk().map(|bytes| u16::from_le_bytes(*bytes))
            && version != VERSION
        {
            return Err(StateError::Version(version));
        }
        let short = StateError::Short(bytes.len());
        let bytes: &[u8; STATE_LEN] = bytes.first_chunk().ok_or(short)?;
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[at + byte]));
        let mut serial = [0; 20];
        serial.copy_from_slice(&bytes[24..44]);
        let mut identity = [0; 16];
        identity.copy_from_slice(&bytes[44..]);
        let writeback = bytes[10];
        if writeback > 1 {
            return Err(StateError::Writeback(writeback));
        }
        Ok(Some(Self {
            writeback,
            capacity: u64::from(word(16)) | u64::from(word(20)) << 32,
            block_size: word(12),
            serial,
            identity: u128::from_be_bytes(identity),
        }))
    }

    /// Whether a guest that had the disk of `self` may go on with that of `here`.
    pub(crate) fn check(&self, here: &Self) -> Result<(), StateError> {
        let saved = self;
        if saved.identity != here.identity && saved.identity != 0 && here.identity != 0 {
            return Err(StateError::Identity {
                saved: saved.identity,
                here: here.identity,
            });
        }
        if saved.serial != here.serial {
            return Err(StateError::Serial {
                saved: saved.serial,
                here: here.serial,
            });
        }
        if saved.block_size != here.block_size {
            return Err(StateError::BlockSize {
                saved: saved.block_size,
                here: here.block_size,
            });
        }
        if saved.capacity > here.capacity {
            return Err(StateError::Smaller {
                saved: saved.capacity,
                here: here.capacity,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guest::options;

    fn state() -> DeviceState {
        DeviceState::of(&Device::new(options()), 1)
    }

    #[test]
    fn a_state_looks_as_it_always_will() {
        let mut options = options();
        options.identity = Some(*b"IDENTITY-OF-DISK");
        let state = DeviceState::of(&Device::new(options), 0);
        let expected = [
            &b"vnvmfblk"[..],
            &[1, 0, 0, 0, 0, 2, 0, 0],
            &[0, 8, 0, 0, 0, 0, 0, 0],
            b"SERIAL-OF-THE-DISK-1IDENTITY-OF-DISK",
        ];
        assert_eq!(state.to_bytes()[..], expected.concat());
    }

    #[test]
    fn no_state_is_fine_and_part_of_one_is_not() {
        let bytes = state().to_bytes();
        assert_eq!(DeviceState::parse(&[]), Ok(None));
        for len in 1..8 {
            assert_eq!(DeviceState::parse(&bytes[..len]), Err(StateError::Foreign));
        }
        for len in 8..STATE_LEN {
            assert_eq!(
                DeviceState::parse(&bytes[..len]),
                Err(StateError::Short(len))
            );
        }
        let longer = [&bytes[..], b"something new"].concat();
        assert_eq!(DeviceState::parse(&longer), Ok(Some(state())));
    }

    #[test]
    fn what_a_guest_could_not_go_on_with_is_told_apart() {
        let here = state();
        let changed = |change: fn(&mut DeviceState)| {
            let mut saved = state();
            change(&mut saved);
            let error = saved.check(&here).expect_err("another disk");
            error.to_string()
        };
        let said = [
            changed(|saved| saved.serial = *b"disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
            changed(|saved| saved.block_size = 4096),
            changed(|saved| saved.capacity += 1),
        ];
        assert_eq!(
            said,
            [
                "it is of the disk with serial 'disk', and this one has 'SERIAL-OF-THE-DISK-1'",
                "its blocks have 4096 bytes, and those of this disk 512",
                "its disk has 2049 sectors, and this one only 2048",
            ]
        );
        let (mut saved, mut here) = (state(), state());
        saved.identity = 1;
        saved.check(&here).expect("nothing to compare with");
        here.identity = 2;
        let error = saved.check(&here).expect_err("another disk");
        assert!(matches!(error, StateError::Identity { saved: 1, here: 2 }));
        saved.identity = 2;
        // The disk has grown since.
        saved.capacity -= 1;
        saved.check(&here).expect("the same");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_state_or_refused(mut bytes: Vec<u8>, genuine: bool) {
            if genuine {
                let whole = state().to_bytes();
                let len = bytes.len().min(10);
                bytes[..len].copy_from_slice(&whole[..len]);
            }
            if let Ok(Some(parsed)) = DeviceState::parse(&bytes) {
                prop_assert!(parsed.writeback <= 1);
                let again = parsed.to_bytes();
                prop_assert_eq!(&again[..11], &bytes[..11]);
                prop_assert_eq!(&again[12..], &bytes[12..STATE_LEN]);
            }
        }
    }
}
