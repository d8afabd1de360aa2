//! Finds the namespaces of a controller, and the one that a selector means.

use std::time::Duration;

use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

use super::admin::Admin;
use super::error::HostError;
use super::namespace::{self, Found, Identifiers, NamespaceInfo, NamespaceSelector};
use crate::spec::identify::{IDENTIFY_LEN, IdentifyNamespace, cns};
use crate::spec::{Nqn, Sqe, Status};

/// Namespaces that are looked at, at most.
const NAMESPACES_MAX: usize = 4096;
/// NSIDs in one page of the active list.
const PAGE_ENTRIES: usize = IDENTIFY_LEN / 4;
const _: () = assert!(NAMESPACES_MAX.is_multiple_of(PAGE_ENTRIES));
/// The largest NSID that can name a namespace.
const NSID_MAX: u32 = 0xffff_fffe;
/// Namespaces that a message lists, at most.
const LISTED_MAX: usize = 8;

/// A look at the namespaces that one controller offers.
pub(super) struct Survey<'a> {
    /// Bounded.
    pub(super) admin: Admin,
    /// More time for each namespace.
    pub(super) each: Duration,
    pub(super) subnqn: &'a Nqn,
    pub(super) hostnqn: &'a Nqn,
    /// Bytes that one command may transfer.
    pub(super) max_transfer: Option<u64>,
}

impl Survey<'_> {
    /// All active namespaces, by ascending NSID.
    pub(super) async fn all(&mut self) -> Result<Vec<Found>, HostError> {
        let mut found = Vec::new();
        for nsid in self.active(0, NAMESPACES_MAX).await? {
            self.admin.extend(self.each);
            found.extend(self.look(nsid).await?);
        }
        Ok(found)
    }

    /// One namespace; `None` when it is not active.
    pub(super) async fn one(&mut self, nsid: u32) -> Result<Option<NamespaceInfo>, HostError> {
        match self.find(nsid).await? {
            Some(found) => self.usable(found).map(Some),
            None => Ok(None),
        }
    }

    /// The namespace with an NSID. Active or not is one question, however many namespaces there are.
    async fn find(&mut self, nsid: u32) -> Result<Option<Found>, HostError> {
        let listed = match nsid {
            1..=NSID_MAX => self.active(nsid - 1, 1).await?,
            _ => Vec::new(),
        };
        if listed.first() != Some(&nsid) {
            return Ok(None);
        }
        self.look(nsid).await
    }

    /// The namespace that is meant.
    pub(super) async fn select(
        &mut self,
        selector: &NamespaceSelector,
    ) -> Result<NamespaceInfo, HostError> {
        if let NamespaceSelector::Nsid(nsid) = *selector
            && let Some(found) = self.find(nsid).await?
        {
            return self.usable(found);
        }
        let mut all = self.all().await?;
        if all.is_empty() {
            return Err(HostError::NoNamespaces {
                at: self.admin.at(),
                subnqn: self.subnqn.to_string(),
                hostnqn: self.hostnqn.to_string(),
            });
        }
        if *selector == NamespaceSelector::Only && all.len() > 1 {
            return Err(HostError::SeveralNamespaces {
                at: self.admin.at(),
                subnqn: self.subnqn.to_string(),
                existing: list(&all),
            });
        }
        let meant: Vec<usize> = (0..all.len())
            .filter(|&index| all[index].matches(selector))
            .collect();
        match meant[..] {
            [index] => self.usable(all.swap_remove(index)),
            [one, other, ..] => Err(self.unusable(format!(
                "its namespaces {} and {} both have {selector}",
                all[one].nsid, all[other].nsid
            ))),
            [] => Err(HostError::NoSuchNamespace {
                at: self.admin.at(),
                subnqn: self.subnqn.to_string(),
                selector: selector.to_string(),
                existing: list(&all),
            }),
        }
    }

    fn usable(&self, found: Found) -> Result<NamespaceInfo, HostError> {
        found.info.map_err(|reason| HostError::UnusableNamespace {
            at: self.admin.at(),
            subnqn: self.subnqn.to_string(),
            nsid: found.nsid,
            reason,
        })
    }

    /// Active NSIDs above `after`, page by page until there are `enough` (at most
    /// [`NAMESPACES_MAX`]).
    async fn active(&self, after: u32, enough: usize) -> Result<Vec<u32>, HostError> {
        let mut nsids: Vec<u32> = Vec::new();
        let mut last = after;
        loop {
            let sqe = Sqe::identify(cns::ACTIVE_NAMESPACES, last, 0);
            let page = self
                .admin
                .read("Identify Active Namespace ID list", sqe, IDENTIFY_LEN)
                .await?;
            let page = <[U32]>::ref_from_bytes(&page).unwrap_or_default();
            let entries = page.iter().map(|nsid| nsid.get());
            let before = nsids.len();
            for nsid in entries.take_while(|&nsid| nsid != 0) {
                if nsid <= last || nsid > NSID_MAX {
                    return Err(self.unusable(format!(
                        "its list of active namespaces has {nsid:#x} after {last:#x}"
                    )));
                }
                nsids.push(nsid);
                last = nsid;
            }
            let full = nsids.len() - before == PAGE_ENTRIES;
            if !full || last == NSID_MAX || nsids.len() >= enough {
                // Pages divide the bound, so it is met exactly.
                if full && nsids.len() == NAMESPACES_MAX {
                    tracing::warn!(
                        controller = %self.admin.at(),
                        "only the first {NAMESPACES_MAX} namespaces are looked at"
                    );
                }
                return Ok(nsids);
            }
        }
    }

    /// Looks at one namespace; `None` when it went away meanwhile.
    async fn look(&self, nsid: u32) -> Result<Option<Found>, HostError> {
        let sqe = Sqe::identify(cns::NAMESPACE, nsid, 0);
        let bytes = match self
            .admin
            .read("Identify Namespace", sqe, IDENTIFY_LEN)
            .await
        {
            Ok(bytes) => bytes,
            Err(HostError::Command { status, .. })
                if status.code() == Status::INVALID_NAMESPACE.code() =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let (data, _) = IdentifyNamespace::ref_from_prefix(&bytes)
            .map_err(|_| self.unusable("Identify Namespace is too short".to_owned()))?;
        let mut ids = Identifiers::from_identify(data);
        let sqe = Sqe::identify(cns::NAMESPACE_DESCRIPTORS, nsid, 0);
        match self
            .admin
            .read(
                "Identify Namespace Identification Descriptors",
                sqe,
                IDENTIFY_LEN,
            )
            .await
        {
            Ok(list) => ids.add_descriptors(&list),
            // Optional before version 1.3.
            Err(HostError::Command { status, .. }) => {
                tracing::debug!(nsid, "no identification descriptors: {status}");
            }
            Err(error) => return Err(error),
        }
        let info = namespace::digest(nsid, data, ids, self.max_transfer);
        Ok(Some(Found { nsid, ids, info }))
    }

    fn unusable(&self, reason: String) -> HostError {
        HostError::Unusable {
            at: self.admin.at(),
            reason,
        }
    }
}

/// Namespaces for a message.
fn list(all: &[Found]) -> String {
    let mut text: Vec<String> = all.iter().take(LISTED_MAX).map(Found::to_string).collect();
    if all.len() > LISTED_MAX {
        text.push(format!("and {} more", all.len() - LISTED_MAX));
    }
    text.join(", ")
}
