//! Peers that break the protocol, at every step and on both sides.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    os::unix::net::{UnixListener, UnixStream},
    panic::{AssertUnwindSafe, catch_unwind},
    process::Command,
    sync::{Arc, Mutex, mpsc},
    thread,
};

use crate::support::{
    Config, Helper, Host, Pair, Qmp, eventually,
    wire::{self, Peer, frame, frame_of_length, hello, message},
};
use serde_json::{Value, json};

fn port_of(uri: &str) -> u16 {
    uri.rsplit_once(':').unwrap().1.parse().unwrap()
}

/// A peer that fails before the stream begins leaves the destination waiting for a proper source.
#[test]
fn strange_clients_are_turned_away_and_the_next_source_is_let_in() {
    let mut pair = Pair::start(&Config::default());
    let uri = pair.listen();
    let port = port_of(&uri);
    let good = pair.destination.blocks();

    let mut random = Peer::connect(port);
    let _ = random.0.write_all(&[0xa5; 100_000]);
    drop(Peer::connect(port));
    let silent = Peer::connect(port);

    // Private data: another version, no extension, too short, no buffers, too long.
    for (data, word) in [
        (&b"\0\0\0\x02\0\0\0\0QRH1\0\x01\0\x40"[..], "version 2"),
        (b"\0\0\0\x01\0\0\0\0", "not a helper"),
        (b"\0\0\0", "private data"),
        (b"\0\0\0\x01\0\0\0\0QRH1\0\x01\0\0\0\0\0\0", "no messages"),
        (&[0; 57], "too long"),
    ] {
        let mut peer = Peer::connect(port);
        peer.send(&hello(data));
        while peer.frame().is_ok() {}
        eventually(word, || pair.destination.helper.log().contains(word).then_some(()));
    }

    // Block lists: wrong count, name or length, a duplicate, malformed.
    let mut fewer = good.clone();
    fewer.pop();
    let mut renamed = good.clone();
    renamed[0].0 = "other".into();
    let mut longer = good.clone();
    longer[0].1 += 4096;
    let mut twice = good.clone();
    twice[1] = twice[0].clone();
    for (list, word) in [
        (&fewer, "RAM blocks"),
        (&renamed, "'other'"),
        (&longer, "bytes at the source"),
        (&twice, "twice"),
    ] {
        let words = Peer::listed(port, list).last_words();
        println!("{words}");
        if word == "twice" {
            assert!(words.contains(word), "{words}");
        } else {
            // A stranger learns nothing about the guest's RAM blocks.
            assert!(words.contains("its helper's log says what differs"), "{words}");
            let known = good.iter().flat_map(|(name, length)| [name.clone(), length.to_string()]);
            let told = known.filter(|it| words.contains(it.as_str())).collect::<Vec<_>>();
            assert!(told.is_empty(), "{told:?}: {words}");
        }
        eventually(word, || pair.destination.helper.log().contains(word).then_some(()));
    }
    let mut peer = Peer::connect(port);
    peer.send(&hello(wire::PRIVATE_DATA));
    peer.send(&message(wire::BLOCK_LIST, 1, b"\x01\0\0"));
    assert!(peer.last_words().contains("BLOCK_LIST"));

    // Before the stream: messages out of turn, writes with a bad key or beyond the block.
    let cases: [(&str, Vec<u8>); 6] = [
        ("FINAL_ACK", message(wire::FINAL_ACK, 1, &[])),
        ("REGISTER_FINISHED", message(wire::REGISTER_FINISHED, 1, &[])),
        ("COMPRESS", message(wire::COMPRESS, 1, &[0; 24])),
        ("READY", message(wire::READY, 1000, &[])),
        ("key 4000", frame(3, 4000, 0, &[0; 4096])),
        ("beyond", frame(3, 1, good[0].1 - 100, &[0; 4096])),
    ];
    for (word, bytes) in cases {
        let mut peer = Peer::listed(port, &good);
        assert_eq!(peer.message().unwrap().0, wire::RAM_BLOCKS_RESULT);
        peer.send(&bytes);
        drop(peer.last_words());
        eventually(word, || pair.destination.helper.log().contains(word).then_some(()));
    }
    // A peer that disconnects after the block lists agreed.
    drop(Peer::listed(port, &good));
    drop(silent);

    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["completed"]);
    pair.verify();
}

