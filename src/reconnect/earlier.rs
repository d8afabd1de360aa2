//! What an earlier life of the disk may still write, and what a later one has to know of this: keeps the record in the
//! front-end's in-flight region, and has what was in flight there begin anew as if a path had been lost.
//!
//! `docs/adr/0012-recovery.md` says why this is safe.

use std::sync::Arc;
use std::time::Duration;

use nvmf::host::NamespaceInfo;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;
use vhost_user_blk::Tail;

use super::path::{FEAR, Path};
use super::{Paths, millis};
use crate::bridge::fence::{EARLIER, Fence, Fences, SEVERAL};
use crate::bridge::path_choice::EARLIER_LIFE;
use crate::bridge::record::{NoRecord, Record};
use crate::worker::mailbox::LaneMessage;

/// No record says more than this: what comes from outside must not fence a disk for ever. Three of the longest
/// keep-alive time-outs that can be asked for, and the longest time that a controller can state for itself.
const LONGEST: u64 = (3 * 3600 + 66) * 1000;

/// Milliseconds within which a front-end that comes back has started all rings that ran before; it takes a few.
const RINGS_COME: u64 = 1000;

/// What the front-end's session tells.
pub(crate) enum SessionNews {
    /// Before any ring runs: requests in flight are in another region from now on.
    Region {
        /// Its private tail.
        tail: Tail,
        /// Answered when every lane knows what is fenced: what is in flight may have been sent by somebody.
        done: oneshot::Sender<bool>,
    },
    /// A ring is about to run.
    Start {
        /// Its number.
        ring: usize,
        /// It has nothing in flight, and may give the numbers of earlier requests to new ones.
        anew: bool,
        /// Answered when it may.
        done: oneshot::Sender<()>,
    },
    /// A ring was given back. What it has in flight then is not worked on by anybody.
    Stopped {
        /// Others still run.
        running: bool,
        /// Answered when the region says what it may still write.
        done: oneshot::Sender<()>,
    },
    /// The rings are stopped, for a successor or for the guest to go on elsewhere.
    Fenced {
        /// Answered with how long an association that was lost may still write something; `None` when there is nothing.
        done: oneshot::Sender<Option<Duration>>,
    },
    /// The session is over: the region is somebody else's.
    Over {
        /// Answered when nothing is written to it any more.
        done: oneshot::Sender<()>,
    },
}

/// The region, and what is known of who had it before.
pub(super) struct Earlier {
    news: mpsc::Receiver<SessionNews>,
    /// Lanes tell that requests of an earlier life have come to them.
    recovered: mpsc::Receiver<()>,
    kept: Option<Kept>,
    /// The region that the owners of fences are in.
    region: u128,
    /// Rings run.
    running: bool,
    /// By when the earlier life is over for certain, in milliseconds of the clock of fences.
    pub(super) over: u64,
    boot: u128,
    /// Of an association with a controller that does not tell: this process itself.
    local_quiet: Option<Duration>,
    /// What the earlier life may still write is more than the guest has asked for.
    writes_around: bool,
}

/// A region that outlives the session.
struct Kept {
    tail: Tail,
    /// Of the copy that was written last.
    number: u64,
}

impl Earlier {
    /// Nothing yet.
    pub(super) fn new(
        news: mpsc::Receiver<SessionNews>,
        recovered: mpsc::Receiver<()>,
        local_quiet: Option<Duration>,
        writes_around: bool,
    ) -> Self {
        Self {
            news,
            recovered,
            kept: None,
            region: 0,
            running: false,
            over: 0,
            boot: boot(),
            local_quiet,
            writes_around,
        }
    }

    /// What comes next.
    pub(super) async fn next(&mut self) -> Option<SessionNews> {
        let Self {
            news, recovered, ..
        } = self;
        tokio::select! {
            Some(news) = news.recv() => Some(news),
            Some(()) = recovered.recv() => None,
            else => std::future::pending().await,
        }
    }
}

