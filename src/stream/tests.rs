//! Handmade streams, split at any byte, and hostile ones.

mod announced;
mod channels;
mod early;
mod staged;

use std::{collections::VecDeque, convert::Infallible};

use proptest::prelude::*;

use super::*;
use crate::ram::{BlockRange, Transfer};

/// A call to a sink. Consecutive stream bytes are joined.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Asked {
    Blocks(Vec<(String, u64)>),
    Stream(Vec<u8>),
    Hook,
    Write(u32, u64, u64),
    Copied(u32, u64, Vec<u8>),
    Zero(u32, u64, u64),
    Announced(u64, bool),
    Finished,
    RamEnd,
    Met,
}

#[derive(Debug, Default)]
struct Recorder {
    asked: Vec<Asked>,
    in_stream: Vec<&'static str>,
    staged: Vec<&'static str>,
    gathered: Vec<u8>,
    meetings: VecDeque<Vec<ChannelPage>>,
}

impl Recorder {
    fn bytes(&mut self, bytes: &[u8]) {
        match self.asked.last_mut() {
            Some(Asked::Stream(last)) => last.extend_from_slice(bytes),
            _ => self.asked.push(Asked::Stream(bytes.to_vec())),
        }
    }

    fn blocks(&mut self, blocks: &[StreamBlock]) {
        let blocks = blocks.iter().map(|block| (block.name.clone(), block.length)).collect();
        self.asked.push(Asked::Blocks(blocks));
    }

    fn forwarded(&self) -> Vec<u8> {
        let bytes = |asked: &Asked| match asked {
            Asked::Stream(bytes) => bytes.clone(),
            _ => Vec::new(),
        };
        self.asked.iter().flat_map(bytes).collect()
    }
}

impl RewriteSink for Recorder {
    type Error = Infallible;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<Vec<Transfer>, Infallible> {
        self.blocks(blocks);
        let transfer = |block: &StreamBlock| match &block.name.as_str() {
            name if self.in_stream.contains(name) => Transfer::Inline,
            name if self.staged.contains(name) => Transfer::Copied,
            _ => Transfer::Direct,
        };
        Ok(blocks.iter().map(transfer).collect())
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.bytes(bytes);
        Ok(())
    }

    fn hook(&mut self) -> Result<(), Infallible> {
        self.asked.push(Asked::Hook);
        Ok(())
    }

    fn write(&mut self, range: BlockRange) -> Result<(), Infallible> {
        self.asked.push(Asked::Write(range.block, range.offset, range.length));
        Ok(())
    }

    fn stage(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.gathered.extend_from_slice(bytes);
        Ok(())
    }

    fn write_staged(&mut self, range: BlockRange) -> Result<(), Infallible> {
        let bytes = std::mem::take(&mut self.gathered);
        assert_eq!(bytes.len() as u64, range.length);
        self.asked.push(Asked::Copied(range.block, range.offset, bytes));
        Ok(())
    }

    fn zero(&mut self, range: BlockRange) -> Result<(), Infallible> {
        self.asked.push(Asked::Zero(range.block, range.offset, range.length));
        Ok(())
    }

    fn extent(&mut self, range: BlockRange) -> Result<Extent, Infallible> {
        // The upper half of each MiB is a hole.
        let (half, hole) = (1 << 19, range.offset >> 19 & 1 == 1);
        Ok(Extent { hole, length: range.length.min(half - range.offset % half) })
    }

    fn announced(&mut self, bytes: u64, hole: bool) -> Result<(), Infallible> {
        self.asked.push(Asked::Announced(bytes, hole));
        Ok(())
    }

    fn finished(&mut self) -> Result<(), Infallible> {
        self.asked.push(Asked::Finished);
        Ok(())
    }

    fn synchronise(&mut self) -> Result<Vec<ChannelPage>, Infallible> {
        self.asked.push(Asked::Met);
        Ok(self.meetings.pop_front().unwrap())
    }
}