/// Strangers, missing connections and protocol errors leave the destination waiting for a source.
#[test]
fn further_connections_that_are_strangers_or_break_the_protocol() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::default();
    let start =
        |name, config: &Config| Host::with_helper(&dir, name, config, &["--connections", "2"]);
    let source = start("source", &config);
    let destination = start("destination", &config.clone().incoming());
    let mut pair = Pair { source, destination, dir };
    pair.source.qemu.await_guest();
    let uri = pair.listen();
    let port = port_of(&uri);
    let good = pair.destination.blocks();
    let logged = |pair: &Pair, word: &str| {
        eventually(word, || pair.destination.helper.log().contains(word).then_some(()));
    };

    // A connection of an unknown session.
    let mut stranger = Peer::connect(port);
    stranger.send(&hello(&wire::connections(0, 1, 42)));
    assert!(stranger.frame().is_err());
    logged(&pair, "its connection belongs to no session");

    // A promised connection that never arrives. One of another session does not count.
    let first = || {
        let mut first = Peer::connect(port);
        // It asks for 7 more and gets the destination's 1.
        first.send(&hello(&wire::connections(7, 0, 0)));
        let (_, reply) = first.frame().unwrap();
        assert_eq!(reply[40..48], *b"QRL1\0\x01\0\0");
        (first, u64::from_be_bytes(reply[48..56].try_into().unwrap()))
    };
    let (lame, session) = first();
    let mut stranger = Peer::connect(port);
    stranger.send(&hello(&wire::connections(0, 1, session ^ 1)));
    assert!(stranger.frame().is_err());
    logged(&pair, "no progress for 5 s");
    drop(lame);

    // One with a wrong number, and content not allowed on a further connection.
    let cases: [(&str, u16, Vec<u8>); 5] = [
        ("connection 2 where 1 belongs", 2, vec![]),
        ("a message where only writes belong", 1, message(wire::READY, 1, &[])),
        ("frame kind 77", 1, frame(77, 0, 0, &[])),
        ("key 4000", 1, frame(3, 4000, 0, &[0; 4096])),
        ("1 bytes landed of 0", 1, frame(5, 0, 1, &[])),
    ];
    for (word, number, bytes) in cases {
        let (mut first, session) = first();
        let mut further = Peer::connect(port);
        further.send(&hello(&wire::connections(0, number, session)));
        if further.frame().is_ok() {
            first.send(&message(wire::BLOCK_LIST, 1, &wire::block_list(&good)));
            assert_eq!(first.message().unwrap().0, wire::RAM_BLOCKS_RESULT);
            further.send(&bytes);
        }
        drop(first.last_words());
        logged(&pair, word);
    }

    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["completed"]);
    pair.verify();
}

/// The head of a stream, up to the end of the block list.
fn stream_head(blocks: &[(String, u64)]) -> Vec<u8> {
    let mut bytes =
        b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    let total: u64 = blocks.iter().map(|(_, length)| length).sum();
    bytes.extend_from_slice(&(total | 4).to_be_bytes());
    for (name, length) in blocks {
        bytes.push(name.len() as u8);
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
    }
    bytes
}

/// Break the protocol after the stream has begun.
///
/// The destination's QEMU cannot start over, as with any transport; the helper logs why, and both
/// exit.
fn breaks_within_the_stream(word: &str, then: impl FnOnce(&mut Peer, &[(String, u64)])) {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::start(&dir, "destination", &Config::default().incoming());
    let uri = format!("rdma:127.0.0.1:{}", crate::support::free_port());
    host.client.run("migrate-incoming", json!({ "uri": uri }));
    let good = host.blocks();
    let mut peer = Peer::listed(port_of(&uri), &good);
    assert_eq!(peer.message().unwrap().0, wire::RAM_BLOCKS_RESULT);
    let head = [stream_head(&good), 0x80_u64.to_be_bytes().to_vec()].concat();
    peer.send(&message(wire::QEMU_FILE, 0, &head));
    then(&mut peer, &good);
    drop(peer.last_words());
    drop(peer);
    eventually(word, || {
        let log = host.helper.log();
        log.lines()
            .any(|line| line.contains("migration failed") && line.contains(word))
            .then_some(())
    });
    eventually("QEMU's end", || host.qemu.child.try_wait().unwrap());
    eventually("the helper's end", || host.helper.child.try_wait().unwrap());
    println!(
        "{}",
        host.helper.log().lines().find(|line| line.contains("migration failed")).unwrap()
    );
}

