//! Clients that connect to a waiting destination and go no further: none of them keeps the source
//! out, be they from one address or many, the source's own included.

use std::{
    collections::VecDeque,
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::support::{
    Config, Pair, eventually,
    wire::{self, Peer, frame, hello, message},
};
use serde_json::json;

/// Number of clients: more than a destination allows to be pending.
const MANY: u8 = 40;

/// Logged by a destination for a client that has timed out.
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

    /// Assert that the source is served before any other client has timed out.
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
    let guest = crate::support::Guest::Dirty { fill: 16, hot: 1, spin: 3000 };
    Config { guest, ..Config::default() }
}

/// Connect the clients from one address, that of the source, then each from an address of its own.
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

/// A client that writes has the guest's memory to itself, but only for a moment.
#[test]
fn clients_that_write_a_page_and_fall_silent_do_not() {
    for address in [1, 2] {
        let siege = Siege::start();
        let mut peer = Peer::connect_from(address, siege.port);
        peer.list(&siege.blocks);
        assert_eq!(peer.message().unwrap().0, wire::RAM_BLOCKS_RESULT);
        peer.send(&frame(3, 1, 0, &[0x5a; 4096]));
        // FLUSH is answered when the page has landed.
        peer.send(&frame(4, 0, 0, &[]));
        assert_eq!(peer.frame().unwrap().0, 5);
        siege.source_is_served();
    }
}

/// Clients that send hello and block list byte by byte, each in time, do not keep the source out.
#[test]
fn slow_clients_do_not() {
    let siege = Siege::start();
    let done = Arc::new(AtomicBool::new(false));
    let bytes =
        [hello(wire::PRIVATE_DATA), message(wire::BLOCK_LIST, 1, &wire::block_list(&siege.blocks))]
            .concat();
    let slow = |number: u8| {
        let mut peer = Peer::connect_from(1 + number % 3, siege.port);
        // The first half have already sent their hello.
        let start = if number < MANY / 2 { hello(wire::PRIVATE_DATA).len() } else { 0 };
        peer.send(&bytes[..start]);
        let (bytes, done) = (bytes[start..].to_vec(), done.clone());
        thread::spawn(move || {
            for byte in bytes {
                if done.load(Ordering::SeqCst) || peer.0.write_all(&[byte]).is_err() {
                    return;
                }
                // The pace of a slow client, not a wait for an event.
                thread::sleep(Duration::from_secs(1));
            }
        })
    };
    let clients: Vec<_> = (0..MANY).map(slow).collect();
    siege.source_is_served();
    done.store(true, Ordering::SeqCst);
    clients.into_iter().for_each(|client| client.join().unwrap());
}

/// One host that connects again and again, before its last connection got anywhere.
struct Storm {
    count: Arc<AtomicU32>,
    over: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Storm {
    /// Connections per second.
    const RATE: u32 = 300;

    /// Start it from 127.0.0.2, not the source's address.
    ///
    /// Clients send `bytes` and stay while they may.
    fn rise(port: u16, bytes: Vec<u8>) -> Self {
        let (count, over) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
        let (counting, until) = (count.clone(), over.clone());
        let thread = thread::spawn(move || {
            let begun = Instant::now();
            let mut peers = VecDeque::new();
            while !until.load(Ordering::SeqCst) {
                // Nothing listens any more after the migration.
                let Ok(mut peer) = Peer::try_connect_from(2, port) else { break };
                // The destination may have disconnected it already.
                let _ = peer.0.write_all(&bytes);
                peers.push_back(peer);
                peers.drain(..peers.len().saturating_sub(400));
                let made = counting.fetch_add(1, Ordering::SeqCst) + 1;
                let due = begun + Duration::from_secs(1) * made / Self::RATE;
                // The pace of the storm, not a wait for an event.
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        });
        Self { count, over, thread }
    }

    /// Wait until `more` clients have connected.
    fn await_more(&self, more: u32) {
        let wanted = self.count.load(Ordering::SeqCst) + more;
        eventually("more of the storm", || {
            (self.count.load(Ordering::SeqCst) >= wanted).then_some(())
        });
    }

    fn calm_down(self) {
        self.over.store(true, Ordering::SeqCst);
        self.thread.join().unwrap();
    }
}

/// Time within which a source must be served during a storm.
const AT_ONCE: Duration = Duration::from_secs(5);

#[track_caller]
fn a_storm_delays_no_source(bytes: impl Fn(&Siege) -> Vec<u8>) {
    let siege = Siege::start();
    let storm = Storm::rise(siege.port, bytes(&siege));
    storm.await_more(4 * Storm::RATE);
    let begun = Instant::now();
    siege.source_is_served();
    storm.calm_down();
    let took = begun.elapsed();
    println!("served in {took:?}");
    assert!(took < AT_ONCE, "it took {took:?}");
}

#[test]
fn a_storm_of_idle_clients_does_not() {
    a_storm_delays_no_source(|_| Vec::new());
}

#[test]
fn a_storm_of_clients_that_greet_does_not() {
    a_storm_delays_no_source(|_| hello(wire::PRIVATE_DATA));
}

#[test]
fn a_storm_of_clients_that_list_the_blocks_does_not() {
    a_storm_delays_no_source(|siege| {
        let list = message(wire::BLOCK_LIST, 1, &wire::block_list(&siege.blocks));
        [hello(wire::PRIVATE_DATA), list].concat()
    });
}

/// Once the source has begun its stream, not even a client that agreed before writes to memory.
#[test]
fn who_has_agreed_writes_nothing_once_the_source_has_begun() {
    let mut siege = Siege::start();
    let mut peer = Peer::connect_from(2, siege.port);
    peer.list(&siege.blocks);
    assert_eq!(peer.message().unwrap().0, wire::RAM_BLOCKS_RESULT);
    let slow = json!({ "max-bandwidth": 8 << 20 });
    siege.pair.source.client.run("migrate-set-parameters", slow);
    siege.pair.source.client.run("migrate", json!({ "uri": siege.uri }));
    // Its connection is closed; until then its writes go nowhere.
    eventually("the stranger's end", || {
        let write = frame(3, 1, 0, &[0x5a; 4096]);
        peer.0.write_all(&write).is_err().then_some(())
    });
    // So is that of a later client.
    let mut late = Peer::connect_from(3, siege.port);
    late.send(&hello(wire::PRIVATE_DATA));
    assert_eq!(late.last_words(), "");
    assert_eq!(siege.pair.source.status(), "active");
    let fast = json!({ "max-bandwidth": 1_u64 << 32 });
    siege.pair.source.client.run("migrate-set-parameters", fast);
    siege.pair.source.await_status(&["completed"]);
    siege.pair.verify();
}
