//! Clients that connect to a waiting destination and go no further: none of them keeps the source out,
//! from one address or from many, the source's own among them.

mod support;

use std::{
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use serde_json::json;
use support::{
    Config, Pair, eventually,
    wire::{self, Peer, frame, hello, message},
};

/// How many there are: more than a destination lets be pending.
const MANY: u8 = 40;

/// What a destination says of a client whose time is over.
const GIVEN_UP: &str = "no progress";

struct Siege {
    pair: Pair,
    uri: String,
    port: u16,
    blocks: Vec<(String, u64)>,
}

impl Siege {
    fn start() -> Self {
        let mut pair = Pair::start(&Config { mib: 64, ..small() });
        let uri = pair.listen();
        let port = uri.rsplit_once(':').unwrap().1.parse().unwrap();
        let blocks = pair.destination.blocks();
        Self { pair, uri, port, blocks }
    }

    /// The source comes and is served, before anybody else was given up.
    #[track_caller]
    fn source_is_served(mut self) {
        self.pair.source.client.run("migrate", json!({ "uri": self.uri }));
        let log = self.pair.destination.helper.log();
        assert!(!log.contains(GIVEN_UP), "it had to wait: {log}");
        self.pair.source.await_status(&["completed"]);
        self.pair.verify();
    }
}

fn small() -> Config {
    let guest = support::Guest::Dirty { fill: 16, hot: 1, spin: 3000 };
    Config { guest, ..Config::default() }
}

/// Let them come from one address, that of the source, and from as many as there are.
fn from_one_and_from_many(play: impl Fn(Peer, &Siege) -> Peer) {
    type Address = fn(u8) -> u8;
    let addresses: [(&str, Address); 2] = [("one", |_| 1), ("many", |number| 2 + number)];
    for (what, address) in addresses {
        println!("from {what}");
        let siege = Siege::start();
        let peers: Vec<_> = (0..MANY)
            .map(|number| play(Peer::connect_from(address(number), siege.port), &siege))
            .collect();
        siege.source_is_served();
        drop(peers);
    }
}

#[test]
fn idle_clients_do_not_keep_the_source_out() {
    from_one_and_from_many(|peer, _| peer);
}

#[test]
fn clients_that_greet_and_fall_silent_do_not() {
    from_one_and_from_many(|mut peer, _| {
        peer.send(&hello(wire::PRIVATE_DATA));
        peer
    });
}

#[test]
fn clients_that_promise_further_connections_do_not() {
    from_one_and_from_many(|mut peer, _| {
        peer.send(&hello(&wire::connections(7, 0, 0)));
        peer
    });
}

#[test]
fn clients_that_list_the_blocks_and_fall_silent_do_not() {
    from_one_and_from_many(|mut peer, siege| {
        peer.list(&siege.blocks);
        peer
    });
}

/// One that also writes has the guest's memory for itself, for a moment.
#[test]
fn clients_that_write_a_page_and_fall_silent_do_not() {
    for address in [1, 2] {
        let siege = Siege::start();
        let mut peer = Peer::connect_from(address, siege.port);
        peer.list(&siege.blocks);
        assert_eq!(peer.message().unwrap().0, wire::RAM_BLOCKS_RESULT);
        peer.send(&frame(3, 1, 0, &[0x5a; 4096]));
        // FLUSH is answered when it has landed.
        peer.send(&frame(4, 0, 0, &[]));
        assert_eq!(peer.frame().unwrap().0, 5);
        siege.source_is_served();
    }
}

/// Greeting and block list byte by byte, each of them in time.
#[test]
fn slow_clients_do_not() {
    let siege = Siege::start();
    let done = Arc::new(AtomicBool::new(false));
    let bytes =
        [hello(wire::PRIVATE_DATA), message(wire::BLOCK_LIST, 1, &wire::block_list(&siege.blocks))]
            .concat();
    let slow = |number: u8| {
        let mut peer = Peer::connect_from(1 + number % 3, siege.port);
        // The first half of them have greeted.
        let start = if number < MANY / 2 { hello(wire::PRIVATE_DATA).len() } else { 0 };
        peer.send(&bytes[..start]);
        let (bytes, done) = (bytes[start..].to_vec(), done.clone());
        thread::spawn(move || {
            for byte in bytes {
                if done.load(Ordering::SeqCst) || peer.0.write_all(&[byte]).is_err() {
                    return;
                }
                // A slow client; nobody waits for an event here.
                thread::sleep(Duration::from_secs(1));
            }
        })
    };
    let clients: Vec<_> = (0..MANY).map(slow).collect();
    siege.source_is_served();
    done.store(true, Ordering::SeqCst);
    clients.into_iter().for_each(|client| client.join().unwrap());
}

/// Who agreed before the source began is let into memory no more once it has.
#[test]
fn who_has_agreed_writes_nothing_once_the_source_has_begun() {
    let mut siege = Siege::start();
    let mut peer = Peer::connect_from(2, siege.port);
    peer.list(&siege.blocks);
    assert_eq!(peer.message().unwrap().0, wire::RAM_BLOCKS_RESULT);
    let slow = json!({ "max-bandwidth": 8 << 20 });
    siege.pair.source.client.run("migrate-set-parameters", slow);
    siege.pair.source.client.run("migrate", json!({ "uri": siege.uri }));
    // It is told by the connection's end; till then what it writes goes nowhere.
    eventually("the stranger's end", || {
        let write = frame(3, 1, 0, &[0x5a; 4096]);
        peer.0.write_all(&write).is_err().then_some(())
    });
    // So is who comes later.
    let mut late = Peer::connect_from(3, siege.port);
    late.send(&hello(wire::PRIVATE_DATA));
    assert_eq!(late.last_words(), "");
    assert_eq!(siege.pair.source.status(), "active");
    let fast = json!({ "max-bandwidth": 1_u64 << 32 });
    siege.pair.source.client.run("migrate-set-parameters", fast);
    siege.pair.source.await_status(&["completed"]);
    siege.pair.verify();
}