fn compress(value: u32, block: u32, offset: u64, length: u64) -> Vec<u8> {
    let payload = [
        &value.to_be_bytes()[..],
        &block.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat();
    message(wire::COMPRESS, 1, &payload)
}

fn register(repeat: u32, block: u32, key: u64, chunks: u64) -> Vec<u8> {
    let payload =
        [&key.to_be_bytes()[..], &block.to_be_bytes(), &[0; 4], &chunks.to_be_bytes()].concat();
    message(wire::REGISTER_REQUEST, repeat, &payload)
}

#[test]
fn ranges_and_counts_out_of_range() {
    breaks_within_the_stream("COMPRESS for RAM block 999", |peer, _| {
        peer.send(&compress(0, 999, 0, 4096))
    });
    breaks_within_the_stream("COMPRESS beyond", |peer, blocks| {
        peer.send(&compress(0, 0, 0, blocks[0].1 + 1))
    });
    breaks_within_the_stream("COMPRESS beyond", |peer, _| {
        peer.send(&compress(0, 0, u64::MAX, 4096))
    });
    breaks_within_the_stream("COMPRESS with value", |peer, _| peer.send(&compress(7, 0, 0, 4096)));
    breaks_within_the_stream("REGISTER_REQUEST for RAM block", |peer, _| {
        peer.send(&register(1, 77, 0, 0))
    });
    breaks_within_the_stream("REGISTER_REQUEST beyond", |peer, _| {
        peer.send(&register(1, 0, 0, u64::MAX))
    });
    breaks_within_the_stream("repeat 4000000000", |peer, _| {
        peer.send(&register(4_000_000_000, 0, 0, 0))
    });
}

#[test]
fn broken_streams_and_frames() {
    breaks_within_the_stream("QEMU_FILE", |peer, _| {
        peer.send(&message(wire::QEMU_FILE, 0, &[0; 8]))
    });
    breaks_within_the_stream("section type", |peer, _| {
        peer.send(&message(wire::REGISTER_FINISHED, 1, &[]));
        let eos = [&0x10_u64.to_be_bytes()[..], b"\x7e\0\0\0\x02\x55"].concat();
        peer.send(&message(wire::QEMU_FILE, 0, &eos));
    });
    breaks_within_the_stream("cut", |peer, blocks| {
        peer.send(&message(wire::REGISTER_FINISHED, 1, &[]));
        let total = stream_head(blocks).len() as u64 + 8;
        peer.send(&message(wire::STREAM_END, 1, &total.to_be_bytes()));
    });
    breaks_within_the_stream("its stream has 5 bytes", |peer, _| {
        peer.send(&message(wire::REGISTER_FINISHED, 1, &[]));
        peer.send(&message(wire::STREAM_END, 1, &5_u64.to_be_bytes()));
    });
    breaks_within_the_stream("a message of", |peer, _| {
        peer.send(&frame_of_length(2, 0, 0, u64::MAX, &[]))
    });
    breaks_within_the_stream("frame kind 9", |peer, _| peer.send(&frame(9, 0, 0, &[])));
    breaks_within_the_stream("closed the connection", |peer, _| {
        peer.send(&frame_of_length(3, 1, 0, 1 << 20, &[1; 5000]));
        peer.0.shutdown(std::net::Shutdown::Write).unwrap();
    });
    breaks_within_the_stream("gave up", |peer, _| {
        peer.send(&message(wire::ERROR_TEXT, 1, b"\0the source gave up"));
    });
}

/// Play a destination with one connection. Return its URI and its thread.
fn played(play: impl FnOnce(Peer) + Send + 'static) -> (String, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("rdma:127.0.0.1:{}", listener.local_addr().unwrap().port());
    (uri, thread::spawn(move || play(Peer::accept(&listener))))
}

/// Answer the hello and the block list, the latter with `count(n)` entries for `n` blocks.
fn agree(peer: &mut Peer, count: impl FnOnce(usize) -> usize) {
    peer.frame().unwrap();
    peer.send(&hello(wire::PRIVATE_DATA));
    let (kind, list) = peer.message().unwrap();
    assert_eq!(kind, wire::BLOCK_LIST);
    let mut entries = Vec::new();
    let (mut rest, mut blocks) = (&list[1..], 0);
    while !rest.is_empty() {
        let (length, name) = (&rest[..8], usize::from(rest[8]));
        entries.push([&[0; 16][..], length, &[0, 0, 0, 1, 0, 0, 0, 0]].concat());
        rest = &rest[9 + name..];
        blocks += 1;
    }
    entries.truncate(count(blocks));
    peer.send(&message(wire::RAM_BLOCKS_RESULT, 1, &entries.concat()));
}

#[test]
fn destinations_that_break_off_at_any_step() {
    let mut pair = Pair::start(&Config::default());
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 16 << 20 }));
    type Play = Box<dyn FnOnce(Peer) + Send>;
    let early: Vec<(&str, Play)> = vec![
        ("", Box::new(drop)),
        ("", Box::new(|mut peer| drop(peer.frame()))),
        ("not a helper", Box::new(|mut peer| peer.send(&[0x5a; 200]))),
        ("version 2", Box::new(|mut peer| peer.send(&hello(b"\0\0\0\x02\0\0\0\0")))),
        ("not a helper", Box::new(|mut peer| peer.send(&hello(b"\0\0\0\x01\0\0\0\0")))),
        (
            "closed",
            Box::new(|mut peer| {
                peer.send(&hello(wire::PRIVATE_DATA));
                drop(peer.message());
            }),
        ),
        (
            "0 RAM blocks in answer",
            Box::new(|mut peer| {
                agree(&mut peer, |_| 0);
                drop(peer.message());
            }),
        ),
        (
            "RAM_BLOCKS_RESULT",
            Box::new(|mut peer| {
                peer.send(&hello(wire::PRIVATE_DATA));
                peer.send(&message(wire::QEMU_FILE, 0, b"surprise"));
                while peer.frame().is_ok() {}
            }),
        ),
        (
            "not today",
            Box::new(|mut peer| {
                peer.send(&hello(wire::PRIVATE_DATA));
                peer.send(&message(wire::ERROR_TEXT, 1, b"\x01not today"));
                while peer.frame().is_ok() {}
            }),
        ),
    ];
    for (word, play) in early {
        let (uri, player) = played(play);
        let error = pair.source.client.fails_to_migrate(&uri);
        println!("{error}");
        assert!(error.contains(word), "{word}: {error}");
        player.join().unwrap();
        assert_eq!(pair.source.qemu.status(), "running");
    }
    let late: Vec<(&str, Play)> = vec![
        (
            "closed",
            Box::new(|mut peer| {
                agree(&mut peer, |count| count);
                drop(peer.message());
            }),
        ),
        (
            "READY",
            Box::new(|mut peer| {
                agree(&mut peer, |count| count);
                peer.send(&message(wire::READY, 1000, &[]));
                while peer.frame().is_ok() {}
            }),
        ),
        (
            "confirmed an unfinished",
            Box::new(|mut peer| {
                agree(&mut peer, |count| count);
                peer.send(&message(wire::FINAL_ACK, 1, &[]));
                while peer.frame().is_ok() {}
            }),
        ),
        (
            "landed",
            Box::new(|mut peer| {
                agree(&mut peer, |count| count);
                peer.send(&frame(5, 0, u64::MAX, &[]));
                while peer.frame().is_ok() {}
            }),
        ),
        (
            "did not say why",
            Box::new(|mut peer| {
                agree(&mut peer, |count| count);
                peer.send(&message(wire::ERROR, 1, &[]));
                while peer.frame().is_ok() {}
            }),
        ),
    ];
    for (word, play) in late {
        let (uri, player) = played(play);
        let error = pair.source.client.fails_to_migrate(&uri);
        println!("{error}");
        assert!(error.contains(word), "{word}: {error}");
        player.join().unwrap();
        pair.source.helper.await_no_worker();
        assert_eq!(pair.source.qemu.status(), "running");
    }
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    pair.migrate();
    pair.verify();
}

