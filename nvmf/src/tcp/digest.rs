//! CRC32C digests of headers and data, and which of them a connection carries.

/// Bytes of a digest on the wire, little-endian.
pub const DIGEST_LEN: usize = 4;

/// Digests asked for, or agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digests {
    /// Behind the header of every PDU.
    pub header: bool,
    /// Behind the data of every PDU that has some.
    pub data: bool,
}

/// Extends `crc`, the CRC32C of what came before (0 at the start), over `bytes`.
pub fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc, bytes)
}

impl Digests {
    /// The DGST byte of ICReq and ICResp.
    pub(crate) fn to_wire(self) -> u8 {
        u8::from(self.header) | u8::from(self.data) << 1
    }

    /// From the DGST byte; reserved bits were checked before.
    pub(crate) fn from_wire(byte: u8) -> Self {
        Self {
            header: byte & 1 != 0,
            data: byte & 2 != 0,
        }
    }

    /// Bytes that follow each header.
    pub(crate) fn header_len(self) -> usize {
        if self.header { DIGEST_LEN } else { 0 }
    }

    /// Bytes that follow `data_len` bytes of data.
    pub(crate) fn data_len(self, data_len: u32) -> usize {
        if self.data && data_len > 0 {
            DIGEST_LEN
        } else {
            0
        }
    }
}

/// The data digest of the PDU that is received: what of it has come.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Trailer {
    bytes: [u8; DIGEST_LEN],
    have: usize,
}

impl Trailer {
    /// Bytes still to come.
    pub(crate) fn needed(&self) -> usize {
        DIGEST_LEN - self.have
    }

    /// Takes what it needs; returns how many bytes, and the digest once it is complete.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> (usize, Option<u32>) {
        let take = self.needed().min(bytes.len());
        self.bytes[self.have..self.have + take].copy_from_slice(&bytes[..take]);
        self.have += take;
        let whole = (self.have == DIGEST_LEN).then(|| u32::from_le_bytes(self.bytes));
        (take, whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_published_vectors_in_one_piece_or_many() {
        // RFC 3720, appendix B.4.
        let ascending: Vec<u8> = (0..32).collect();
        for (bytes, expected) in [
            (&[0u8; 32][..], 0x8a91_36aa),
            (&[0xff; 32][..], 0x62a8_ab43),
            (&ascending[..], 0x46dd_794e),
        ] {
            assert_eq!(crc32c(0, bytes), expected);
            for at in 0..32 {
                assert_eq!(crc32c(crc32c(0, &bytes[..at]), &bytes[at..]), expected);
            }
        }
    }
}
