//! What a disk does about what its controllers report: a namespace that has grown reaches the guest, and
//! everything is logged with the disk's name.
//!
//! A guest's disk never becomes smaller. Of a namespace that has shrunk, the controller refuses what lies beyond
//! its end; of one that is gone, it refuses everything until it is back. Where another namespace has taken the
//! place, the association is given up, so that nothing of the guest reaches that one: the way back looks for
//! the right one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nvmf::host::{Association, HostError, HostEvent, Inquiry, NamespaceInfo};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use vhost_user_blk::Device;

use crate::reconnect::verify::{NotTheSame, verify};
use crate::worker::mailbox::{LaneMessage, Mailbox, PairLost};

/// Bytes of a sector, virtio's unit.
const SECTOR: u64 = 512;
/// Lines in the log that controllers may cause for a disk in each window; what else they report is logged for
/// who looks for it.
const LINES: u32 = 20;
const WINDOW: Duration = Duration::from_secs(60);
/// Looks at the namespace that are under way or wait for their turn; more would find nothing new.
const LOOKS_MAX: usize = 8;

/// One disk's namespace and those who have to know of its changes.
pub(crate) struct NamespaceEvents {
    disk: Arc<Disk>,
    looks: Arc<Semaphore>,
}

struct Disk {
    /// For the log.
    name: String,
    device: Arc<Device>,
    lanes: Vec<Mailbox>,
    /// Where it is told that an association cannot go on.
    losses: mpsc::Sender<PairLost>,
    known: Mutex<Known>,
    lines: Mutex<Lines>,
    /// The namespace, for those who want to know when it changes.
    seen: watch::Sender<NamespaceInfo>,
    /// Looks happen one after the other.
    looking: tokio::sync::Mutex<()>,
}

/// Lines that were logged in this window.
struct Lines {
    since: Instant,
    count: u32,
}

/// What was last found.
struct Known {
    /// The namespace, never smaller than the guest's disk.
    namespace: NamespaceInfo,
    /// What was in the way when it was last looked at.
    trouble: Option<Trouble>,
}

/// What is wrong with the namespace; logged when it changes.
#[derive(Debug, PartialEq, Eq)]
enum Trouble {
    Gone,
    Shrunk(u64),
    WriteProtected,
    Unusable,
}

impl NamespaceEvents {
    /// Of a disk that a guest has, or will have, with this namespace.
    pub(crate) fn new(
        name: String,
        device: Arc<Device>,
        lanes: Vec<Mailbox>,
        losses: mpsc::Sender<PairLost>,
        namespace: NamespaceInfo,
    ) -> Self {
        Self {
            disk: Arc::new(Disk {
                name,
                device,
                lanes,
                losses,
                seen: watch::Sender::new(namespace.clone()),
                known: Mutex::new(Known {
                    namespace,
                    trouble: None,
                }),
                lines: Mutex::new(Lines {
                    since: Instant::now(),
                    count: 0,
                }),
                looking: tokio::sync::Mutex::default(),
            }),
            looks: Arc::new(Semaphore::new(LOOKS_MAX)),
        }
    }

    /// The namespace as the guest has it: what takes its place must not be smaller.
    pub(crate) fn namespace(&self) -> NamespaceInfo {
        self.disk.known().namespace.clone()
    }

    /// The same, and when it is another.
    pub(crate) fn seen(&self) -> watch::Receiver<NamespaceInfo> {
        self.disk.seen.subscribe()
    }

