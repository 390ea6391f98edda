//! Cost of encoding and decoding control messages.

mod processor_time;

use std::hint::black_box;

use criterion::Throughput;
use qemu_rdma_helper::wire::{Compress, Message, RamBlockEntry, Register};

/// Stream bytes in a QEMU_FILE, as batched by `worker/source/stream_reader.rs`.
const BATCH: usize = 128 << 10;

fn compress() -> Compress {
    Compress {
        value: 0.into(),
        block_idx: 1.into(),
        offset: 0x4000_1000.into(),
        length: 0x2000.into(),
    }
}

fn register() -> Register {
    Register { key: 0x4010_0000.into(), index: 2.into(), padding: 0.into(), chunks: 63.into() }
}

fn entry() -> RamBlockEntry {
    RamBlockEntry {
        remote_host_addr: 0x7f00_0020_0000.into(),
        offset: 0x4000_0000.into(),
        length: 0x10_0000.into(),
        remote_rkey: 0x1234.into(),
        padding: 0.into(),
    }
}

fn main() {
    let mut criterion = processor_time::criterion();
    let batch = vec![0x55; BATCH];
    let messages = [
        ("READY", Message::Ready(8)),
        ("COMPRESS", Message::Compress(compress())),
        ("REGISTER_REQUEST", Message::RegisterRequest(vec![register()])),
        ("RAM_BLOCKS_RESULT of 16", Message::RamBlocksResult(vec![entry(); 16])),
        ("QEMU_FILE of 128 KiB", Message::QemuFile(&batch)),
    ];
    for (name, message) in &messages {
        let mut scratch = Vec::new();
        let (header, payload) = message.encode(&mut scratch);
        let bytes = [&header, payload].concat();
        let size = Throughput::ElementsAndBytes { elements: 1, bytes: bytes.len() as u64 };
        // One scratch buffer per message, as in `worker/link.rs`.
        let mut group = processor_time::group(&mut criterion, "encode");
        group.throughput(size.clone()).bench_function(*name, |bencher| {
            bencher.iter(|| {
                let mut scratch = Vec::new();
                let (header, payload) = black_box(message).encode(&mut scratch);
                black_box((header, payload.len()))
            });
        });
        group.finish();
        let mut group = processor_time::group(&mut criterion, "decode");
        group.throughput(size).bench_function(*name, |bencher| {
            bencher.iter(|| Message::decode(black_box(&bytes)).expect("a message"));
        });
        group.finish();
    }
    criterion.final_summary();
}
