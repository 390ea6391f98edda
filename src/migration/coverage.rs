//! Which pages of a block have been written, or said to be zero, at least once.
//!
//! QEMU goes through a block from its beginning to its end before it comes back to any page. So the
//! ranges are few, however large the block is, and what comes behind the first pass changes nothing.

use std::ops::Range;

/// Of one block.
#[derive(Debug, Default)]
pub struct Coverage {
    /// Sorted, and with a gap between each and the next.
    ranges: Vec<Range<u64>>,
}

impl Coverage {
    /// These bytes are.
    pub fn add(&mut self, range: Range<u64>) {
        // Those that it overlaps or touches become one with it.
        let first = self.ranges.partition_point(|known| known.end < range.start);
        let mut last = first;
        while self.ranges.get(last).is_some_and(|known| known.start <= range.end) {
            last += 1;
        }
        if first == last {
            self.ranges.insert(first, range);
            return;
        }
        let end = self.ranges[last - 1].end.max(range.end);
        let joined = &mut self.ranges[first];
        joined.start = joined.start.min(range.start);
        joined.end = end;
        self.ranges.drain(first + 1..last);
    }

    /// How many of the first `length` bytes are not.
    pub fn lacks(&self, length: u64) -> u64 {
        let covered = |range: &Range<u64>| range.end.min(length).saturating_sub(range.start);
        length - self.ranges.iter().map(covered).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_pass_in_order_is_one_range() {
        let mut coverage = Coverage::default();
        for page in 0..100 {
            coverage.add(page * 4096..(page + 1) * 4096);
            assert_eq!(coverage.ranges.len(), 1);
        }
        assert_eq!(coverage.lacks(100 * 4096), 0);
        assert_eq!(coverage.lacks(101 * 4096), 4096);
        // A later pass.
        coverage.add(7 * 4096..9 * 4096);
        assert_eq!((coverage.ranges.len(), coverage.lacks(100 * 4096)), (1, 0));
    }

    proptest! {
        #[test]
        fn it_is_the_union(added in prop::collection::vec((0..64_u64, 1..12_u64), 0..40)) {
            let mut coverage = Coverage::default();
            let mut pages = [false; 80];
            for (start, length) in added {
                coverage.add(start..start + length);
                pages[start as usize..(start + length) as usize].fill(true);
                for length in 0..80 {
                    let lacks = pages[..length].iter().filter(|page| !**page).count();
                    prop_assert_eq!(coverage.lacks(length as u64), lacks as u64);
                }
            }
            let gaps = coverage.ranges.windows(2).all(|pair| pair[0].end < pair[1].start);
            prop_assert!(gaps, "{:?}", coverage.ranges);
        }
    }
}
