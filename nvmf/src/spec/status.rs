//! The status field of a completion: type, code, and what the host may do about it.

/// Status of a command (Base, section "Status Field"): SCT, SC, CRDT, M and DNR.
///
/// Bits are those of the wire without the phase bit: SC 7:0, SCT 10:8, CRDT 12:11, M 13, DNR 14.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Status(u16);

/// Status code types.
pub mod sct {
    /// Generic command status.
    pub const GENERIC: u8 = 0;
    /// Command-specific status.
    pub const COMMAND: u8 = 1;
    /// Media and data integrity errors.
    pub const MEDIA: u8 = 2;
    /// Path-related status.
    pub const PATH: u8 = 3;
    /// Vendor-specific.
    pub const VENDOR: u8 = 7;
}

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $sct:expr, $sc:expr, $text:expr;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Status = Status::new($sct, $sc);)*

            /// The status of this name, which is that of its constant in lower case with hyphens.
            pub fn from_name(name: &str) -> Option<Self> {
                let same = |constant: &str| {
                    let constant = constant.bytes().map(|byte| match byte {
                        b'_' => b'-',
                        byte => byte.to_ascii_lowercase(),
                    });
                    constant.eq(name.bytes())
                };
                $(if same(stringify!($name)) { return Some(Self::$name); })*
                None
            }

            /// What the code means, in a few words; empty when we do not know it.
            pub fn text(self) -> &'static str {
                $(if self.code() == Self::$name.code() { return $text; })*
                ""
            }
        }
    };
}

statuses! {
    /// The command succeeded.
    SUCCESS = sct::GENERIC, 0x00, "success";
    /// Unknown opcode.
    INVALID_OPCODE = sct::GENERIC, 0x01, "invalid command opcode";
    /// A field has a value that is not allowed.
    INVALID_FIELD = sct::GENERIC, 0x02, "invalid field in command";
    /// A command with this CID is outstanding already.
    CID_CONFLICT = sct::GENERIC, 0x03, "command ID conflict";
    /// The data could not be moved.
    DATA_TRANSFER_ERROR = sct::GENERIC, 0x04, "data transfer error";
    /// Internal error of the controller.
    INTERNAL_ERROR = sct::GENERIC, 0x06, "internal error";
    /// Aborted because an Abort asked for it.
    ABORT_REQUESTED = sct::GENERIC, 0x07, "command abort requested";
    /// The queue went away under the command.
    ABORTED_SQ_DELETION = sct::GENERIC, 0x08, "command aborted due to SQ deletion";
    /// Namespace unknown, or its format not valid.
    INVALID_NAMESPACE = sct::GENERIC, 0x0b, "invalid namespace or format";
    /// Not allowed in this order.
    SEQUENCE_ERROR = sct::GENERIC, 0x0c, "command sequence error";
    /// Data length does not fit the SGL.
    DATA_SGL_LENGTH_INVALID = sct::GENERIC, 0x0f, "data SGL length invalid";
    /// SGL descriptor type not supported.
    SGL_TYPE_INVALID = sct::GENERIC, 0x11, "SGL descriptor type invalid";
    /// SGL offset not allowed.
    SGL_OFFSET_INVALID = sct::GENERIC, 0x16, "SGL offset invalid";
    /// The namespace is write protected.
    WRITE_PROTECTED = sct::GENERIC, 0x20, "namespace is write protected";
    /// The transport failed in passing; a retry may succeed.
    TRANSIENT_TRANSPORT = sct::GENERIC, 0x22, "transient transport error";
    /// The blocks are not inside the namespace.
    LBA_OUT_OF_RANGE = sct::GENERIC, 0x80, "LBA out of range";
    /// No room left behind the namespace.
    CAPACITY_EXCEEDED = sct::GENERIC, 0x81, "capacity exceeded";
    /// The namespace cannot be used now.
    NAMESPACE_NOT_READY = sct::GENERIC, 0x82, "namespace not ready";
    /// Too many Asynchronous Event Requests.
    AER_LIMIT_EXCEEDED = sct::COMMAND, 0x05, "asynchronous event request limit exceeded";
    /// Log page not supported.
    INVALID_LOG_PAGE = sct::COMMAND, 0x09, "invalid log page";
    /// Feature cannot be changed.
    FEATURE_NOT_CHANGEABLE = sct::COMMAND, 0x0e, "feature not changeable";
    /// Cross-Controller Reset: this controller was asked for the same already.
    CROSS_RESET_IN_PROGRESS = sct::COMMAND, 0x3f, "cross-controller reset in progress";
    /// Cross-Controller Reset: what is over was not read, and there is no room for more.
    CROSS_RESET_LOG_FULL = sct::COMMAND, 0x40, "cross-controller reset log page full";
    /// Cross-Controller Reset: as many as the controller can see to at a time are going on.
    CROSS_RESET_LIMIT_EXCEEDED = sct::COMMAND, 0x41, "cross-controller reset limit exceeded";
    /// Connect: record format not supported.
    CONNECT_INCOMPATIBLE_FORMAT = sct::COMMAND, 0x80, "connect incompatible format";
    /// Connect: the controller has an association already, or no room for one.
    CONNECT_CONTROLLER_BUSY = sct::COMMAND, 0x81, "connect controller busy";
    /// Connect: a parameter is not acceptable; the result says which.
    CONNECT_INVALID_PARAMETERS = sct::COMMAND, 0x82, "connect invalid parameters";
    /// Connect: this host may not connect to the subsystem.
    CONNECT_INVALID_HOST = sct::COMMAND, 0x84, "connect invalid host";
    /// Discovery log changed while it was read.
    LOG_RESTART_DISCOVERY = sct::COMMAND, 0x90, "log restart discovery";
    /// In-band authentication is required.
    AUTHENTICATION_REQUIRED = sct::COMMAND, 0x91, "authentication required";
    /// NVM commands: attributes conflict, or the range is not valid.
    WRITE_TO_READ_ONLY_RANGE = sct::COMMAND, 0x82, "attempted write to read only range";
    /// Writing failed.
    WRITE_FAULT = sct::MEDIA, 0x80, "write fault";
    /// Reading failed.
    UNRECOVERED_READ_ERROR = sct::MEDIA, 0x81, "unrecovered read error";
    /// Compare found a difference.
    COMPARE_FAILURE = sct::MEDIA, 0x85, "compare failure";
    /// The path failed, cause unknown.
    INTERNAL_PATH_ERROR = sct::PATH, 0x00, "internal path error";
    /// The namespace is gone from this controller for good.
    ANA_PERSISTENT_LOSS = sct::PATH, 0x01, "asymmetric access persistent loss";
    /// The namespace cannot be reached through this controller now.
    ANA_INACCESSIBLE = sct::PATH, 0x02, "asymmetric access inaccessible";
    /// How the namespace is reached through this controller changes now.
    ANA_TRANSITION = sct::PATH, 0x03, "asymmetric access transition";
    /// The host's side of the path failed.
    HOST_PATH_ERROR = sct::PATH, 0x70, "host pathing error";
    /// Lost with the association, synthesised by the host.
    ABORTED_BY_HOST = sct::PATH, 0x71, "command aborted by host";
}

