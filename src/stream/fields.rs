//! Fields at the start of input that may be incomplete.

/// Longest command data, and longest machine type, in bytes.
pub(super) const FIELD_MAX: usize = 1024;

/// Reads fields from the start of `bytes`; `None` if one is incomplete.
pub(super) struct Fields<'a> {
    bytes: &'a [u8],
    /// Bytes read so far.
    pub(super) next: usize,
}

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, next: 0 }
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.next..self.next.checked_add(length)?)?;
        self.next += length;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub(super) fn skip(&mut self, length: usize) -> Option<()> {
        self.take(length).map(|_| ())
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// Read a string with a `u8` length.
    pub(super) fn string(&mut self) -> Option<&'a [u8]> {
        let length = self.u8()?;
        self.take(length.into())
    }

    /// Skip a string with a `u32` length, and return the length. If it exceeds [`FIELD_MAX`],
    /// return it without waiting for the string.
    pub(super) fn long_string(&mut self) -> Option<usize> {
        let length = self.u32()? as usize;
        if length <= FIELD_MAX {
            self.skip(length)?;
        }
        Some(length)
    }
}
