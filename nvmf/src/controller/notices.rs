//! What a controller reports to its host of its own accord, and has reported already.
//!
//! A change is remembered until the host has read the page that tells it, whether or not it could be
//! reported: a host that asks for events late, or has no request outstanding, misses nothing. Between a report
//! and the reading of its page there is no other of its kind.

use std::collections::BTreeSet;

use crate::spec::event::{AsyncEvent, config, kind, notice};
use crate::spec::log::{CHANGED_NAMESPACES_LEN, GetLogPage, lid};

/// State of one kind of event.
#[derive(Debug, Default)]
struct Notice {
    /// There is something to report.
    pending: bool,
    /// It was reported, and the page was not read since.
    masked: bool,
}

impl Notice {
    /// True when it is to be reported now; it is taken for reported then.
    fn take(&mut self) -> bool {
        let due = self.pending && !self.masked;
        if due {
            *self = Self {
                pending: false,
                masked: true,
            };
        }
        due
    }
}

/// The events of one association, from one enabling of the controller to the next.
#[derive(Debug, Default)]
pub(super) struct Notices {
    namespaces: Notice,
    /// Namespaces that changed since the list was read: never more than there can be.
    changed: BTreeSet<u32>,
    ana: Notice,
    cross_reset: Notice,
    discovery: Notice,
}

impl Notices {
    /// A namespace changed.
    pub(super) fn namespace(&mut self, nsid: u32) {
        self.changed.insert(nsid);
        self.namespaces.pending = true;
    }

    /// The access state of some group changed.
    pub(super) fn ana(&mut self) {
        self.ana.pending = true;
    }

    /// A reset of another controller that was asked for is over.
    pub(super) fn cross_reset(&mut self) {
        self.cross_reset.pending = true;
    }

    /// The discovery log changed.
    pub(super) fn discovery(&mut self) {
        self.discovery.pending = true;
    }

    /// The next event to report, of those that the host has `enabled`: bits of [`config`].
    pub(super) fn next(&mut self, enabled: u32) -> Option<AsyncEvent> {
        let event = |info, page| {
            Some(AsyncEvent {
                kind: kind::NOTICE,
                info,
                page,
            })
        };
        if enabled & config::NAMESPACE_ATTRIBUTE != 0 && self.namespaces.take() {
            return event(notice::NAMESPACE_ATTRIBUTE, lid::CHANGED_NAMESPACES);
        }
        if enabled & config::ANA_CHANGE != 0 && self.ana.take() {
            return event(notice::ANA_CHANGE, lid::ANA);
        }
        if enabled & config::CROSS_CONTROLLER_RESET != 0 && self.cross_reset.take() {
            return event(notice::CROSS_CONTROLLER_RESET, lid::CROSS_CONTROLLER_RESET);
        }
        if enabled & config::DISCOVERY_CHANGE != 0 && self.discovery.take() {
            return event(notice::DISCOVERY_CHANGE, lid::DISCOVERY);
        }
        None
    }

    /// The Changed Namespace List, as a host reads it: a read of the whole list starts a new one, unless the
    /// host wants to `retain` the event.
    pub(super) fn changed_namespaces(&mut self, request: GetLogPage, retain: bool) -> Vec<u8> {
        let mut list: Vec<u8> = self.changed.iter().flat_map(|n| n.to_le_bytes()).collect();
        if !retain {
            self.namespaces.masked = false;
            if request.offset == 0 && request.len >= list.len() as u64 {
                self.changed.clear();
                self.namespaces.pending = false;
            }
        }
        list.resize(CHANGED_NAMESPACES_LEN, 0);
        list
    }

    /// The host reads the ANA log, as it is after this call, and does not retain the event.
    pub(super) fn ana_read(&mut self) {
        self.ana = Notice::default();
    }

    /// As [`Self::ana_read`], of the log of resets.
    pub(super) fn cross_reset_read(&mut self) {
        self.cross_reset = Notice::default();
    }

    /// As [`Self::ana_read`], of the discovery log.
    pub(super) fn discovery_read(&mut self) {
        self.discovery = Notice::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u32 = config::NAMESPACE_ATTRIBUTE | config::ANA_CHANGE;

    fn read(notices: &mut Notices, offset: u64, len: u64, retain: bool) -> Vec<u8> {
        let request = GetLogPage {
            lid: lid::CHANGED_NAMESPACES,
            offset,
            len,
        };
        notices.changed_namespaces(request, retain)[..12].to_vec()
    }

    fn list(nsids: [u32; 3]) -> Vec<u8> {
        nsids.iter().flat_map(|n| n.to_le_bytes()).collect()
    }

    #[test]
    fn a_change_is_reported_once_until_the_list_is_read() {
        let mut notices = Notices::default();
        assert_eq!(notices.next(ALL), None);
        notices.namespace(3);
        assert_eq!(notices.next(0), None, "nobody asked for it");
        let event = notices.next(ALL).unwrap();
        assert_eq!((event.info, event.page), (0, lid::CHANGED_NAMESPACES));
        notices.namespace(1);
        assert_eq!(notices.next(ALL), None, "the list was not read");
        assert_eq!(read(&mut notices, 0, 4096, true), list([1, 3, 0]));
        assert_eq!(notices.next(ALL), None, "the event was retained");
        assert_eq!(read(&mut notices, 0, 4096, false), list([1, 3, 0]));
        assert_eq!(notices.next(ALL), None, "the list told it");
        assert_eq!(read(&mut notices, 0, 4096, false), list([0, 0, 0]));
        notices.namespace(1);
        assert!(notices.next(ALL).is_some());
    }

    #[test]
    fn a_read_of_a_part_loses_nothing() {
        let mut notices = Notices::default();
        notices.namespace(1);
        notices.namespace(2);
        assert!(notices.next(ALL).is_some());
        assert_eq!(read(&mut notices, 0, 4, false), list([1, 2, 0]));
        notices.namespace(2);
        assert!(notices.next(ALL).is_some(), "it may be reported again");
        assert_eq!(read(&mut notices, 4, 4092, false), list([1, 2, 0]));
        assert_eq!(read(&mut notices, 0, 8, false), list([1, 2, 0]));
        assert_eq!(read(&mut notices, 0, 8, false), list([0, 0, 0]));
    }

    #[test]
    fn both_kinds_are_apart() {
        let mut notices = Notices::default();
        notices.ana();
        notices.namespace(1);
        assert_eq!(
            notices.next(ALL).map(|it| it.page),
            Some(lid::CHANGED_NAMESPACES)
        );
        let ana = notices.next(ALL).unwrap();
        assert_eq!((ana.info, ana.page), (notice::ANA_CHANGE, lid::ANA));
        notices.ana();
        assert_eq!(notices.next(ALL), None);
        notices.ana_read();
        assert_eq!(notices.next(ALL), None, "what was read told it");
        notices.ana();
        assert!(notices.next(ALL).is_some());
    }
}
