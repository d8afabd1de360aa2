//! Finds the ways to a disk's subsystem by discovery.

use std::collections::BTreeSet;

use nvmf::host::discovery::{DiscoveredKind, Discovery, explore};
use nvmf::host::{HostError, HostOptions, TargetAddress};
use nvmf::spec::Nqn;
use nvmf::transport::Registry;

use crate::config::locator::Search;

/// Names that are listed in an error, at most.
const LISTED_MAX: usize = 16;

/// Why no way to one subsystem was found.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FindError {
    /// Nobody tells.
    #[error("cannot find the disk by discovery: {0}")]
    NoAnswer(#[source] HostError),
    /// Nothing of that name.
    #[error(
        "none of the subsystems that discovery tells this host of matches '{pattern}': {found}; check the pattern, \
         and whether the target admits {hostnqn}"
    )]
    NoMatch {
        /// What was looked for.
        pattern: String,
        /// What there is.
        found: String,
        /// Who asked.
        hostnqn: Nqn,
    },
    /// Several of that name.
    #[error(
        "several subsystems match '{pattern}', and a disk is of one; narrow the pattern to one of: {found}"
    )]
    Several {
        /// What was looked for.
        pattern: String,
        /// What matches.
        found: String,
    },
    /// One that cannot be connected to.
    #[error("discovery tells no way to {subnqn} that can be gone: {reasons}")]
    NoWay {
        /// The subsystem.
        subnqn: Nqn,
        /// What is in the way.
        reasons: String,
    },
}

/// All ways to the one subsystem that is searched, in the order in which they are told; at least one.
///
/// # Errors
/// [`FindError`] lists what there is.
pub(crate) async fn find(
    registry: &Registry,
    search: &Search,
    options: &HostOptions,
) -> Result<Vec<TargetAddress>, FindError> {
    // What is asked of the disk's controllers is not asked of this one.
    let plain = HostOptions {
        local: options.local.clone(),
        connect_timeout: options.connect_timeout,
        ..HostOptions::new(options.hostnqn.clone(), options.hostid)
    };
    let found = explore(registry, &search.controller.targets(), &plain).await;
    let found = found.map_err(FindError::NoAnswer)?;
    for it in &found.unfollowed {
        tracing::warn!(
            "referral of {} to {} not followed: {}",
            it.referrer,
            it.to,
            it.reason
        );
    }
    choose(&found, search, options)
}

fn choose(
    found: &Discovery,
    search: &Search,
    options: &HostOptions,
) -> Result<Vec<TargetAddress>, FindError> {
    let records = found.records();
    let subsystems: BTreeSet<&Nqn> = records
        .filter(|record| record.kind == DiscoveredKind::Nvm && record.subnqn != Nqn::discovery())
        .map(|record| &record.subnqn)
        .collect();
    let matching = subsystems.iter().copied();
    let matching: Vec<&Nqn> = matching.filter(|it| search.pattern.matches(it)).collect();
    let pattern = search.pattern.to_string();
    let subnqn = match matching[..] {
        [subnqn] => subnqn,
        [] => {
            return Err(FindError::NoMatch {
                pattern,
                found: list(subsystems),
                hostnqn: options.hostnqn.clone(),
            });
        }
        _ => {
            return Err(FindError::Several {
                pattern,
                found: list(matching),
            });
        }
    };
    let (ways, reasons) = ways_to(found, subnqn);
    if ways.is_empty() {
        return Err(FindError::NoWay {
            subnqn: subnqn.clone(),
            reasons: list(reasons),
        });
    }
    for reason in reasons {
        tracing::warn!("one way to {subnqn} is not used: {reason}");
    }
    Ok(ways)
}

/// The ways to a subsystem that can be gone, in the order in which they are told, and what is in the way of others.
pub(crate) fn ways_to<'a>(
    found: &'a Discovery,
    subnqn: &Nqn,
) -> (Vec<TargetAddress>, Vec<&'a String>) {
    let (mut ways, mut reasons) = (Vec::new(), Vec::new());
    let records = found.records();
    for record in records.filter(|it| it.kind == DiscoveredKind::Nvm && it.subnqn == *subnqn) {
        match &record.target {
            Ok(target) => ways.push(target.clone()),
            Err(reason) => reasons.push(reason),
        }
    }
    (ways, reasons)
}

