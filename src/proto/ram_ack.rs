//! RAM that QEMU announces without content (capability `x-shared-ram-external` of `qemu-patches/`):
//! finds its holes, and acknowledges it to QEMU.
//!
//! Records without content fill no socket buffer. What holds QEMU back, and tells it the bandwidth,
//! is the return-path message RAM_ACK: how much is done, and how much of that had to be
//! transferred.

use std::{collections::VecDeque, io, ops::Range};

use crate::{
    memory::Region,
    ram::{BlockRange, PAGE},
    stream::Extent,
};

/// Bytes after which QEMU is told again. It keeps at least 1 MiB in flight.
const STEP: u64 = 256 << 10;

/// RAM_ACK: type and length (`migration/migration.c`, patched).
const HEAD: [u8; 4] = [0, 8, 0, 16];

/// A RAM_ACK message.
pub type RamAck = [u8; 20];

/// Where the blocks' memory is data. Queries must be in the order in which QEMU goes through RAM.
#[derive(Debug, Default)]
pub struct Extents(Vec<Known>);

/// What is known about a block.
#[derive(Debug, Clone, Default)]
struct Known {
    /// Memory was looked at up to here. An announcement before it means that the guest wrote the
    /// page.
    seen: u64,
    /// The data found last. Holes are not cached, because the guest may fill them at any time.
    data: Range<u64>,
}

impl Extents {
    /// Return the extent at the start of `range` in `region`. May report data where a hole was made
    /// since.
    ///
    /// # Errors
    /// An I/O error from the system.
    pub fn first(&mut self, range: BlockRange, region: &Region) -> io::Result<Extent> {
        let BlockRange { block, offset, length } = range;
        let block = block as usize;
        if self.0.len() <= block {
            self.0.resize(block + 1, Known::default());
        }
        let known = &mut self.0[block];
        if offset < known.seen {
            return Ok(Extent { hole: false, length: length.min(known.seen - offset) });
        }
        let in_data = known.data.contains(&offset);
        let data = if in_data { offset } else { region.next_data(offset)? };
        let hole = data > offset;
        if !in_data && !hole {
            // Slow, so not done for each piece of a hole before the data. Returns `offset` if a
            // hole was made meanwhile.
            known.data = offset..region.next_hole(offset)?.max(offset + PAGE);
        }
        let end = if hole { data } else { known.data.end };
        let length = length.min(end - offset);
        known.seen = offset + length;
        Ok(Extent { hole, length })
    }
}

/// Bytes since the migration's start.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    done: u64,
    transferred: u64,
}

/// Counts the announced RAM that has landed.
#[derive(Debug, Default)]
pub struct Acknowledgement {
    /// Counts that apply when so many posted bytes have landed, in that order, a step apart. Over
    /// several connections later bytes may land first; then QEMU is told early, by what is in
    /// flight.
    marks: VecDeque<(u64, Count)>,
    handed: Count,
    told: Count,
}

impl Acknowledgement {
    /// Count announced bytes; `posted` is the total of posted bytes including them. A `hole` is not
    /// posted. Returns whether it is time to check what has landed.
    pub fn handed(&mut self, bytes: u64, hole: bool, posted: u64) -> bool {
        self.handed.done += bytes;
        self.handed.transferred += if hole { 0 } else { bytes };
        let last = self.marks.back().map_or(self.told, |(_, count)| *count);
        if self.handed.done - last.done < STEP {
            return false;
        }
        match self.marks.back_mut() {
            Some((at, count)) if *at == posted => *count = self.handed,
            _ => self.marks.push_back((posted, self.handed)),
        }
        true
    }

    /// Return the message for QEMU when `landed` of the posted bytes have landed.
    pub fn landed(&mut self, landed: u64) -> Option<RamAck> {
        let mut done = self.told;
        while let Some((posted, count)) = self.marks.front().copied()
            && posted <= landed
        {
            done = count;
            self.marks.pop_front();
        }
        self.tell(done)
    }

    /// Return the message for QEMU when all of them have landed.
    pub fn all_landed(&mut self) -> Option<RamAck> {
        self.marks.clear();
        self.tell(self.handed)
    }