/// A page is never overwritten by older zeroes.
///
/// The destination's CPU zeroes ranges while a device may write, so the source waits for the
/// zeroing.
#[test]
fn no_page_is_written_before_older_zeros_are_done() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::default();
    let mut source = Host::with_helper(&dir, "source", &config, &["--stall-timeout", "2"]);
    source.qemu.await_guest();
    source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    let (uri, player) = played(|mut peer| {
        agree(&mut peer, |count| count);
        let (mut zeros, mut finished, mut written) = (false, false, 0_u64);
        while let Ok((kind, payload)) = peer.frame() {
            match kind {
                // MESSAGE. READY is never sent: there are enough buffers.
                2 => {
                    let kind = u32::from_be_bytes(payload[4..8].try_into().unwrap());
                    zeros |= kind == wire::COMPRESS;
                    finished |= zeros && kind == wire::REGISTER_FINISHED;
                }
                // WRITE
                3 => {
                    assert!(!finished, "{} bytes behind zeros that may not be done", payload.len());
                    written += payload.len() as u64;
                    peer.send(&frame(5, 0, written, &[]));
                }
                // FLUSH, answered by LANDED
                _ => peer.send(&frame(5, 0, written, &[])),
            }
        }
        assert!(finished, "no section with zeros came to its end");
    });
    source.client.run("migrate", json!({ "uri": uri }));
    let state = source.await_status(&["failed", "completed"]);
    let error = state["error-desc"].as_str().unwrap();
    assert!(error.contains("no progress for 2 s"), "{error}");
    player.join().unwrap();
    source.qemu.assert_goes_on();
}

