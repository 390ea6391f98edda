//! The ranges of the destination's blocks that the source may write, and when to request more.
//!
//! Only decides; the source's `remote_blocks` sends requests and waits.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
};

use crate::{fabric::RemoteKey, memory::Ranges, ram::RANGE_MAX};

/// A block's index and a range of the block.
pub type BlockRange = (usize, Range<u64>);

/// What is known about an offset.
#[derive(Debug, PartialEq, Eq)]
pub enum Known {
    /// The key to it.
    Key(RemoteKey),
    /// The key was requested.
    Asked,
    /// The key was not requested.
    Nothing,
}

/// The ranges, and how much guest memory they pin.
#[derive(Debug)]
pub struct RkeyCache {
    /// By block; `None` until the key has arrived.
    ranges: HashMap<usize, Ranges<Option<RemoteKey>>>,
    /// Pending requests; answers arrive in this order.
    asked: VecDeque<BlockRange>,
    /// Requested and granted ranges, oldest first.
    held: VecDeque<BlockRange>,
    /// Bytes in `held`.
    used: u64,
    limit: u64,
    /// Bytes of a chunk.
    chunk: u64,
    largest: u64,
}

impl RkeyCache {
    /// Create a cache for at most `limit` bytes, but never less than one chunk of `chunk` bytes.
    pub fn new(limit: Option<u64>, chunk: u64) -> Self {
        let limit = limit.unwrap_or(u64::MAX).max(chunk);
        // A quarter, so that one range can be released while others are in use.
        let largest = (limit / 4 / chunk * chunk).clamp(chunk, RANGE_MAX.max(chunk));
        Self {
            ranges: HashMap::new(),
            asked: VecDeque::new(),
            held: VecDeque::new(),
            used: 0,
            limit,
            chunk,
            largest,
        }
    }

    /// Return the bytes of a chunk.
    pub fn chunk(&self) -> u64 {
        self.chunk
    }

    fn of_block(&mut self, index: usize) -> &mut Ranges<Option<RemoteKey>> {
        self.ranges.entry(index).or_insert_with(|| Ranges::new(self.chunk))
    }

    /// Return what is known about `offset` of block `index`.
    pub fn get(&self, index: usize, offset: u64) -> Known {
        match self.ranges.get(&index).and_then(|ranges| ranges.get(offset)) {
            Some((_, Some(key))) => Known::Key(*key),
            Some((_, None)) => Known::Asked,
            None => Known::Nothing,
        }
    }

    /// Return the range to request for an unknown offset.
    pub fn wanted(&mut self, index: usize, offset: u64, length: u64) -> Range<u64> {
        let largest = self.largest;
        self.of_block(index).wanted(offset, length, largest)
    }

    /// Return the range to request before it is needed, so that no write waits for it: if a write
    /// at `offset` is in the second half of a run's last range.
    pub fn ahead(&mut self, index: usize, offset: u64, length: u64) -> Option<Range<u64>> {
        let ranges = self.ranges.get(&index)?;
        let (range, _) = ranges.get(offset)?;
        let run = range.end - range.start > self.chunk;
        let late = offset - range.start >= (range.end - range.start) / 2;
        if !run || !late || range.end >= length || !self.asked.is_empty() {
            return None;
        }
        let free = ranges.get(range.end).is_none();
        let next = free.then(|| self.wanted(index, range.end, length))?;
        self.fit(next.end - next.start).then_some(next)
    }

    /// Return whether `bytes` more fit into the limit.
    pub fn fit(&self, bytes: u64) -> bool {
        self.used.saturating_add(bytes) <= self.limit
    }

    /// Forget the oldest range, whose key must have arrived; `None` if there is none.
    pub fn release(&mut self) -> Option<BlockRange> {
        let (index, range) = self.held.pop_front()?;
        self.used -= range.end - range.start;
        if let Some(ranges) = self.ranges.get_mut(&index) {
            ranges.remove(&range);
        }
        Some((index, range))
    }