    fn tell(&mut self, count: Count) -> Option<RamAck> {
        if count.done == self.told.done {
            return None;
        }
        self.told = count;
        let mut message = RamAck::default();
        message[..4].copy_from_slice(&HEAD);
        message[4..12].copy_from_slice(&count.done.to_be_bytes());
        message[12..].copy_from_slice(&count.transferred.to_be_bytes());
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    fn told(message: Option<RamAck>) -> Option<(u64, u64)> {
        let message = message?;
        assert_eq!(message[..4], HEAD);
        let field = |at: usize| u64::from_be_bytes(message[at..at + 8].try_into().unwrap());
        Some((field(4), field(12)))
    }

    fn region(pages: u64) -> Region {
        let fd: OwnedFd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, (pages + 1) * PAGE).unwrap();
        Region::new("ram", fd, PAGE, pages * PAGE).unwrap()
    }

    fn range(first: u64, pages: u64) -> BlockRange {
        BlockRange { block: 2, offset: first * PAGE, length: pages * PAGE }
    }

    #[test]
    fn what_is_told_has_landed() {
        let mut acknowledgement = Acknowledgement::default();
        assert!(!acknowledgement.handed(STEP - PAGE, false, STEP - PAGE));
        assert!(acknowledgement.handed(PAGE, false, STEP));
        assert_eq!(told(acknowledgement.landed(STEP - 1)), None);
        // A hole waits for what was handed over before it.
        assert!(acknowledgement.handed(1 << 30, true, STEP));
        assert_eq!(told(acknowledgement.landed(STEP)), Some((STEP + (1 << 30), STEP)));
        assert!(!acknowledgement.handed(PAGE, false, STEP + PAGE));
        assert_eq!(told(acknowledgement.landed(STEP + PAGE)), None);
        assert_eq!(
            told(acknowledgement.all_landed()),
            Some((STEP + (1 << 30) + PAGE, STEP + PAGE))
        );
        assert_eq!(told(acknowledgement.all_landed()), None);
    }

    #[test]
    fn a_hole_is_looked_at_each_time_and_data_but_once() {
        let region = region(8);
        region.write_at(&[1; 4096], 2 * PAGE).unwrap();
        let mut extents = Extents::default();
        assert_eq!(
            extents.first(range(0, 4), &region).unwrap(),
            Extent { hole: true, length: 2 * PAGE }
        );
        assert!(extents.0[2].data.is_empty());
        assert_eq!(
            extents.first(range(2, 2), &region).unwrap(),
            Extent { hole: false, length: PAGE }
        );
        // Not for the hole before it, because finding the end of data goes through all of it.
        assert_eq!(extents.0[2].data, 2 * PAGE..3 * PAGE);
        // The guest fills a hole before it is announced.
        region.write_at(&[1; 4096], 3 * PAGE).unwrap();
        assert!(!extents.first(range(3, 1), &region).unwrap().hole);
        assert!(extents.first(range(4, 4), &region).unwrap().hole);
        // A second announcement means that the guest wrote it.
        assert!(!extents.first(range(4, 1), &region).unwrap().hole);
    }

    proptest! {
        #[test]
        fn extents_cover_a_pass_and_miss_no_data(data in proptest::collection::vec(any::<bool>(), 1..64)) {
            let pages = data.len() as u64;
            let region = region(pages);
            for (page, _) in data.iter().enumerate().filter(|(_, data)| **data) {
                region.write_at(&[1; 4096], page as u64 * PAGE).unwrap();
            }
            let mut extents = Extents::default();
            let mut at = 0;
            while at < pages {
                let extent = extents.first(range(at, (pages - at).min(7)), &region).unwrap();
                prop_assert!(extent.length > 0 && extent.length.is_multiple_of(PAGE));
                let next = at + extent.length / PAGE;
                for page in at..next {
                    prop_assert_eq!(data[page as usize], !extent.hole);
                }
                at = next;
            }
            prop_assert_eq!(at, pages);
        }
    }
}
