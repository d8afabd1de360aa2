//! Sizes as people write them: bytes, or a number with a suffix.

use std::fmt;
use std::str::FromStr;

/// A size in bytes, at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Size(u64);

/// Why a string is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SizeError {
    /// Not digits with at most one suffix.
    #[error("'{0}' is not a size; write bytes, or a number with K, M, G or T, as in 512M")]
    Form(String),
    /// Nothing fits in it.
    #[error("a size of 0 holds nothing; write at least one block")]
    Zero,
    /// More than 64 bits of bytes.
    #[error("'{0}' is more bytes than 64 bits can count; write a smaller size")]
    TooLarge(String),
}

impl Size {
    /// So many MiB, at least 1.
    pub(crate) const fn mebibytes(number: u64) -> Self {
        Self(number << 20)
    }

    /// Bytes.
    pub(crate) fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let form = || SizeError::Form(text.to_owned());
        let shift = match text.bytes().last().map(|b| b.to_ascii_uppercase()) {
            Some(b'K') => 10,
            Some(b'M') => 20,
            Some(b'G') => 30,
            Some(b'T') => 40,
            _ => 0,
        };
        let digits = if shift == 0 {
            text
        } else {
            text.split_at(text.len() - 1).0
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(form());
        }
        let too_large = || SizeError::TooLarge(text.to_owned());
        let number: u64 = digits.parse().map_err(|_| too_large())?;
        match number.checked_mul(1 << shift) {
            Some(0) => Err(SizeError::Zero),
            Some(bytes) => Ok(Self(bytes)),
            None => Err(too_large()),
        }
    }
}

impl fmt::Display for Size {
    /// The shortest form that [`Size::from_str`] reads back as the same size.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = [(40, "T"), (30, "G"), (20, "M"), (10, "K"), (0, "")];
        let exact = |&(shift, _): &(u32, &str)| self.0.trailing_zeros() >= shift;
        let (shift, letter) = suffix.into_iter().find(exact).unwrap_or((0, ""));
        write!(f, "{}{letter}", self.0 >> shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suffix_is_a_power_of_1024_in_either_case() {
        for (text, bytes) in [
            ("1", 1),
            ("4096", 4096),
            ("1K", 1 << 10),
            ("64m", 64 << 20),
            ("3G", 3 << 30),
            ("2t", 2 << 40),
        ] {
            assert_eq!(text.parse::<Size>().map(Size::bytes), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "K", "1KB", "-1", "+1", "0x10", "1.5G", " 1", "1é"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::Form(text.to_owned())));
        }
        assert_eq!("0G".parse::<Size>(), Err(SizeError::Zero));
        for text in ["16777216T", "18446744073709551616"] {
            assert!(matches!(text.parse::<Size>(), Err(SizeError::TooLarge(_))));
        }
    }

    #[test]
    fn a_size_is_shown_as_it_would_be_written() {
        for text in ["1", "513", "1K", "1025K", "64M", "2T"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
    }
}