/// What there is, and not all of many.
fn list<T: std::fmt::Display>(all: impl IntoIterator<Item = T>) -> String {
    let all: Vec<String> = all.into_iter().map(|it| it.to_string()).collect();
    let more = all.len().saturating_sub(LISTED_MAX);
    let mut listed = match all.is_empty() {
        true => "there is none".to_owned(),
        false => all[..all.len() - more].join(", "),
    };
    if more > 0 {
        listed += &format!(" and {more} more");
    }
    listed
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use nvmf::host::LocalEnd;
    use nvmf::host::discovery::{Discovered, DiscoveryLog};
    use uuid::Uuid;

    use super::*;
    use crate::config::locator::Locator;

    fn nqn(name: &str) -> Nqn {
        Nqn::new(format!("nqn.2026-01.org.example:{name}")).unwrap()
    }

    fn record(name: &str, target: Result<&str, &str>) -> Discovered {
        let subnqn = nqn(name);
        Discovered {
            kind: DiscoveredKind::Nvm,
            trtype: 3,
            adrfam: 1,
            traddr: target.unwrap_or_default().to_owned(),
            trsvcid: "4420".to_owned(),
            subnqn: subnqn.clone(),
            portid: 1,
            cntlid: 0xffff,
            asqsz: 32,
            treq: 2,
            eflags: 0,
            target: target
                .map(|host| TargetAddress {
                    host: host.to_owned(),
                    port: 4420,
                    subnqn,
                    local: LocalEnd::default(),
                })
                .map_err(str::to_owned),
        }
    }

    fn chosen(records: Vec<Discovered>, query: &str) -> Result<Vec<String>, String> {
        let log = DiscoveryLog {
            address: SocketAddr::from(([192, 0, 2, 1], 8009)),
            subnqn: Nqn::discovery(),
            own_name: None,
            referrer: None,
            generation: 1,
            records,
            skipped: Vec::new(),
        };
        let found = Discovery {
            logs: vec![log],
            ..Discovery::default()
        };
        let Locator::Search(search) = format!("nvme+tcp-discovery://h/{query}").parse().unwrap()
        else {
            panic!("{query} is no search")
        };
        let options = HostOptions::new(nqn("host"), Uuid::from_u128(1));
        let ways = choose(&found, &search, &options).map_err(|error| error.to_string())?;
        Ok(ways.into_iter().map(|way| way.host).collect())
    }

    #[test]
    fn all_ways_to_the_one_subsystem_that_matches_are_found_in_order() {
        let records = || {
            vec![
                record("a1", Ok("192.0.2.9")),
                record("b1", Ok("192.0.2.8")),
                record("a1", Err("transport type 1 is not TCP")),
                record("a1", Ok("192.0.2.3")),
            ]
        };
        assert_eq!(
            chosen(records(), "?nqn=*:a?").unwrap(),
            ["192.0.2.9", "192.0.2.3"]
        );
        assert_eq!(chosen(records(), "?nqn=*b*").unwrap(), ["192.0.2.8"]);
        assert_eq!(
            chosen(vec![record("a", Ok("192.0.2.9"))], "").unwrap(),
            ["192.0.2.9"]
        );
    }

    #[test]
    fn none_or_several_subsystems_are_answered_with_what_there_is() {
        let records = || vec![record("a", Ok("192.0.2.9")), record("b", Ok("192.0.2.9"))];
        let several = chosen(records(), "").unwrap_err();
        assert!(
            several.contains("example:a, nqn.2026-01.org.example:b"),
            "{several}"
        );
        let none = chosen(records(), "?nqn=*c").unwrap_err();
        assert!(
            none.contains("'*c'") && none.contains("example:a, "),
            "{none}"
        );
        assert!(none.contains("example:host"), "{none}");
        assert!(
            chosen(Vec::new(), "")
                .unwrap_err()
                .contains("there is none")
        );
        let many = (0..20).map(|nth| record(&format!("d{nth:02}"), Ok("192.0.2.9")));
        let many = chosen(many.collect(), "").unwrap_err();
        assert!(
            many.contains("d15 and 4 more") && !many.contains("d16"),
            "{many}"
        );
    }

    #[test]
    fn a_subsystem_without_a_way_says_what_is_in_the_way() {
        let records = vec![record("a", Err("it demands TLS, which is not supported"))];
        let error = chosen(records, "").unwrap_err();
        assert!(
            error.contains("example:a") && error.contains("TLS"),
            "{error}"
        );
    }
}
