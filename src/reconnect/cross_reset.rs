//! Which associations that are gone may still carry commands out, and the end of their fences where a controller of the
//! same subsystem can be asked to see to that (Cross-Controller Reset).
//!
//! `docs/adr/0016-cross-controller-reset.md` says why this is safe.

use std::time::Duration;

use nvmf::host::HostError;
use nvmf::spec::ControllerInstance;
use uuid::Uuid;

use super::path::Path;
use super::{News, Paths};
use crate::bridge::fence::{EARLIER, SEVERAL};
use crate::bridge::record::{Associations, MAX_ASSOCIATIONS};

/// Namespace of the UUIDs that name a host and a subsystem.
const PARTIES: Uuid = Uuid::from_u128(0x5f0c_1f8b_7a52_4d0e_9b16_3c8e_2d74_a901);

/// A controller, and by whom it was connected to where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Party {
    /// Names the host and the subsystem.
    name: u128,
    controller: ControllerInstance,
}

/// An association that may still carry commands out.
struct Lost {
    /// The number that its fences have.
    number: u64,
    party: Party,
    /// When it cannot any more, in milliseconds of the clock of fences.
    until: u64,
    /// Associations that have no good answer.
    asked: Vec<u64>,
    /// One is being asked.
    asking: bool,
}

/// All of these.
#[derive(Default)]
pub(super) struct AtLarge {
    lost: Vec<Lost>,
    /// Until when others may that nobody can be asked about.
    unknown: u64,
}

/// What a controller says.
pub(super) struct Answer {
    /// The lost association.
    number: u64,
    party: Party,
    /// The one that was asked.
    asked: u64,
    /// Nothing of the lost one is carried out any more.
    result: Result<(), HostError>,
}

impl AtLarge {
    fn add(&mut self, number: u64, party: Option<Party>, until: u64) {
        match party {
            Some(party) if self.lost.len() < MAX_ASSOCIATIONS => self.lost.push(Lost {
                number,
                party,
                until,
                asked: Vec::new(),
                asking: false,
            }),
            _ => self.unknown = self.unknown.max(until),
        }
    }

    fn expire(&mut self, now: u64) {
        self.lost.retain(|lost| lost.until > now);
    }
}

impl Path {
    /// Its association, as far as another controller can be asked about it. A local disk has nobody to ask.
    pub(super) fn party(&self) -> Option<Party> {
        let way = self.way_back.as_ref()?;
        let controller = self.association.as_ref()?.controller();
        let (subsystem, host) = (&controller.subnqn, &way.host);
        let name = format!("{subsystem}\0{}\0{}", host.hostnqn, host.hostid);
        Some(Party {
            name: Uuid::new_v5(&PARTIES, name.as_bytes()).as_u128(),
            controller: controller.instance?,
        })
    }
}

impl Paths {
    /// An association of this process was lost with writes of unknown fate.
    pub(super) fn lost_at_large(&mut self, number: u64, party: Option<Party>, until: u64) {
        self.at_large.expire(self.now());
        self.at_large.add(number, party, until);
    }

    /// An earlier life has had these associations, or there is no telling. What they may still write is fenced.
    pub(super) fn inherit_lost(&mut self, told: Option<Associations>) {
        let now = self.now();
        let fenced = self.fences.iter().map(|fence| fence.deadline).max();
        let until = fenced.unwrap_or(0).max(self.earlier.over);
        if until <= now {
            return;
        }
        self.at_large.expire(now);
        let told = told.filter(|told| !told.controllers.is_empty());
        let Some(Associations { party, controllers }) = told else {
            return self.at_large.add(EARLIER, None, until);
        };
        let ours: Vec<_> = self.paths.iter().filter_map(Path::party).collect();
        for controller in controllers {
            let party = Party {
                name: party,
                controller,
            };
            let mut lost = self.at_large.lost.iter_mut();
            let known = lost.find(|lost| lost.number == EARLIER && lost.party == party);
            match known {
                Some(known) => known.until = known.until.max(until),
                // The earlier life may be this process's: its own associations are not to be reset.
                None => {
                    let party = Some(party).filter(|party| !ours.contains(party));
                    self.at_large.add(EARLIER, party, until);
                }
            }
        }
    }

    /// All associations that may carry commands out, also when this process is gone; `None` when there may be others.
    /// Those that there are are among them while rings run.
    pub(super) fn at_large(&self, now: u64, running: bool) -> Option<Associations> {
        if self.at_large.unknown > now {
            return None;
        }
        let lost = self.at_large.lost.iter().filter(|lost| lost.until > now);
        let mut parties: Vec<Party> = lost.map(|lost| lost.party).collect();
        for path in self.paths.iter().filter(|path| path.association.is_some()) {
            if running {
                parties.push(path.party()?);
            }
        }
        let name = parties.first()?.name;
        if parties.len() > MAX_ASSOCIATIONS || parties.iter().any(|party| party.name != name) {
            return None;
        }
        Some(Associations {
            party: name,
            controllers: parties.iter().map(|party| party.controller).collect(),
        })
    }

    /// Asks about every lost association, one controller at a time that there is a way to.
    pub(super) fn ask(&mut self) {
        let now = self.now();
        self.at_large.expire(now);
        let paths = &self.paths;
        for lost in self.at_large.lost.iter_mut().filter(|lost| !lost.asking) {
            let can_tell = |path: &&Path| {
                let Some((party, association)) = path.party().zip(path.association.as_ref()) else {
                    return false;
                };
                party.name == lost.party.name
                    && party.controller.cntlid != lost.party.controller.cntlid
                    && association.controller().cross_resets > 0
                    && !lost.asked.contains(&path.number)
            };
            let path = paths.iter().find(can_tell);
            let Some((number, association)) =
                path.and_then(|path| Some((path.number, path.association.as_ref()?)))
            else {
                continue;
            };
            lost.asking = true;
            let inquiry = association.inquiry();
            let within = Duration::from_millis(lost.until.saturating_sub(now));
            let (of, party) = (lost.number, lost.party);
            self.tasks.spawn(async move {
                News::Answered(Answer {
                    number: of,
                    party,
                    asked: number,
                    result: inquiry.reset_other(party.controller, within).await,
                })
            });
        }
    }

    /// What is known of a lost association now. Where nothing is, another controller is asked.
    pub(super) async fn answered(&mut self, answer: Answer) {
        let Answer {
            number,
            party,
            asked,
            result,
        } = answer;
        let is_meant = |lost: &Lost| (lost.number, lost.party) == (number, party);
        if let Err(error) = result {
            tracing::debug!(
                disk = self.name,
                "what is fenced stays so, since nothing tells that it cannot be written late: {error}"
            );
            let mut lost = self.at_large.lost.iter_mut();
            if let Some(lost) = lost.find(|lost| is_meant(lost)) {
                lost.asking = false;
                lost.asked.push(asked);
            }
            return self.ask();
        }
        self.at_large.lost.retain(|lost| !is_meant(lost));
        let now = self.now();
        let mut others = self.at_large.lost.iter();
        if number == EARLIER {
            if self.at_large.unknown > now || others.any(|lost| lost.number == EARLIER) {
                return;
            }
            // What is still to come of it was carried out, or never is.
            self.earlier.over = self.earlier.over.min(now);
        }
        debug_assert!(number != SEVERAL);
        let ended = self.fences.end(number);
        tracing::info!(
            disk = self.name,
            ended,
            left = self.fences.len(),
            "the controller says that nothing of a lost association is carried out any more: its fences end"
        );
        self.save();
        self.tell_fences().await;
    }
}
