//! What an asynchronous event means, by its type and by the log page that goes with it.

use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

use crate::spec::NSID_ALL;
use crate::spec::ana::AnaHeader;
use crate::spec::discovery::RECORD_LEN;
use crate::spec::event::{AsyncEvent, health, kind, notice};
use crate::spec::log::{CHANGED_NAMESPACES_LEN, lid};

/// Entries of the error log that are read at most, and their length.
const ERROR_ENTRIES_MAX: usize = 64;
const ERROR_ENTRY_LEN: usize = 64;
/// Length of the health page and of the firmware page.
const SHORT_PAGE_LEN: usize = 512;
/// Bits of the critical warning, the first byte of the health page.
const WARNINGS: [&str; 6] = [
    "spare below threshold",
    "temperature beyond threshold",
    "reliability degraded",
    "media read only",
    "backup of volatile memory failed",
    "persistent memory region read only or unreliable",
];

/// Something that a controller reports of its own accord. The log page was read; the event can come again.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostEvent {
    /// Namespaces were added, removed, or changed, in size for instance.
    NamespacesChanged(Changed),
    /// Namespaces are reached in another way than before: read the ANA log.
    AnaChanged,
    /// The discovery log changed.
    Discovery,
    /// Another firmware is being activated; commands may take longer than usual.
    Firmware,
    /// The controller is unwell; what it warns of, in words.
    Smart(Vec<&'static str>),
    /// The controller has an error; which, in words.
    Error(&'static str),
    /// What we make nothing of.
    Other {
        /// The type: see [`kind`].
        kind: u8,
        /// Which event of that type.
        info: u8,
        /// The log page that it names.
        page: u8,
    },
    /// Events were not taken in time and are lost: any of the above may have been among them.
    Missed,
}

/// Which namespaces changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changed {
    /// These, in ascending order without repetition; at most 1024.
    Namespaces(Vec<u32>),
    /// Any may have.
    All,
}

impl Changed {
    /// True when this namespace may have changed.
    pub fn has(&self, nsid: u32) -> bool {
        match self {
            Self::Namespaces(nsids) => nsids.binary_search(&nsid).is_ok(),
            Self::All => true,
        }
    }

    /// From the Changed Namespace List. One that makes no sense says nothing, so any may have changed.
    fn from_page(page: &[u8]) -> Self {
        let list = <[U32]>::ref_from_bytes(page).unwrap_or_default();
        let nsids: Vec<u32> = list
            .iter()
            .map(|nsid| nsid.get())
            .take_while(|&nsid| nsid != 0)
            .collect();
        let ascending = nsids.is_sorted_by(|a, b| a < b);
        if nsids.is_empty() || !ascending || nsids.last() == Some(&NSID_ALL) {
            return Self::All;
        }
        Self::Namespaces(nsids)
    }
}

impl std::fmt::Display for HostEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NamespacesChanged(Changed::All) => f.write_str("namespaces changed"),
            Self::NamespacesChanged(Changed::Namespaces(nsids)) => match nsids.as_slice() {
                [nsid] => write!(f, "namespace {nsid} changed"),
                [first, .., last] => write!(
                    f,
                    "{} namespaces from {first} to {last} changed",
                    nsids.len()
                ),
                [] => f.write_str("no namespace changed"),
            },
            Self::AnaChanged => f.write_str("asymmetric namespace access changed"),
            Self::Discovery => f.write_str("discovery log changed"),
            Self::Firmware => f.write_str("firmware is being activated"),
            Self::Smart(warnings) => write!(f, "health warning: {}", warnings.join(", ")),
            Self::Error(what) => write!(f, "controller error: {what}"),
            Self::Other { kind, info, page } => write!(
                f,
                "event of type {kind:#x}, information {info:#04x}, log page {page:#04x}"
            ),
            Self::Missed => f.write_str("events were missed"),
        }
    }
}

/// Bytes of the event's page to read: enough to know what is meant, and to clear the event. 0 when the
/// page is none that we know.
pub(super) fn page_len(event: AsyncEvent, error_entries: u16) -> usize {
    match event.page {
        lid::ERROR => usize::from(error_entries).clamp(1, ERROR_ENTRIES_MAX) * ERROR_ENTRY_LEN,
        lid::HEALTH | lid::FIRMWARE => SHORT_PAGE_LEN,
        lid::CHANGED_NAMESPACES => CHANGED_NAMESPACES_LEN,
        lid::ANA => size_of::<AnaHeader>(),
        lid::DISCOVERY => RECORD_LEN,
        _ => 0,
    }
}