    /// Takes an event of an association of the disk, which has `number` there and the namespace under `nsid`. Does
    /// not wait: what has to be looked at is looked at beside the caller.
    pub(crate) fn take(
        &self,
        event: &HostEvent,
        association: &Association,
        number: u64,
        nsid: u32,
    ) {
        let disk = &self.disk;
        let at = association.controller().address;
        match event {
            // What has changed is logged when it is known.
            HostEvent::NamespacesChanged(_) => {
                tracing::debug!(disk = disk.name, controller = %at, "{event}");
            }
            _ if !disk.may_log() => {
                tracing::debug!(disk = disk.name, controller = %at, "{event}");
            }
            HostEvent::Smart(_) | HostEvent::Error(_) | HostEvent::Missed => {
                tracing::warn!(disk = disk.name, controller = %at, "{event}");
            }
            _ => tracing::info!(disk = disk.name, controller = %at, "{event}"),
        }
        let changed = match event {
            HostEvent::NamespacesChanged(changed) => changed.has(nsid),
            HostEvent::Missed => true,
            _ => false,
        };
        if changed {
            self.look(association.inquiry(), number, nsid);
        }
    }

    fn look(&self, inquiry: Inquiry, number: u64, nsid: u32) {
        // Those that wait will see what there is to see now.
        let Ok(permit) = Arc::clone(&self.looks).try_acquire_owned() else {
            return;
        };
        let disk = Arc::clone(&self.disk);
        tokio::spawn(async move {
            let one_by_one = disk.looking.lock().await;
            disk.looked(inquiry.reidentify(nsid).await, number, nsid)
                .await;
            drop((one_by_one, permit));
        });
    }

    /// A verified namespace of a new association: it may have grown meanwhile. To be called when the lanes know
    /// of it.
    pub(crate) async fn found(&self, namespace: &NamespaceInfo) {
        self.disk.same(namespace).await;
    }
}

impl Disk {
    fn known(&self) -> MutexGuard<'_, Known> {
        // Every change is complete in itself.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True when one more line may be logged now.
    fn may_log(&self) -> bool {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.since.elapsed() > WINDOW {
            *lines = Lines {
                since: Instant::now(),
                count: 0,
            };
        }
        lines.count = lines.count.saturating_add(1);
        lines.count <= LINES
    }

    /// Acts on what a look has found.
    async fn looked(
        &self,
        found: Result<Option<NamespaceInfo>, HostError>,
        number: u64,
        nsid: u32,
    ) {
        let found = match found {
            Ok(Some(found)) => found,
            Ok(None) => {
                if self.note(Some(Trouble::Gone)) {
                    tracing::error!(
                        disk = self.name,
                        nsid,
                        "the namespace is gone from its controller: requests fail until it is back"
                    );
                }
                return;
            }
            Err(error @ HostError::UnusableNamespace { .. }) => {
                if self.note(Some(Trouble::Unusable)) {
                    tracing::error!(disk = self.name, nsid, "the namespace has changed: {error}");
                }
                self.give_up(number, error.to_string());
                return;
            }
            // The association is lost, or about to be; the next one looks anyway.
            Err(error) => {
                if self.may_log() {
                    tracing::warn!(disk = self.name, nsid, "the namespace has changed: {error}");
                }
                return;
            }
        };
        let known = self.known().namespace.clone();
        match verify(&known, &found) {
            Ok(()) => self.same(&found).await,
            Err(reason @ NotTheSame::Smaller { .. }) => {
                if self.note(Some(Trouble::Shrunk(found.block_count))) {
                    tracing::error!(
                        disk = self.name,
                        nsid,
                        "the namespace has shrunk: {reason}; requests beyond its end fail"
                    );
                }
            }
            Err(reason) => {
                if self.may_log() {
                    tracing::error!(
                        disk = self.name,
                        nsid,
                        "the namespace has changed: {reason}"
                    );
                }
                self.give_up(number, reason.to_string());
            }
        }
    }

    /// It is the namespace that the guest has, at least as large.
    async fn same(&self, found: &NamespaceInfo) {
        let trouble = found.write_protected.then_some(Trouble::WriteProtected);
        let protected = trouble.is_some();
        if self.note(trouble) {
            if protected {
                tracing::warn!(
                    disk = self.name,
                    "the namespace is write protected: writes fail"
                );
            } else {
                tracing::info!(disk = self.name, "the namespace is as it was before");
            }
        }
        let before = {
            let mut known = self.known();
            if found.block_count < known.namespace.block_count {
                // Another association has seen it larger since this one was asked.
                return;
            }
            std::mem::replace(&mut known.namespace, found.clone()).block_count
        };
        if found.block_count > before {
            self.grow(found, before).await;
        }
        self.seen.send_if_modified(|seen| {
            let news = *seen != *found;
            seen.clone_from(found);
            news
        });
    }

