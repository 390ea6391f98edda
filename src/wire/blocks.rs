//! The RAM-block exchange and the arithmetic of chunks and ranges.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use super::{Compress, ListedBlock, Register, WireError};
use crate::ram::BLOCKS_MAX;

use crate::ram::CHUNK;

/// Match each block of `source` to one of `own`, the destination's blocks.
///
/// Return indices into `own`, in the source's order. `fixed_length` tells whether an own block must
/// have the source's length; QEMU itself resizes the others (ROMs) when it loads.
///
/// # Errors
/// [`WireError::Misbehaved`] for an invalid list; otherwise the first difference in count, name or
/// length, with both values.
pub fn compare(
    source: &[ListedBlock],
    own: &[ListedBlock],
    fixed_length: impl Fn(usize) -> bool,
) -> Result<Vec<usize>, WireError> {
    const HINT: &str = "start both QEMUs with the same machine type, memory and devices";
    let mut named = HashSet::new();
    if let Some(twice) = source.iter().find(|block| !named.insert(&block.name)) {
        return Err(WireError::Misbehaved(format!("RAM block '{}' is listed twice", twice.name)));
    }
    if source.len() != own.len() {
        return Err(WireError::Incompatible(format!(
            "The source has {} RAM blocks and the destination {}{}; {HINT}",
            source.len(),
            own.len(),
            first_missing(source, own)
        )));
    }
    let by_name: HashMap<_, _> =
        own.iter().enumerate().map(|(index, block)| (block.name.as_str(), index)).collect();
    let mut indices = Vec::with_capacity(source.len());
    for block in source {
        let Some(&index) = by_name.get(block.name.as_str()) else {
            return Err(WireError::Incompatible(format!(
                "The destination has no RAM block '{}', which the source has; {HINT}",
                block.name
            )));
        };
        if fixed_length(index) && own[index].length != block.length {
            return Err(WireError::Incompatible(format!(
                "RAM block '{}' has {} bytes at the source and {} at the destination; {HINT}",
                block.name, block.length, own[index].length
            )));
        }
        indices.push(index);
    }
    Ok(indices)
}

/// Name the first block that only one side has, for the error message.
fn first_missing(source: &[ListedBlock], own: &[ListedBlock]) -> String {
    let lacks = |list: &[ListedBlock], name: &str| !list.iter().any(|block| block.name == name);
    if let Some(block) = source.iter().find(|block| lacks(own, &block.name)) {
        return format!(" ('{}' is only at the source)", block.name);
    }
    match own.iter().find(|block| lacks(source, &block.name)) {
        Some(block) => format!(" ('{}' is only at the destination)", block.name),
        None => String::new(),
    }
}

/// The destination's blocks in the source's order, for checking the source's ranges.
#[derive(Debug, Clone)]
pub struct BlockTable {
    /// `(offset in the destination's numbering, length)`.
    blocks: Vec<(u64, u64)>,
    /// Bytes of a registered chunk. The size is not on the wire: both ends must know it.
    chunk: u64,
}

impl Default for BlockTable {
    fn default() -> Self {
        Self { blocks: Vec::new(), chunk: CHUNK }
    }
}

impl BlockTable {
    /// Number blocks of these lengths consecutively, in chunks of `chunk` bytes.
    ///
    /// # Errors
    /// Too many blocks, or more bytes than 64 bits can address.
    pub fn new(lengths: impl IntoIterator<Item = u64>, chunk: u64) -> Result<Self, WireError> {
        let mut blocks = Vec::new();
        let mut next = 0_u64;
        for length in lengths {
            let end =
                chunks(length, chunk).checked_mul(chunk).and_then(|size| next.checked_add(size));
            let Some(end) = end.filter(|_| blocks.len() < BLOCKS_MAX) else {
                return Err(WireError::Incompatible(format!(
                    "The guest has more RAM blocks than {BLOCKS_MAX}, or more RAM than 16 EiB"
                )));
            };
            blocks.push((next, length));
            next = end;
        }
        Ok(Self { blocks, chunk })
    }

    /// Return what the source adds to offsets in block `index`.
    pub fn offset(&self, index: usize) -> Option<u64> {
        self.blocks.get(index).map(|(offset, _)| *offset)
    }

    /// Return the block of a COMPRESS, and the range in it.
    ///
    /// # Errors
    /// A value other than zero; a block or a range that does not exist.
    pub fn compress(&self, compress: &Compress) -> Result<(usize, Range<u64>), WireError> {
        if compress.value.get() != 0 {
            return Err(WireError::Misbehaved(format!(
                "COMPRESS with value {}; only 0 is possible",
                compress.value
            )));
        }
        self.range("COMPRESS", compress.block_idx.get(), compress.offset.get(), |offset, _| {
            offset.checked_add(compress.length.get())
        })
    }

