//! What a disk is, so far as its guest can tell, and whether another process has the same.

use nvmf::host::NamespaceInfo;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vhost_user_blk::Device;

/// A disk as one process has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Description {
    /// `attach` or `serve`.
    pub(crate) command: String,
    /// NQN of its subsystem.
    pub(crate) subsystem: String,
    nsid: u32,
    uuid: Option<Uuid>,
    nguid: Option<[u8; 16]>,
    eui64: Option<[u8; 8]>,
    block_size: u32,
    block_count: u64,
    /// Bytes of what the guest takes for a block; `None` from a process that does not tell.
    #[serde(default)]
    guest_block: Option<u32>,
    features: u64,
    protocol_features: u64,
    queues: u16,
    segments: u32,
}

impl Description {
    /// Of a disk of this process.
    pub(crate) fn new(
        command: &str,
        subsystem: &str,
        namespace: &NamespaceInfo,
        device: &Device,
    ) -> Self {
        Self {
            command: command.to_owned(),
            subsystem: subsystem.to_owned(),
            nsid: namespace.nsid,
            uuid: namespace.uuid,
            nguid: namespace.nguid,
            eui64: namespace.eui64,
            block_size: namespace.block_size,
            block_count: namespace.block_count,
            guest_block: Some(device.options().block_size),
            features: device.features(),
            protocol_features: device.protocol_features(),
            queues: device.options().num_queues,
            segments: device.options().seg_max,
        }
    }

    /// Checks that a guest which has this disk can go on with `other`.
    ///
    /// # Errors
    /// What is not the same, and how to make it so.
    pub(crate) fn check(&self, other: &Self) -> Result<(), String> {
        if self.command != other.command {
            return Err(format!(
                "it is a disk of '{}', not of '{}'",
                self.command, other.command
            ));
        }
        let ids = |it: &Self| (it.uuid, it.nguid, it.eui64);
        let unnamed = ids(self) == (None, None, None);
        let elsewhere = (&self.subsystem, self.nsid) != (&other.subsystem, other.nsid);
        if ids(self) != ids(other) || (unnamed && elsewhere) {
            return Err(format!(
                "it is another namespace, {} in place of {}",
                other.name(),
                self.name()
            ));
        }
        if self.block_size != other.block_size {
            return Err(format!(
                "its blocks have {} bytes there and {} here",
                self.block_size, other.block_size
            ));
        }
        if let (Some(there), Some(here)) = (self.guest_block, other.guest_block)
            && there != here
        {
            return Err(format!(
                "its guest knows blocks of {there} bytes there and {here} here; give both --emulate-512, or none"
            ));
        }
        if self.block_count > other.block_count {
            return Err(format!(
                "it has {} blocks there and {} here",
                self.block_count, other.block_count
            ));
        }
        let read_only = |it: &Self| it.features & Device::READ_ONLY != 0;
        if read_only(self) != read_only(other) {
            return Err(
                "only one of the two is read-only; give both --read-only, or none".to_owned(),
            );
        }
        let lost = self.features & !other.features;
        let protocol = self.protocol_features & !other.protocol_features;
        if lost != 0 || protocol != 0 {
            return Err(format!(
                "it lacks features that the guest may use ({lost:#x}, and {protocol:#x} of the protocol)"
            ));
        }
        if self.queues > other.queues {
            return Err(format!(
                "it has {} queues in place of {}; give --num-queues {}",
                other.queues, self.queues, self.queues
            ));
        }
        if self.segments > other.segments {
            return Err(format!(
                "its requests have {} segments at most, in place of {}",
                other.segments, self.segments
            ));
        }
        Ok(())
    }

    fn name(&self) -> String {
        match self.uuid {
            Some(uuid) => format!("{}?uuid={uuid}", self.subsystem),
            None => format!("{}?nsid={}", self.subsystem, self.nsid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> Description {
        Description {
            command: "attach".to_owned(),
            subsystem: "nqn.2026-01.org.example:a".to_owned(),
            nsid: 1,
            uuid: Some(Uuid::from_u128(1)),
            nguid: None,
            eui64: None,
            block_size: 512,
            block_count: 1000,
            guest_block: Some(512),
            features: 0b1100_0000,
            protocol_features: 0b11,
            queues: 4,
            segments: 126,
        }
    }

    #[test]
    fn the_same_and_more_is_good_enough() {
        let old = description();
        let more = Description {
            // Another way to the same, which has grown.
            subsystem: "nqn.2026-01.org.example:b".to_owned(),
            block_count: 2000,
            guest_block: None,
            features: old.features | 1,
            protocol_features: 0b111,
            queues: 8,
            ..old.clone()
        };
        assert_eq!(old.check(&old), Ok(()));
        assert_eq!(old.check(&more), Ok(()));
    }

    #[test]
    fn whatever_the_guest_would_miss_is_named() {
        let old = description();
        type Change = fn(&mut Description);
        let changes: [(Change, &str); 10] = [
            (|it| it.command = "serve".to_owned(), "'serve'"),
            (|it| it.uuid = Some(Uuid::from_u128(2)), "another namespace"),
            (|it| it.nguid = Some([1; 16]), "another namespace"),
            (|it| it.block_size = 4096, "4096"),
            (|it| it.guest_block = Some(4096), "--emulate-512"),
            (|it| it.block_count = 999, "999"),
            (|it| it.features = 0b0100_0000, "0x80"),
            (|it| it.features |= Device::READ_ONLY, "--read-only"),
            (|it| it.queues = 3, "--num-queues 4"),
            (|it| it.segments = 1, "segments"),
        ];
        for (change, word) in changes {
            let mut new = old.clone();
            change(&mut new);
            let reason = old.check(&new).unwrap_err();
            assert!(reason.contains(word), "{word}: {reason}");
        }
    }

    #[test]
    fn namespaces_without_a_name_of_their_own_are_told_by_subsystem_and_number() {
        let old = Description {
            uuid: None,
            ..description()
        };
        assert_eq!(old.check(&old), Ok(()));
        let other = Description {
            nsid: 2,
            ..old.clone()
        };
        assert!(old.check(&other).is_err());
    }
}