#[test]
fn a_destination_that_stops_reading() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::default();
    let mut source = Host::with_helper(&dir, "source", &config, &["--stall-timeout", "1"]);
    source.qemu.await_guest();
    source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    let (enough, waits) = mpsc::channel::<()>();
    let (uri, player) = played(move |mut peer| {
        agree(&mut peer, |count| count);
        // Wait until the test has seen the source give up.
        assert!(waits.recv().is_err());
    });
    source.client.run("migrate", json!({ "uri": uri }));
    let state = source.await_status(&["failed", "completed"]);
    let error = state["error-desc"].as_str().unwrap();
    println!("{error}");
    assert!(error.contains("no progress for 1 s"), "{error}");
    source.qemu.assert_goes_on();
    source.helper.await_no_worker();
    drop(enough);
    player.join().unwrap();
    let destination = Host::start(&dir, "destination", &config.clone().incoming());
    let mut pair = Pair { source, destination, dir };
    pair.migrate();
    pair.verify();
}

/// Text from a peer reaches the client and the log as one line of plain text.
#[test]
fn what_a_peer_says_is_plain_text() {
    let mut pair = Pair::start(&Config::default());
    let (uri, player) = played(|mut peer| {
        peer.send(&hello(wire::PRIVATE_DATA));
        let words = "\u{1}\u{1b}]0;owned\u{7}\u{1b}[2Jnot\r\n2026-01-01 ERROR today\u{202e}";
        peer.send(&message(wire::ERROR_TEXT, 1, words.as_bytes()));
        while peer.frame().is_ok() {}
    });
    let error = pair.source.client.fails_to_migrate(&uri);
    println!("{error}");
    assert_eq!(error, "?]0;owned??[2Jnot  2026-01-01 ERROR today?");
    player.join().unwrap();
    // The same from a source.
    let uri = pair.listen();
    let mut peer = Peer::connect(port_of(&uri));
    peer.send(&hello(wire::PRIVATE_DATA));
    peer.send(&message(wire::BLOCK_LIST, 1, &wire::block_list(&[("\u{1b}[2J".into(), 4096)])));
    assert!(peer.last_words().contains("not plain text"));
    for log in [pair.source.helper.log(), pair.destination.helper.log()] {
        let bad = log.chars().find(|it| it.is_control() && *it != '\n' || *it == '\u{202e}');
        assert_eq!(bad, None, "{log}");
    }
}

/// Every log message is a line of its own, however long the peer's error text is.
#[test]
fn a_long_word_of_a_peer_does_not_reach_into_the_next_message() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    let words = "A\u{f6}".repeat(4090 / 3);
    for turn in ["first", "second", "third"] {
        let uri = pair.listen();
        let good = pair.destination.blocks();
        let mut peer = Peer::listed(port_of(&uri), &good);
        assert_eq!(peer.message().unwrap().0, wire::RAM_BLOCKS_RESULT);
        peer.send(&message(wire::ERROR_TEXT, 1, &[b"\0", words.as_bytes()].concat()));
        drop(peer.last_words());
        let helper = &mut pair.destination.helper.child;
        eventually("the helper's end", || helper.try_wait().unwrap());
        let log = pair.destination.helper.log();
        assert!(log.contains(&"A\u{f6}".repeat(1000)), "{log}");
        // Every line begins with a timestamp; this is its date.
        let day = &log[..11];
        for line in log.lines() {
            assert!(line.starts_with(day) && line.matches(day).count() == 1, "{line}");
            assert!(line.len() < 4096, "{}", line.len());
        }
        // The error has ended the incoming migration.
        pair.new_destination(&config, turn);
    }
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["completed"]);
}

