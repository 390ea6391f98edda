//! Workers that hang or are killed by any signal in any phase, and signals to the relay: the guest
//! keeps running, its monitor stays connected, and the next migration succeeds.
//!
//! A few signals are tried by default, and all of them by `scripts/test --full`.

use std::{fs, net::TcpListener, thread};

use crate::support::{
    Config, Guest, Memory, Qmp, eventually, free_port,
    helper::{signal_if_alive, signal_process},
    wrapped::{Wrapped, WrappedPair, has_ended},
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Signals that terminate a process by default (signal(7)), without SIGPIPE, which is expected.
const DEADLY: [Signal; 22] = [
    Signal::KILL,
    Signal::SEGV,
    Signal::TERM,
    Signal::ABORT,
    Signal::ALARM,
    Signal::BUS,
    Signal::FPE,
    Signal::HUP,
    Signal::ILL,
    Signal::INT,
    Signal::IO,
    Signal::POWER,
    Signal::PROF,
    Signal::QUIT,
    Signal::STKFLT,
    Signal::SYS,
    Signal::TRAP,
    Signal::USR1,
    Signal::USR2,
    Signal::VTALARM,
    Signal::XCPU,
    Signal::XFSZ,
];

/// Kill a worker, repeatedly: Rust's runtime ignores a first SIGSEGV or SIGBUS without a fault.
#[track_caller]
fn end(worker: u32, signal: Signal) {
    signal_process(worker, signal);
    if signal != HANG {
        eventually("the worker's end", || {
            let _ = rustix::process::kill_process(pid(worker), signal);
            has_ended(worker).then_some(())
        });
    }
}

fn pid(pid: u32) -> rustix::process::Pid {
    rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

fn name(signal: Signal) -> String {
    format!("{signal:?}").trim_matches('"').replace("Signal::", "SIG")
}

/// Makes a process hang.
const HANG: Signal = Signal::STOP;

fn full() -> bool {
    std::env::var_os("QEMU_RDMA_HELPER_TEST_FULL").is_some()
}

/// The signals to try in each phase.
fn signals() -> Vec<Signal> {
    let count = if full() { DEADLY.len() } else { 3 };
    let hang = full().then_some(HANG);
    DEADLY.into_iter().take(count).chain(hang).collect()
}

/// A guest that dirties RAM faster than it is sent.
fn config() -> Config {
    let guest = Guest::Dirty { fill: 48, hot: 32, spin: 100 };
    Config { memory: Memory::Private, mib: 64, guest, ..Config::default() }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    FirstPass,
    LaterPass,
    PreSwitchover,
}

/// Start a migration and wait for this phase.
#[track_caller]
fn enter(pair: &mut WrappedPair, phase: Phase) {
    let pause = phase == Phase::PreSwitchover;
    pair.source.client.capability("pause-before-switchover", pause);
    if phase == Phase::LaterPass {
        // So that no pass is the last one.
        pair.source.client.run("migrate-set-parameters", json!({ "downtime-limit": 1 }));
    }
    pair.begin(match phase {
        Phase::FirstPass => 16,
        Phase::LaterPass => 100,
        Phase::PreSwitchover => 4096,
    });
    let source = &mut pair.source;
    match phase {
        Phase::FirstPass => eventually("RAM to move", || {
            let state = source.client.run("query-migrate", json!({}));
            (state["ram"]["transferred"].as_u64().unwrap_or(0) > 1 << 20).then_some(())
        }),
        Phase::LaterPass => eventually("another pass", || {
            let state = source.client.run("query-migrate", json!({}));
            (state["ram"]["dirty-sync-count"].as_u64().unwrap_or(0) >= 2).then_some(())
        }),
        Phase::PreSwitchover => drop(source.await_status(&["pre-switchover"])),
    }
}

/// Assert that the migration failed, the guest runs and the monitor answers.
#[track_caller]
fn failed(source: &mut Wrapped) -> Value {
    let end = source.await_status(&["failed", "completed", "cancelled"]);
    assert_eq!(end["status"], "failed", "{end}");
    source.runs_on();
    eventually("the worker's end", || source.workers().is_empty().then_some(()));
    source.client.run("migrate-set-parameters", json!({ "downtime-limit": 300 }));
    end
}

/// Kill a worker by each signal, and print a table row each.
#[track_caller]
fn kill_worker(phase: Phase, side: fn(&WrappedPair) -> &Wrapped) {
    let mut pair = WrappedPair::start(&config());
    let (source, first) = (pair.source.relay, std::ptr::eq(&pair.source, side(&pair)));
    for signal in signals() {
        enter(&mut pair, phase);
        end(side(&pair).await_worker(), signal);
        let end = failed(&mut pair.source);
        let side = if first { "source" } else { "destination" };
        let why = end["error-desc"].as_str().unwrap_or_default();
        println!(
            "| {side} | {phase:?} | {} | guest runs, monitor connected | {why} |",
            name(signal)
        );
        assert!(!why.is_empty());
        assert!(!has_ended(source));
        pair.new_destination();
    }
    pair.source.client.capability("pause-before-switchover", false);
    pair.migrate();
    println!("| | | | the next migration succeeds | |");
}

#[test]
fn the_sources_worker_in_the_first_pass() {
    kill_worker(Phase::FirstPass, |pair| &pair.source);
}

#[test]
fn the_sources_worker_in_a_later_pass() {
    kill_worker(Phase::LaterPass, |pair| &pair.source);
}

#[test]
fn the_sources_worker_at_pre_switchover() {
    kill_worker(Phase::PreSwitchover, |pair| &pair.source);
}

#[test]
fn the_destinations_worker_in_the_first_pass() {
    kill_worker(Phase::FirstPass, |pair| &pair.destination);
}

#[test]
fn the_destinations_worker_in_a_later_pass() {
    kill_worker(Phase::LaterPass, |pair| &pair.destination);
}

#[test]
fn the_destinations_worker_at_pre_switchover() {
    kill_worker(Phase::PreSwitchover, |pair| &pair.destination);
}

/// A worker that hangs at pre-switchover does not keep the guest stopped for long.
#[test]
fn a_worker_that_hangs_is_noticed() {
    for side in [
        |pair: &WrappedPair| pair.source.await_worker(),
        |pair: &WrappedPair| pair.destination.await_worker(),
    ] {
        let mut pair = WrappedPair::start(&config());
        enter(&mut pair, Phase::PreSwitchover);
        signal_process(side(&pair), HANG);
        let end = failed(&mut pair.source);
        println!("{}", end["error-desc"]);
        pair.new_destination();
        pair.source.client.capability("pause-before-switchover", false);
        pair.migrate();
    }
}

/// Wait for a child of any thread of process `of`.
fn new_child(of: u32) -> u32 {
    loop {
        let tasks = fs::read_dir(format!("/proc/{of}/task")).into_iter().flatten().flatten();
        let mut children =
            tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        if let Some(child) = children.find_map(|list| list.split_whitespace().next()?.parse().ok())
        {
            return child;
        }
    }
}

/// A worker that is stopped at once blocks no monitor, although usually its program has not
/// started, for which the kernel makes its parent wait.
#[test]
fn a_worker_that_is_stopped_at_once_holds_no_monitor() {
    let mut pair = WrappedPair::start(&config());
    let relay = pair.destination.relay;
    let stopped = thread::spawn(move || {
        let worker = new_child(relay);
        signal_process(worker, HANG);
        worker
    });
    let mut other = Qmp::connect(&pair.destination.qemu.spare_socket());
    let uri = format!("rdma:127.0.0.1:{}", free_port());
    let ask = json!({ "execute": "migrate-incoming", "arguments": { "uri": uri } });
    pair.destination.client.send(format!("{ask}\n").as_bytes());
    let worker = stopped.join().unwrap();
    other.run("query-status", json!({}));
    let reply = pair.destination.client.reply_line();
    println!("{reply}");
    assert!(reply.contains("The helper's worker did not"), "{reply}");
    signal_if_alive(worker, Signal::CONT);
    eventually("the worker's end", || has_ended(worker).then_some(()));
    pair.migrate();
}

/// A hung worker that takes no orders blocks no monitor, although clients' commands cause some.
#[test]
fn a_worker_that_takes_no_orders_holds_no_monitor() {
    let mut pair = WrappedPair::start(&config());
    pair.begin(8);
    pair.source.await_status(&["active"]);
    signal_process(pair.source.await_worker(), HANG);
    let mut other = Qmp::connect(&pair.source.qemu.spare_socket());
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..400 {
                other.run("stop", json!({}));
                other.run("cont", json!({}));
            }
        });
        for count in 0..400 {
            let channels = json!({ "multifd-channels": 2 + count % 100 });
            pair.source.client.run("migrate-set-parameters", channels);
        }
    });
    let end = failed(&mut pair.source);
    println!("{}", end["error-desc"]);
    pair.new_destination();
    pair.migrate();
}

