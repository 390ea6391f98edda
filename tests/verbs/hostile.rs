//! Peers on an RDMA device that break version 1 of the protocol, in both roles. Messages are
//! literal bytes; only their transport is the project's. Run by `scripts/lab/test`.

use std::{sync::Arc, thread, time::Duration};

use crate::support::{Config, Guest, Host, Pair, eventually, free_port};
use qemu_rdma_helper::{
    address::Address,
    fabric::{
        Connection, Fabric as _, RecvHalf, RemoteKey, SendHalf,
        verbs::{Timeouts, Verbs},
    },
    memory::Region,
};
use serde_json::json;

const ERROR: u32 = 1;
const READY: u32 = 2;
const QEMU_FILE: u32 = 3;
const RAM_BLOCKS_REQUEST: u32 = 4;
const RAM_BLOCKS_RESULT: u32 = 5;
const COMPRESS: u32 = 6;
const REGISTER_REQUEST: u32 = 7;
const REGISTER_RESULT: u32 = 8;
const REGISTER_FINISHED: u32 = 9;

/// Version 1, no flags.
const STOCK: &[u8] = b"\0\0\0\x01\0\0\0\0";
const PIN_ALL: &[u8] = b"\0\0\0\x01\0\0\0\x01";

fn verbs() -> Verbs {
    Verbs { timeouts: Timeouts { peer: Duration::from_secs(5) }, window: 16, lanes: 0 }
}

fn message(kind: u32, repeat: u32, payload: &[u8]) -> Vec<u8> {
    message_of_length(kind, repeat, payload.len() as u32, payload)
}

fn message_of_length(kind: u32, repeat: u32, length: u32, payload: &[u8]) -> Vec<u8> {
    let words = [length, kind, repeat, 0];
    let header = words.iter().flat_map(|word| word.to_be_bytes());
    header.chain(payload.iter().copied()).collect()
}

/// A peer played by the test.
struct Peer {
    poster: Arc<dyn SendHalf>,
    receiver: Box<dyn RecvHalf>,
}

impl Peer {
    fn new(connection: Box<dyn Connection>) -> Self {
        let (poster, receiver) = connection.split();
        Self { poster, receiver }
    }

    fn connect(port: u16, private_data: &[u8]) -> Self {
        let address = Address { host: crate::support::address(), port };
        let connected = verbs().connect(&address, private_data, Duration::from_secs(10));
        Self::new(connected.unwrap().1)
    }

    fn send(&self, bytes: &[u8]) {
        // The helper may have closed the connection already.
        let _ = self.poster.send(bytes, &[]);
    }

    /// Receive a message. Return its type and payload.
    fn next(&mut self) -> Option<(u32, Vec<u8>)> {
        let mut bytes = Vec::new();
        self.receiver.receive(&mut bytes).ok()?;
        let kind = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        Some((kind, bytes[16..].to_vec()))
    }

    /// Receive until the end. Return whether there was an ERROR.
    fn last_words(mut self) -> bool {
        let mut error = false;
        while let Some((kind, _)) = self.next() {
            error |= kind == ERROR;
        }
        error
    }
}

fn config() -> Config {
    let guest = Guest::Dirty { fill: 8, hot: 1, spin: 3000 };
    Config { mib: 32, guest, ..Config::default() }
}

