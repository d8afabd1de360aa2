//! Identify Controller, digested into the limits and abilities that the rest goes by.

use std::net::SocketAddr;
use std::time::Duration;

use zerocopy::FromBytes;

use super::admin::Admin;
use super::ana::AnaInfo;
use super::error::HostError;
use super::events::EventSupport;
use crate::spec::identify::{IDENTIFY_LEN, IdentifyController, cmic, cns, ctratt, lpa, oncs};
use crate::spec::property::Cap;
use crate::spec::{ControllerInstance, Nqn, Sqe};

/// Version from which Identify with CNS 06h may be asked.
const VERSION_2_0: u32 = 2 << 16;
/// In-capsule data that is used at most, whatever the controller takes: a larger capsule would
/// only keep others waiting.
const IN_CAPSULE_MAX: u64 = 1 << 20;
/// Capsule sizes come in units of this many bytes; a command takes four.
const CAPSULE_UNIT: u64 = 16;
const COMMAND_UNITS: u32 = 4;
/// CNTRLTYPE of a discovery and of an administrative controller.
const DISCOVERY_CONTROLLER: u8 = 2;
const ADMINISTRATIVE_CONTROLLER: u8 = 3;
/// Unit of the retry delays (CRDT).
const RETRY_DELAY_UNIT: Duration = Duration::from_millis(100);
/// Unit of the keep-alive granularity (KAS).
const KEEP_ALIVE_UNIT: Duration = Duration::from_millis(100);
/// Ranges that one Dataset Management command can hold.
const DSM_RANGES_MAX: u16 = 256;

/// What a controller is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControllerInfo {
    /// Its address, the one of several that answered.
    pub address: SocketAddr,
    /// Its subsystem.
    pub subnqn: Nqn,
    /// Controller ID.
    pub cntlid: u16,
    /// Specification version: major in bits 31:16, minor in 15:8, tertiary in 7:0; 0 = not told.
    pub version: u32,
    /// Serial number, without padding and control characters.
    pub serial: String,
    /// Model number, likewise.
    pub model: String,
    /// Firmware revision, likewise.
    pub firmware: String,
    /// Bytes that one command may transfer (MDTS); `None` = no limit.
    pub max_transfer: Option<u64>,
    /// Bytes of data that a command capsule of an I/O queue may hold; 0 = none.
    pub in_capsule_limit: u32,
    /// Entries that an I/O queue may have (CAP.MQES and MAXCMD), at least 2.
    pub max_queue_entries: u32,
    /// Optional NVM commands: see [`oncs`].
    pub oncs: u16,
    /// It has a volatile write cache: what is not flushed may be lost with it.
    pub volatile_write_cache: bool,
    /// Bytes that one Write Zeroes may cover (WZSL); `None` = no limit told.
    pub max_write_zeroes: Option<u64>,
    /// Limits of Dataset Management.
    pub deallocate: DeallocateLimits,
    /// How long it may ask to wait before a command that failed is tried again: by retry delay 1 to 3 of
    /// a status (CRDT1 to CRDT3). Zero is not at all.
    pub retry_delays: [Duration; 3],
    /// How it finds out that its host is gone.
    pub liveness: Liveness,
    /// What its subsystem may have several of: see [`cmic`].
    pub cmic: u8,
    /// What it says of asymmetric namespace access; `None` when it does not report that.
    pub ana: Option<AnaInfo>,
    /// What it runs as since it was enabled, by which another controller can be asked to reset it; `None` when it does
    /// not tell.
    pub instance: Option<ControllerInstance>,
    /// Other controllers that it can be asked to reset at a time (CCRL); 0 when it cannot.
    pub cross_resets: u8,
    /// Parts of a log page can be read at any offset.
    pub extended_log: bool,
    /// What it reports of its own accord.
    pub events: EventSupport,
}

/// How a controller finds out that its host is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Liveness {
    /// What its keep-alive timer counts in (KAS); zero when it does not tell.
    pub granularity: Duration,
    /// It takes any command for a sign of life (traffic-based keep-alive).
    pub traffic_based: bool,
    /// How long it may take to stop working on commands then (CQT); zero when it does not tell.
    pub quiesce: Duration,
}

/// What one Dataset Management command may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeallocateLimits {
    /// Ranges, 1 to 256 (DMRL).
    pub max_ranges: u16,
    /// Blocks of one range (DMRSL).
    pub max_range_blocks: u32,
    /// Blocks of all ranges together (DMSL); `None` = no limit told.
    pub max_blocks: Option<u64>,
}

impl Default for DeallocateLimits {
    fn default() -> Self {
        Self {
            max_ranges: DSM_RANGES_MAX,
            max_range_blocks: u32::MAX,
            max_blocks: None,
        }
    }
}

