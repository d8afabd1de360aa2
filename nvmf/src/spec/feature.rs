//! Feature identifiers and the values of those that are used.

/// Feature identifiers (Base, figure "Feature Identifiers").
pub mod fid {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER_MANAGEMENT: u8 = 0x02;
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    pub const ASYNC_EVENT_CONFIG: u8 = 0x0b;
    pub const KEEP_ALIVE_TIMER: u8 = 0x0f;
    pub const HOST_BEHAVIOR: u8 = 0x16;
    pub const HOST_ID: u8 = 0x81;
}

/// The data of Host Behavior Support (512 bytes) of a host that understands retry delays in completions (ACRE), and
/// nothing else that a controller has to know of.
pub fn host_behavior_with_retry_delays() -> Vec<u8> {
    let mut data = vec![0; 512];
    data[0] = 1;
    data
}

/// Number of Queues asks for, and answers with, two zero-based counts. This makes the dword from
/// an ordinary count of I/O queue pairs (1 to 65535).
pub fn number_of_queues(count: u16) -> u32 {
    let zero_based = u32::from(count.saturating_sub(1));
    zero_based << 16 | zero_based
}

/// The number of I/O queue pairs that an answer to Number of Queues grants: the smaller of its
/// two counts, made one-based.
pub fn queues_granted(dw0: u32) -> u32 {
    (dw0 & 0xffff).min(dw0 >> 16) + 1
}
