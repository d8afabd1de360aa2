//! Whether the namespace that came back is the one that was lost.

use nvmf::host::{NamespaceInfo, NamespaceSelector};

/// Why it is not, or cannot be used in its place.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotTheSame {
    /// It is another one.
    #[error("it has {found} in place of {lost}, which the guest has as its disk")]
    Other {
        /// What there is.
        found: String,
        /// What there was.
        lost: String,
    },
    /// It was formatted anew.
    #[error("{name} has blocks of {found} bytes now; the guest's disk has blocks of {lost}")]
    BlockSize {
        /// The namespace.
        name: String,
        /// What there is.
        found: u32,
        /// What there was.
        lost: u32,
    },
    /// It is too small.
    #[error("{name} has {found} blocks now; the guest's disk has {lost}")]
    Smaller {
        /// The namespace.
        name: String,
        /// What there is.
        found: u64,
        /// What there was.
        lost: u64,
    },
}

/// It can be told from others wherever it is found.
pub(crate) fn has_own_name(namespace: &NamespaceInfo) -> bool {
    namespace.uuid.is_some() || namespace.nguid.is_some() || namespace.eui64.is_some()
}

/// How to find a namespace again: by what is its own, if it has that.
pub(crate) fn selector(lost: &NamespaceInfo) -> NamespaceSelector {
    match (lost.uuid, lost.nguid) {
        (Some(uuid), _) => NamespaceSelector::Uuid(uuid),
        (None, Some(nguid)) => NamespaceSelector::Nguid(nguid),
        (None, None) => NamespaceSelector::Nsid(lost.nsid),
    }
}

/// Compares what was found with what was lost.
///
/// # Errors
/// [`NotTheSame`] names both.
pub(crate) fn verify(lost: &NamespaceInfo, found: &NamespaceInfo) -> Result<(), NotTheSame> {
    let same_ids =
        lost.uuid == found.uuid && lost.nguid == found.nguid && lost.eui64 == found.eui64;
    if !same_ids {
        return Err(NotTheSame::Other {
            found: name(found),
            lost: name(lost),
        });
    }
    if lost.block_size != found.block_size {
        return Err(NotTheSame::BlockSize {
            name: name(found),
            found: found.block_size,
            lost: lost.block_size,
        });
    }
    if lost.block_count > found.block_count {
        return Err(NotTheSame::Smaller {
            name: name(found),
            found: found.block_count,
            lost: lost.block_count,
        });
    }
    Ok(())
}

/// Everything that a namespace is called.
fn name(namespace: &NamespaceInfo) -> String {
    let mut name = format!("namespace {}", namespace.nsid);
    if let Some(uuid) = namespace.uuid {
        name += &format!(", uuid={uuid}");
    }
    if let Some(nguid) = namespace.nguid {
        name += &format!(", nguid={:032x}", u128::from_be_bytes(nguid));
    }
    if let Some(eui64) = namespace.eui64 {
        name += &format!(", eui64={:016x}", u64::from_be_bytes(eui64));
    }
    name
}

#[cfg(test)]
mod tests {
    use nvmf::host::OptimalIo;
    use uuid::Uuid;

    use super::*;

    fn namespace() -> NamespaceInfo {
        NamespaceInfo {
            nsid: 1,
            block_size: 512,
            block_count: 100,
            uuid: Some(Uuid::from_u128(1)),
            nguid: Some([2; 16]),
            eui64: None,
            write_protected: false,
            deallocated_reads_zero: false,
            write_zeroes_deallocates: false,
            optimal: OptimalIo::default(),
            anagrpid: 0,
        }
    }

    #[test]
    fn the_same_namespace_may_have_grown_and_have_another_number() {
        let found = NamespaceInfo {
            nsid: 9,
            block_count: 101,
            ..namespace()
        };
        assert_eq!(verify(&namespace(), &namespace()), Ok(()));
        assert_eq!(verify(&namespace(), &found), Ok(()));
    }

    #[test]
    fn another_identifier_block_size_or_a_smaller_size_is_not_the_same_and_both_are_named() {
        let refused = |change: fn(&mut NamespaceInfo), named: [&str; 2]| {
            let mut found = namespace();
            change(&mut found);
            let error = verify(&namespace(), &found).unwrap_err().to_string();
            for name in named {
                assert!(error.contains(name), "{error}");
            }
        };
        let one = Uuid::from_u128(1).to_string();
        let two = Uuid::from_u128(2).to_string();
        refused(|found| found.uuid = Some(Uuid::from_u128(2)), [&one, &two]);
        refused(|found| found.uuid = None, ["namespace 1, nguid", &one]);
        refused(|found| found.nguid = Some([3; 16]), ["0202", "0303"]);
        refused(|found| found.eui64 = Some([4; 8]), ["0404", &one]);
        refused(|found| found.block_size = 4096, ["512", "4096"]);
        refused(|found| found.block_count = 99, ["99", "100"]);
    }

    #[test]
    fn it_is_looked_for_by_what_is_its_own() {
        let mut lost = namespace();
        assert_eq!(selector(&lost), NamespaceSelector::Uuid(Uuid::from_u128(1)));
        lost.uuid = None;
        assert_eq!(selector(&lost), NamespaceSelector::Nguid([2; 16]));
        lost.nguid = None;
        assert_eq!(selector(&lost), NamespaceSelector::Nsid(1));
    }
}