    /// Shows the guest a larger disk, once all lanes take requests for it.
    async fn grow(&self, found: &NamespaceInfo, before: u64) {
        let mut answers = Vec::with_capacity(self.lanes.len());
        for lane in &self.lanes {
            let block_count = found.block_count;
            let (done, answer) = oneshot::channel();
            lane.send(LaneMessage::Grow { block_count, done }).await;
            answers.push(answer);
        }
        for answer in answers {
            // A lane that is gone takes no requests at all.
            let _ = answer.await;
        }
        let told = self.device.set_capacity(found.capacity() / SECTOR);
        let reaches = match told {
            true => "the VMM is told",
            false => "the VMM sees it when it reads the configuration again",
        };
        if self.may_log() {
            tracing::info!(
                disk = self.name,
                blocks = found.block_count,
                before,
                "the namespace has grown: {reaches}"
            );
        }
    }

    /// Remembers what is in the way; true when that has changed, and may be logged.
    fn note(&self, trouble: Option<Trouble>) -> bool {
        let mut known = self.known();
        let changed = known.trouble != trouble;
        known.trouble = trouble;
        drop(known);
        changed && self.may_log()
    }

    /// Has the association given up: its namespace ID means something else now.
    fn give_up(&self, association: u64, cause: String) {
        // A full channel has told of a loss before.
        let _ = self.losses.try_send(PairLost { association, cause });
    }
}

#[cfg(test)]
mod tests {
    use nvmf::spec::Status;
    use tokio::time::timeout;
    use uuid::Uuid;

    use super::*;
    use crate::bridge::geometry::{Choices, device_options};
    use crate::bridge::samples::{controller, namespace};

    const NUMBER: u64 = 7;
    const BLOCKS: u64 = 2048;

    struct Bench {
        events: NamespaceEvents,
        lane: mpsc::Receiver<LaneMessage>,
        losses: mpsc::Receiver<PairLost>,
    }

    impl Bench {
        fn new() -> Self {
            let choices = Choices {
                num_queues: 1,
                serial: None,
                read_only: false,
                emulate_512: false,
            };
            let namespace = found(BLOCKS);
            let device = Device::new(device_options(&choices, &controller(), &namespace));
            let (mailbox, lane) = Mailbox::new(16);
            let (loss, losses) = mpsc::channel(1);
            let events =
                NamespaceEvents::new("disk".to_owned(), device, vec![mailbox], loss, namespace);
            Self {
                events,
                lane,
                losses,
            }
        }

        async fn looked(&self, found: Result<Option<NamespaceInfo>, HostError>) {
            self.events.disk.looked(found, NUMBER, 7).await;
        }

        fn capacity(&self) -> u64 {
            self.events.disk.device.capacity()
        }

        /// Nothing was told to lanes, and no association was given up.
        fn is_quiet(&mut self) -> bool {
            self.lane.try_recv().is_err() && self.losses.try_recv().is_err()
        }

        fn trouble(&self) -> bool {
            self.events.disk.known().trouble.is_some()
        }
    }

    fn found(blocks: u64) -> NamespaceInfo {
        NamespaceInfo {
            uuid: Some(Uuid::from_u128(1)),
            ..namespace(512, blocks * 512)
        }
    }

    /// Polls until nothing goes on any more but what waits for an answer.
    async fn settle(growing: &mut (impl Future<Output = ()> + Unpin)) -> bool {
        timeout(Duration::from_millis(20), growing).await.is_ok()
    }

