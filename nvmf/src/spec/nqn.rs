//! NVMe qualified names.

/// Field length of an NQN on the wire.
pub const NQN_FIELD_LEN: usize = 256;
/// Longest NQN, in bytes (Base, section "NVMe Qualified Names").
pub const NQN_MAX_LEN: usize = 223;
/// The well-known name of discovery subsystems.
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";

const UUID_PREFIX: &str = "nqn.2014-08.org.nvmexpress:uuid:";

/// A checked NVMe qualified name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nqn(String);

/// Why a string is not an NQN.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NqnError {
    /// Longer than the specification allows.
    #[error("it has {0} bytes; an NQN has at most {NQN_MAX_LEN}")]
    TooLong(usize),
    /// Does not begin as an NQN does.
    #[error("an NQN begins with \"nqn.\", a year and a month, as in nqn.2026-01.org.example:disk1")]
    Prefix,
    /// `nqn.yyyy-mm.` is not followed by a reverse domain name.
    #[error("after nqn.YYYY-MM. comes a reversed domain name, as in nqn.2026-01.org.example:disk1")]
    Domain,
    /// The UUID of a UUID-based NQN does not parse.
    #[error("after \"uuid:\" comes a UUID")]
    Uuid,
    /// A byte that no name may have.
    #[error("control characters and blanks are not allowed in an NQN")]
    Character,
    /// On the wire: no terminating zero in the field, or not UTF-8.
    #[error("the NQN field is not a zero-terminated UTF-8 string")]
    Field,
}

impl Nqn {
    /// Checks a name.
    ///
    /// # Errors
    /// [`NqnError`] says what is wrong.
    pub fn new(name: impl Into<String>) -> Result<Self, NqnError> {
        let name = name.into();
        if name.len() > NQN_MAX_LEN {
            return Err(NqnError::TooLong(name.len()));
        }
        if name.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(NqnError::Character);
        }
        if let Some(uuid) = name.strip_prefix(UUID_PREFIX) {
            uuid::Uuid::try_parse(uuid).map_err(|_| NqnError::Uuid)?;
            return Ok(Self(name));
        }
        let rest = name.strip_prefix("nqn.").ok_or(NqnError::Prefix)?;
        let (date, domain) = rest.split_once('.').ok_or(NqnError::Prefix)?;
        let date = date.as_bytes();
        let digits = |part: &[u8]| part.iter().all(u8::is_ascii_digit);
        if date.len() != 7 || date[4] != b'-' || !digits(&date[..4]) || !digits(&date[5..]) {
            return Err(NqnError::Prefix);
        }
        if domain.is_empty() || domain.starts_with([':', '.']) {
            return Err(NqnError::Domain);
        }
        Ok(Self(name))
    }

    /// The UUID-based form.
    pub fn from_uuid(uuid: uuid::Uuid) -> Self {
        Self(format!("{UUID_PREFIX}{uuid}"))
    }

    /// The discovery subsystem's name.
    pub fn discovery() -> Self {
        Self(DISCOVERY_NQN.to_owned())
    }

    /// From a 256-byte field of a command or log page.
    ///
    /// # Errors
    /// [`NqnError`] when the field holds no valid name.
    pub fn from_field(field: &[u8; NQN_FIELD_LEN]) -> Result<Self, NqnError> {
        let end = field.iter().position(|&b| b == 0).ok_or(NqnError::Field)?;
        let name = std::str::from_utf8(&field[..end]).map_err(|_| NqnError::Field)?;
        Self::new(name)
    }

    /// As a zero-filled 256-byte field.
    pub fn to_field(&self) -> [u8; NQN_FIELD_LEN] {
        let mut field = [0; NQN_FIELD_LEN];
        field[..self.0.len()].copy_from_slice(self.0.as_bytes());
        field
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Nqn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for Nqn {
    type Err = NqnError;

    fn from_str(name: &str) -> Result<Self, NqnError> {
        Self::new(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_name_are_accepted_and_survive_the_wire() {
        for name in [
            "nqn.2026-01.org.example:disk1",
            "nqn.2014-08.org.nvmexpress:uuid:6ba7b810-9dad-11d1-80b4-00c04fd430c8",
            DISCOVERY_NQN,
        ] {
            let nqn = Nqn::new(name).unwrap();
            assert_eq!(Nqn::from_field(&nqn.to_field()).unwrap().as_str(), name);
        }
    }

    #[test]
    fn what_is_no_name_is_refused_with_its_reason() {
        assert_eq!(Nqn::new("iqn.2026-01.org.example"), Err(NqnError::Prefix));
        assert_eq!(Nqn::new("nqn.2026-1.org.example"), Err(NqnError::Prefix));
        assert_eq!(Nqn::new("nqn.2026-01."), Err(NqnError::Domain));
        assert_eq!(
            Nqn::new("nqn.2026-01.org.example a"),
            Err(NqnError::Character)
        );
        assert_eq!(
            Nqn::new("nqn.2014-08.org.nvmexpress:uuid:x"),
            Err(NqnError::Uuid)
        );
        assert_eq!(Nqn::new("n".repeat(224)), Err(NqnError::TooLong(224)));
        assert_eq!(Nqn::from_field(&[b'n'; 256]), Err(NqnError::Field));
    }
}
