//! Truncated streams of real QEMUs: none is taken for a complete one.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixListener,
};

use crate::support::{
    Config, Guest, Host, Qemu, VERSIONS,
    wire::{self, Peer, message},
};
use serde_json::json;
use tempfile::TempDir;

/// Bytes per message: large enough that the destination has a buffer for each message of a stream.
const MESSAGE: usize = 100_000;

/// The stream that a QEMU with this configuration writes to `unix:`.
fn stream_of(dir: &TempDir, config: &Config) -> Vec<u8> {
    let mut qemu = Qemu::start(dir.path(), "source", config);
    qemu.await_guest();
    qemu.qmp.run("stop", json!({}));
    let path = dir.path().join("stream");
    let listener = UnixListener::bind(&path).unwrap();
    qemu.qmp.run("migrate", json!({ "uri": format!("unix:{}", path.display()) }));
    let mut stream = Vec::new();
    listener.accept().unwrap().0.read_to_end(&mut stream).unwrap();
    stream
}

/// Offset of a stream's end mark: QEMU_VM_EOF, followed only by the description of the devices
/// (QEMU_VM_VMDESCRIPTION, u32 length, JSON; `migration/savevm.c`).
fn end_mark(stream: &[u8]) -> usize {
    let is_end = |at: &usize| {
        let (mark, rest) = stream[*at..].split_at(6);
        mark[..2] == [0, 6]
            && rest.len() == u32::from_be_bytes(mark[2..].try_into().unwrap()) as usize
    };
    (0..stream.len() - 6).rev().find(is_end).expect("no description of the devices")
}

/// Send `stream` to a destination as a complete one. Return its last message: type and payload.
fn send(destination: &mut Host, stream: &[u8]) -> (u32, Vec<u8>) {
    let port = crate::support::free_port();
    let uri = json!({ "uri": format!("rdma:127.0.0.1:{port}") });
    destination.client.run("migrate-incoming", uri);
    let mut peer = Peer::listed(port, &destination.blocks());
    assert_eq!(peer.message().unwrap().0, wire::RAM_BLOCKS_RESULT);
    for piece in stream.chunks(MESSAGE) {
        peer.send(&message(wire::QEMU_FILE, 0, piece));
    }
    // The destination may close the connection first.
    let end = message(wire::STREAM_END, 1, &(stream.len() as u64).to_be_bytes());
    let _ = peer.0.write_all(&end);
    loop {
        let (kind, payload) = peer.message().expect("no last words");
        if [wire::ERROR_TEXT, wire::FINAL_ACK].contains(&kind) {
            return (kind, payload);
        }
    }
}

/// A stream cut after RAM never completes a migration.
///
/// Helpers do not know where device state ends: the destination's QEMU decides whether it has
/// loaded everything.
#[test]
fn a_cut_after_ram_is_noticed_by_each_version() {
    for version in VERSIONS {
        let guest = Guest::Dirty { fill: 4, hot: 1, spin: 3000 };
        let config = Config { version, mib: 32, guest, ..Config::default() };
        let dir = tempfile::tempdir().unwrap();
        let stream = stream_of(&dir, &config);
        let end = end_mark(&stream);
        let start = |name| Host::start(&dir, name, &config.clone().incoming());
        for (name, length) in [("device", end - 10_000), ("footer", end - 3), ("mark", end)] {
            let mut destination = start(name);
            let (kind, words) = send(&mut destination, &stream[..length]);
            let text = String::from_utf8_lossy(&words[1..]).into_owned();
            println!("QEMU {version}, {length} of {} bytes: {text}", stream.len());
            assert_eq!((kind, words[0]), (wire::ERROR_TEXT, 1), "{text}");
        }
        for (name, length) in [("marked", end + 1), ("whole", stream.len())] {
            let mut destination = start(name);
            let (kind, _) = send(&mut destination, &stream[..length]);
            println!("QEMU {version}, {length} of {} bytes: loaded", stream.len());
            assert_eq!(kind, wire::FINAL_ACK);
            destination.client.run("cont", json!({}));
            destination.qemu.assert_goes_on();
        }
    }
}
