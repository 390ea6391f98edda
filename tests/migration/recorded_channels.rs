//! Multifd streams and channels recorded from real QEMUs (scripts/record-streams).
//!
//! The pages found in them must be those that QEMU counted while it sent them (`info migrate`).

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    convert::Infallible,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

use lzma_rust2::XzReader;
use qemu_rdma_helper::{
    ram::{BlockRange, PAGE, Transfer},
    stream::{
        ChannelPage, ForwardSink, Forwarder, Limits, RewriteSink, Rewriter, StreamBlock,
        multifd::{self, INIT_SIZE, PACKET_SIZE, Packet},
    },
};

/// A page: zero or not, its block's name, its offset.
type Page = (bool, String, u64);

/// A page of a channel, with its content.
type Sent = (String, u64, Option<Box<[u8; PAGE as usize]>>);

struct Recording {
    name: String,
    main: Vec<u8>,
    channels: [Vec<u8>; 2],
    said: String,
}

fn unpacked(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    XzReader::new(fs::File::open(path).unwrap(), false).read_to_end(&mut bytes).unwrap();
    bytes
}

impl Recording {
    fn all() -> Vec<Self> {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/channels");
        let names = ["7.2-pc", "10.0-pc-7.2", "10.0-pc-8.2", "10.0-pc-9.2", "10.0-q35", "11.1-q35"];
        let read = |name: &str| {
            let part = |part: &str| unpacked(&dir.join(format!("{name}.{part}.xz")));
            Self {
                name: name.to_owned(),
                main: part("main"),
                channels: [part("0"), part("1")],
                said: fs::read_to_string(dir.join(format!("{name}.txt"))).unwrap(),
            }
        };
        names.map(read).into()
    }

    /// Return a count of `info migrate`.
    fn count(&self, what: &str) -> usize {
        crate::streams::count(&self.said, what).unwrap() as usize
    }

    /// Whether the stream has words for sync points (not up to 8.0), and packets have zero pages
    /// (up to 8.2 the stream has them).
    fn form(&self) -> (bool, bool) {
        let machine = self.name.rsplit('-').next().unwrap();
        (self.name != "7.2-pc" && machine != "7.2", ["9.2", "q35"].contains(&machine))
    }
}

/// Split the pages of a channel at its sync points.
fn rounds(bytes: &[u8]) -> Vec<Vec<Sent>> {
    let (init, mut rest) = bytes.split_first_chunk::<INIT_SIZE>().unwrap();
    assert!(multifd::init(init).unwrap() < 2);
    let mut rounds = vec![Vec::new()];
    while let Some((bytes, behind)) = rest.split_first_chunk::<PACKET_SIZE>() {
        let packet = Packet::read(bytes).unwrap();
        let (content, behind) = behind.split_at(packet.content());
        let pages = content.as_chunks::<{ PAGE as usize }>().0;
        let sent = rounds.last_mut().unwrap();
        let block = packet.block.to_owned();
        let normal = packet.normal().zip(pages);
        sent.extend(normal.map(|(at, page)| (block.clone(), at, Some(Box::new(*page)))));
        sent.extend(packet.zero().map(|at| (block.clone(), at, None)));
        if packet.sync {
            rounds.push(Vec::new());
        }
        rest = behind;
    }
    assert!(rest.is_empty(), "a packet is cut");
    assert!(rounds.pop().unwrap().is_empty(), "pages behind the last synchronisation");
    rounds
}

/// The source's worker: RAM is direct, everything else is inline.
#[derive(Default)]
struct Source {
    channels: Vec<VecDeque<Vec<Sent>>>,
    blocks: Vec<StreamBlock>,
    messages: Vec<Vec<u8>>,
    /// Pages of each round, from the stream and the channels.
    rounds: Vec<Vec<Page>>,
    zero_in_stream: usize,
}

impl RewriteSink for Source {
    type Error = Infallible;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<Vec<Transfer>, Infallible> {
        self.blocks = blocks.to_vec();
        let transfer = |block: &StreamBlock| match &*block.name {
            "pc.ram" => Transfer::Direct,
            _ => Transfer::Inline,
        };
        Ok(blocks.iter().map(transfer).collect())
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.messages.last_mut().unwrap().extend_from_slice(bytes);
        Ok(())
    }

    fn hook(&mut self) -> Result<(), Infallible> {
        self.messages.push(Vec::new());
        Ok(())
    }

    fn write(&mut self, range: BlockRange) -> Result<(), Infallible> {
        panic!("{range:?} is in the stream");
    }

    fn stage(&mut self, _: &[u8]) -> Result<(), Infallible> {
        panic!("nothing is staged");
    }

    fn write_staged(&mut self, range: BlockRange) -> Result<(), Infallible> {
        panic!("{range:?} is staged");
    }

    fn zero(&mut self, range: BlockRange) -> Result<(), Infallible> {
        let name = &self.blocks[range.block as usize].name;
        let round = self.rounds.last_mut().unwrap();
        for at in (range.offset..range.offset + range.length).step_by(PAGE as usize) {
            round.push((true, name.clone(), at));
            self.zero_in_stream += 1;
        }
        Ok(())
    }

    fn finished(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn synchronise(&mut self) -> Result<Vec<ChannelPage>, Infallible> {
        let mut others = Vec::new();
        for channel in &mut self.channels {
            for (name, offset, content) in channel.pop_front().expect("channels have come here") {
                let round = self.rounds.last_mut().unwrap();
                round.push((content.is_none(), name.clone(), offset));
                let block = self.blocks.iter().position(|block| block.name == name).unwrap() as u32;
                if name != "pc.ram" {
                    others.push(ChannelPage { block, offset, content });
                }
            }
        }
        self.rounds.push(Vec::new());
        Ok(others)
    }
}

/// What the destination's QEMU receives.
#[derive(Default)]
struct Destination(Vec<u8>);

impl ForwardSink for Destination {
    type Error = Infallible;