impl ForwardSink for Recorder {
    type Error = Infallible;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<(), Infallible> {
        self.blocks(blocks);
        Ok(())
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.bytes(bytes);
        Ok(())
    }

    fn hook(&mut self) -> Result<(), Infallible> {
        self.asked.push(Asked::Hook);
        Ok(())
    }

    fn ram_end(&mut self) -> Result<(), Infallible> {
        self.asked.push(Asked::RamEnd);
        Ok(())
    }
}

/// Builds streams.
#[derive(Clone, Default)]
struct Build(Vec<u8>);

impl Build {
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn word(self, word: u64) -> Self {
        self.raw(&word.to_be_bytes())
    }

    fn name(self, name: &str) -> Self {
        self.raw(&[name.len() as u8]).raw(name.as_bytes())
    }

    fn header() -> Self {
        Self::default().raw(b"QEVM\0\0\0\x03").raw(b"\x07\0\0\0\x02pc")
    }

    /// Header and set-up with these blocks.
    fn with_blocks(blocks: &[(&str, u64)]) -> Self {
        let total: u64 = blocks.iter().map(|(_, length)| length).sum();
        let mut build = Self::header().raw(b"\x01\0\0\0\x02").name("ram");
        build = build.raw(&[0, 0, 0, 0, 0, 0, 0, 4]).word(total | 4);
        for (name, length) in blocks {
            build = build.name(name).word(*length);
        }
        build.end_of_section()
    }

    fn end_of_section(self) -> Self {
        self.word(0x10).raw(b"\x7e\0\0\0\x02")
    }

    fn part(self) -> Self {
        self.raw(b"\x02\0\0\0\x02")
    }

    fn last(self) -> Self {
        self.raw(b"\x03\0\0\0\x02")
    }

    fn page(self, offset: u64, name: Option<&str>, fill: u8) -> Self {
        let flags = if name.is_some() { 0x08 } else { 0x28 };
        let build = self.word(offset | flags);
        let build = if let Some(name) = name { build.name(name) } else { build };
        build.raw(&[fill; 4096])
    }

    fn zero(self, offset: u64, name: Option<&str>) -> Self {
        let flags = if name.is_some() { 0x02 } else { 0x22 };
        let build = self.word(offset | flags);
        let build = if let Some(name) = name { build.name(name) } else { build };
        build.raw(&[0])
    }
}

/// A stream with a bit of everything.
fn sample() -> Vec<u8> {
    Build::with_blocks(&[("pc.ram", 4 << 20), ("rom", 8192)])
        .raw(b"\x08\0\x02\0\x04\0\0\0\x01")
        .part()
        .zero(0, Some("pc.ram"))
        .zero(4096, None)
        .page(8192, None, 1)
        .page(12288, None, 2)
        .page(0, Some("rom"), 3)
        .page(16384, Some("pc.ram"), 4)
        .page(4096, Some("rom"), 5)
        .word(0x200)
        .end_of_section()
        .last()
        .word((1 << 20) | 0x40)
        .name("pc.ram")
        .raw(b"\x01\0\x03abc")
        .word(((1 << 20) + 4096) | 0x120)
        .raw(b"\0\0\0\x05defgh")
        .end_of_section()
        .raw(b"\x04 device state, opaque \x7e")
        .raw(&[0])
        .0
}

fn rewrite(stream: &[u8], cuts: &[usize]) -> Result<Recorder, PushError<Infallible>> {
    rewrite_to(Recorder { in_stream: vec!["rom"], ..Recorder::default() }, stream, cuts)
}

fn rewrite_to(
    mut recorder: Recorder,
    stream: &[u8],
    cuts: &[usize],
) -> Result<Recorder, PushError<Infallible>> {
    let mut rewriter = Rewriter::new(Limits::default());
    let mut from = 0;
    for cut in cuts.iter().copied().chain([stream.len()]) {
        rewriter.push(&stream[from..cut], &mut recorder)?;
        from = cut;
    }
    rewriter.finish().map_err(PushError::Stream)?;
    Ok(recorder)
}

