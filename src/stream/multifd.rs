//! QEMU's multifd channels, which carry RAM beside the stream (`migration/multifd.c`).
//!
//! Each channel starts with an init packet, followed by data packets: the offsets of up to 128
//! pages of one block, then the pages' content. The main channel (the stream) then has no pages,
//! except zero pages in QEMU up to 8.2. At a sync point each channel has a packet with SYNC, and
//! the main channel either a MULTIFD_FLUSH word (from 8.1 on) or just the end of a RAM section
//! (before, and with older machine types).

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U32, U64},
};

use crate::ram::PAGE;

/// Length of the init packet in bytes.
pub const INIT_SIZE: usize = size_of::<RawInit>();

/// Length of a packet in bytes, without its pages' content.
pub const PACKET_SIZE: usize = size_of::<RawPacket>();

/// Most pages of a packet: MULTIFD_PACKET_SIZE of 512 KiB.
pub const PAGES_MAX: usize = (512 << 10) / PAGE as usize;

/// Starts both kinds of packets (MULTIFD_MAGIC).
const MAGIC: u32 = 0x1122_3344;

/// MULTIFD_VERSION.
const VERSION: u32 = 1;

/// MULTIFD_FLAG_SYNC. All others mean that the content is compressed, or not RAM.
const SYNC: u32 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawInit {
    magic: U32,
    version: U32,
    uuid: [u8; 16],
    id: u8,
    unused: [u8; 39],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPacket {
    magic: U32,
    version: U32,
    flags: U32,
    pages_alloc: U32,
    normal_pages: U32,
    next_packet_size: U32,
    packet_num: U64,
    /// Reserved and zero up to QEMU 8.2, which sends zero pages on the main channel.
    zero_pages: U32,
    reserved: [u8; 28],
    ramblock: [u8; 256],
    /// Normal pages first, then zero pages.
    offset: [U64; PAGES_MAX],
}

/// A malformed packet, or unsupported content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Malformed packet on a multifd channel: {0}")]
pub struct PacketError(String);

/// A parsed packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet<'a> {
    /// All channels synchronise after the pages of this packet.
    pub sync: bool,
    /// The block of the pages, if there are any.
    pub block: &'a str,
    normal: &'a [U64],
    zero: &'a [U64],
}

/// Return the number of a channel, from its init packet.
///
/// # Errors
/// If it is not an init packet.
pub fn init(bytes: &[u8; INIT_SIZE]) -> Result<u8, PacketError> {
    let init: &RawInit = zerocopy::transmute_ref!(bytes);
    check_head(init.magic, init.version)?;
    Ok(init.id)
}

fn check_head(magic: U32, version: U32) -> Result<(), PacketError> {
    if (magic.get(), version.get()) == (MAGIC, VERSION) {
        return Ok(());
    }
    let why = format!("magic {magic:#x} and version {version} for {MAGIC:#x} and {VERSION}");
    Err(PacketError(why))
}

impl<'a> Packet<'a> {
    /// Parse a packet.
    ///
    /// # Errors
    /// If it is malformed, or has unsupported content: compressed pages, device state.
    pub fn read(bytes: &'a [u8; PACKET_SIZE]) -> Result<Self, PacketError> {
        let raw: &RawPacket = zerocopy::transmute_ref!(bytes);
        check_head(raw.magic, raw.version)?;
        let flags = raw.flags.get();
        if flags & !SYNC != 0 {
            return Err(PacketError(format!("flags {flags:#x}, for plain pages only")));
        }
        let (normal, zero) = (raw.normal_pages.get() as usize, raw.zero_pages.get() as usize);
        let pages = normal.checked_add(zero).and_then(|pages| raw.offset.get(..pages));
        let Some((normal, zero)) = pages.and_then(|pages| pages.split_at_checked(normal)) else {
            return Err(PacketError(format!("{normal} pages and {zero} that are zero")));
        };
        let content = raw.next_packet_size.get() as usize;
        // Without pages, QEMU 7.2 repeats the last packet's size.
        if !normal.is_empty() && content != normal.len() * PAGE as usize {
            return Err(PacketError(format!("{content} bytes for {} pages", normal.len())));
        }
        let end = raw.ramblock.iter().position(|byte| *byte == 0).unwrap_or(raw.ramblock.len());
        let Ok(block) = std::str::from_utf8(&raw.ramblock[..end]) else {
            return Err(PacketError("a RAM block without a proper name".into()));
        };
        Ok(Self { sync: flags & SYNC != 0, block, normal, zero })
    }

    /// Bytes of content after the packet.
    pub fn content(&self) -> usize {
        self.normal.len() * PAGE as usize
    }

    /// Offsets of the pages with content, in the content's order.
    pub fn normal(&self) -> impl ExactSizeIterator<Item = u64> {
        self.normal.iter().map(|offset| offset.get())
    }

    /// Offsets of the zero pages.
    pub fn zero(&self) -> impl ExactSizeIterator<Item = u64> {
        self.zero.iter().map(|offset| offset.get())
    }
}