    fn ram_blocks(&mut self, _: &[StreamBlock]) -> Result<(), Infallible> {
        Ok(())
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn hook(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn ram_end(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Collects the records that are left in a stream.
#[derive(Default)]
struct Left {
    blocks: Vec<StreamBlock>,
    pages: Vec<(bool, String, u64)>,
}

impl Left {
    fn push(&mut self, zero: bool, range: BlockRange) {
        let name = self.blocks[range.block as usize].name.clone();
        for at in (range.offset..range.offset + range.length).step_by(PAGE as usize) {
            self.pages.push((zero, name.clone(), at));
        }
    }
}

impl RewriteSink for Left {
    type Error = Infallible;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<Vec<Transfer>, Infallible> {
        self.blocks = blocks.to_vec();
        Ok(vec![Transfer::Direct; blocks.len()])
    }

    fn stream(&mut self, _: &[u8]) -> Result<(), Infallible> {
        Ok(())
    }

    fn hook(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn write(&mut self, range: BlockRange) -> Result<(), Infallible> {
        self.push(false, range);
        Ok(())
    }

    fn stage(&mut self, _: &[u8]) -> Result<(), Infallible> {
        Ok(())
    }

    fn write_staged(&mut self, _: BlockRange) -> Result<(), Infallible> {
        Ok(())
    }

    fn zero(&mut self, range: BlockRange) -> Result<(), Infallible> {
        self.push(true, range);
        Ok(())
    }

    fn finished(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

fn rewritten(recording: &Recording, pieces: usize) -> Source {
    let channels = recording.channels.iter().map(|channel| rounds(channel).into()).collect();
    let (messages, rounds) = (vec![Vec::new()], vec![Vec::new()]);
    let mut source = Source { channels, messages, rounds, ..Source::default() };
    let mut rewriter = Rewriter::beside_channels(Limits::default());
    for piece in recording.main.chunks(pieces) {
        rewriter.push(piece, &mut source).unwrap();
    }
    rewriter.finish().unwrap();
    source
}

#[test]
fn every_page_that_qemu_counted_is_found() {
    for recording in Recording::all() {
        let source = rewritten(&recording, 4096);
        let name = &recording.name;
        assert!(source.channels.iter().all(VecDeque::is_empty), "{name}: a meeting is missed");
        // Zero pages of inline blocks stay in the stream, if zero pages are there at all.
        let mut forwarder = Forwarder::default();
        let mut destination = Destination::default();
        for message in &source.messages {
            forwarder.push(message, &mut destination).unwrap();
        }
        forwarder.finish().unwrap();
        let mut left = Left::default();
        Rewriter::new(Limits::default()).push(&destination.0, &mut left).unwrap();

        let others = source.rounds.iter().flatten().filter(|page| page.1 != "pc.ram");
        let others: Vec<_> = others.cloned().collect();
        for page in &others {
            assert!(left.pages.contains(page), "{name}: {page:?} is lost");
        }
        let ram = source.rounds.iter().flatten().filter(|page| page.1 == "pc.ram");
        let found: Vec<_> = ram.cloned().chain(left.pages).collect();
        let zero = found.iter().filter(|page| page.0).count();
        let counted = (recording.count("normal"), recording.count("duplicate"));
        assert_eq!((found.len() - zero, zero), counted, "{name}");
        // The first pass sends every page.
        let distinct: BTreeSet<_> = found.iter().map(|page| (&page.1, page.2)).collect();
        let lengths: u64 = source.blocks.iter().map(|block| block.length).sum();
        assert_eq!(distinct.len() as u64, lengths / PAGE, "{name}");
        assert!(recording.count("dirty sync count") >= 3, "{name}: no later pass");
    }
}

#[test]
fn no_page_comes_twice_between_two_meetings() {
    for recording in Recording::all() {
        for round in rewritten(&recording, 4096).rounds {
            let mut times: BTreeMap<_, u32> = BTreeMap::new();
            for (_, name, at) in round {
                *times.entry((name, at)).or_default() += 1;
            }
            assert!(times.values().all(|times| *times == 1), "{}", recording.name);
        }
    }
}

#[test]
fn each_form_is_there() {
    for recording in Recording::all() {
        let (flushes, zero_in_packets) = recording.form();
        let source = rewritten(&recording, 4096);
        assert_eq!(source.zero_in_stream == 0, zero_in_packets, "{}", recording.name);
        // MULTIFD_FLUSH, and the EOS that ends the set-up section.
        let word = [0x200_u64.to_be_bytes(), 0x10_u64.to_be_bytes()].concat();
        let found = recording.main.windows(16).filter(|bytes| *bytes == word).count();
        assert_eq!(found >= 1, flushes, "{}: {found} words", recording.name);
    }
}

#[test]
fn no_cut_changes_anything() {
    for recording in Recording::all() {
        let whole = rewritten(&recording, usize::MAX);
        for pieces in [1, 7, 4096, 4097] {
            let cut = rewritten(&recording, pieces);
            assert_eq!(cut.rounds, whole.rounds, "{} by {pieces}", recording.name);
            assert_eq!(cut.messages.concat(), whole.messages.concat(), "{}", recording.name);
        }
    }
}
