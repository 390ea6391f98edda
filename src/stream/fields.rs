//! Fields at the front of bytes that may not all be there yet.

/// Longest data of a command, and longest machine type, in bytes.
pub(super) const FIELD_MAX: usize = 1024;

/// Reads fields from the front of bytes; `None` when they are not all there.
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

    /// `u8` length, then the string.
    pub(super) fn string(&mut self) -> Option<&'a [u8]> {
        let length = self.u8()?;
        self.take(length.into())
    }

    /// `u32` length, then as many bytes; returns the length, even while the bytes are missing
    /// if it is too long ever to be honest.
    pub(super) fn long_string(&mut self) -> Option<usize> {
        let length = self.u32()? as usize;
        if length <= FIELD_MAX {
            self.skip(length)?;
        }
        Some(length)
    }
}