/// The RAM block of the played QEMU, whose address must be mapped.
static ROM: [u8; 4096] = [0; 4096];

/// Plays a QEMU that answers one command as no version does.
#[derive(Clone)]
struct OddQemu {
    version: Value,
    /// The odd command and its answer.
    odd: Arc<Mutex<(String, Value)>>,
    /// All commands received so far.
    asked: Arc<Mutex<BTreeSet<String>>>,
}

impl Default for OddQemu {
    fn default() -> Self {
        let version = json!({ "qemu": { "major": 10, "minor": 0, "micro": 0 }, "package": "" });
        Self { version, odd: Arc::default(), asked: Arc::default() }
    }
}

impl OddQemu {
    /// Serve one client.
    fn serve(&self, stream: UnixStream) {
        let mut migrates = false;
        let say = |value: Value| writeln!(&stream, "{value}\r");
        say(json!({ "QMP": { "version": self.version, "capabilities": [] } })).unwrap();
        for line in BufReader::new(&stream).lines() {
            let Ok(request) = line.map(|line| serde_json::from_str::<Value>(&line).unwrap()) else {
                return;
            };
            let command = request["execute"].as_str().unwrap();
            self.asked.lock().unwrap().insert(command.to_owned());
            let right = match command {
                "query-version" => self.version.clone(),
                _ => Self::answer(command, &request["arguments"], &mut migrates),
            };
            let (odd, answer) = self.odd.lock().unwrap().clone();
            let answer = if odd == command { answer } else { right };
            if say(json!({ "return": answer, "id": request["id"] })).is_err() {
                return;
            }
        }
    }

    fn answer(command: &str, arguments: &Value, migrates: &mut bool) -> Value {
        let connect = |path: &str| drop(UnixStream::connect(path));
        match command {
            "query-status" => json!({ "status": "running", "running": true }),
            "x-query-ramblock" => {
                let address = ROM.as_ptr() as usize;
                let row = format!("rom 4 KiB 0x0 0x1000 0x1000 {address:#x} ro\n");
                let text = format!("Block Name PSize Offset Used Total HVA RO\n{row}");
                json!({ "human-readable-text": text })
            }
            "query-migrate-capabilities" => {
                let entry = |name| json!({ "capability": name, "state": false });
                json!(["multifd", "return-path", "events"].map(entry))
            }
            "query-migrate-parameters" => json!({
                "multifd-channels": 2, "multifd-compression": "none", "zero-page-detection": "multifd",
                "max-bandwidth": 1 << 27, "mode": "normal", "tls-creds": "",
            }),
            "query-memory-devices" | "query-yank" | "qom-list" => json!([]),
            "chardev-add" => {
                connect(arguments["backend"]["data"]["addr"]["data"]["path"].as_str().unwrap());
                json!({})
            }
            "migrate" => {
                *migrates = true;
                arguments["uri"]
                    .as_str()
                    .unwrap()
                    .strip_prefix("unix:")
                    .into_iter()
                    .for_each(connect);
                json!({})
            }
            "migrate_cancel" => {
                *migrates = false;
                json!({})
            }
            "query-migrate" if *migrates => json!({ "status": "active", "ram": { "total": 4096 } }),
            "query-migrate" => json!({ "status": "cancelled" }),
            "human-monitor-command" => json!(""),
            _ => json!({}),
        }
    }
}

