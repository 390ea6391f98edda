//! Any bytes as packets of a multifd channel: what is accepted has valid pages.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu_rdma_helper::{
    ram::PAGE,
    stream::multifd::{self, INIT_SIZE, PACKET_SIZE, PAGES_MAX, Packet},
};

const CHUNK: u64 = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let Some((init, mut rest)) = input.split_first_chunk::<INIT_SIZE>() else { return };
    let _ = multifd::init(init);
    while let Some((bytes, behind)) = rest.split_first_chunk::<PACKET_SIZE>() {
        rest = behind;
        let Ok(packet) = Packet::read(bytes) else { continue };
        assert!(packet.normal().len() + packet.zero().len() <= PAGES_MAX);
        assert_eq!(packet.content(), packet.normal().len() * PAGE as usize);
        let offsets = packet.normal().map(|offset| (offset & !(PAGE - 1)) >> 1);
        for (offset, length) in multifd::ranges(offsets.map(|it| it & !(PAGE - 1)), CHUNK) {
            assert!(length > 0 && offset / CHUNK == (offset + length - 1) / CHUNK);
        }
    }
});
