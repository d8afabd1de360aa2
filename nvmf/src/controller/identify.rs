//! What Identify answers: structures filled with what is true of this controller.

use zerocopy::{FromZeros, IntoBytes};

use super::ana;
use super::registers::VERSION;
use super::subsystem::{MAX_NSID, Namespace, Subsystem};
use super::{Limits, PAGE};
use crate::spec::ana::anacap;
use crate::spec::event::config;
use crate::spec::identify::{
    IDENTIFY_LEN, IdentifyController, IdentifyNamespace, LbaFormat, NamespaceDescriptorHeader,
    cmic, cns, ctratt, lpa, nidt, oncs,
};
use crate::spec::{ControllerInstance, NSID_ALL, Sqe, Status};

/// Keep-alive granularity in units of 100 ms.
pub(super) const KAS: u16 = 10;
/// Capsule sizes are in units of 16 bytes.
const CAPSULE_UNIT: u32 = 16;
const SQE_LEN: u32 = 64;
/// SGLS: SGLs are supported; an offset can be an address; transport data blocks.
const SGLS: u32 = 1 | 1 << 20 | 1 << 21;
/// CNTRLTYPE of an I/O controller.
const IO_CONTROLLER: u8 = 1;
/// LPA: commands supported and effects; extended data.
const LPA: u8 = lpa::EFFECTS | lpa::EXTENDED;
/// ANACAP: every state may be reported.
const ANACAP: u8 = anacap::OPTIMIZED
    | anacap::NON_OPTIMIZED
    | anacap::INACCESSIBLE
    | anacap::PERSISTENT_LOSS
    | anacap::CHANGE
    | anacap::GROUP_IS_FIXED;
/// Command set identifier of the NVM command set.
const CSI_NVM: u8 = 0;
/// What the operating system writes at once, for hints: a page.
const PREFERRED_WRITE: u32 = 4096;

/// Firmware revision: the version of this build.
pub(super) fn firmware() -> [u8; 8] {
    padded(env!("CARGO_PKG_VERSION"))
}

/// A space-padded ASCII field.
pub(super) fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    let len = text.len().min(N);
    field[..len].copy_from_slice(&text.as_bytes()[..len]);
    field
}

fn refuse<T>(status: Status) -> Result<T, Status> {
    Err(status.do_not_retry())
}

/// Answers Identify: 4096 bytes.
///
/// # Errors
/// The status to answer with.
pub(super) fn identify(
    sqe: &Sqe,
    data_len: u32,
    subsystem: &Subsystem,
    instance: ControllerInstance,
    limits: &Limits,
) -> Result<Vec<u8>, Status> {
    if data_len as usize != IDENTIFY_LEN {
        return refuse(Status::DATA_SGL_LENGTH_INVALID);
    }
    let nsid = sqe.nsid.get();
    let csi = (sqe.cdw11.get() >> 24) as u8;
    match sqe.cdw10.get() as u8 {
        cns::NAMESPACE => Ok(match active(subsystem, nsid)? {
            Some(namespace) => self::namespace(namespace).as_bytes().to_vec(),
            None => vec![0; IDENTIFY_LEN],
        }),
        cns::CONTROLLER => {
            let mut id = controller(subsystem, instance.cntlid, limits);
            if limits.cross_resets > 0 {
                id.oaes = (id.oaes.get() | config::CROSS_CONTROLLER_RESET).into();
                id.ciu = instance.ciu;
                id.cirn = instance.cirn.into();
                id.ccrl = limits.cross_resets;
            }
            Ok(id.as_bytes().to_vec())
        }
        cns::ACTIVE_NAMESPACES => active_namespaces(subsystem, nsid),
        cns::NAMESPACE_DESCRIPTORS => match active(subsystem, nsid)? {
            Some(namespace) => Ok(descriptors(namespace)),
            None => refuse(Status::INVALID_FIELD),
        },
        // The NVM command set's own structures: no limits beyond those of Identify Controller, no
        // protection information.
        cns::IO_NAMESPACE if csi == CSI_NVM => match active(subsystem, nsid)? {
            Some(_) => Ok(vec![0; IDENTIFY_LEN]),
            None => refuse(Status::INVALID_FIELD),
        },
        cns::IO_CONTROLLER if csi == CSI_NVM => Ok(vec![0; IDENTIFY_LEN]),
        cns::INDEPENDENT_NAMESPACE => match active(subsystem, nsid)? {
            Some(namespace) => Ok(independent(namespace)),
            None => refuse(Status::INVALID_FIELD),
        },
        _ => refuse(Status::INVALID_FIELD),
    }
}

/// The namespace with an NSID that is valid, if it is active.
fn active(subsystem: &Subsystem, nsid: u32) -> Result<Option<&Namespace>, Status> {
    if !(1..=MAX_NSID).contains(&nsid) {
        return refuse(Status::INVALID_NAMESPACE);
    }
    let found = subsystem.find(nsid);
    Ok(found.map(|at| &subsystem.namespaces()[at]))
}