/// Helper and client connection survive any answer of QEMU's to the helper's own commands.
#[test]
fn an_answer_of_another_kind_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = OddQemu::default();
    let listener = UnixListener::bind(dir.path().join("qemu")).unwrap();
    let played = qemu.clone();
    thread::spawn(move || played.serve(listener.accept().unwrap().0));
    // A destination that agrees to everything.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("rdma:127.0.0.1:{}", listener.local_addr().unwrap().port());
    thread::spawn(move || {
        loop {
            let mut peer = Peer::accept(&listener);
            // The source may have given up.
            let _ = catch_unwind(AssertUnwindSafe(|| {
                agree(&mut peer, |count| count);
                while peer.frame().is_ok() {}
            }));
        }
    });
    let helper = Helper::attach(dir.path(), "odd", &dir.path().join("qemu"), &[]);
    let mut client = Qmp::connect(&helper.socket);
    let huge = json!({ "total": u64::MAX, "remaining": u64::MAX, "multifd-bytes": u64::MAX, "precopy-bytes": u64::MAX });
    let answers = [
        json!(null),
        json!(5),
        json!("x"),
        json!([5]),
        json!([{ "capability": 5, "state": 5, "type": 5, "data": 5 }]),
        json!({}),
        json!({ "status": "active", "ram": 5, "qemu": 5, "human-readable-text": 5 }),
        json!({ "status": "active", "ram": huge }),
    ];
    // At first all answers are proper, so that the helper sends all its commands.
    let mut todo = vec![(String::new(), json!(null))];
    let mut known = BTreeSet::new();
    while let Some((command, answer)) = todo.pop() {
        *qemu.odd.lock().unwrap() = (command.clone(), answer.clone());
        let line = json!({ "command-line": "info migrate" });
        for (execute, arguments) in [
            ("query-rdma-helper", json!({})),
            ("query-rdma-migrate-blockers", json!({})),
            ("query-migrate-parameters", json!({})),
            ("migrate", json!({ "uri": uri })),
            ("query-migrate", json!({})),
            ("query-migrate-capabilities", json!({})),
            ("human-monitor-command", line),
        ] {
            // Any answer will do, an error included.
            let _ = client.execute(execute, arguments);
        }
        helper.await_no_worker();
        let _ = client.execute("query-migrate", json!({}));
        assert!(!helper.log().contains("panicked"), "{command}: {answer}");
        for new in qemu.asked.lock().unwrap().iter().filter(|it| known.insert((*it).clone())) {
            todo.extend(answers.iter().map(|answer| (new.clone(), answer.clone())));
        }
    }
    println!("{known:?}");
    for command in ["query-yank", "x-query-ramblock", "query-migrate", "migrate", "query-status"] {
        assert!(known.contains(command), "{command} was never asked: {known:?}");
    }
}

/// A QEMU newer than any tested version causes a warning, because it may behave differently.
///
/// It is accepted all the same.
#[test]
fn a_newer_qemu_is_warned_of() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qemu");
    let listener = UnixListener::bind(&path).unwrap();
    let newer = json!({ "qemu": { "major": 12, "minor": 0, "micro": 1 }, "package": "" });
    let qemu = OddQemu { version: newer.clone(), ..OddQemu::default() };
    thread::spawn(move || listener.incoming().for_each(|stream| qemu.serve(stream.unwrap())));
    let warning = "QEMU 12.0.1 is newer than 11.1, the newest that was tried";
    let check = Command::new(crate::support::helper::BINARY)
        .args(["check", "--fabric", "tcp", "--qemu-qmp"])
        .arg(&path)
        .output()
        .unwrap();
    let said = String::from_utf8(check.stdout).unwrap();
    assert!(said.contains(&format!("warning  {warning}\n         hint: ")), "{said}");
    assert_eq!(check.status.code(), Some(0), "{said}");
    let helper = Helper::attach(dir.path(), "newer", &path, &[]);
    eventually("a warning", || helper.log().contains(warning).then_some(()));
    assert_eq!(Qmp::connect(&helper.socket).run("query-rdma-helper", json!({}))["qemu"], newer);
}

#[test]
fn who_does_not_greet_as_qmp_does_is_not_attached_to() {
    for greeting in [r#"{"QMP": 5}"#, r#"{"QMP": []}"#, r#"{"QMP": null}"#, "5", "[]", "x"] {
        let dir = tempfile::tempdir().unwrap();
        let (qemu, socket) = (dir.path().join("qemu"), dir.path().join("qmp"));
        let listener = UnixListener::bind(&qemu).unwrap();
        let played = thread::spawn(move || {
            let stream = listener.accept().unwrap().0;
            writeln!(&stream, "{greeting}\r").unwrap();
            // Until the helper hangs up.
            BufReader::new(&stream).lines().map_while(Result::ok).count()
        });
        let attach = Command::new(crate::support::helper::BINARY)
            .args(["attach", "--fabric", "tcp", "--qemu-qmp"])
            .arg(&qemu)
            .arg("--qmp")
            .arg(&socket)
            .output()
            .unwrap();
        let said = String::from_utf8(attach.stderr).unwrap();
        assert_eq!(attach.status.code(), Some(1), "{greeting}: {said}");
        assert!(said.contains("it sends no QMP greeting"), "{greeting}: {said}");
        assert_eq!(played.join().unwrap(), 0, "{greeting}");
    }
}
