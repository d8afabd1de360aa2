//! Random-looking data that both ends can compute: any range of it, from a seed and the position alone.

use std::io::{self, Read};

/// The data's 64-bit word number `index` under `seed` (splitmix64's output function over a position).
fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed ^ index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `buffer` with the data of `seed` from byte `position` on; `position` is a multiple of 8.
pub fn fill(seed: u64, position: u64, buffer: &mut [u8]) {
    for (index, chunk) in (position / 8..).zip(buffer.chunks_mut(8)) {
        let bytes = word(seed, index).to_le_bytes();
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
}

/// A stretch of seeded data somewhere on a disk. Its bytes depend on the seed and on the position on the disk, so that data
/// written to the wrong place is found.
#[derive(Clone, Copy, Debug)]
pub struct Seeded {
    /// The seed.
    pub seed: u64,
    /// Where it starts on the disk, in bytes; a multiple of 8.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

impl Seeded {
    /// Compares `found`, read from `self.offset` on, with the data.
    ///
    /// # Errors
    /// The first position that differs, or where `found` ended early.
    pub fn compare(&self, found: &mut impl Read) -> io::Result<()> {
        let mut expected = vec![0; 1 << 20];
        let mut buffer = vec![0; 1 << 20];
        let mut done = 0;
        while done < self.length {
            let step = (self.length - done).min(1 << 20) as usize;
            let position = self.offset + done;
            found.read_exact(&mut buffer[..step])?;
            fill(self.seed, position, &mut expected[..step]);
            if let Some(at) = (0..step).find(|&i| buffer[i] != expected[i]) {
                let (is, should) = (buffer[at], expected[at]);
                let differing = (at..step).filter(|&i| buffer[i] != expected[i]).count();
                return Err(io::Error::other(format!(
                    "byte {} is {is:#04x}, should be {should:#04x} (seed {}); {differing} bytes differ up to byte {}",
                    position + at as u64,
                    self.seed,
                    position + step as u64,
                )));
            }
            done += step as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_is_the_same_whether_made_at_once_or_in_parts() {
        let mut whole = [0; 64];
        fill(7, 4096, &mut whole);
        let mut part = [0; 24];
        fill(7, 4096 + 16, &mut part);
        assert_eq!(part, whole[16..40]);
    }

    #[test]
    fn one_wrong_byte_and_the_wrong_place_are_found() {
        let stretch = Seeded {
            seed: 3,
            offset: 512,
            length: 2048,
        };
        let mut data = vec![0; 2048];
        fill(3, 512, &mut data);
        stretch.compare(&mut data.as_slice()).unwrap();
        data[1000] ^= 1;
        let error = stretch
            .compare(&mut data.as_slice())
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("byte 1512 is"), "{error}");
        fill(3, 1024, &mut data);
        stretch.compare(&mut data.as_slice()).unwrap_err();
        stretch.compare(&mut [0u8; 100].as_slice()).unwrap_err();
    }
}
