//! Streams recorded from real QEMUs (scripts/record-streams), through both readers.
//!
//! The pages found in them must be those that QEMU counted while it sent them (`info migrate`).

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    fs,
};

use crate::streams::PAGE;
use qemu_rdma_helper::{
    ram::{
        BlockRange,
        Transfer::{self, Copied, Direct, Inline},
    },
    stream::{ForwardSink, Forwarder, Limits, RewriteSink, Rewriter, StreamBlock},
};

/// The transfer of a block, by its name.
type Choice = fn(&str) -> Transfer;

/// Choices of the blocks that stay in the stream.
const CHOICES: [Choice; 3] =
    [|_| Inline, |name| either(name, Inline, Direct), |name| either(name, Direct, Inline)];

/// Choices of the blocks that are copied.
const COPIED: [Choice; 2] =
    [|name| either(name, Copied, Inline), |name| either(name, Copied, Direct)];

fn either(name: &str, ram: Transfer, rest: Transfer) -> Transfer {
    if name == "pc.ram" { ram } else { rest }
}

/// A recorded stream and its QEMU's monitor output.
struct Recording {
    name: String,
    stream: Vec<u8>,
    said: String,
}

impl Recording {
    fn all() -> Vec<Self> {
        let recording = |(name, stream)| {
            let said = crate::streams::directory().join(format!("{name}.txt"));
            Self { name, stream, said: fs::read_to_string(said).unwrap() }
        };
        crate::streams::recorded().into_iter().map(recording).collect()
    }

    /// Return the possible [`CHOICES`]: pages announced without content can't stay in the stream.
    fn choices(&self) -> &'static [Choice] {
        if self.kind() == "announced" { &CHOICES[2..] } else { &CHOICES }
    }

    fn kind(&self) -> &str {
        self.name.split_once('-').unwrap().1
    }

    /// Return a count of `info migrate`, or 0 if it is not there.
    fn count(&self, what: &str) -> u64 {
        crate::streams::count(&self.said, what).unwrap_or(0)
    }

    /// Return the names and used lengths of `info ramblock`.
    fn blocks(&self) -> BTreeMap<String, u64> {
        let lines = self.said.lines().filter(|line| line.contains(" KiB  0x"));
        let block = |line: &str| {
            let words: Vec<_> = line.split_whitespace().collect();
            let used = u64::from_str_radix(words[4].strip_prefix("0x").unwrap(), 16).unwrap();
            (words[0].to_owned(), used)
        };
        lines.map(block).collect()
    }
}

/// Receives the rewriter's output, as the source's worker does.
struct Source {
    transfer: Choice,
    blocks: Vec<StreamBlock>,
    /// QEMU_FILE messages; one ends at each HOOK.
    messages: Vec<Vec<u8>>,
    hook_open: bool,
    /// Bytes announced without content.
    announced: u64,
    /// (zero, block, offset) of each page.
    pages: Vec<(bool, u32, u64)>,
    /// Copied bytes that are not yet written, and those that are.
    gathered: Vec<u8>,
    staged: Vec<u8>,
}

impl Source {
    fn new(transfer: Choice) -> Self {
        Self {
            transfer,
            blocks: Vec::new(),
            messages: vec![Vec::new()],
            hook_open: false,
            announced: 0,
            pages: Vec::new(),
            gathered: Vec::new(),
            staged: Vec::new(),
        }
    }

    fn range(&mut self, zero: bool, range: BlockRange) {
        assert!(self.hook_open, "written outside a hook");
        let block = &self.blocks[range.block as usize];
        assert!(range.offset + range.length <= block.length);
        assert_ne!((self.transfer)(&block.name), Inline, "{}", block.name);
        for offset in (range.offset..range.offset + range.length).step_by(PAGE as usize) {
            self.pages.push((zero, range.block, offset));
        }
    }

    fn pages(&self, zero: bool) -> u64 {
        self.pages.iter().filter(|page| page.0 == zero).count() as u64
    }
}