    /// Return the block of a REGISTER_REQUEST, and the range in it: whole chunks, the last one
    /// clamped to the block's end.
    ///
    /// # Errors
    /// A block or a range that does not exist.
    pub fn register(&self, request: &Register) -> Result<(usize, Range<u64>), WireError> {
        let chunk = self.chunk;
        let (index, range) = self.range(
            "REGISTER_REQUEST",
            request.index.get(),
            request.key.get(),
            |offset, length| {
                let last = (offset / chunk).checked_add(request.chunks.get())?;
                if last >= chunks(length, chunk) {
                    return None;
                }
                Some(last.checked_add(1)?.checked_mul(chunk)?.min(length))
            },
        )?;
        Ok((index, range.start / chunk * chunk..range.end))
    }

    /// Return the block of an UNREGISTER_REQUEST, and the range in it. The key is the number of the
    /// first chunk in the block.
    ///
    /// # Errors
    /// A block or a range that does not exist.
    pub fn unregister(&self, request: &Register) -> Result<(usize, Range<u64>), WireError> {
        let base = self.offset(request.index.get() as usize).unwrap_or(0);
        let start = request.key.get().checked_mul(self.chunk).and_then(|it| it.checked_add(base));
        self.register(&Register { key: start.unwrap_or(u64::MAX).into(), ..*request })
    }

    /// Return the range in block `index` that begins at `address`. `end` computes its end from the
    /// offset in the block and the block's length.
    fn range(
        &self,
        what: &str,
        index: u32,
        address: u64,
        end: impl Fn(u64, u64) -> Option<u64>,
    ) -> Result<(usize, Range<u64>), WireError> {
        let Some(&(base, length)) = self.blocks.get(index as usize) else {
            return Err(WireError::Misbehaved(format!(
                "{what} for RAM block {index} of {}",
                self.blocks.len()
            )));
        };
        let start = address.checked_sub(base).filter(|start| *start < length);
        let range = start.and_then(|start| Some(start..end(start, length)?));
        match range {
            Some(range) if range.start < range.end && range.end <= length => {
                Ok((index as usize, range))
            }
            _ => Err(WireError::Misbehaved(format!(
                "{what} beyond RAM block {index} of {length} bytes (address {address:#x}, the \
                 block begins at {base:#x})"
            ))),
        }
    }
}