#[test]
fn records_become_writes_and_the_rest_goes_on() {
    let recorder = rewrite(&sample(), &[]).unwrap();
    let hook = || Build::default().word(0x80);
    let setup = Build::with_blocks(&[("pc.ram", 4 << 20), ("rom", 8192)]).0;
    let (setup, end) = setup.split_at(setup.len() - 13);
    let in_stream = Build::default().page(0, Some("rom"), 3).page(4096, None, 5).end_of_section();
    let expected = vec![
        Asked::Stream(setup.to_vec()),
        Asked::Blocks(vec![("pc.ram".into(), 4 << 20), ("rom".into(), 8192)]),
        Asked::Stream(hook().0),
        Asked::Hook,
        Asked::Finished,
        Asked::Stream([end, b"\x08\0\x02\0\x04\0\0\0\x01", b"\x02\0\0\0\x02", &hook().0].concat()),
        Asked::Hook,
        Asked::Zero(0, 0, 8192),
        Asked::Write(0, 8192, 12288),
        Asked::Finished,
        Asked::Stream([in_stream.last().0, hook().0].concat()),
        Asked::Hook,
        Asked::Write(0, 1 << 20, 8192),
        Asked::Finished,
        Asked::Stream(Build::default().end_of_section().raw(b"\x04 device state, opaque \x7e\0").0),
    ];
    for (asked, expected) in recorder.asked.iter().zip(&expected) {
        assert_eq!(asked, expected);
    }
    assert_eq!(recorder.asked.len(), expected.len());
}

#[test]
fn every_single_cut_asks_the_same() {
    let stream = sample();
    let whole = rewrite(&stream, &[]).unwrap().asked;
    for cut in 0..stream.len() {
        assert_eq!(rewrite(&stream, &[cut]).unwrap().asked, whole, "cut at {cut}");
    }
}

#[test]
fn byte_by_byte_asks_the_same() {
    let stream = sample();
    let cuts: Vec<usize> = (1..stream.len()).collect();
    assert_eq!(rewrite(&stream, &cuts).unwrap().asked, rewrite(&stream, &[]).unwrap().asked);
}

/// When QEMU pauses, pending pages are flushed, and no record is split.
#[test]
fn a_flush_at_any_cut_changes_no_byte() {
    let stream = Build::with_blocks(&[("pc.ram", 4 << 20), ("rom", 8192)])
        .part()
        .page(8192, Some("pc.ram"), 2)
        .page(0, Some("rom"), 3)
        .zero(0, Some("pc.ram"))
        .end_of_section()
        .last()
        .end_of_section()
        .raw(&[0])
        .0;
    let whole = rewrite(&stream, &[]).unwrap();
    for cut in 0..stream.len() {
        let mut recorder = Recorder { in_stream: vec!["rom"], ..Recorder::default() };
        let mut rewriter = Rewriter::new(Limits::default());
        rewriter.push(&stream[..cut], &mut recorder).unwrap();
        rewriter.flush(&mut recorder).unwrap();
        rewriter.push(&stream[cut..], &mut recorder).unwrap();
        rewriter.finish().unwrap();
        assert_eq!(recorder.asked, whole.asked, "cut at {cut}");
    }
}

#[test]
fn runs_end_at_their_limit() {
    let mut build = Build::with_blocks(&[("pc.ram", 4 << 20)]).part();
    for page in 200..300 {
        build = build.page(page * 4096, (page == 200).then_some("pc.ram"), 1);
    }
    let stream = build.end_of_section().last().end_of_section().raw(&[0]).0;
    let asked = rewrite(&stream, &[]).unwrap().asked;
    let writes: Vec<_> = asked.iter().filter(|asked| matches!(asked, Asked::Write(..))).collect();
    let (first, second) = (56 * 4096, 44 * 4096);
    assert_eq!(writes, [&Asked::Write(0, 200 * 4096, first), &Asked::Write(0, 1 << 20, second)]);
}