impl Liveness {
    /// How long after the host has sent its last command the controller may still be working on one, when the
    /// association was lost without a word; `kato` is the time-out that the association was made with. `None`
    /// without keep-alive: then the controller need not find out ever.
    ///
    /// The controller's timer may have been started again by the last command just before the loss, and
    /// with traffic-based keep-alive it looks only once in each period whether there was traffic: it has
    /// found out after two, or three, periods (Base, "Communication Loss Handling"). Then it has the time that
    /// it states to stop what it has begun.
    pub fn quiet_after(&self, kato: Duration) -> Option<Duration> {
        if kato.is_zero() {
            return None;
        }
        let unit = self.granularity.max(Duration::from_millis(1));
        let periods = kato.as_nanos().div_ceil(unit.as_nanos());
        let kato = unit.saturating_mul(u32::try_from(periods).unwrap_or(u32::MAX));
        let times = if self.traffic_based { 3 } else { 2 };
        Some(kato.saturating_mul(times).saturating_add(self.quiesce))
    }
}

impl ControllerInfo {
    /// Write Zeroes is supported.
    pub fn supports_write_zeroes(&self) -> bool {
        self.oncs & oncs::WRITE_ZEROES != 0
    }

    /// Dataset Management, and so deallocation, is supported.
    pub fn supports_deallocate(&self) -> bool {
        self.oncs & oncs::DATASET_MANAGEMENT != 0
    }
}

