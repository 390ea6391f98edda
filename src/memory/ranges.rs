//! Ranges of a block that are registered on demand.

use std::{collections::BTreeMap, ops::Range};

use crate::ram::CHUNK;

/// Disjoint ranges, each with its registration.
///
/// They grow like readahead. A registration costs a round trip and more, so ranges should be large;
/// but it allocates the holes in a range, so they should be small where little is written. A range
/// that continues its predecessor is twice as long, any other is one chunk.
#[derive(Debug)]
pub struct Ranges<T> {
    /// Keyed by start; with the end.
    ranges: BTreeMap<u64, (u64, T)>,
    /// Chunk size in bytes.
    chunk: u64,
}

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self::new(CHUNK)
    }
}

impl<T> Ranges<T> {
    /// Start without ranges, with chunks of `chunk` bytes.
    pub fn new(chunk: u64) -> Self {
        Self { ranges: BTreeMap::new(), chunk }
    }

    /// Return the range that contains `offset`, and its registration.
    pub fn get(&self, offset: u64) -> Option<(Range<u64>, &T)> {
        let (start, (end, registered)) = self.ranges.range(..=offset).next_back()?;
        (offset < *end).then_some((*start..*end, registered))
    }

    /// Whether a registered range overlaps `range`.
    pub fn overlaps(&self, range: &Range<u64>) -> bool {
        let before = self.ranges.range(..range.end).next_back();
        before.is_some_and(|(_, (end, _))| *end > range.start)
    }

    /// Return the range to register for `offset`, which no range contains, in a block of `length`
    /// bytes. It has at most `largest` bytes, a multiple of the chunk size.
    pub fn wanted(&self, offset: u64, length: u64, largest: u64) -> Range<u64> {
        let start = offset / self.chunk * self.chunk;
        let before = self.ranges.range(..=start).next_back();
        let size = match before {
            Some((before, (end, _))) if *end == start => (2 * (end - before)).min(largest),
            _ => self.chunk,
        };
        let next = self.ranges.range(start..).next().map_or(length, |(next, _)| *next);
        start..start.saturating_add(size).min(next).min(length)
    }

    /// Add a registered range.
    pub fn insert(&mut self, range: Range<u64>, registered: T) {
        self.ranges.insert(range.start, (range.end, registered));
    }

    /// Remove exactly `range`, and return its registration; `None` if there is no such range.
    pub fn remove(&mut self, range: &Range<u64>) -> Option<T> {
        let (end, _) = self.ranges.get(&range.start)?;
        if *end != range.end {
            return None;
        }
        self.ranges.remove(&range.start).map(|(_, registered)| registered)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ram::{CHUNK_MAX, RANGE_MAX};

    #[test]
    fn a_run_is_registered_in_ever_larger_ranges() {
        let mut ranges = Ranges::default();
        let mut sizes = Vec::new();
        let length = (1 << 40) + 4096;
        let mut offset = 0;
        while offset < 300 << 20 {
            let range = ranges.wanted(offset, length, RANGE_MAX);
            assert_eq!(range.start, offset);
            sizes.push((range.end - range.start) >> 20);
            offset = range.end;
            ranges.insert(range, ());
        }
        assert_eq!(sizes, [1, 2, 4, 8, 16, 32, 64, 64, 64, 64]);
        assert_eq!(ranges.wanted(1 << 40, length, RANGE_MAX), 1 << 40..length);
        assert_eq!(ranges.wanted((900 << 20) + 4096, length, RANGE_MAX), 900 << 20..901 << 20);
    }

    proptest! {
        /// Whatever is requested in blocks of up to 16 TiB: ranges contain it, are whole chunks,
        /// stay in the block, and never overlap.
        #[test]
        fn ranges_never_overlap(
            pages in 1_u64..=(16 << 40) / 4096,
            chunk in prop_oneof![Just(CHUNK), Just(32 * CHUNK), Just(CHUNK_MAX)],
            largest in 1_u64..=64,
            offsets in prop::collection::vec((any::<prop::sample::Index>(), 0..8_u64), 1..200),
        ) {
            let (length, largest) = (pages * 4096, largest * chunk);
            let mut ranges = Ranges::<usize>::new(chunk);
            let mut all: Vec<Range<u64>> = Vec::new();
            for (start, run) in offsets {
                let start = start.index(pages as usize) as u64 * 4096;
                for offset in (0..=run).map(|next| start + next * chunk).filter(|it| *it < length) {
                    match ranges.get(offset) {
                        Some((range, index)) => {
                            prop_assert!(range.contains(&offset));
                            prop_assert_eq!(range, all[*index].clone());
                        }
                        None => {
                            let range = ranges.wanted(offset, length, largest);
                            prop_assert!(!ranges.overlaps(&range));
                            prop_assert!(range.contains(&offset) && range.end <= length);
                            prop_assert!(range.start.is_multiple_of(chunk));
                            prop_assert!(range.end.is_multiple_of(chunk) || range.end == length);
                            prop_assert!(range.end - range.start <= largest);
                            prop_assert!(all.iter().all(|it| it.end <= range.start || range.end <= it.start));
                            ranges.insert(range.clone(), all.len());
                            prop_assert!(ranges.overlaps(&(range.end - 1..range.end)));
                            all.push(range);
                        }
                    }
                }
            }
        }
    }
}
