//! Follows referrals from one discovery controller to the next: each is asked once, and not for ever.

use std::collections::{HashSet, VecDeque};
use std::net::SocketAddr;

use tokio::time::Instant;

use super::record::{Discovered, DiscoveredKind, Lead};
use super::{DiscoveryLog, ask, discover};
use crate::host::address::{TargetAddress, share};
use crate::host::dial::{Dial, Tcp};
use crate::host::error::HostError;
use crate::host::options::HostOptions;
use crate::spec::Nqn;
use crate::transport::Registry;

/// Controllers that are asked because of referrals, at most.
const REFERRALS_MAX: usize = 32;
/// Referrals between the first controller and the last, at most.
const DEPTH_MAX: usize = 4;
/// Records of all controllers together, at most; more are not asked then.
const RECORDS_MAX: usize = 16384;
/// Following referrals may take this many times as long as connecting.
const TIMES: u32 = 4;

/// What a discovery controller and those that it refers to say. What several of them say, or one says several
/// times, is there once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Discovery {
    /// The log of each controller, in the order in which they were asked; the first is the one that was named.
    pub logs: Vec<DiscoveryLog>,
    /// Referrals that led nowhere.
    pub unfollowed: Vec<Unfollowed>,
}

/// A referral that led nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfollowed {
    /// The controller that refers.
    pub referrer: SocketAddr,
    /// Address and port, as the referral has them.
    pub to: String,
    /// Why.
    pub reason: String,
}

impl Discovery {
    /// The records of all logs, in order.
    pub fn records(&self) -> impl Iterator<Item = &Discovered> {
        self.logs.iter().flat_map(|log| &log.records)
    }
}

/// As [`discover`], and follows referrals. That takes no longer than four times
/// [`HostOptions::connect_timeout`] on top, and one that leads nowhere is no error.
///
/// # Errors
/// As [`discover`].
pub async fn explore(
    registry: &Registry,
    targets: &[TargetAddress],
    options: &HostOptions,
) -> Result<Discovery, HostError> {
    let first = discover(registry, targets, options).await?;
    Ok(follow(&Tcp::new(registry, options), first, options).await)
}

/// A controller to be asked.
struct Referral {
    referrer: SocketAddr,
    to: TargetAddress,
    depth: usize,
}

/// Asks the controllers that the first one refers to, the ones that those refer to, and so on.
pub(in crate::host) async fn follow(
    dial: &impl Dial,
    first: DiscoveryLog,
    options: &HostOptions,
) -> Discovery {
    let end = Instant::now() + options.connect_timeout * TIMES;
    let mut walk = Walk::default();
    walk.asked
        .insert((canonical(first.address), Nqn::discovery()));
    walk.learn(first, 0);
    let mut referrals = 0;
    while let Some(Referral {
        referrer,
        to,
        depth,
    }) = walk.waiting.pop_front()
    {
        let shown = shown(&to);
        let Some(at) = to.literal() else {
            walk.give_up(referrer, shown, "it is not an address");
            continue;
        };
        if !walk.asked.insert((canonical(at), to.subnqn.clone())) {
            continue;
        }
        let told = walk.found.records().count();
        if referrals >= REFERRALS_MAX || depth > DEPTH_MAX || told >= RECORDS_MAX {
            let reason = format!(
                "{REFERRALS_MAX} referrals, {DEPTH_MAX} from one to the next, and {RECORDS_MAX} records are the \
                 most that is followed"
            );
            walk.give_up(referrer, shown, reason);
            continue;
        }
        referrals += 1;
        let now = Instant::now();
        let deadline = share(now, end, walk.waiting.len() + 1).min(now + options.connect_timeout);
        match ask(dial, at, &to.subnqn, options, deadline).await {
            Ok(log) => {
                let referrer = Some(referrer);
                walk.learn(DiscoveryLog { referrer, ..log }, depth);
            }
            Err(error) => walk.give_up(referrer, shown, error.to_string()),
        }
    }
    walk.found
}

#[derive(Default)]
struct Walk {
    found: Discovery,
    waiting: VecDeque<Referral>,
    /// Controllers that were asked, under each name that they have.
    asked: HashSet<(SocketAddr, Nqn)>,
    /// What records lead to.
    seen: HashSet<Lead>,
}

impl Walk {
    /// Takes a log in, without what is known already.
    fn learn(&mut self, mut log: DiscoveryLog, depth: usize) {
        if let Some(name) = &log.own_name {
            self.asked.insert((canonical(log.address), name.clone()));
        }
        for record in std::mem::take(&mut log.records) {
            if !self.seen.insert(record.lead()) {
                continue;
            }
            if record.kind == DiscoveredKind::Referral {
                match &record.target {
                    Ok(to) => self.waiting.push_back(Referral {
                        referrer: log.address,
                        to: to.clone(),
                        depth: depth + 1,
                    }),
                    Err(reason) => {
                        let to = format!("{}:{}", record.traddr, record.trsvcid);
                        self.give_up(log.address, to, reason.as_str());
                    }
                }
            }
            log.records.push(record);
        }
        self.found.logs.push(log);
    }

    fn give_up(&mut self, referrer: SocketAddr, to: String, reason: impl Into<String>) {
        self.found.unfollowed.push(Unfollowed {
            referrer,
            to,
            reason: reason.into(),
        });
    }
}

/// The same for all spellings of one address.
fn canonical(at: SocketAddr) -> SocketAddr {
    match at {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => at,
        _ => SocketAddr::new(at.ip().to_canonical(), at.port()),
    }
}

fn shown(to: &TargetAddress) -> String {
    match to.host.contains(':') {
        true => format!("[{}]:{}", to.host, to.port),
        false => format!("{}:{}", to.host, to.port),
    }
}