#[test]
fn many_in_stream_records_are_held_in_bounds() {
    let mut build = Build::with_blocks(&[("pc.ram", 4 << 20), ("rom", 4 << 20)]).part();
    build = build.page(0, Some("pc.ram"), 1).page(8192, None, 1).page(0, Some("rom"), 1);
    for page in 1..500 {
        build = build.page(page * 4096, None, 1);
    }
    let stream = build.end_of_section().last().end_of_section().raw(&[0]).0;
    let asked = rewrite(&stream, &[]).unwrap().asked;
    let written = asked.iter().position(|asked| *asked == Asked::Write(0, 8192, 4096)).unwrap();
    assert_eq!(asked[written + 1], Asked::Finished);
    assert!(matches!(&asked[written + 2], Asked::Stream(bytes) if bytes.len() > 500 * 4096));
}

#[test]
fn the_forwarder_passes_all_but_the_hooks() {
    let recorder = rewrite(&sample(), &[]).unwrap();
    let mut landed = Recorder::default();
    let mut forwarder = Forwarder::default();
    for asked in &recorder.asked {
        if let Asked::Stream(bytes) = asked {
            forwarder.push(bytes, &mut landed).unwrap();
        }
    }
    forwarder.finish().unwrap();
    let hooks = landed.asked.iter().filter(|asked| **asked == Asked::Hook).count();
    assert_eq!(hooks, 3);
    assert_eq!(landed.forwarded().len(), recorder.forwarded().len() - 3 * 8);
    let end = landed.asked.iter().position(|asked| *asked == Asked::RamEnd).unwrap();
    let Asked::Stream(rest) = &landed.asked[end + 1] else { panic!("no end of the section") };
    assert!(rest.starts_with(&0x10_u64.to_be_bytes()));
}

#[test]
fn bytes_after_a_hook_are_refused() {
    let stream = Build::with_blocks(&[("pc.ram", 4096)]).part().word(0x80).end_of_section().0;
    let error = Forwarder::default().push(&stream, &mut Recorder::default()).unwrap_err();
    assert!(error.to_string().contains("after a HOOK"), "{error}");
}

