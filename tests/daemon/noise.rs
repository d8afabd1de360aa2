//! Data that no other data is taken for: random, and the same for the same seed.

/// So many random bytes of a seed.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = fastrand::Rng::with_seed(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend(state.u64(..).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
