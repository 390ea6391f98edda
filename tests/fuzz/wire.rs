//! Any bytes from the peer: what is decoded round-trips, and no accepted range leaves its block.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu_rdma_helper::wire::{Message, PrivateData, blocks::BlockTable};

/// Block lengths: one page, not a multiple of chunks, and beyond 32 bits.
const LENGTHS: [u64; 4] = [4096, (5 << 20) + 4096, 1 << 30, 1 << 40];

fuzz_target!(|input: &[u8]| {
    if let Ok(private) = PrivateData::decode(input) {
        assert_eq!(PrivateData::decode(&private.encode()).unwrap(), private);
    }
    let Ok(message) = Message::decode(input) else { return };
    let mut scratch = Vec::new();
    let (header, payload) = message.encode(&mut scratch);
    let again = [&header, payload].concat();
    assert_eq!(Message::decode(&again).unwrap(), message);

    let chunk = 1 << (20 + input.len() % 11);
    let table = BlockTable::new(LENGTHS, chunk).unwrap();
    let inside = |(index, range): (usize, std::ops::Range<u64>)| {
        assert!(range.start < range.end && range.end <= LENGTHS[index]);
    };
    match message {
        Message::Compress(compress) => drop(table.compress(&compress).map(inside)),
        Message::RegisterRequest(requests) | Message::UnregisterRequest(requests) => {
            for entry in requests {
                let _ = table.register(&entry).map(inside);
            }
        }
        _ => {}
    }
});
