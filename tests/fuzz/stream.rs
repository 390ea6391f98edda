//! Any bytes as a migration stream: both readers stay within the stream's blocks, splits change
//! nothing, and the rewriter's output is a stream.
#![no_main]

use std::convert::Infallible;

use libfuzzer_sys::fuzz_target;
use qemu_rdma_helper::{
    ram::{BlockRange, Transfer},
    stream::{Extent, ForwardSink, Forwarder, Limits, RewriteSink, Rewriter, StreamBlock},
};

#[derive(Default)]
struct Source {
    /// Bit n: block n (modulo 4) is inline; bit n + 4: otherwise it is copied.
    transfers: u8,
    /// Copied bytes of the next write, and of all earlier ones.
    gathered: Vec<u8>,
    staged: Vec<u8>,
    blocks: Vec<StreamBlock>,
    messages: Vec<Vec<u8>>,
    hook_open: bool,
    ranges: Vec<(bool, BlockRange)>,
}

impl Source {
    fn range(&mut self, zero: bool, range: BlockRange) {
        assert!(self.hook_open);
        let length = self.blocks[range.block as usize].length;
        assert!(
            range.length > 0
                && [range.offset, range.length].iter().all(|it| it.is_multiple_of(4096))
        );
        assert!(range.offset < length && range.length <= length - range.offset);
        match self.ranges.last_mut() {
            // A split may end a range early.
            Some((last_zero, last))
                if *last_zero == zero
                    && last.block == range.block
                    && last.offset + last.length == range.offset =>
            {
                last.length += range.length;
            }
            _ => self.ranges.push((zero, range)),
        }
    }
}

impl RewriteSink for Source {
    type Error = Infallible;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<Vec<Transfer>, Infallible> {
        self.blocks = blocks.to_vec();
        let transfer = |index: usize| match self.transfers >> (index % 4) & 0x11 {
            0 => Transfer::Direct,
            0x10 => Transfer::Copied,
            _ => Transfer::Inline,
        };
        Ok((0..blocks.len()).map(transfer).collect())
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        assert!(!self.hook_open);
        if self.messages.is_empty() {
            self.messages.push(Vec::new());
        }
        self.messages.last_mut().unwrap().extend_from_slice(bytes);
        Ok(())
    }

    fn hook(&mut self) -> Result<(), Infallible> {
        self.hook_open = true;
        self.messages.push(Vec::new());
        Ok(())
    }

    fn write(&mut self, range: BlockRange) -> Result<(), Infallible> {
        self.range(false, range);
        Ok(())
    }

    fn stage(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.gathered.extend_from_slice(bytes);
        assert!(self.gathered.len() <= 1 << 20);
        Ok(())
    }

    fn write_staged(&mut self, range: BlockRange) -> Result<(), Infallible> {
        assert_eq!(self.gathered.len() as u64, range.length);
        self.staged.append(&mut self.gathered);
        self.range(false, range);
        Ok(())
    }

    fn zero(&mut self, range: BlockRange) -> Result<(), Infallible> {
        self.range(true, range);
        Ok(())
    }

    fn extent(&mut self, range: BlockRange) -> Result<Extent, Infallible> {
        let (half, hole) = (1 << 19, range.offset >> 19 & 1 == 1);
        Ok(Extent { hole, length: range.length.min(half - range.offset % half) })
    }

    fn announced(&mut self, bytes: u64, hole: bool) -> Result<(), Infallible> {
        let (zero, last) = self.ranges.last().expect("handed over");
        assert!(*zero == hole && (1..=last.length).contains(&bytes));
        Ok(())
    }

    fn finished(&mut self) -> Result<(), Infallible> {
        self.hook_open = false;
        Ok(())
    }
}

#[derive(Default)]
struct Destination {
    ram_ends: usize,
}

impl ForwardSink for Destination {
    type Error = Infallible;

    fn ram_blocks(&mut self, _: &[StreamBlock]) -> Result<(), Infallible> {
        Ok(())
    }

    fn stream(&mut self, _: &[u8]) -> Result<(), Infallible> {
        Ok(())
    }

    fn hook(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn ram_end(&mut self) -> Result<(), Infallible> {
        self.ram_ends += 1;
        Ok(())
    }
}

/// Rewrite `stream` in pieces of `size`. Return whether it was accepted to the end.
fn rewrite(stream: &[u8], size: usize, transfers: u8) -> (Source, bool) {
    let mut source = Source { transfers, ..Source::default() };
    let mut rewriter = Rewriter::new(Limits::default());
    let fed = stream.chunks(size).all(|piece| {
        // As if QEMU paused after each.
        rewriter.push(piece, &mut source).is_ok() && rewriter.flush(&mut source).is_ok()
    });
    let whole = fed && rewriter.finish().is_ok();
    (source, whole)
}

fuzz_target!(|input: &[u8]| {
    let [size, transfers, stream @ ..] = input else { return };
    let (source, whole) = rewrite(stream, usize::MAX, *transfers);
    let (cut, cut_whole) = rewrite(stream, usize::from(*size) + 1, *transfers);
    assert_eq!(whole, cut_whole);
    if whole {
        assert_eq!(source.ranges, cut.ranges);
        assert_eq!(source.staged, cut.staged);
        assert_eq!(source.messages.concat(), cut.messages.concat());
        let mut destination = Destination::default();
        let mut forwarder = Forwarder::default();
        for message in &source.messages {
            forwarder.push(message, &mut destination).unwrap();
        }
        forwarder.finish().unwrap();
        assert_eq!(destination.ram_ends, 1);
    }
    // Hostile bytes directly to the destination.
    let mut forwarder = Forwarder::default();
    let mut destination = Destination::default();
    if stream.chunks(usize::from(*size) + 1).all(|it| forwarder.push(it, &mut destination).is_ok())
    {
        let _ = forwarder.finish();
    }
});