/// A worker that reads nothing at the end is noticed, although QEMU answers nobody then: it writes
/// its last bytes with the lock held that its monitor needs.
#[test]
fn a_worker_that_takes_nothing_at_the_end_is_noticed() {
    let mut pair = WrappedPair::start(&config());
    for signal in [HANG, Signal::KILL] {
        enter(&mut pair, Phase::PreSwitchover);
        let worker = pair.source.await_worker();
        signal_process(worker, HANG);
        let client = &mut pair.source.client;
        let go_on =
            json!({ "execute": "migrate-continue", "arguments": { "state": "pre-switchover" } });
        client.send(format!("{go_on}\n").as_bytes());
        client.await_event("MIGRATION", |data| data["status"] == "device");
        if signal != HANG {
            end(worker, signal);
        }
        // The reply may need the lock too.
        let is_reply = |message: &Value| message.get("return").is_some();
        if !client.events.iter().any(is_reply) {
            assert!(is_reply(&serde_json::from_str(&client.reply_line()).unwrap()));
        }
        client.events.clear();
        let end = failed(&mut pair.source);
        println!("{}", end["error-desc"]);
        pair.new_destination();
    }
    pair.source.client.capability("pause-before-switchover", false);
    pair.migrate();
}

/// A worker that dies before QEMU knows of the migration fails only that migration.
#[test]
fn the_sources_worker_while_it_connects() {
    let mut pair = WrappedPair::start(&config());
    // Accepts the connection and stays silent.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("rdma:{}", silent.local_addr().unwrap());
    for signal in signals() {
        let socket = pair.source.qemu.spare_socket();
        let asked = thread::spawn({
            let uri = uri.clone();
            move || Qmp::connect(&socket).fails_to_migrate(&uri)
        });
        let (connection, _) = silent.accept().unwrap();
        let worker = pair.source.await_worker();
        // A hung worker is waited for no longer than a silent destination.
        end(worker, signal);
        let why = asked.join().unwrap();
        println!("| source | connecting | {} | failed | {why} |", name(signal));
        drop(connection);
        pair.source.runs_on();
        eventually("the worker's end", || pair.source.workers().is_empty().then_some(()));
    }
    pair.migrate();
}

