//! Asynchronous events: what a completed request says, and what can be asked for.

/// Dword 0 of a completed Asynchronous Event Request, taken apart (Base, figure "Asynchronous Event
/// Request - Completion Queue Entry Dword 0").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AsyncEvent {
    /// What kind of event: see [`kind`].
    pub kind: u8,
    /// Which event of that kind: see [`notice`] and [`health`].
    pub info: u8,
    /// Log page that belongs to it: see [`super::log::lid`].
    pub page: u8,
}

impl AsyncEvent {
    /// From dword 0 of a completion.
    pub const fn from_dw0(dw0: u32) -> Self {
        Self {
            kind: dw0 as u8 & 7,
            info: (dw0 >> 8) as u8,
            page: (dw0 >> 16) as u8,
        }
    }

    /// As dword 0 of a completion.
    pub const fn to_dw0(self) -> u32 {
        self.kind as u32 & 7 | (self.info as u32) << 8 | (self.page as u32) << 16
    }
}

/// Event types.
pub mod kind {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const ERROR: u8 = 0;
    pub const HEALTH: u8 = 1;
    pub const NOTICE: u8 = 2;
    pub const IO_COMMAND_SET: u8 = 6;
    pub const VENDOR: u8 = 7;
}

/// Which notice.
pub mod notice {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const NAMESPACE_ATTRIBUTE: u8 = 0x00;
    pub const FIRMWARE_ACTIVATION: u8 = 0x01;
    pub const ANA_CHANGE: u8 = 0x03;
    pub const DISCOVERY_CHANGE: u8 = 0xf0;
    pub const CROSS_CONTROLLER_RESET: u8 = 0xf4;
}

/// Which SMART / health event.
pub mod health {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const RELIABILITY: u8 = 0;
    pub const TEMPERATURE: u8 = 1;
    pub const SPARE: u8 = 2;
}

/// Bits of the Asynchronous Event Configuration feature; those of notices are the bits of OAES, too.
pub mod config {
    /// A spare area is below its threshold.
    pub const SPARE: u32 = 1 << 0;
    /// A temperature is beyond its threshold.
    pub const TEMPERATURE: u32 = 1 << 1;
    /// Reliability is degraded.
    pub const RELIABILITY: u32 = 1 << 2;
    /// The media can only be read.
    pub const READ_ONLY: u32 = 1 << 3;
    /// The backup of volatile memory failed.
    pub const VOLATILE_BACKUP: u32 = 1 << 4;
    /// All health warnings.
    pub const HEALTH: u32 = SPARE | TEMPERATURE | RELIABILITY | READ_ONLY | VOLATILE_BACKUP;
    /// Namespace attribute notices.
    pub const NAMESPACE_ATTRIBUTE: u32 = 1 << 8;
    /// Firmware activation notices.
    pub const FIRMWARE_ACTIVATION: u32 = 1 << 9;
    /// Asymmetric namespace access change notices.
    pub const ANA_CHANGE: u32 = 1 << 11;
    /// Cross-Controller Reset completed notices.
    pub const CROSS_CONTROLLER_RESET: u32 = 1 << 20;
    /// Discovery log page change notices.
    pub const DISCOVERY_CHANGE: u32 = 1 << 31;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dword_0_has_type_information_and_page_where_the_specification_puts_them() {
        let event = AsyncEvent::from_dw0(0xff04_00fa);
        assert_eq!((event.kind, event.info, event.page), (2, 0, 4));
        let ana = AsyncEvent {
            kind: kind::NOTICE,
            info: notice::ANA_CHANGE,
            page: 0x0c,
        };
        assert_eq!(ana.to_dw0(), 0x000c_0302);
        assert_eq!(AsyncEvent::from_dw0(ana.to_dw0()), ana);
    }
}