/// Count a block's chunks as QEMU does: one spare if the length is a multiple.
fn chunks(length: u64, chunk: u64) -> u64 {
    (length / chunk).saturating_add(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    use crate::ram::CHUNK_MAX;

    const TIB: u64 = 1 << 40;

    /// Chunk sizes that a stock QEMU may be set to: the smallest, the largest and one between.
    fn chunk() -> impl Strategy<Value = u64> {
        prop_oneof![Just(CHUNK), Just(32 * CHUNK), Just(CHUNK_MAX)]
    }

    /// A write at any offset lies in the chunk whose key a stock source uses for it, and the source
    /// is granted nothing that it did not ask for.
    #[test]
    fn a_request_means_chunks_of_the_size_that_both_ends_have() {
        let length = 3 * CHUNK_MAX + 4096;
        for (chunk, expected) in [
            (CHUNK, 33 * CHUNK..34 * CHUNK),
            (32 * CHUNK, 32 * CHUNK..64 * CHUNK),
            (CHUNK_MAX, 0..CHUNK_MAX),
        ] {
            let table = BlockTable::new([4096, length], chunk).unwrap();
            let base = table.offset(1).unwrap();
            let request = |offset: u64, chunks: u64| Register {
                key: (base + offset).into(),
                index: 1.into(),
                padding: 0.into(),
                chunks: chunks.into(),
            };
            let granted = table.register(&request(33 * CHUNK + 8192, 0)).unwrap();
            assert_eq!(granted, (1, expected.clone()), "{chunk}");
            let (_, more) = table.register(&request(33 * CHUNK, 1)).unwrap();
            assert_eq!(more, expected.start..expected.end + chunk, "{chunk}");
            let (_, last) = table.register(&request(3 * CHUNK_MAX, 0)).unwrap();
            assert_eq!(last, 3 * CHUNK_MAX..length, "{chunk}");
            let number = Register { key: (expected.start / chunk).into(), ..request(0, 0) };
            assert_eq!(table.unregister(&number).unwrap(), granted, "{chunk}");
        }
    }

    fn listed(blocks: &[(&str, u64)]) -> Vec<ListedBlock> {
        let listed =
            |(name, length): &(&str, u64)| ListedBlock { name: (*name).into(), length: *length };
        blocks.iter().map(listed).collect()
    }

    fn difference(source: &[(&str, u64)], own: &[(&str, u64)]) -> String {
        compare(&listed(source), &listed(own), |_| true).unwrap_err().to_string()
    }

    #[test]
    fn finds_blocks_in_another_order() {
        let source = listed(&[("pc.ram", 4096), ("vga.vram", 8192)]);
        let own = listed(&[("vga.vram", 8192), ("pc.ram", 4096)]);
        assert_eq!(compare(&source, &own, |_| true).unwrap(), [1, 0]);
    }

    #[test]
    fn says_what_differs() {
        let error = difference(&[("a", 1), ("b", 1)], &[("a", 1)]);
        assert!(
            error.contains("2 RAM blocks") && error.contains("'b' is only at the source"),
            "{error}"
        );
        let error = difference(&[("a", 1)], &[("b", 1)]);
        assert!(error.contains("no RAM block 'a'"), "{error}");
        let error = difference(&[("a", 4096)], &[("a", 8192)]);
        assert!(error.contains("4096 bytes at the source and 8192"), "{error}");
        assert!(difference(&[("a", 1), ("a", 1)], &[("a", 1), ("b", 1)]).contains("twice"));
    }

    #[test]
    fn lets_qemu_resize_what_it_may() {
        assert!(compare(&listed(&[("rom", 1)]), &listed(&[("rom", 2)]), |_| false).is_ok());
    }

    #[test]
    fn refuses_more_blocks_than_a_result_can_name() {
        for chunk in [CHUNK, CHUNK_MAX] {
            assert!(BlockTable::new(vec![16 * TIB; BLOCKS_MAX], chunk).is_ok());
            assert!(BlockTable::new(vec![1; BLOCKS_MAX + 1], chunk).is_err());
            assert!(BlockTable::new([u64::MAX], chunk).is_err());
        }
    }

    proptest! {
        /// Whatever the peer asks for, the granted range lies in the block: up to 16383 blocks of
        /// up to 16 TiB.
        #[test]
        fn ranges_lie_in_their_block(
            lengths in prop::collection::vec(1..=16 * TIB, 1..20),
            count in prop_oneof![1..24_usize, 1..=BLOCKS_MAX],
            index in prop_oneof![0_u32..24, 0..=BLOCKS_MAX as u32],
            key in prop_oneof![any::<u64>(), 0..64 * TIB],
            length in prop_oneof![any::<u64>(), 0..32 * TIB],
            chunk_count in prop_oneof![any::<u64>(), 0..32_u64 << 20],
            chunk in chunk(),
        ) {
            let lengths: Vec<_> = lengths.into_iter().cycle().take(count).collect();
            let table = BlockTable::new(lengths.iter().copied(), chunk).unwrap();
            // Bias half of the keys towards the block.
            let base = table.offset(index as usize).unwrap_or(0);
            let key = if key % 2 == 0 { key } else { base.saturating_add(key % (32 * TIB)) };
            let compress = Compress {
                value: 0.into(), block_idx: index.into(), offset: key.into(), length: length.into(),
            };
            if let Ok((block, range)) = table.compress(&compress) {
                prop_assert!(range.start < range.end && range.end <= lengths[block]);
                prop_assert_eq!(range.end - range.start, length);
                prop_assert_eq!(table.offset(block).unwrap() + range.start, key);
            }
            let register = Register {
                key: key.into(), index: index.into(), padding: 0.into(), chunks: chunk_count.into(),
            };
            if let Ok((block, range)) = table.register(&register) {
                prop_assert!(range.start < range.end && range.end <= lengths[block]);
                prop_assert_eq!(range.start % chunk, 0);
            }
            if let Ok((block, range)) = table.unregister(&register) {
                prop_assert!(range.start < range.end && range.end <= lengths[block]);
                prop_assert_eq!(range.start / chunk, key);
            }
        }

        /// Blocks are numbered consecutively: no address belongs to two of them.
        #[test]
        fn blocks_do_not_overlap(
            lengths in prop::collection::vec(1..=16 * TIB, 1..20),
            count in 2..=BLOCKS_MAX,
            at in any::<prop::sample::Index>(),
            chunk in chunk(),
        ) {
            let lengths: Vec<_> = lengths.into_iter().cycle().take(count).collect();
            let table = BlockTable::new(lengths.iter().copied(), chunk).unwrap();
            let at = at.index(count - 1);
            let end = table.offset(at).unwrap() + lengths[at].div_ceil(chunk) * chunk;
            prop_assert!(end <= table.offset(at + 1).unwrap());
        }

        /// Every chunk of every block can be registered, and the granted range covers it.
        #[test]
        fn every_chunk_is_granted(length in 1..=16 * TIB, at in any::<prop::sample::Index>(), chunk in chunk()) {
            let table = BlockTable::new([4096, length], chunk).unwrap();
            let number = at.index(usize::try_from(length.div_ceil(chunk)).unwrap()) as u64;
            let key = table.offset(1).unwrap() + number * chunk;
            let request = Register { key: key.into(), index: 1.into(), padding: 0.into(), chunks: 0.into() };
            let (_, range) = table.register(&request).unwrap();
            prop_assert_eq!(range, number * chunk..((number + 1) * chunk).min(length));
        }
    }
}