    #[tokio::test]
    async fn a_guest_sees_growth_once_every_lane_takes_requests_for_the_new_blocks() {
        let mut bench = Bench::new();
        bench.looked(Ok(Some(found(BLOCKS)))).await;
        assert!(bench.is_quiet());
        let (disk, device) = {
            let disk = &bench.events.disk;
            (Arc::clone(disk), Arc::clone(&disk.device))
        };
        for (blocks, before) in [(3000, BLOCKS), (4000, 3000)] {
            let namespace = found(blocks);
            let mut growing = Box::pin(disk.same(&namespace));
            assert!(!settle(&mut growing).await, "the lane has not answered");
            assert_eq!(device.capacity(), before);
            let Ok(LaneMessage::Grow { block_count, done }) = bench.lane.try_recv() else {
                panic!("the lane was not told");
            };
            assert_eq!(block_count, blocks);
            done.send(()).unwrap();
            assert!(settle(&mut growing).await);
            assert_eq!(device.capacity(), blocks);
            assert_eq!(bench.events.namespace().block_count, blocks);
        }
        // What another association was asked before that is old.
        disk.same(&found(3000)).await;
        assert_eq!(bench.events.namespace().block_count, 4000);
        // A lane that is gone answers nothing, and is not waited for.
        drop(bench.lane);
        disk.same(&found(5000)).await;
        assert_eq!(device.capacity(), 5000);
    }

    #[tokio::test]
    async fn a_namespace_that_shrinks_or_goes_keeps_the_guests_disk_as_it_is_until_it_is_back() {
        let mut bench = Bench::new();
        for gone in [Some(found(100)), None] {
            bench.looked(Ok(gone)).await;
            assert!(bench.is_quiet() && bench.trouble());
            assert_eq!(bench.capacity(), BLOCKS);
            assert_eq!(bench.events.namespace().block_count, BLOCKS);
            bench.looked(Ok(Some(found(BLOCKS)))).await;
            assert!(bench.is_quiet() && !bench.trouble());
        }
        bench.looked(Ok(None)).await;
        let told = async { assert!(bench.lane.recv().await.is_some()) };
        let grown = Ok(Some(found(BLOCKS + 1)));
        tokio::join!(bench.events.disk.looked(grown, NUMBER, 7), told);
        assert!(!bench.trouble());
        assert_eq!(bench.capacity(), BLOCKS + 1);
    }

    #[tokio::test]
    async fn an_association_whose_namespace_is_another_one_now_is_given_up() {
        let other = NamespaceInfo {
            uuid: Some(Uuid::from_u128(2)),
            ..found(BLOCKS)
        };
        let reformatted = NamespaceInfo {
            block_size: 4096,
            ..found(BLOCKS)
        };
        let unusable = HostError::UnusableNamespace {
            at: controller().address,
            subnqn: String::new(),
            nsid: 7,
            reason: "metadata".to_owned(),
        };
        for found in [Ok(Some(other)), Ok(Some(reformatted)), Err(unusable)] {
            let mut bench = Bench::new();
            bench.looked(found).await;
            let lost = bench.losses.try_recv().unwrap();
            assert_eq!(lost.association, NUMBER);
            assert!(bench.lane.try_recv().is_err());
            assert_eq!(bench.capacity(), BLOCKS);
        }
    }

    #[test]
    fn controllers_cause_no_more_than_so_many_lines() {
        let bench = Bench::new();
        let lines = (0..1000).filter(|_| bench.events.disk.may_log());
        assert_eq!(lines.count(), LINES as usize);
    }

    #[tokio::test]
    async fn a_question_that_fails_and_write_protection_change_nothing() {
        let mut bench = Bench::new();
        let failed = HostError::Command {
            at: controller().address,
            command: "Identify Namespace",
            status: Status::INTERNAL_ERROR,
        };
        bench.looked(Err(failed)).await;
        assert!(bench.is_quiet() && !bench.trouble());
        let protected = NamespaceInfo {
            write_protected: true,
            ..found(BLOCKS)
        };
        bench.looked(Ok(Some(protected))).await;
        assert!(bench.is_quiet() && bench.trouble());
    }
}
