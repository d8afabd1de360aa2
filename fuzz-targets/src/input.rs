//! Reads decisions from bytes.

use nvmf::tcp::{Digests, Limits};

/// Bytes that decide; zeroes follow them.
#[derive(Debug)]
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// At most `len` bytes.
    pub(crate) fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    pub(crate) fn bit(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// Below `bound`, which is at least 1.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::from(self.u8()) % bound
    }

    /// One of `choices`.
    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Mostly `right`, sometimes a little or a lot beside it.
    pub(crate) fn about(&mut self, right: u32) -> u32 {
        match self.u8() {
            0..=0xcf => right,
            0xd0..=0xdf => right.wrapping_add(1),
            0xe0..=0xef => right.wrapping_sub(1),
            0xf0..=0xf7 => right.wrapping_add(u32::from(self.u16())),
            _ => self.u32(),
        }
    }

    /// The length of a command's data.
    pub(crate) fn length(&mut self) -> u32 {
        match self.u8() {
            small @ 0..=0x7f => u32::from(small) * 4,
            0x80..=0xbf => 512 << (self.u8() % 6),
            0xc0..=0xef => u32::from(self.u16()),
            _ => 300_000,
        }
    }

    /// What bounds a queue pair.
    pub(crate) fn limits(&mut self) -> Limits {
        let flags = self.u8();
        let align = |byte: u8| (u32::from(byte % 32) + 1) * 4;
        Limits {
            rx_align: align(self.u8()),
            tx_align: align(self.u8()),
            max_h2c_data: self.pick(&[4096, 8192, 131_072, 4 << 20]),
            max_r2t: self.pick(&[1, 2, 4, u32::MAX]),
            in_capsule_limit: self.pick(&[0, 512, 4096, 8192]),
            digests: Digests {
                header: flags & 1 != 0,
                data: flags & 2 != 0,
            },
            admin: flags & 4 != 0,
        }
    }
}
