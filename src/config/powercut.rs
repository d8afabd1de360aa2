//! `powercut=`: a volatile write cache over storage, lost when the process is killed.

use std::str::FromStr;

use super::size::{Size, SizeError};

/// How much the cache holds, when nothing is said.
const DEFAULT_SIZE: Size = Size::mebibytes(64);
/// Fewer bytes are no cache.
const LEAST: Size = Size::mebibytes(1);
/// More is a mistake: it is memory.
const MOST: Size = Size::mebibytes(16 << 10);

/// The cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PowerCut {
    /// Bytes that it holds at most.
    pub(crate) size: Size,
    /// Decides what makes room when it is full.
    pub(crate) seed: u64,
}

/// Why a string is not a cache.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PowerCutError {
    /// Bad size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Too small or too large.
    #[error("a cache has between {LEAST} and {MOST}")]
    Bounds,
    /// Something else behind the size.
    #[error("'{0}' is not seed=N; write SIZE, SIZE:seed=N or seed=N")]
    Seed(String),
}

impl Default for PowerCut {
    fn default() -> Self {
        Self {
            size: DEFAULT_SIZE,
            seed: 0,
        }
    }
}

impl FromStr for PowerCut {
    type Err = PowerCutError;

    /// Parses `SIZE[:seed=N]` or `seed=N`.
    fn from_str(text: &str) -> Result<Self, PowerCutError> {
        let mut cache = Self::default();
        let (size, seed) = match text.split_once(':') {
            Some((size, seed)) => (Some(size), Some(seed)),
            None if text.starts_with("seed=") => (None, Some(text)),
            None => (Some(text), None),
        };
        if let Some(size) = size {
            cache.size = size.parse()?;
        }
        if !(LEAST..=MOST).contains(&cache.size) {
            return Err(PowerCutError::Bounds);
        }
        if let Some(seed) = seed {
            let number = seed.strip_prefix("seed=");
            let number = number.and_then(|number| number.parse().ok());
            cache.seed = number.ok_or_else(|| PowerCutError::Seed(seed.to_owned()))?;
        }
        Ok(cache)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_and_a_seed_may_each_be_left_out() {
        let size = Size::mebibytes(2);
        for (text, size, seed) in [
            ("2M", size, 0),
            ("2M:seed=7", size, 7),
            ("seed=7", DEFAULT_SIZE, 7),
        ] {
            assert_eq!(text.parse(), Ok(PowerCut { size, seed }));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let parse = |text: &str| text.parse::<PowerCut>();
        for text in ["", ":seed=1", "x", "0"] {
            assert!(matches!(parse(text), Err(PowerCutError::Size(_))), "{text}");
        }
        for text in ["4K", "1T"] {
            assert_eq!(parse(text), Err(PowerCutError::Bounds));
        }
        for (text, seed) in [("2M:", ""), ("2M:7", "7"), ("seed=x", "seed=x")] {
            assert_eq!(parse(text), Err(PowerCutError::Seed(seed.to_owned())));
        }
    }
}
