//! Device state that arrives before RAM.

use super::*;

const FOOTER: &[u8] = b"\x7e\0\0\0\x26";

fn setup() -> Build {
    Build::with_blocks(&[("pc.ram", 4096), ("0000:00:02.0/vmem0", 4096)])
}

/// virtio-mem's section without footer: `blocks` blocks of 2 MiB, claimed to have `block` bytes.
fn virtio_mem(blocks: u64, block: u64) -> Build {
    let bitmap = vec![0xa5; blocks.div_ceil(64) as usize * 8];
    Build::default()
        .raw(b"\x04\0\0\0\x26")
        .name("0000:00:02.0/virtio-mem-device-early")
        .raw(&[0, 0, 0, 0, 0, 0, 0, 1])
        .word(1 << 32)
        .word(blocks * (2 << 20))
        .word(block)
        .raw(&[0, 0, 0, 0])
        .word(4 << 20)
        .raw(&bitmap)
}

#[test]
fn what_virtio_mem_has_plugged_goes_on() {
    for blocks in [1, 64, 65, 5000] {
        let section = virtio_mem(blocks, 2 << 20).raw(FOOTER).0;
        let stream = setup().raw(&section).part().page(0, Some("pc.ram"), 1).end_of_section();
        let stream = stream.last().end_of_section().raw(&[0]).0;
        let whole = rewrite(&stream, &[]).unwrap();
        assert!(whole.asked.contains(&Asked::Write(0, 0, 4096)));
        assert!(whole.forwarded().windows(section.len()).any(|bytes| bytes == section));
        for cut in 0..stream.len() {
            assert_eq!(rewrite(&stream, &[cut]).unwrap().asked, whole.asked, "cut at {cut}");
        }
    }
}

#[test]
fn nonsense_of_virtio_mem_is_refused() {
    for (section, word) in [
        (virtio_mem(1, 0), "blocks of 0"),
        (virtio_mem(1, 4097), "blocks of 4097"),
        (virtio_mem(3, 4 << 20), "virtio-mem of 6291456 bytes"),
        (virtio_mem(1, 2 << 20).raw(b"\x7e\0\0\0\x27"), "no footer"),
        (virtio_mem(1, 2 << 20).raw(b"\x7d\0\0\0\x26"), "no footer"),
    ] {
        let error = rewrite(&setup().raw(&section.0).0, &[]).err().unwrap();
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
}