impl RewriteSink for Source {
    type Error = Infallible;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<Vec<Transfer>, Infallible> {
        self.blocks = blocks.to_vec();
        Ok(blocks.iter().map(|block| (self.transfer)(&block.name)).collect())
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        assert!(!self.hook_open, "stream bytes between a hook and the end of its writes");
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

    fn announced(&mut self, bytes: u64, _: bool) -> Result<(), Infallible> {
        self.announced += bytes;
        Ok(())
    }

    fn finished(&mut self) -> Result<(), Infallible> {
        self.hook_open = false;
        Ok(())
    }
}

/// What the destination's QEMU receives.
#[derive(Default)]
struct Destination {
    bytes: Vec<u8>,
    hooks: usize,
    blocks: Vec<StreamBlock>,
    ram_ends: usize,
}

impl ForwardSink for Destination {
    type Error = Infallible;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<(), Infallible> {
        self.blocks = blocks.to_vec();
        Ok(())
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn hook(&mut self) -> Result<(), Infallible> {
        self.hooks += 1;
        Ok(())
    }

    fn ram_end(&mut self) -> Result<(), Infallible> {
        self.ram_ends += 1;
        Ok(())
    }
}

fn rewrite(stream: &[u8], pieces: usize, transfer: Choice) -> Source {
    let mut source = Source::new(transfer);
    let mut rewriter = Rewriter::new(Limits::default());
    for piece in stream.chunks(pieces) {
        rewriter.push(piece, &mut source).unwrap();
        // As if QEMU paused here.
        rewriter.flush(&mut source).unwrap();
    }
    rewriter.finish().unwrap();
    source
}

fn land(source: &Source) -> Destination {
    let mut destination = Destination::default();
    let mut forwarder = Forwarder::default();
    for message in &source.messages {
        forwarder.push(message, &mut destination).unwrap();
    }
    forwarder.finish().unwrap();
    destination
}

#[test]
fn every_page_that_qemu_counted_is_found() {
    for recording in Recording::all() {
        let source = rewrite(&recording.stream, 1 << 20, |_| Direct);
        let blocks: BTreeMap<_, _> =
            source.blocks.iter().map(|block| (block.name.clone(), block.length)).collect();
        assert_eq!(blocks, recording.blocks(), "{}", recording.name);
        // The first pass sends every page.
        let distinct: BTreeSet<_> = source.pages.iter().map(|page| (page.1, page.2)).collect();
        let lengths: u64 = blocks.values().sum();
        assert_eq!(distinct.len() as u64, lengths / PAGE, "{}", recording.name);
        let sent = ["normal", "xbzrle pages", "compression pages"].map(|it| recording.count(it));
        let counted = (sent.iter().sum::<u64>(), recording.count("duplicate"));
        let found = (source.pages(false), source.pages(true));
        if sent[1] + sent[2] == 0 {
            assert_eq!(found, counted, "{}", recording.name);
        } else {
            // QEMU also counts unchanged XBZRLE pages, which it does not send. At each flush 7.2
            // counts the compression threads that had nothing to send.
            assert!(found.0 <= counted.0 && found.1 <= counted.1, "{found:?} of {counted:?}");
            assert!(found.0 >= counted.0 * 9 / 10, "{found:?} of {counted:?}");
        }
        assert!(recording.count("dirty sync count") >= 3, "{}: no later pass", recording.name);
        let announced = source.announced > 0;
        assert_eq!(announced, recording.kind() == "announced", "{}", recording.name);
        let of_its_kind = match recording.kind() {
            "xbzrle" => sent[1],
            "compress" => sent[2],
            _ => sent[0],
        };
        assert!(of_its_kind > 0, "{}: none of its kind of record", recording.name);
    }
}

#[test]
fn no_cut_changes_anything() {
    for recording in Recording::all() {
        let staged = if recording.kind() == "plain" { &COPIED[..] } else { &[] };
        for transfer in recording.choices().iter().chain(staged) {
            let whole = rewrite(&recording.stream, usize::MAX, *transfer);
            for pieces in [1, 7, 4096, 4097, 65536] {
                let cut = rewrite(&recording.stream, pieces, *transfer);
                assert_eq!(cut.staged, whole.staged, "{} by {pieces}", recording.name);
                assert_eq!(cut.pages, whole.pages, "{} by {pieces}", recording.name);
                assert_eq!(cut.messages.concat(), whole.messages.concat(), "{}", recording.name);
            }
        }
    }
}

/// Without RAM the stream is small, and QEMU's device state is unchanged.
#[test]
fn what_is_not_ram_arrives_unchanged() {
    for recording in Recording::all() {
        let source = rewrite(&recording.stream, 4096, |_| Direct);
        let destination = land(&source);
        assert_eq!(destination.blocks, source.blocks);
        assert_eq!(destination.ram_ends, 1);
        assert!(destination.hooks > 1);
        assert!(destination.bytes.len() < 256 << 10, "{}", recording.name);
        let tail = recording.stream.len() - 4096;
        assert!(destination.bytes.ends_with(&recording.stream[tail..]), "{}", recording.name);
    }
}

/// Blocks that stay in the stream keep their records, in any encoding and in order.
#[test]
fn blocks_in_the_stream_keep_their_records() {
    for recording in Recording::all() {
        let all = rewrite(&recording.stream, 4096, |_| Direct);
        for transfer in recording.choices() {
            let source = rewrite(&recording.stream, 4096, *transfer);
            // Read again what the destination's QEMU would receive: only those blocks' pages.
            let kept = rewrite(&land(&source).bytes, 4096, |_| Direct);
            let of = |pages: &[(bool, u32, u64)], wanted: bool| -> Vec<_> {
                let name = |block: u32| all.blocks[block as usize].name.as_str();
                let wanted =
                    pages.iter().filter(|page| (transfer(name(page.1)) == Inline) == wanted);
                wanted.copied().collect()
            };
            assert_eq!(kept.pages, of(&all.pages, true), "{}", recording.name);
            assert_eq!(source.pages, of(&all.pages, false), "{}", recording.name);
        }
    }
}

/// A stream that is cut before the end of RAM is never accepted.
#[test]
fn a_cut_before_the_end_of_ram_is_noticed() {
    for recording in Recording::all() {
        let mut source = Source::new(|_| Direct);
        let mut rewriter = Rewriter::new(Limits::default());
        let mut ends = 0;
        for piece in recording.stream.chunks(1000) {
            ends += usize::from(!rewriter.ram_ended());
            rewriter.push(piece, &mut source).unwrap();
        }
        for end in [0, 1, 100, ends / 2 * 1000, (ends - 1) * 1000] {
            let mut rewriter = Rewriter::new(Limits::default());
            rewriter.push(&recording.stream[..end], &mut Source::new(|_| Direct)).unwrap();
            assert!(rewriter.finish().is_err(), "{} cut at {end}", recording.name);
        }
    }
}