    /// Note that a range was requested.
    pub fn ask(&mut self, index: usize, range: Range<u64>) {
        self.used += range.end - range.start;
        self.of_block(index).insert(range.clone(), None);
        self.held.push_back((index, range.clone()));
        self.asked.push_back((index, range));
    }

    /// Return whether a request is unanswered.
    pub fn waits(&self) -> bool {
        !self.asked.is_empty()
    }

    /// Note the answer to the oldest request; false if there was none.
    pub fn answer(&mut self, key: RemoteKey) -> bool {
        let Some((index, range)) = self.asked.pop_front() else { return false };
        self.of_block(index).insert(range, Some(key));
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ram::{CHUNK, CHUNK_MAX};

    const KEY: RemoteKey = RemoteKey { address: 1, rkey: 2 };
    const LENGTH: u64 = 1 << 30;

    /// A destination returns the key of the chunk in which a request begins, and registers it once:
    /// a requested range must begin and end at its chunk boundaries.
    #[test]
    fn ranges_are_the_destinations_chunks() {
        for (chunk, sizes) in [(32 * CHUNK, [32, 64, 64, 64]), (CHUNK_MAX, [1024; 4])] {
            let mut keys = RkeyCache::new(None, chunk);
            let mut offset = 5 * CHUNK;
            for size in sizes {
                let range = keys.wanted(0, offset, 8 * LENGTH);
                assert_eq!(range, offset / chunk * chunk..offset / chunk * chunk + size * CHUNK);
                keys.ask(0, range.clone());
                offset = range.end;
            }
        }
    }

    #[test]
    fn a_run_is_asked_for_before_it_is_needed() {
        let mut keys = RkeyCache::new(None, CHUNK);
        let (mut waited, mut offset) = (0, 0);
        while offset < LENGTH {
            if keys.get(0, offset) == Known::Nothing {
                waited += 1;
                let range = keys.wanted(0, offset, LENGTH);
                keys.ask(0, range);
                assert!(keys.answer(KEY));
            }
            if let Some(range) = keys.ahead(0, offset, LENGTH) {
                assert!(range.start > offset);
                keys.ask(0, range);
                assert!(keys.answer(KEY));
            }
            offset += CHUNK;
        }
        assert_eq!(waited, 2, "for the first chunk and the range behind it");
        assert!(!keys.answer(KEY));
    }

    #[test]
    fn single_chunks_are_no_run() {
        let mut keys = RkeyCache::new(None, CHUNK);
        for offset in [0, 64 * CHUNK, 128 * CHUNK] {
            let range = keys.wanted(0, offset, LENGTH);
            assert_eq!(range.end - range.start, CHUNK);
            keys.ask(0, range);
            assert!(keys.answer(KEY));
            assert_eq!(keys.ahead(0, offset + CHUNK - 4096, LENGTH), None);
        }
    }

    proptest! {
        /// Whatever is written, the limit holds, and a released range is unknown.
        #[test]
        fn the_limit_holds(
            limit in 1_u64..200,
            chunk in prop_oneof![Just(CHUNK), Just(32 * CHUNK), Just(CHUNK_MAX)],
            offsets in prop::collection::vec((0..3_usize, 0..LENGTH), 1..300),
        ) {
            let limit = (limit * CHUNK).max(chunk);
            let mut keys = RkeyCache::new(Some(limit), chunk);
            for (index, offset) in offsets {
                if keys.get(index, offset) == Known::Nothing {
                    let range = keys.wanted(index, offset, LENGTH);
                    prop_assert!(range.contains(&offset));
                    while !keys.fit(range.end - range.start) {
                        let (index, gone) = keys.release().unwrap();
                        prop_assert_eq!(keys.get(index, gone.start), Known::Nothing);
                    }
                    keys.ask(index, range);
                    prop_assert_eq!(keys.get(index, offset), Known::Asked);
                    prop_assert!(keys.answer(KEY));
                }
                prop_assert_eq!(keys.get(index, offset), Known::Key(KEY));
                prop_assert!(keys.used <= limit);
                let held: u64 = keys.held.iter().map(|(_, range)| range.end - range.start).sum();
                prop_assert_eq!(held, keys.used);
            }
        }
    }
}