pub(super) fn controller(
    subsystem: &Subsystem,
    cntlid: u16,
    limits: &Limits,
) -> IdentifyController {
    let mut id = IdentifyController::new_zeroed();
    id.sn = padded(subsystem.serial());
    id.mn = padded("vhost-nvmf");
    id.fr = firmware();
    // Several controllers may exist in the subsystem.
    id.cmic = cmic::CONTROLLERS;
    id.mdts = (limits.max_transfer / PAGE).ilog2() as u8;
    id.cntlid = cntlid.into();
    id.ver = VERSION.into();
    id.oaes = config::NAMESPACE_ATTRIBUTE.into();
    if subsystem.ana().is_some() {
        id.cmic |= cmic::ANA;
        id.oaes |= config::ANA_CHANGE;
        id.anatt = ana::TRANSITION_SECONDS;
        id.anacap = ANACAP;
        id.anagrpmax = ana::GROUPS_MAX.into();
        id.nanagrpid = ana::GROUPS_MAX.into();
    }
    id.ctratt = (ctratt::HOST_ID_128 | ctratt::TBKAS).into();
    id.cntrltype = IO_CONTROLLER;
    id.acl = 3;
    id.aerl = limits.async_events.saturating_sub(1);
    // One firmware slot, read-only.
    id.frmw = 1 | 1 << 1;
    id.lpa = LPA;
    id.wctemp = 0x157.into();
    id.cctemp = 0x157.into();
    id.kas = KAS.into();
    id.sqes = 0x66;
    id.cqes = 0x44;
    id.maxcmd = u16::try_from(limits.queue_size).unwrap_or(u16::MAX).into();
    id.nn = MAX_NSID.into();
    id.mnan = MAX_NSID.into();
    id.oncs = (oncs::COMPARE | oncs::DATASET_MANAGEMENT | oncs::WRITE_ZEROES).into();
    // Bits 2:1 = 10b: a flush names its namespace.
    id.vwc = u8::from(subsystem.has_volatile_cache()) | 2 << 1;
    id.sgls = SGLS.into();
    id.subnqn = subsystem.nqn().to_field();
    id.ioccsz = ((SQE_LEN + limits.in_capsule) / CAPSULE_UNIT).into();
    id.iorcsz = 1.into();
    id.msdbd = 1;
    // Disconnect ends an I/O queue.
    id.ofcs = 1.into();
    id
}

fn namespace(namespace: &Namespace) -> IdentifyNamespace {
    let geometry = namespace.backend().geometry();
    let mut id = IdentifyNamespace::new_zeroed();
    id.nsze = geometry.block_count.into();
    id.ncap = geometry.block_count.into();
    id.nuse = geometry.block_count.into();
    id.nsfeat = IdentifyNamespace::NSFEAT_OPTPERF;
    let preferred = (PREFERRED_WRITE / geometry.block_size).max(1) as u16 - 1;
    id.npwg = preferred.into();
    id.npwa = preferred.into();
    id.npdg = preferred.into();
    id.npda = preferred.into();
    id.nows = preferred.into();
    // Any number of controllers may use it at a time.
    id.nmic = 1;
    id.dlfeat = u8::from(geometry.deallocated_reads_zeroes)
        | u8::from(geometry.deallocate && geometry.deallocated_reads_zeroes) << 3;
    id.nsattr = u8::from(geometry.read_only);
    id.anagrpid = namespace.ana_group().into();
    id.nguid = *namespace.uuid().as_bytes();
    id.lbaf[0] = LbaFormat {
        ms: 0.into(),
        lbads: geometry.block_size.ilog2() as u8,
        rp: 0,
    };
    id
}

/// The command set independent structure (Base 2.0): few bytes of it say something.
fn independent(namespace: &Namespace) -> Vec<u8> {
    const NMIC: usize = 1;
    const ANAGRPID: std::ops::Range<usize> = 4..8;
    const NSATTR: usize = 8;
    const NSTAT: usize = 14;
    let mut id = vec![0; IDENTIFY_LEN];
    id[NMIC] = 1;
    id[ANAGRPID].copy_from_slice(&namespace.ana_group().to_le_bytes());
    id[NSATTR] = u8::from(namespace.backend().geometry().read_only);
    // Ready.
    id[NSTAT] = 1;
    id
}

fn active_namespaces(subsystem: &Subsystem, after: u32) -> Result<Vec<u8>, Status> {
    if after >= NSID_ALL - 1 {
        return refuse(Status::INVALID_FIELD);
    }
    let mut list = Vec::with_capacity(IDENTIFY_LEN);
    let nsids = subsystem.namespaces().iter().map(Namespace::nsid);
    for nsid in nsids.filter(|&nsid| nsid > after).take(IDENTIFY_LEN / 4) {
        list.extend_from_slice(&nsid.to_le_bytes());
    }
    list.resize(IDENTIFY_LEN, 0);
    Ok(list)
}

fn descriptors(namespace: &Namespace) -> Vec<u8> {
    let mut list = Vec::with_capacity(IDENTIFY_LEN);
    for (nidt, value) in [
        (nidt::NGUID, namespace.uuid().as_bytes().as_slice()),
        (nidt::UUID, namespace.uuid().as_bytes().as_slice()),
        (nidt::CSI, &[CSI_NVM]),
    ] {
        let header = NamespaceDescriptorHeader {
            nidt,
            nidl: value.len() as u8,
            reserved: [0; 2],
        };
        list.extend_from_slice(header.as_bytes());
        list.extend_from_slice(value);
    }
    list.resize(IDENTIFY_LEN, 0);
    list
}