#[test]
fn what_can_not_be_carried_is_named() {
    let setup = || Build::with_blocks(&[("pc.ram", 1 << 20)]);
    let start =
        |name| Build::header().raw(b"\x01\0\0\0\x09").name(name).raw(&[0, 0, 0, 0, 0, 0, 0, 1]);
    let configuration = |name: &str| {
        Build::header()
            .raw(b"\x05")
            .name("configuration/capabilities")
            .raw(&[0, 0, 0, 1, 0, 0, 0, 1])
            .name(name)
    };
    let cases = [
        ("dirty-bitmap", start("dirty-bitmap")),
        ("0000:00:02.0/vfio", start("0000:00:02.0/vfio")),
        ("postcopy", Build::header().raw(b"\x08\0\x03\0\0")),
        ("COLO", Build::header().raw(b"\x08\0\x08\0\0")),
        ("x-ignore-shared", configuration("x-ignore-shared")),
        ("mapped-ram", configuration("mapped-ram")),
        ("version 3", Build::default().raw(b"QEVM\0\0\0\x02")),
        ("type 0x55", Build::header().raw(b"\x55")),
        ("unknown section 7", setup().raw(b"\x02\0\0\0\x07")),
        ("no footer", setup().part().word(0x10).raw(b"\x7e\0\0\0\x03")),
        ("of no RAM block", setup().part().page(0, None, 0)),
        ("unknown RAM block 'x'", setup().part().page(0, Some("x"), 0)),
        ("has 1048576 bytes", setup().part().page(1 << 20, Some("pc.ram"), 0)),
        ("filled with 0x1", setup().part().word(2).name("pc.ram").raw(&[1])),
        ("flags 0x6", setup().part().word(6)),
        ("flags 0x400", setup().part().word(0x400)),
        ("compressed page", setup().part().word(0x100).name("pc.ram").raw(&[1, 0, 0, 0])),
        ("XBZRLE", setup().part().word(0x40).name("pc.ram").raw(&[1, 0xff, 0])),
        ("QEMU's own RDMA", setup().part().word(0x80)),
        ("in the set-up", {
            let build = setup();
            Build(build.0[..build.0.len() - 13].to_vec()).page(0, Some("pc.ram"), 0)
        }),
        ("end before", setup().raw(&[0])),
        ("a machine type", Build::default().raw(b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff")),
    ];
    for (expected, build) in cases {
        match rewrite(&build.0, &[]) {
            Ok(_) => panic!("'{expected}' was carried"),
            Err(error) => assert!(error.to_string().contains(expected), "{expected}: {error}"),
        }
    }
}

#[test]
fn block_lists_that_lie_are_refused() {
    let begin = |total: u64| {
        Build::header()
            .raw(b"\x01\0\0\0\x02")
            .name("ram")
            .raw(&[0, 0, 0, 0, 0, 0, 0, 4])
            .word(total | 4)
    };
    let cases = [
        begin(4096).name("a").word(8192),
        begin(8192).name("a").word(4096).name("a").word(4096),
        begin(8192).name("a").word(0),
        begin(8192).name("a").word(100),
        begin(8192).name("").word(8192),
        begin(8192).raw(b"\x02\xff\xfe").word(8192),
        begin(0),
        Build(begin(0).0).word(0),
    ];
    for (index, build) in cases.into_iter().enumerate() {
        let error = rewrite(&build.0, &[]).err().unwrap();
        assert!(
            matches!(error, PushError::Stream(StreamError::Malformed { .. })),
            "{index}: {error}"
        );
    }
}

#[test]
fn a_stream_that_is_cut_says_where() {
    let stream = sample();
    let ram_end = stream.len() - b"\x7e\0\0\0\x02\x04 device state, opaque \x7e\0".len();
    for length in 0..ram_end {
        let error = rewrite(&stream[..length], &[]).err().unwrap();
        assert!(matches!(error, PushError::Stream(StreamError::Cut { .. })), "{length}: {error}");
    }
}

proptest! {
    #[test]
    fn any_cuts_ask_the_same(mut cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..30)) {
        let stream = sample();
        let mut cuts: Vec<usize> = cuts.drain(..).map(|cut| cut.index(stream.len())).collect();
        cuts.sort_unstable();
        prop_assert_eq!(rewrite(&stream, &cuts).unwrap().asked, rewrite(&stream, &[]).unwrap().asked);
    }

    /// Damaged streams are forwarded or refused, and all ranges stay within their blocks.
    #[test]
    fn damaged_streams_stay_in_bounds(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut stream = sample();
        for (at, byte) in damage {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        let mut recorder = Recorder { staged: vec!["rom"], ..Recorder::default() };
        let mut rewriter = Rewriter::new(Limits::default());
        let _ = rewriter.push(&stream, &mut recorder);
        let mut lengths = Vec::new();
        for asked in recorder.asked {
            match asked {
                Asked::Blocks(blocks) => lengths = blocks.into_iter().map(|(_, length)| length).collect(),
                Asked::Write(block, offset, length) | Asked::Zero(block, offset, length) => {
                    prop_assert!(offset + length <= lengths[block as usize]);
                }
                Asked::Copied(block, offset, bytes) => {
                    prop_assert!(offset + bytes.len() as u64 <= lengths[block as usize]);
                }
                _ => {}
            }
        }
        let _ = Forwarder::default().push(&stream, &mut Recorder::default());
    }
}