fn u64s(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// Return the stream up to the first HOOK, with these blocks.
fn head(blocks: &[(String, u64)]) -> Vec<u8> {
    let mut bytes =
        b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    let total: u64 = blocks.iter().map(|(_, length)| length).sum();
    bytes.extend_from_slice(&(total | 4).to_be_bytes());
    for (name, length) in blocks {
        bytes.push(name.len() as u8);
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
    }
    bytes.extend_from_slice(&0x80_u64.to_be_bytes());
    bytes
}

/// Play a source that breaks the protocol, and assert that the helper logs why and QEMU exits.
fn source(word: &str, private_data: &[u8], play: impl FnOnce(&mut Peer, &[(String, u64)])) {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::start(&dir, "destination", &config().incoming());
    let uri = format!("rdma:{}:{}", crate::support::address(), free_port());
    host.client.run("migrate-incoming", json!({ "uri": uri }));
    let info = host.client.run("query-rdma-helper", json!({}));
    let blocks: Vec<_> = info["blocks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| (it["name"].as_str().unwrap().to_owned(), it["length"].as_u64().unwrap()))
        .collect();
    let mut peer = Peer::connect(uri.rsplit(':').next().unwrap().parse().unwrap(), private_data);
    assert_eq!(peer.next().unwrap().0, READY);
    play(&mut peer, &blocks);
    peer.last_words();
    let failed = eventually(word, || {
        let log = host.helper.log();
        let line = log.lines().find(|line| line.contains("migration failed"))?.to_owned();
        Some(line)
    });
    println!("{failed}");
    assert!(failed.contains(word), "{word}: {failed}");
    eventually("QEMU's end", || host.qemu.child.try_wait().unwrap());
}

/// Return a play that sends the head of a stream, and then `bytes`.
fn after_the_head(bytes: Vec<u8>) -> impl FnOnce(&mut Peer, &[(String, u64)]) {
    move |peer, blocks| {
        peer.send(&message(QEMU_FILE, 0, &head(blocks)));
        assert_eq!(peer.next().unwrap().0, READY);
        peer.send(&bytes);
    }
}

#[test]
fn sources_that_break_the_protocol() {
    if !crate::support::lab() {
        return;
    }
    let compress = |value: u32, block: u32, offset: u64, length: u64| {
        let head = [value.to_be_bytes(), block.to_be_bytes()].concat();
        message(COMPRESS, 1, &[head, u64s(&[offset, length])].concat())
    };
    let register = |repeat: u32, block: u32, key: u64, chunks: u64| {
        let index = [block.to_be_bytes(), [0; 4]].concat();
        message(REGISTER_REQUEST, repeat, &[u64s(&[key]), index, u64s(&[chunks])].concat())
    };
    let cases = [
        ("COMPRESS for RAM block 999", compress(0, 999, 0, 4096)),
        ("COMPRESS beyond", compress(0, 0, 0, u64::MAX)),
        ("COMPRESS beyond", compress(0, 0, u64::MAX, 4096)),
        ("COMPRESS with value", compress(9, 0, 0, 4096)),
        ("REGISTER_REQUEST for RAM block", register(1, 16384, 0, 0)),
        ("REGISTER_REQUEST beyond", register(1, 0, u64::MAX, 0)),
        ("REGISTER_REQUEST beyond", register(1, 0, 0, u64::MAX)),
        ("repeat 4096 with 1", register(4096, 0, 0, 0)),
        ("where another message belongs", message(REGISTER_RESULT, 1, &[0; 16])),
        ("where another message belongs", message(QEMU_FILE, 0, &[0; 8])),
        ("type 77", message(77, 1, &[])),
        ("length 524288", message_of_length(QEMU_FILE, 0, 524_288, &[0; 8])),
        ("did not say why", message(ERROR, 1, &[])),
    ];
    for (word, bytes) in cases {
        source(word, STOCK, after_the_head(bytes));
    }
    source("not a QEMU migration stream", STOCK, |peer, _| {
        peer.send(&message(QEMU_FILE, 0, &[0x55; 1000]));
    });
    source("RAM blocks", STOCK, |peer, blocks| {
        peer.send(&message(QEMU_FILE, 0, &head(&blocks[1..])));
    });
    source("bytes at the source", STOCK, |peer, blocks| {
        let mut longer = blocks.to_vec();
        longer[0].1 += 1 << 20;
        peer.send(&message(QEMU_FILE, 0, &head(&longer)));
    });
}

/// Silent peers, stock or helpers, do not keep the source out, even if more than may be pending.
/// Over tcp: `tests/failure/strangers.rs`.
#[test]
fn silent_peers_do_not_keep_the_source_out() {
    if !crate::support::lab() {
        return;
    }
    for private_data in [b"\0\0\0\x01\0\0\0\0QRH1\0\x02\0\x10\0\0\0\0".as_slice(), STOCK] {
        let mut pair = Pair::start(&config());
        let uri = pair.listen();
        let port = uri.rsplit(':').next().unwrap().parse().unwrap();
        let peers: Vec<_> = (0..6).map(|_| Peer::connect(port, private_data)).collect();
        pair.source.client.run("migrate", json!({ "uri": uri }));
        pair.source.await_status(&["completed"]);
        pair.verify();
        drop(peers);
    }
}

/// The device refuses writes outside the registered memory or with a wrong key.
#[test]
fn writes_outside_what_was_let_in() {
    if !crate::support::lab() {
        return;
    }
    for case in 0..3 {
        source("closed the connection", PIN_ALL, move |peer, blocks| {
            peer.send(&message(QEMU_FILE, 0, &head(blocks)));
            assert_eq!(peer.next().unwrap().0, READY);
            peer.send(&message(RAM_BLOCKS_REQUEST, 1, &[]));
            let (kind, entries) = peer.next().unwrap();
            assert_eq!(kind, RAM_BLOCKS_RESULT);
            let number = |at: usize| u64::from_be_bytes(entries[at..at + 8].try_into().unwrap());
            let (address, length) = (number(0), number(16));
            let rkey = u32::from_be_bytes(entries[24..28].try_into().unwrap());
            let to = match case {
                0 => RemoteKey { address: address + length, rkey },
                1 => RemoteKey { address: address.wrapping_sub(4096), rkey },
                _ => RemoteKey { address, rkey: rkey ^ 0xff },
            };
            let from = Arc::new(Region::stand_in("from", 4096).unwrap());
            peer.poster.pin(&from, 0..4096).unwrap();
            let _ = peer.poster.write(&from, 0, 4096, to);
            assert!(peer.poster.drain().is_err(), "the device let it in");
        });
    }
}

/// After the last RAM section, when the guest may run, keys are no longer valid.
#[test]
fn writes_after_the_last_ram_section() {
    if !crate::support::lab() {
        return;
    }
    // QEMU may exit before the connection ends.
    source("migration failed", PIN_ALL, |peer, blocks| {
        let said = |peer: &mut Peer, bytes: &[u8]| {
            peer.send(bytes);
            peer.next().unwrap()
        };
        said(peer, &message(QEMU_FILE, 0, &head(blocks)));
        let (kind, entries) = said(peer, &message(RAM_BLOCKS_REQUEST, 1, &[]));
        assert_eq!(kind, RAM_BLOCKS_RESULT);
        assert_eq!(peer.next().unwrap().0, READY);
        let address = u64::from_be_bytes(entries[..8].try_into().unwrap());
        let rkey = u32::from_be_bytes(entries[24..28].try_into().unwrap());
        let (to, from) = (RemoteKey { address, rkey }, Region::stand_in("from", 4096).unwrap());
        let from = Arc::new(from);
        peer.poster.pin(&from, 0..4096).unwrap();
        let write =
            |peer: &Peer| peer.poster.write(&from, 0, 4096, to).and_then(|()| peer.poster.drain());
        write(peer).unwrap();
        said(peer, &message(REGISTER_FINISHED, 1, &[]));
        // The set-up section ends; the last one begins, up to its HOOK.
        let footer = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
        let last = [footer, &b"\x03\0\0\0\x02\0\0\0\0\0\0\0\x80"[..]].concat();
        said(peer, &message(QEMU_FILE, 0, &last));
        write(peer).unwrap();
        said(peer, &message(REGISTER_FINISHED, 1, &[]));
        said(peer, &message(QEMU_FILE, 0, footer));
        assert!(write(peer).is_err(), "the device let it in");
    });
}

/// A destination that breaks the protocol fails the migration, and the guest keeps running.
#[test]
fn destinations_that_break_the_protocol() {
    if !crate::support::lab() {
        return;
    }
    type Play = Box<dyn FnOnce(&mut Peer) + Send>;
    let entries = |make: fn(usize, u64) -> [u64; 4]| -> Play {
        Box::new(move |peer| {
            let blocks = requested(peer);
            let entries =
                blocks.into_iter().enumerate().flat_map(|(i, length)| u64s(&make(i, length)));
            peer.send(&message(RAM_BLOCKS_RESULT, 1, &entries.collect::<Vec<_>>()));
        })
    };
    let cases: Vec<(&str, Play)> = vec![
        ("closed", Box::new(|_| {})),
        ("READY for 0", Box::new(|peer| peer.send(&message(READY, 0, &[])))),
        ("READY for 2", Box::new(|peer| peer.send(&message(READY, 2, &[])))),
        ("without READY", Box::new(|peer| peer.send(&message(COMPRESS, 1, &[0; 24])))),
        ("without READY", Box::new(|peer| peer.send(&message(QEMU_FILE, 0, b"surprise")))),
        ("did not say why", Box::new(|peer| peer.send(&message(ERROR, 1, &[])))),
        ("not a multiple of 32", {
            Box::new(|peer| {
                requested(peer);
                peer.send(&message(RAM_BLOCKS_RESULT, 1, &[0; 33]));
            })
        }),
        ("and the destination 1", {
            Box::new(|peer| {
                requested(peer);
                peer.send(&message(RAM_BLOCKS_RESULT, 1, &[0; 32]));
            })
        }),
        ("no RAM_BLOCKS_RESULT", {
            Box::new(|peer| {
                requested(peer);
                peer.send(&message(REGISTER_RESULT, 1, &[0; 16]));
            })
        }),
        ("at the destination", entries(|_, length| [4096, 0, length + 4096, 0])),
        ("' at 0xffff", entries(|_, length| [4096, u64::MAX, length, 0])),
        ("named a key", entries(|_, length| [4096, 0, length, 0x77 << 32])),
        // A key that permits nothing.
        ("does not let its memory be written", entries(|_, length| [4096, 0, length, 0x77 << 32])),
    ];
    let mut pair = Pair::start(&config());
    for (word, play) in cases {
        let mut listener =
            verbs().listen(&Address { host: crate::support::address(), port: 0 }).unwrap();
        let uri = format!("rdma:{}:{}", crate::support::address(), listener.address().port);
        let player = thread::spawn(move || {
            let connection = listener.accept().unwrap().accept(STOCK).unwrap();
            let mut peer = Peer::new(connection);
            play(&mut peer);
            if word != "closed" {
                // Answer everything with READY.
                loop {
                    peer.send(&message(READY, 1, &[]));
                    if peer.next().is_none() {
                        return;
                    }
                }
            }
        });
        pair.source.client.capability("rdma-pin-all", word.starts_with("does not let"));
        let error = pair.source.client.fails_to_migrate(&uri);
        println!("{error}");
        assert!(error.contains(word), "{word}: {error}");
        player.join().unwrap();
        pair.source.helper.await_no_worker();
        assert_eq!(pair.source.qemu.status(), "running");
    }
    pair.source.client.capability("rdma-pin-all", false);
    pair.migrate();
    pair.verify();
}

/// Receive up to RAM_BLOCKS_REQUEST. Return the lengths of the blocks in the stream.
fn requested(peer: &mut Peer) -> Vec<u64> {
    let mut stream = Vec::new();
    loop {
        peer.send(&message(READY, 1, &[]));
        match peer.next().unwrap() {
            (QEMU_FILE, bytes) => stream.extend_from_slice(&bytes),
            (RAM_BLOCKS_REQUEST, _) => break,
            (kind, _) => panic!("message of type {kind}"),
        }
    }
    let ram = stream.windows(4).position(|it| it == b"\x03ram").unwrap() + 12;
    let number = |at: usize| u64::from_be_bytes(stream[at..at + 8].try_into().unwrap());
    let (mut left, mut at) = (number(ram) & !0xfff, ram + 8);
    let mut lengths = Vec::new();
    while left > 0 {
        at += 1 + usize::from(stream[at]);
        lengths.push(number(at));
        left -= number(at);
        at += 8;
    }
    lengths
}
