//! Speed of reading QEMU's stream, and the cost of joining its pages into runs.
//!
//! Streams are in memory, and fed as in the source's stream reader. Writes are only counted, and
//! copied pages are copied, so that nothing else is measured.

mod processor_time;
#[path = "../tests/support/streams.rs"]
mod streams;

use std::{convert::Infallible, hint::black_box};

use criterion::{BenchmarkGroup, Criterion, Throughput};
use processor_time::{ProcessorTime, group};
use qemu_rdma_helper::{
    ram::{BlockRange, Transfer},
    stream::{Limits, RewriteSink, Rewriter, StreamBlock},
};
use streams::{PAGE, Stream};

/// Bytes fed at once, as in `worker/source/stream_reader.rs`.
const READ: usize = 256 << 10;

/// Pages of each synthetic stream: 256 MiB.
const PAGES: u64 = 65536;

/// Name of the guest's RAM; other blocks are ROMs.
const RAM: &str = "pc.ram";

/// The sink with the least work.
struct Counter {
    /// How the guest's RAM is transferred.
    transfer: Transfer,
    pages: u64,
    ranges: u64,
    /// Stream bytes of the next message.
    batch: Vec<u8>,
    /// Bytes of the next staged write.
    staged: Vec<u8>,
}

impl Counter {
    fn range(&mut self, range: BlockRange) {
        self.pages += range.length / PAGE;
        self.ranges += 1;
    }
}

impl RewriteSink for Counter {
    type Error = Infallible;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<Vec<Transfer>, Infallible> {
        let transfer = |block: &StreamBlock| {
            if block.name == RAM { self.transfer } else { Transfer::Inline }
        };
        Ok(blocks.iter().map(transfer).collect())
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.batch.extend_from_slice(bytes);
        Ok(())
    }

    fn hook(&mut self) -> Result<(), Infallible> {
        black_box(&self.batch);
        self.batch.clear();
        Ok(())
    }

    fn write(&mut self, range: BlockRange) -> Result<(), Infallible> {
        self.range(black_box(range));
        Ok(())
    }

    fn stage(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.staged.extend_from_slice(bytes);
        Ok(())
    }

    fn write_staged(&mut self, range: BlockRange) -> Result<(), Infallible> {
        black_box(&self.staged);
        self.staged.clear();
        self.range(black_box(range));
        Ok(())
    }

    fn zero(&mut self, range: BlockRange) -> Result<(), Infallible> {
        self.range(black_box(range));
        Ok(())
    }

    fn finished(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Read all of a stream.
fn read(stream: &[u8], transfer: Transfer) -> Counter {
    let (batch, staged) = (Vec::new(), Vec::new());
    let mut counter = Counter { transfer, pages: 0, ranges: 0, batch, staged };
    let mut rewriter = Rewriter::new(Limits::default());
    for piece in stream.chunks(READ) {
        rewriter.push(piece, &mut counter).expect("a stream");
    }
    rewriter.finish().expect("a whole stream");
    counter
}

/// Measure reading `stream`, in bytes of it and in pages.
fn measure(
    group: &mut BenchmarkGroup<'_, ProcessorTime>,
    name: &str,
    stream: &[u8],
    transfer: Transfer,
) {
    let pages = read(stream, transfer).pages;
    group.throughput(Throughput::ElementsAndBytes { elements: pages, bytes: stream.len() as u64 });
    group.bench_function(name, |bencher| bencher.iter(|| read(black_box(stream), transfer).ranges));
}

/// Appends the record of the page with this number.
type Append = fn(&mut Stream, u64);

/// Return the offset of page `number`, so that none follows its neighbour: an odd factor permutes
/// the numbers below a power of two.
fn scattered(number: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b1) % PAGES * PAGE
}

/// Build a stream of [`PAGES`] records in one section.
fn synthetic(page: Append) -> Vec<u8> {
    let mut stream = Stream::new(RAM, PAGES * PAGE);
    stream.bytes.reserve((PAGES * (PAGE + 9)) as usize);
    stream.begin_section(false);
    (0..PAGES).for_each(|number| page(&mut stream, number));
    stream.end_section();
    stream.begin_section(true);
    stream.end_section();
    stream.end();
    stream.bytes
}

fn reader(criterion: &mut Criterion<ProcessorTime>) {
    let mut group = group(criterion, "stream reader");
    for (name, stream) in streams::recorded() {
        measure(&mut group, &name, &stream, Transfer::Direct);
    }
    let plain = synthetic(|stream, number| stream.page(number * PAGE, 1));
    measure(&mut group, "plain pages", &plain, Transfer::Direct);
    measure(&mut group, "plain pages, staged", &plain, Transfer::Copied);
    // Memory bandwidth when every byte is read: the baseline of this machine.
    group.throughput(Throughput::Bytes(plain.len() as u64));
    group.bench_function("memory", |bencher| {
        bencher.iter(|| {
            let words = black_box(&plain).as_chunks().0;
            words.iter().fold(0, |sum: u64, word| sum.wrapping_add(u64::from_ne_bytes(*word)))
        });
    });
}

fn coalescing(criterion: &mut Criterion<ProcessorTime>) {
    let mut group = group(criterion, "run coalescing");
    let orders: [(&str, Append); 5] = [
        ("in sequence", |stream, number| stream.page(number * PAGE, 1)),
        ("scattered", |stream, number| stream.page(scattered(number), 1)),
        ("zero, in sequence", |stream, number| stream.zero(number * PAGE)),
        ("zero, scattered", |stream, number| stream.zero(scattered(number))),
        ("zero and not, in turn", |stream, number| match number % 2 {
            0 => stream.zero(number * PAGE),
            _ => stream.page(number * PAGE, 1),
        }),
    ];
    for (name, page) in orders {
        measure(&mut group, name, &synthetic(page), Transfer::Direct);
    }
}

fn main() {
    let mut criterion = processor_time::criterion();
    reader(&mut criterion);
    coalescing(&mut criterion);
    criterion.final_summary();
}