/// The event, with what its page says; an empty page could not be read.
pub(super) fn digest(event: AsyncEvent, page: &[u8]) -> HostEvent {
    match (event.kind, event.info) {
        (kind::ERROR, info) => HostEvent::Error(error_text(info)),
        (kind::HEALTH, info) => HostEvent::Smart(warnings(info, page)),
        (kind::NOTICE, notice::NAMESPACE_ATTRIBUTE) => {
            // Of another page than the list, nothing can be told.
            let list = if event.page == lid::CHANGED_NAMESPACES {
                page
            } else {
                &[]
            };
            HostEvent::NamespacesChanged(Changed::from_page(list))
        }
        (kind::NOTICE, notice::FIRMWARE_ACTIVATION) => HostEvent::Firmware,
        (kind::NOTICE, notice::ANA_CHANGE) => HostEvent::AnaChanged,
        (kind::NOTICE, notice::DISCOVERY_CHANGE) => HostEvent::Discovery,
        _ => HostEvent::Other {
            kind: event.kind,
            info: event.info,
            page: event.page,
        },
    }
}

fn error_text(info: u8) -> &'static str {
    match info {
        0 => "write to an invalid doorbell",
        1 => "invalid value written to a doorbell",
        2 => "diagnostic failure",
        3 => "persistent internal error",
        4 => "transient internal error",
        5 => "firmware image could not be loaded",
        _ => "of unknown kind",
    }
}

/// What the page warns of; without one, what the event itself says.
fn warnings(info: u8, page: &[u8]) -> Vec<&'static str> {
    let bits = page.first().copied().unwrap_or(0);
    let mut told: Vec<&'static str> = WARNINGS
        .iter()
        .enumerate()
        .filter(|&(bit, _)| bits & 1 << bit != 0)
        .map(|(_, &text)| text)
        .collect();
    if told.is_empty() {
        told.push(match info {
            health::RELIABILITY => WARNINGS[2],
            health::TEMPERATURE => WARNINGS[1],
            health::SPARE => WARNINGS[0],
            _ => "of unknown kind",
        });
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(nsids: &[u32]) -> Vec<u8> {
        let mut page: Vec<u8> = nsids.iter().flat_map(|nsid| nsid.to_le_bytes()).collect();
        page.resize(CHANGED_NAMESPACES_LEN, 0);
        page
    }

    #[test]
    fn a_changed_list_names_its_namespaces() {
        let changed = Changed::from_page(&list(&[2, 3, 70_000]));
        assert_eq!(changed, Changed::Namespaces(vec![2, 3, 70_000]));
        assert!(changed.has(3) && !changed.has(4));
        let full: Vec<u32> = (1..=1024).collect();
        assert_eq!(
            Changed::from_page(&list(&full)),
            Changed::Namespaces(full.clone())
        );
    }

    #[test]
    fn a_changed_list_that_says_nothing_means_all_namespaces() {
        for nsids in [&[][..], &[NSID_ALL], &[3, 2], &[3, 3], &[1, NSID_ALL]] {
            assert_eq!(Changed::from_page(&list(nsids)), Changed::All, "{nsids:?}");
        }
        assert_eq!(Changed::from_page(&[]), Changed::All);
        assert_eq!(Changed::from_page(&[1, 0, 0]), Changed::All);
        assert!(Changed::All.has(7));
    }

    #[test]
    fn warnings_are_those_of_the_page_or_else_that_of_the_event() {
        let mut page = vec![0; 512];
        page[0] = 0b1001;
        let event = |info| AsyncEvent {
            kind: kind::HEALTH,
            info,
            page: lid::HEALTH,
        };
        let told = digest(event(health::TEMPERATURE), &page).to_string();
        assert_eq!(
            told,
            "health warning: spare below threshold, media read only"
        );
        let told = digest(event(health::TEMPERATURE), &[]).to_string();
        assert_eq!(told, "health warning: temperature beyond threshold");
        let told = digest(event(0xff), &[]).to_string();
        assert_eq!(told, "health warning: of unknown kind");
    }

    #[test]
    fn every_event_is_shown_in_one_line_of_bounded_length() {
        for kind in 0..8 {
            for info in [0, 1, 2, 3, 4, 5, 6, 0xf0, 0xff] {
                for page in (0..0x20).chain([0x70, 0x71, 0xff]) {
                    let event = AsyncEvent { kind, info, page };
                    assert!(page_len(event, u16::MAX) <= 4096);
                    let text = digest(event, &list(&[1, 9])).to_string();
                    assert!(!text.is_empty() && !text.contains('\n') && text.len() < 300);
                }
            }
        }
    }
}