/// A worker that dies before a source connects fails the incoming migration and ends that QEMU.
#[test]
fn the_destinations_worker_while_it_listens() {
    let mut pair = WrappedPair::start(&config());
    for signal in signals().into_iter().filter(|signal| *signal != HANG) {
        let uri = format!("rdma:127.0.0.1:{}", crate::support::free_port());
        pair.destination.client.run("migrate-incoming", json!({ "uri": uri }));
        end(pair.destination.await_worker(), signal);
        let (qemu, relay) = (&mut pair.destination.qemu, pair.destination.relay);
        eventually("the destination's end", || qemu.child.try_wait().unwrap());
        eventually("its relay's end", || has_ended(relay).then_some(()));
        let why = pair.source.client.fails_to_migrate(&uri);
        println!("| destination | listening | {} | it ends | source: {why} |", name(signal));
        pair.source.runs_on();
        pair.new_destination();
    }
    pair.migrate();
}

/// When memory runs out, the kernel kills a migration's worker rather than a guest.
#[test]
fn the_worker_goes_first_where_memory_ends() {
    let mut pair = WrappedPair::start(&config());
    enter(&mut pair, Phase::FirstPass);
    let score = |pid: u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        text.trim().parse::<i32>().unwrap()
    };
    for host in [&pair.source, &pair.destination] {
        assert_eq!(score(host.await_worker()), 1000);
        assert!(score(host.qemu.pid()) < 1000 && score(host.relay) < 1000);
    }
}

/// The relay ends only with QEMU: signals other than SIGKILL, SIGSTOP and faults have no effect.
#[test]
fn signals_to_the_relay_have_no_effect() {
    let mut pair = WrappedPair::start(&config());
    enter(&mut pair, Phase::FirstPass);
    let faults = [
        Signal::KILL,
        Signal::STOP,
        Signal::ABORT,
        Signal::BUS,
        Signal::FPE,
        Signal::ILL,
        Signal::SEGV,
        Signal::SYS,
        Signal::TRAP,
    ];
    let harmless =
        [Signal::PIPE, Signal::CONT, Signal::WINCH, Signal::URG, Signal::CHILD, Signal::TSTP];
    for relay in [pair.source.relay, pair.destination.relay] {
        for signal in DEADLY.into_iter().chain(harmless) {
            if !faults.contains(&signal) {
                signal_process(relay, signal);
            }
        }
    }
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 4096_u64 << 20 }));
    let end = pair.source.await_status(&["completed", "failed"]);
    assert_eq!(end["status"], "completed", "{end}");
    for relay in [pair.source.relay, pair.destination.relay] {
        assert!(!has_ended(relay));
    }
}