/// Asks the controller who it is. `cntlid` is what Connect returned.
pub(super) async fn identify_controller(
    admin: &Admin,
    subnqn: &Nqn,
    cap: Cap,
    cntlid: u16,
) -> Result<ControllerInfo, HostError> {
    let at = admin.at();
    let unusable = |reason: String| HostError::Unusable { at, reason };
    let sqe = Sqe::identify(cns::CONTROLLER, 0, 0);
    let bytes = admin.read("Identify Controller", sqe, IDENTIFY_LEN).await?;
    let (data, _) = IdentifyController::ref_from_prefix(&bytes)
        .map_err(|_| unusable("Identify Controller is too short".to_owned()))?;
    let mut info = digest(data, at, subnqn, cap).map_err(unusable)?;
    if info.cntlid != cntlid {
        return Err(unusable(format!(
            "Connect returned controller ID {cntlid:#06x} and Identify {:#06x}",
            info.cntlid
        )));
    }
    if info.version >= VERSION_2_0 {
        let sqe = Sqe::identify(cns::IO_CONTROLLER, 0, 0);
        match admin
            .read(
                "Identify I/O Command Set Specific Controller",
                sqe,
                IDENTIFY_LEN,
            )
            .await
        {
            Ok(bytes) => add_command_set_limits(&mut info, &bytes, cap),
            // Optional for the NVM command set: no limits then.
            Err(HostError::Command { status, .. }) => {
                tracing::debug!(controller = %at, "no NVM command set limits: {status}");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(info)
}

fn digest(
    data: &IdentifyController,
    address: SocketAddr,
    subnqn: &Nqn,
    cap: Cap,
) -> Result<ControllerInfo, String> {
    match data.cntrltype {
        DISCOVERY_CONTROLLER => return Err("it is a discovery controller".to_owned()),
        ADMINISTRATIVE_CONTROLLER => return Err("it is an administrative controller".to_owned()),
        _ => {}
    }
    check_subnqn(data, subnqn)?;
    for (what, reported, ours) in [("submission", data.sqes, 6), ("completion", data.cqes, 4)] {
        if reported & 0xf > ours {
            let least = 1u32 << (reported & 0xf);
            return Err(format!(
                "its {what} queue entries have at least {least} bytes"
            ));
        }
    }
    let max_queue_entries = match u32::from(data.maxcmd.get()) {
        0 => cap.max_queue_entries(),
        maxcmd => cap.max_queue_entries().min(maxcmd).max(2),
    };
    Ok(ControllerInfo {
        address,
        subnqn: subnqn.clone(),
        cntlid: data.cntlid.get(),
        version: data.ver.get(),
        serial: text(&data.sn),
        model: text(&data.mn),
        firmware: text(&data.fr),
        max_transfer: pages(data.mdts, cap),
        in_capsule_limit: in_capsule_limit(data)?,
        max_queue_entries,
        oncs: data.oncs.get(),
        volatile_write_cache: data.vwc & 1 != 0,
        max_write_zeroes: None,
        deallocate: DeallocateLimits::default(),
        retry_delays: data
            .crdt
            .map(|delay| RETRY_DELAY_UNIT * u32::from(delay.get())),
        liveness: Liveness {
            granularity: KEEP_ALIVE_UNIT * u32::from(data.kas.get()),
            traffic_based: data.ctratt.get() & ctratt::TBKAS != 0,
            quiesce: Duration::from_millis(data.cqt.get().into()),
        },
        cmic: data.cmic,
        ana: (data.cmic & cmic::ANA != 0).then(|| ana_info(data)),
        // An uniquifier is never 0.
        instance: (data.ciu != 0).then(|| ControllerInstance {
            cntlid: data.cntlid.get(),
            ciu: data.ciu,
            cirn: data.cirn.get(),
        }),
        cross_resets: data.ccrl,
        extended_log: data.lpa & lpa::EXTENDED != 0,
        events: event_support(data),
    })
}

fn ana_info(data: &IdentifyController) -> AnaInfo {
    AnaInfo {
        capabilities: data.anacap,
        transition_time: Duration::from_secs(data.anatt.into()),
        max_group: data.anagrpmax.get(),
        groups: data.nanagrpid.get(),
        namespaces: match data.mnan.get() {
            0 => data.nn.get(),
            most => most,
        },
    }
}

/// What the controller says of its events; both counts are zero-based there.
pub(super) fn event_support(data: &IdentifyController) -> EventSupport {
    EventSupport {
        requests: u16::from(data.aerl) + 1,
        optional: data.oaes.get(),
        error_entries: u16::from(data.elpe) + 1,
    }
}

/// A controller that answers under another name is another subsystem, and its namespaces are not
/// the ones that were asked for. A field without a name says nothing.
fn check_subnqn(data: &IdentifyController, subnqn: &Nqn) -> Result<(), String> {
    match Nqn::from_field(&data.subnqn) {
        Ok(told) if told != *subnqn => Err(format!(
            "it was connected to as {subnqn} and says that its subsystem is {told}"
        )),
        _ => Ok(()),
    }
}

fn in_capsule_limit(data: &IdentifyController) -> Result<u32, String> {
    let units = data.ioccsz.get();
    let Some(room) = units.checked_sub(COMMAND_UNITS) else {
        return Err(format!(
            "its I/O command capsules have {} bytes, too few for a command (IOCCSZ)",
            u64::from(units) * CAPSULE_UNIT
        ));
    };
    if data.icdoff.get() != 0 {
        // Data would not follow the command directly, as NVMe/TCP has it.
        return Ok(0);
    }
    Ok((u64::from(room) * CAPSULE_UNIT).min(IN_CAPSULE_MAX) as u32)
}

/// 2^`power` of the controller's smallest pages in bytes; 0, and what no command can reach, is no
/// limit.
fn pages(power: u8, cap: Cap) -> Option<u64> {
    if power == 0 {
        return None;
    }
    let shift = u32::from(power) + cap.mps_min().trailing_zeros();
    (shift < u64::BITS).then(|| 1 << shift)
}

/// Identify with CNS 06h for the NVM command set: WZSL is byte 1, DMRL byte 3, DMRSL bytes 4 to 7,
/// DMSL bytes 8 to 15; zeroes are no limits.
fn add_command_set_limits(info: &mut ControllerInfo, bytes: &[u8], cap: Cap) {
    let [_, wzsl, _, dmrl, rest @ ..] = bytes else {
        return;
    };
    let Some((dmrsl, rest)) = rest.split_first_chunk::<4>() else {
        return;
    };
    let Some((dmsl, _)) = rest.split_first_chunk::<8>() else {
        return;
    };
    info.max_write_zeroes = pages(*wzsl, cap);
    let limits = &mut info.deallocate;
    if *dmrl != 0 {
        limits.max_ranges = u16::from(*dmrl);
    }
    if let blocks @ 1.. = u32::from_le_bytes(*dmrsl) {
        limits.max_range_blocks = blocks;
    }
    limits.max_blocks = Some(u64::from_le_bytes(*dmsl)).filter(|&blocks| blocks != 0);
}

/// A string field: padding and control characters removed, what is no text replaced.
fn text(field: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(field)
        .chars()
        .filter(|c| !c.is_control())
        .collect();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;

    const CAP: Cap = Cap(Cap::CSS_NVM | 1023);

    fn controller(change: impl FnOnce(&mut IdentifyController)) -> Result<ControllerInfo, String> {
        let mut data = IdentifyController::new_zeroed();
        data.ioccsz = 4.into();
        change(&mut data);
        let subnqn = Nqn::new("nqn.2026-01.org.example:disk1").unwrap();
        digest(&data, "127.0.0.1:4420".parse().unwrap(), &subnqn, CAP)
    }

    #[test]
    fn transfer_limits_are_powers_of_the_smallest_page() {
        for (mdts, expected) in [
            (0, None),
            (1, Some(8192)),
            (5, Some(131_072)),
            (51, Some(1 << 63)),
            (52, None),
            (255, None),
        ] {
            let info = controller(|data| data.mdts = mdts).unwrap();
            assert_eq!(info.max_transfer, expected, "MDTS {mdts}");
        }
    }

    #[test]
    fn capsules_give_what_they_have_beside_the_command() {
        for (ioccsz, expected) in [(4, 0), (5, 16), (516, 8192), (u32::MAX, 1 << 20)] {
            let info = controller(|data| data.ioccsz = ioccsz.into()).unwrap();
            assert_eq!(info.in_capsule_limit, expected, "IOCCSZ {ioccsz}");
        }
        let offset = controller(|data| {
            data.ioccsz = 516.into();
            data.icdoff = 1.into();
        });
        assert_eq!(offset.unwrap().in_capsule_limit, 0);
        for ioccsz in 0..4u32 {
            let reason = controller(|data| data.ioccsz = ioccsz.into()).unwrap_err();
            assert!(reason.contains("IOCCSZ"), "{reason}");
        }
    }

    #[test]
    fn strings_lose_padding_control_characters_and_what_is_no_text() {
        let info = controller(|data| {
            data.sn = *b"\x1b[2JSN 1\r\n\0\0      \0\0";
            data.mn = [b' '; 40];
            data.fr = *b"\xff\xfe1.0   ";
        });
        let info = info.unwrap();
        assert_eq!((info.serial.as_str(), info.model.as_str()), ("[2JSN 1", ""));
        assert_eq!(info.firmware, "\u{fffd}\u{fffd}1.0");
    }

    #[test]
    fn a_lost_controller_is_quiet_after_its_keep_alive_periods_and_the_time_that_it_states() {
        let after = |change: fn(&mut IdentifyController), kato| {
            let info = controller(change).unwrap();
            info.liveness.quiet_after(Duration::from_millis(kato))
        };
        let millis = |millis| Some(Duration::from_millis(millis));
        assert_eq!(after(|_| {}, 0), None);
        assert_eq!(after(|data| data.cqt = 100.into(), 0), None);
        assert_eq!(after(|_| {}, 5000), millis(10_000));
        assert_eq!(after(|data| data.cqt = 250.into(), 5000), millis(10_250));
        let traffic: fn(&mut IdentifyController) = |data| data.ctratt = (1 << 6).into();
        assert_eq!(after(traffic, 5000), millis(15_000));
        // A timer that counts whole seconds runs for two of them.
        assert_eq!(after(|data| data.kas = 10.into(), 1500), millis(4000));
        assert!(after(|data| data.kas = 10.into(), u64::MAX).is_some());
    }

    #[test]
    fn abilities_are_those_that_are_told() {
        let none = controller(|_| {}).unwrap();
        assert!(!none.supports_write_zeroes() && !none.supports_deallocate());
        assert!(!none.volatile_write_cache);
        let all = controller(|data| {
            data.oncs = (oncs::WRITE_ZEROES | oncs::DATASET_MANAGEMENT).into();
            data.vwc = 7;
        });
        let all = all.unwrap();
        assert!(all.supports_write_zeroes() && all.supports_deallocate());
        assert!(all.volatile_write_cache);
        // Flush of all namespaces, but no cache.
        assert!(
            !controller(|data| data.vwc = 6)
                .unwrap()
                .volatile_write_cache
        );
    }

    #[test]
    fn controllers_of_other_kinds_and_names_are_refused() {
        type Change = fn(&mut IdentifyController);
        let changes: [(Change, &str); 5] = [
            (|data| data.cntrltype = 2, "discovery"),
            (|data| data.cntrltype = 3, "administrative"),
            (
                |data| data.sqes = 0x77,
                "submission queue entries have at least 128",
            ),
            (
                |data| data.cqes = 0x55,
                "completion queue entries have at least 32",
            ),
            (
                |data| {
                    data.subnqn = Nqn::new("nqn.2026-01.org.example:other")
                        .unwrap()
                        .to_field()
                },
                "org.example:other",
            ),
        ];
        for (change, named) in changes {
            let reason = controller(change).unwrap_err();
            assert!(reason.contains(named), "{reason}");
        }
        // No name, and what is no name, are only untidy.
        assert!(controller(|data| data.subnqn = [0xff; 256]).is_ok());
    }

    #[test]
    fn command_set_limits_of_zero_are_no_limits_and_short_data_says_nothing() {
        let mut info = controller(|_| {}).unwrap();
        add_command_set_limits(&mut info, &[0; 4096], CAP);
        assert_eq!(
            (info.max_write_zeroes, info.deallocate),
            (None, DeallocateLimits::default())
        );
        for len in 0..16 {
            add_command_set_limits(&mut info, &vec![0xff; len], CAP);
            assert_eq!(info.deallocate, DeallocateLimits::default(), "{len} bytes");
        }
    }
}
