//! A controller and a namespace as the tests of the bridge know them.

use nvmf::host::{
    ControllerInfo, DeallocateLimits, EventSupport, Liveness, NamespaceInfo, OptimalIo,
};
use nvmf::spec::Nqn;
use nvmf::spec::identify::oncs;

/// A controller that can do everything and has no limits.
pub(crate) fn controller() -> ControllerInfo {
    ControllerInfo {
        address: ([127, 0, 0, 1], 4420).into(),
        subnqn: Nqn::new("nqn.2026-01.org.example:disk1").unwrap(),
        cntlid: 1,
        version: 0x2_0000,
        serial: "1".to_owned(),
        model: "model".to_owned(),
        firmware: "1".to_owned(),
        max_transfer: None,
        in_capsule_limit: 8192,
        max_queue_entries: 128,
        oncs: oncs::DATASET_MANAGEMENT | oncs::WRITE_ZEROES,
        volatile_write_cache: true,
        max_write_zeroes: None,
        deallocate: DeallocateLimits::default(),
        retry_delays: Default::default(),
        liveness: Liveness::default(),
        cmic: 0,
        ana: None,
        instance: None,
        cross_resets: 0,
        extended_log: true,
        events: EventSupport::default(),
    }
}

/// A namespace of this many bytes.
pub(crate) fn namespace(block_size: u32, bytes: u64) -> NamespaceInfo {
    NamespaceInfo {
        nsid: 7,
        block_size,
        block_count: bytes / u64::from(block_size),
        uuid: None,
        nguid: None,
        eui64: None,
        write_protected: false,
        deallocated_reads_zero: true,
        write_zeroes_deallocates: true,
        optimal: OptimalIo::default(),
        anagrpid: 0,
    }
}