impl Paths {
    /// Takes news of the session; `None` is that lanes have requests of an earlier life.
    pub(super) async fn session_news(&mut self, news: Option<SessionNews>) {
        // That nobody waits any more for an answer is the end of the session.
        match news {
            None => self.recover().await,
            Some(SessionNews::Region { tail, done }) => {
                let already = self.begin_region(tail).await;
                let _ = done.send(already);
            }
            Some(SessionNews::Start { ring, anew, done }) => {
                self.earlier.running = true;
                if anew && self.fences.disown_ring(ring) {
                    self.tell_fences().await;
                }
                self.save();
                let _ = done.send(());
            }
            Some(SessionNews::Stopped { running, done }) => {
                // What was lost is known before it is said that nothing is under way.
                self.collect_losses().await;
                self.earlier.running = running;
                self.save();
                let _ = done.send(());
            }
            Some(SessionNews::Fenced { done }) => {
                self.collect_losses().await;
                let last = self.fences.iter().map(|fence| fence.deadline).max();
                let left = last.map(|last| last.saturating_sub(self.now()));
                let _ = done.send(left.map(Duration::from_millis));
            }
            Some(SessionNews::Over { done }) => {
                self.earlier.kept = None;
                let _ = done.send(());
            }
        }
    }

    /// Collects what lanes have lost up to now, and has the region say so.
    async fn collect_losses(&mut self) {
        while let Ok(pair) = self.losses.try_recv() {
            self.lost_pair(&pair).await;
        }
    }

    /// Goes on with the requests of another region. True when somebody may have sent them.
    async fn begin_region(&mut self, tail: Tail) -> bool {
        self.earlier.kept = None;
        let now = self.now();
        let read = (!tail.fresh()).then(|| read(&tail));
        let mut number = 0;
        let mut already = false;
        match read {
            None => self.change_region(Uuid::new_v4().as_u128()),
            Some(Ok((of_copy, record))) if self.is_of_this_disk(&record) => {
                number = of_copy;
                // The fences of this very process are all here, with later ones.
                if record.region != self.earlier.region {
                    self.change_region(record.region);
                    self.inherit(&record, now);
                }
                if record.sending {
                    already = true;
                    let over = now.saturating_add(record.quiet.min(LONGEST));
                    self.earlier.over = self.earlier.over.max(over);
                }
                self.inherit_lost(record.associations);
            }
            Some(Ok((of_copy, _))) => {
                number = of_copy;
                tracing::error!(
                    disk = self.name,
                    "the requests in flight were made of another namespace: look at what this disk was attached to before"
                );
                already = self.fear(now);
            }
            Some(Err(error)) => {
                tracing::warn!(
                    disk = self.name,
                    "the region of requests in flight was in use before, but {error}: whatever was lost then may \
                     be written late"
                );
                already = self.fear(now);
            }
        }
        if already && self.earlier.writes_around {
            self.await_rings(now);
        }
        if tail.kept() {
            self.earlier.kept = Some(Kept { tail, number });
            // Both copies: none of another life is left.
            self.save();
            self.save();
        }
        self.tell_fences().await;
        self.ask();
        already
    }

    /// What a ring that is yet to come had in flight may be written late with the sectors around it, as they were. So no other
    /// ring writes before all have come, and what they may still write is fenced.
    fn await_rings(&mut self, now: u64) {
        self.fences.add(Fence {
            slba: 0,
            blocks: u64::MAX,
            owner: None,
            generation: SEVERAL,
            deadline: now.saturating_add(RINGS_COME),
        });
    }

    fn is_of_this_disk(&self, record: &Record) -> bool {
        let ours = identity(&self.namespace.namespace());
        record.disk == ours || record.disk == 0 || ours == 0
    }

    /// Requests have numbers of their own in each region.
    fn change_region(&mut self, region: u128) {
        self.fences.disown();
        self.earlier.region = region;
    }

    /// Takes over the fences of an earlier life.
    fn inherit(&mut self, record: &Record, now: u64) {
        // By the clock of this run of the machine what is left of them is known; otherwise it is all of the time.
        let comparable = record.boot == self.earlier.boot && record.boot != 0;
        let since_boot = boot_time();
        for fence in record.fences.iter() {
            let left = match comparable {
                true => fence.deadline.saturating_sub(since_boot).min(LONGEST),
                false => record.quiet.min(LONGEST),
            };
            if left > 0 {
                self.fences.add(Fence {
                    deadline: now.saturating_add(left).saturating_add(1),
                    ..*fence
                });
            }
        }
        if !self.fences.is_empty() {
            tracing::info!(
                disk = self.name,
                fenced = self.fences.len(),
                "an earlier life has left fences"
            );
        }
    }