/// Join pages into ranges (offset, length) that cross not a multiple of `limit` bytes.
///
/// QEMU moves zero pages to the end by swapping, which leaves both kinds out of order.
pub fn ranges(offsets: impl Iterator<Item = u64>, limit: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut sorted = [0; PAGES_MAX];
    let mut count = 0;
    for (place, offset) in sorted.iter_mut().zip(offsets) {
        *place = offset;
        count += 1;
    }
    // Usually in order already, which costs one pass.
    sorted[..count].sort_unstable();
    let mut next = 0;
    std::iter::from_fn(move || {
        let pages = &sorted[..count];
        let start = *pages.get(next)?;
        let mut end = start.saturating_add(PAGE);
        next += 1;
        while pages.get(next) == Some(&end) && !end.is_multiple_of(limit) {
            end += PAGE;
            next += 1;
        }
        Some((start, end - start))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::FromZeros as _;

    use super::*;

    fn packet(flags: u32, normal: &[u64], zero: &[u64]) -> [u8; PACKET_SIZE] {
        let mut raw = RawPacket::new_zeroed();
        raw.magic = MAGIC.into();
        raw.version = VERSION.into();
        raw.flags = flags.into();
        raw.normal_pages = (normal.len() as u32).into();
        raw.zero_pages = (zero.len() as u32).into();
        raw.next_packet_size = (normal.len() as u32 * PAGE as u32).into();
        raw.ramblock[..6].copy_from_slice(b"pc.ram");
        for (place, offset) in raw.offset.iter_mut().zip(normal.iter().chain(zero)) {
            *place = (*offset).into();
        }
        zerocopy::transmute!(raw)
    }

    #[test]
    fn sizes_are_qemus() {
        assert_eq!((INIT_SIZE, PACKET_SIZE), (64, 1344));
    }

    #[test]
    fn normal_pages_come_before_zero_pages() {
        let bytes = packet(0, &[0, 4096], &[8192]);
        let packet = Packet::read(&bytes).unwrap();
        assert!(!packet.sync);
        assert_eq!((packet.block, packet.content()), ("pc.ram", 8192));
        assert_eq!(packet.normal().collect::<Vec<_>>(), [0, 4096]);
        assert_eq!(packet.zero().collect::<Vec<_>>(), [8192]);
    }

    /// Up to QEMU 8.2 a SYNC packet may have pages.
    #[test]
    fn sync_may_come_with_pages() {
        assert!(Packet::read(&packet(SYNC, &[], &[])).unwrap().sync);
        let bytes = packet(SYNC, &[4096], &[]);
        let packet = Packet::read(&bytes).unwrap();
        assert!(packet.sync && packet.content() == 4096);
    }

    #[test]
    fn what_is_no_plain_page_is_refused() {
        for flag in 1..32 {
            assert!(Packet::read(&packet(1 << flag, &[0], &[])).is_err(), "flag {flag}");
        }
        let too_many = [0; PAGES_MAX];
        assert!(Packet::read(&packet(0, &too_many, &[])).is_ok());
        assert!(Packet::read(&packet(0, &too_many, &[0])).is_err());
        let mut cut = packet(0, &[0], &[]);
        cut[23] = 1;
        assert!(Packet::read(&cut).is_err());
    }

    #[test]
    fn a_channel_begins_with_its_number() {
        let mut raw = RawInit::new_zeroed();
        raw.magic = MAGIC.into();
        raw.version = VERSION.into();
        raw.id = 3;
        let mut bytes: [u8; INIT_SIZE] = zerocopy::transmute!(raw);
        assert_eq!(init(&bytes), Ok(3));
        bytes[7] = 2;
        assert!(init(&bytes).is_err());
    }

    #[test]
    fn ranges_end_at_the_limit_and_at_gaps() {
        let pages = [4096, 0, 8192, 0x10_0000 - 4096, 0x10_0000, u64::MAX - 4095];
        let found: Vec<_> = ranges(pages.into_iter(), 1 << 20).collect();
        let last = (u64::MAX - 4095, 4095);
        assert_eq!(found, [(0, 12288), (0xf_f000, 4096), (0x10_0000, 4096), last]);
    }

    proptest! {
        #[test]
        fn nothing_panics(mut bytes in prop::collection::vec(any::<u8>(), PACKET_SIZE), proper: bool) {
            if proper {
                bytes[..8].copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1]);
                bytes[8..23].fill(0);
            }
            let bytes: &[u8; PACKET_SIZE] = bytes.as_slice().try_into().unwrap();
            if let Ok(packet) = Packet::read(bytes) {
                let pages = packet.normal().len() + packet.zero().len();
                prop_assert!(pages <= PAGES_MAX);
                let _ = ranges(packet.normal(), 1 << 20).count();
            }
        }

        /// All pages that fit are read back unchanged, at any offset.
        #[test]
        fn a_packet_has_the_pages_that_it_names(
            flags in prop::sample::select(vec![0, SYNC]),
            normal in prop::collection::vec(any::<u64>(), 0..PAGES_MAX + 2),
            zero in prop::collection::vec(any::<u64>(), 0..PAGES_MAX + 2),
        ) {
            let bytes = packet(flags, &normal, &zero);
            let Ok(packet) = Packet::read(&bytes) else {
                prop_assert!(normal.len() + zero.len() > PAGES_MAX);
                return Ok(());
            };
            prop_assert_eq!(packet.normal().collect::<Vec<_>>(), &normal[..]);
            prop_assert_eq!(packet.zero().collect::<Vec<_>>(), &zero[..]);
            prop_assert_eq!(packet.content() as u64, normal.len() as u64 * PAGE);
            prop_assert!(ranges(packet.normal(), 1 << 20).count() <= normal.len());
            prop_assert!(ranges(packet.zero(), u64::MAX).count() <= zero.len());
        }

        #[test]
        fn ranges_are_the_pages(pages in prop::collection::btree_set(0..1000_u64, 0..PAGES_MAX)) {
            let offsets: Vec<_> = pages.iter().map(|page| page * PAGE).collect();
            let found: Vec<_> = ranges(offsets.iter().rev().copied(), 1 << 20).collect();
            let mut covered = Vec::new();
            for (offset, length) in found {
                prop_assert_eq!(offset >> 20, (offset + length - 1) >> 20);
                covered.extend((offset..offset + length).step_by(PAGE as usize));
            }
            prop_assert_eq!(covered, offsets);
        }
    }
}
