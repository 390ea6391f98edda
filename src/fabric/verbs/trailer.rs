//! What the fabric itself says in private data: more queue pairs for RAM.
//!
//! It stands at the end of the longest private data, behind what migrations say there. A stock QEMU
//! reads the first 8 bytes and sends no more.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U16, U32, U64},
};

use crate::fabric::{FabricError, PRIVATE_DATA_MAX, Result};

/// "QRL1".
const MAGIC: u32 = u32::from_be_bytes(*b"QRL1");

/// Where it begins.
const START: usize = PRIVATE_DATA_MAX - size_of::<Trailer>();

/// Of a request, or of the reply to it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub(super) struct Trailer {
    magic: U32,
    /// Queue pairs for RAM beside the first: what is asked for, and what is granted.
    pub(super) lanes: U16,
    /// 0 for the first queue pair, else which of the further ones of a session.
    pub(super) lane: U16,
    /// Chosen by who accepts; names what the further ones belong to.
    pub(super) session: U64,
}

impl Trailer {
    pub(super) fn new(lanes: u16, lane: u16, session: u64) -> Self {
        let magic = MAGIC.into();
        Self { magic, lanes: lanes.into(), lane: lane.into(), session: session.into() }
    }

    /// Put it behind `private_data`.
    pub(super) fn append(&self, private_data: &[u8]) -> Result<Vec<u8>> {
        if private_data.len() > START {
            let source = std::io::ErrorKind::InvalidInput.into();
            return Err(FabricError::Host { call: "Private data", source });
        }
        let mut bytes = private_data.to_vec();
        bytes.resize(START, 0);
        bytes.extend_from_slice(self.as_bytes());
        Ok(bytes)
    }

    /// The peer's, if it sent one.
    pub(super) fn find(private_data: &[u8]) -> Option<Self> {
        let (trailer, _) = Self::read_from_prefix(private_data.get(START..)?).ok()?;
        (trailer.magic == MAGIC).then_some(trailer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stands_at_the_end() {
        let trailer = Trailer::new(4, 2, 0x0123_4567_89ab_cdef);
        let bytes = trailer.append(b"\0\0\0\x01\0\0\0\0").unwrap();
        assert_eq!(bytes.len(), PRIVATE_DATA_MAX);
        assert_eq!(bytes[..8], *b"\0\0\0\x01\0\0\0\0");
        assert_eq!(bytes[40..], *b"QRL1\0\x04\0\x02\x01\x23\x45\x67\x89\xab\xcd\xef");
        assert_eq!(Trailer::find(&bytes), Some(trailer));
        assert_eq!(Trailer::find(&bytes[..55]), None);
        assert_eq!(Trailer::find(&[0; PRIVATE_DATA_MAX]), None);
        assert!(trailer.append(&[0; 41]).is_err());
    }
}