impl Status {
    const DNR: u16 = 1 << 14;

    /// A status of this type and code.
    pub const fn new(sct: u8, sc: u8) -> Self {
        Self(((sct & 7) as u16) << 8 | sc as u16)
    }

    /// From the status word of a completion; the phase bit is dropped.
    pub const fn from_wire(word: u16) -> Self {
        Self(word >> 1)
    }

    /// The status word of a completion, phase bit 0.
    pub const fn to_wire(self) -> u16 {
        self.0 << 1
    }

    /// With "do not retry" set.
    pub const fn do_not_retry(self) -> Self {
        Self(self.0 | Self::DNR)
    }

    /// Status code type: see [`sct`].
    pub const fn sct(self) -> u8 {
        (self.0 >> 8) as u8 & 7
    }

    /// Status code.
    pub const fn sc(self) -> u8 {
        self.0 as u8
    }

    /// Type and code without the retry bits.
    pub const fn code(self) -> u16 {
        self.0 & 0x7ff
    }

    /// Which of the controller's retry delays to wait: 0 (none) to 3.
    pub const fn crdt(self) -> u8 {
        (self.0 >> 11) as u8 & 3
    }

    /// The same command would fail again.
    pub const fn dnr(self) -> bool {
        self.0 & Self::DNR != 0
    }

    /// The command succeeded.
    pub const fn is_success(self) -> bool {
        self.code() == 0
    }

    /// The path failed and not the command.
    pub const fn is_path(self) -> bool {
        self.sct() == sct::PATH
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dnr = if self.dnr() { ", do not retry" } else { "" };
        match self.text() {
            "" => write!(
                f,
                "status type {:#x} code {:#04x}{dnr}",
                self.sct(),
                self.sc()
            ),
            text => write!(
                f,
                "{text} (type {:#x} code {:#04x}{dnr})",
                self.sct(),
                self.sc()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_word_keeps_type_code_and_dnr_where_the_specification_puts_them() {
        let status = Status::CONNECT_INVALID_PARAMETERS.do_not_retry();
        assert_eq!(status.to_wire(), 0x8000 | 1 << 9 | 0x82 << 1);
        assert_eq!(Status::from_wire(status.to_wire() | 1), status);
        assert_eq!((status.sct(), status.sc(), status.dnr()), (1, 0x82, true));
    }

    #[test]
    fn a_status_is_found_by_its_name() {
        let named = Status::from_name("unrecovered-read-error");
        assert_eq!(named, Some(Status::UNRECOVERED_READ_ERROR));
        for name in ["", "unrecovered", "write-faults", "WRITE_FAULT"] {
            assert_eq!(Status::from_name(name), None, "{name}");
        }
    }
}