    /// Nothing is known of an earlier life: all of the disk is fenced. True, since anything may have been sent.
    fn fear(&mut self, now: u64) -> bool {
        self.change_region(Uuid::new_v4().as_u128());
        let quiet = millis(self.quiet()).min(LONGEST);
        self.earlier.over = self.earlier.over.max(now.saturating_add(quiet));
        self.fences.add(Fence {
            slba: 0,
            blocks: u64::MAX,
            owner: None,
            generation: SEVERAL,
            deadline: self.earlier.over,
        });
        self.inherit_lost(None);
        tracing::warn!(
            disk = self.name,
            seconds = quiet / 1000,
            "writes wait until it cannot be"
        );
        true
    }

    /// What was in flight in an earlier life is lost with it: what it may still write becomes known everywhere, and
    /// then it begins anew.
    async fn recover(&mut self) {
        // One round is for all that have come up to now.
        while self.earlier.recovered.try_recv().is_ok() {}
        let (requests, fences) = self.collect(EARLIER_LIFE, EARLIER).await;
        let (now, over) = (self.now(), self.earlier.over);
        if over > now {
            self.fences.add_all(&fences, EARLIER, over);
        }
        tracing::info!(
            disk = self.name,
            requests,
            fenced = self.fences.len(),
            "requests of an earlier life go on"
        );
        self.fence().await;
    }

    pub(super) async fn tell_fences(&self) {
        let fences = Arc::new(self.fences.clone());
        self.tell(|| LaneMessage::Fences {
            fences: Arc::clone(&fences),
            done: None,
        })
        .await;
    }

    /// How long commands may be carried out that this process has sent, when it is gone.
    fn quiet(&self) -> Duration {
        let of_path = |path: &Path| path.quiet(self.keep_alive);
        let paths = self.paths.iter().filter_map(of_path).max();
        let unknown = || match self.keep_alive {
            Duration::ZERO => FEAR,
            keep_alive => keep_alive.saturating_mul(3),
        };
        self.earlier.local_quiet.or(paths).unwrap_or_else(unknown)
    }

    /// Has the region say what is in force now. Whatever follows from a change is done after that.
    pub(super) fn save(&mut self) {
        let connected = self.paths.iter().any(|path| path.association.is_some());
        let quiet = millis(self.quiet());
        let (now, since_boot) = (self.now(), boot_time());
        let disk = identity(&self.namespace.namespace());
        let associations = self.at_large(now, self.earlier.running);
        let earlier = &mut self.earlier;
        let Some(kept) = &mut earlier.kept else {
            return;
        };
        let mut fences = Fences::default();
        // Elsewhere the deadlines say nothing, and all of the time is taken for each.
        let mut longest = 0;
        for fence in self.fences.iter() {
            let left = fence.deadline.saturating_sub(now);
            longest = longest.max(left);
            fences.add(Fence {
                deadline: since_boot.saturating_add(left).saturating_add(1),
                ..*fence
            });
        }
        // What the life before may have sent and was not collected yet is feared further on.
        let left = earlier.over.saturating_sub(now);
        let record = Record {
            region: earlier.region,
            boot: earlier.boot,
            disk,
            sending: (earlier.running && connected) || left > 0,
            quiet: longest.max(left).max(if connected { quiet } else { 0 }),
            fences,
            associations,
        };
        kept.number = kept.number.wrapping_add(1);
        let written = record
            .encode(kept.number, kept.tail.len())
            .is_some_and(|(at, bytes)| kept.tail.write(at, &bytes));
        if !written {
            tracing::error!(
                disk = self.name,
                "the in-flight region has no room for what is fenced"
            );
        }
    }
}

fn read(tail: &Tail) -> Result<(u64, Record), NoRecord> {
    let mut bytes = vec![0; tail.len()];
    if !tail.read(0, &mut bytes) {
        return Err(NoRecord::Nonsense);
    }
    Record::decode(&bytes)
}

/// Names a namespace; 0 when it has no name of its own.
fn identity(namespace: &NamespaceInfo) -> u128 {
    let uuid = namespace.uuid.map(|uuid| uuid.as_u128());
    let nguid = namespace.nguid.map(u128::from_be_bytes);
    let eui64 = namespace
        .eui64
        .map(|eui64| u64::from_be_bytes(eui64).into());
    uuid.or(nguid).or(eui64).unwrap_or(0)
}

/// Milliseconds since the machine was started, suspended or not.
fn boot_time() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds
        .saturating_mul(1000)
        .saturating_add(nanos / 1_000_000)
}

/// Names this run of the machine; 0 when it does not tell.
fn boot() -> u128 {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let id = id.ok().and_then(|id| Uuid::parse_str(id.trim()).ok());
    id.map_or(0, |id| id.as_u128())
}
