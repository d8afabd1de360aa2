//! Identifiers that a user writes: UUIDs, NGUIDs and serials.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use crate::limits::SERIAL_LEN;

/// Why a string is not the identifier that it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IdError {
    /// Not a UUID.
    #[error("not a UUID; write it as 6ba7b810-9dad-41d1-80b4-00c04fd430c8")]
    Uuid,
    /// Not 16 bytes of hex.
    #[error("not an NGUID; write 32 hex digits, as `nvme id-ns` shows them")]
    Nguid,
    /// All zero, which means "none".
    #[error("all zero means that there is no identifier; write the namespace's own")]
    Zero,
    /// Serial too long.
    #[error("{0} bytes; a serial has at most {SERIAL_LEN}")]
    SerialLength(usize),
    /// Serial empty.
    #[error("empty; write 1 to {SERIAL_LEN} characters, or leave the option out")]
    SerialEmpty,
    /// Serial with something else than printable ASCII.
    #[error("a serial is made of printable ASCII characters; leave out {0:?}")]
    SerialCharacter(char),
}

/// Parses a UUID, hyphenated or not.
///
/// # Errors
/// [`IdError`] for anything else, and for the UUID of zeroes.
pub(crate) fn parse_uuid(text: &str) -> Result<Uuid, IdError> {
    match Uuid::try_parse(text) {
        Ok(uuid) if uuid.is_nil() => Err(IdError::Zero),
        Ok(uuid) => Ok(uuid),
        Err(_) => Err(IdError::Uuid),
    }
}

/// Parses an NGUID: 32 hex digits, with or without the hyphens that Linux shows in sysfs.
///
/// # Errors
/// [`IdError`] for anything else, and for the NGUID of zeroes.
pub(crate) fn parse_nguid(text: &str) -> Result<[u8; 16], IdError> {
    let digits: String = text.chars().filter(|&c| c != '-').collect();
    if digits.len() != 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(IdError::Nguid);
    }
    match u128::from_str_radix(&digits, 16) {
        Ok(0) => Err(IdError::Zero),
        Ok(number) => Ok(number.to_be_bytes()),
        Err(_) => Err(IdError::Nguid),
    }
}

/// What a guest reads as the disk's serial: 1 to 20 printable ASCII bytes, padded with zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Serial([u8; SERIAL_LEN]);

impl Serial {
    /// The bytes, as virtio carries them.
    pub(crate) fn bytes(self) -> [u8; SERIAL_LEN] {
        self.0
    }
}

impl FromStr for Serial {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        if let Some(other) = text.chars().find(|c| !matches!(c, ' '..='~')) {
            return Err(IdError::SerialCharacter(other));
        }
        let mut serial = [0; SERIAL_LEN];
        match text.len() {
            0 => return Err(IdError::SerialEmpty),
            len => serial
                .get_mut(..len)
                .ok_or(IdError::SerialLength(len))?
                .copy_from_slice(text.as_bytes()),
        }
        Ok(Self(serial))
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.0.iter().position(|&b| b == 0).unwrap_or(SERIAL_LEN);
        f.write_str(&String::from_utf8_lossy(&self.0[..end]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_is_padded_with_zeroes_to_twenty_bytes() {
        let serial: Serial = "disk 1".parse().unwrap();
        assert_eq!(&serial.bytes()[..7], b"disk 1\0");
        assert_eq!(serial.to_string(), "disk 1");
        let full: Serial = "12345678901234567890".parse().unwrap();
        assert_eq!(&full.bytes(), b"12345678901234567890");
    }

    #[test]
    fn a_serial_that_does_not_fit_is_refused() {
        assert_eq!(
            "123456789012345678901".parse::<Serial>(),
            Err(IdError::SerialLength(21))
        );
        assert_eq!("".parse::<Serial>(), Err(IdError::SerialEmpty));
        assert_eq!("é".parse::<Serial>(), Err(IdError::SerialCharacter('é')));
        assert_eq!("a\n".parse::<Serial>(), Err(IdError::SerialCharacter('\n')));
    }

    #[test]
    fn an_nguid_is_read_with_and_without_hyphens() {
        let nguid = parse_nguid("36345730526044870025384100000001").unwrap();
        assert_eq!(nguid[..4], [0x36, 0x34, 0x57, 0x30]);
        assert_eq!(
            parse_nguid("36345730-5260-4487-0025-384100000001"),
            Ok(nguid)
        );
    }

    #[test]
    fn identifiers_of_zeroes_or_of_another_form_are_refused() {
        assert_eq!(parse_nguid(&"0".repeat(32)), Err(IdError::Zero));
        assert_eq!(parse_nguid(&"0".repeat(31)), Err(IdError::Nguid));
        assert_eq!(parse_nguid(&"+".repeat(32)), Err(IdError::Nguid));
        assert_eq!(parse_uuid(&Uuid::nil().to_string()), Err(IdError::Zero));
        assert_eq!(parse_uuid("disk1"), Err(IdError::Uuid));
    }
}
