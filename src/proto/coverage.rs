//! Tracks which pages of a block were written or announced as zero at least once.
//!
//! One bit per page, so that the order of pages does not affect the cost. QEMU's first pass is in
//! order, but pages that the guest, a device or the balloon make it skip arrive later, one by one.

use std::ops::Range;

use crate::ram::PAGE;

/// Coverage of one block.
#[derive(Debug)]
pub struct Coverage {
    length: u64,
    pages: Vec<u64>,
    /// Pages that are not covered.
    missing: u64,
}

impl Coverage {
    /// Create empty coverage of a block of `length` bytes.
    pub fn new(length: u64) -> Self {
        let missing = length.div_ceil(PAGE);
        Self { length, pages: vec![0; missing.div_ceil(BITS) as usize], missing }
    }

    /// Add these bytes. A page counts if the range contains all of it.
    pub fn add(&mut self, range: Range<u64>) {
        let whole =
            if range.end >= self.length { self.length.div_ceil(PAGE) } else { range.end / PAGE };
        let mut page = range.start.div_ceil(PAGE);
        while page < whole {
            let count = (BITS - page % BITS).min(whole - page);
            let mask = (u64::MAX >> (BITS - count)) << (page % BITS);
            let word = &mut self.pages[(page / BITS) as usize];
            self.missing -= u64::from((mask & !*word).count_ones());
            *word |= mask;
            page += count;
        }
    }

    /// Return how many bytes are not covered.
    pub fn lacks(&self) -> u64 {
        (self.missing * PAGE).min(self.length)
    }
}

/// Pages in a word.
const BITS: u64 = u64::BITS as u64;

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_pass_in_order_is_all_of_it() {
        let mut coverage = Coverage::new(100 * PAGE);
        for page in 0..100 {
            assert_eq!(coverage.lacks(), (100 - page) * PAGE);
            coverage.add(page * PAGE..(page + 1) * PAGE);
        }
        assert_eq!(coverage.lacks(), 0);
        // A later pass.
        coverage.add(7 * PAGE..9 * PAGE);
        assert_eq!(coverage.lacks(), 0);
    }

    #[test]
    fn a_part_of_a_page_is_none() {
        let mut coverage = Coverage::new(2 * PAGE + 100);
        coverage.add(1..2 * PAGE - 1);
        assert_eq!(coverage.lacks(), 2 * PAGE + 100);
        coverage.add(PAGE..2 * PAGE + 100);
        assert_eq!(coverage.lacks(), PAGE);
        // Beyond the end of the block.
        coverage.add(0..u64::MAX);
        assert_eq!(coverage.lacks(), 0);
    }

    /// Coverage is updated under a lock that all channels share.
    #[test]
    fn pages_in_any_order_cost_no_more() {
        let pages = 1 << 20;
        let mut coverage = Coverage::new(2 * pages * PAGE);
        let begun = Instant::now();
        for page in (0..pages).rev() {
            coverage.add(2 * page * PAGE..(2 * page + 1) * PAGE);
        }
        assert_eq!(coverage.lacks(), pages * PAGE);
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }

    proptest! {
        #[test]
        fn it_is_the_union(added in prop::collection::vec((0..300_u64, 1..150_u64), 0..20)) {
            let mut coverage = Coverage::new(400 * PAGE);
            let mut pages = [false; 450];
            for (start, length) in added {
                coverage.add(start * PAGE..(start + length) * PAGE);
                pages[start as usize..(start + length) as usize].fill(true);
                let lacks = pages[..400].iter().filter(|page| !**page).count();
                prop_assert_eq!(coverage.lacks(), lacks as u64 * PAGE);
            }
        }
    }
}
