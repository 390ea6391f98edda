//! Migrations over real verbs: between helpers, and with a stock QEMU at either end.
//!
//! They need an RDMA device: `scripts/lab/test` runs them in a machine that has one. Elsewhere they
//! are skipped.

use std::{fs::File, os::unix::fs::FileExt as _};

use crate::support::{
    Config, Guest, Memory, Pair, Qemu, eventually, free_port, helper::signal_process,
};
use rustix::{
    fs::{FallocateFlags, fallocate},
    process::Signal,
};
use serde_json::json;

/// With and without `rdma-pin-all` and `return-path`.
const CASES: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

/// Small because the machine is slow, but busy enough.
fn config() -> Config {
    let guest = Guest::Dirty { fill: 40, hot: 4, spin: 3000 };
    Config { mib: 96, guest, ..Config::default() }
}

fn pair(pin_all: bool, return_path: bool) -> Pair {
    let mut pair = Pair::start(&config());
    for host in [&mut pair.source, &mut pair.destination] {
        host.client.capability("rdma-pin-all", pin_all);
        host.client.capability("return-path", return_path);
    }
    pair
}

#[test]
fn from_helper_to_helper() {
    if !crate::support::lab() {
        return;
    }
    for (pin_all, return_path) in CASES {
        println!("pin-all {pin_all}, return-path {return_path}");
        let mut pair = pair(pin_all, return_path);
        pair.migrate();
        pair.verify();
    }
}

#[test]
fn from_helper_to_stock_qemu() {
    if !crate::support::lab() {
        return;
    }
    for (pin_all, return_path) in CASES {
        println!("pin-all {pin_all}, return-path {return_path}");
        let mut pair = pair(pin_all, return_path);
        let uri = format!("rdma:{}:{}", crate::support::address(), free_port());
        pair.destination.qemu.qmp.run("migrate-incoming", json!({ "uri": uri }));
        pair.source.client.run("migrate", json!({ "uri": uri }));
        let end = pair.source.await_status(&["completed", "failed", "cancelled"]);
        assert_eq!(end["status"], "completed", "{end}");
        pair.verify();
        pair.source.helper.await_no_worker();
    }
}

#[test]
fn from_stock_qemu_to_helper() {
    if !crate::support::lab() {
        return;
    }
    for (pin_all, return_path) in CASES {
        println!("pin-all {pin_all}, return-path {return_path}");
        let mut pair = pair(pin_all, return_path);
        let uri = pair.listen();
        pair.source.qemu.qmp.run("migrate", json!({ "uri": uri }));
        pair.destination.await_status(&["completed"]);
        pair.source.await_status(&["completed"]);
        pair.verify();
        pair.destination.helper.await_no_worker();
    }
}

/// Migrate, with QEMU's own RDMA at the end that `stock` names, if any.
fn migrate_beside_stock(pair: &mut Pair, stock: Option<&str>) {
    let uri = format!("rdma:{}:{}", crate::support::address(), free_port());
    let arguments = json!({ "uri": uri });
    match stock {
        Some("destination") => pair.destination.qemu.qmp.run("migrate-incoming", arguments.clone()),
        _ => pair.destination.client.run("migrate-incoming", arguments.clone()),
    };
    match stock {
        Some("source") => pair.source.qemu.qmp.run("migrate", arguments),
        _ => pair.source.client.run("migrate", arguments),
    };
    let end = pair.source.await_status(&["completed", "failed", "cancelled"]);
    assert_eq!(end["status"], "completed", "{end}");
    pair.destination.await_status(&["completed"]);
    pair.verify();
}

/// QEMU 7.2 migrates too, without a return path: over RDMA it has one only with postcopy.
#[test]
fn with_qemu_7_2_at_both_ends() {
    if !crate::support::lab() {
        return;
    }
    let config = Config { version: "7.2", ..config() };
    for stock in [None, Some("source"), Some("destination")] {
        println!("stock: {stock:?}");
        let mut pair = Pair::start(&config);
        migrate_beside_stock(&mut pair, stock);
    }
}

/// Since 11.1 stock QEMU registers chunks whose size is not on the wire, so the helper uses its own
/// QEMU's setting. Two helpers may differ.
#[test]
fn with_chunks_of_each_size_of_qemu_11_1() {
    if !crate::support::lab() {
        return;
    }
    for (stock, sizes) in [
        (Some("destination"), [1, 1]),
        (Some("destination"), [32, 32]),
        (Some("destination"), [1024, 1024]),
        (Some("source"), [1, 1]),
        (Some("source"), [32, 32]),
        (Some("source"), [1024, 1024]),
        (None, [1, 1024]),
        (None, [32, 1]),
    ] {
        println!("stock: {stock:?}, chunks of {sizes:?} MiB");
        let mut pair = Pair::start(&Config { version: "11.1", ..config() });
        for (host, size) in [&mut pair.source, &mut pair.destination].into_iter().zip(sizes) {
            let size = json!({ "x-rdma-chunk-size": size << 20 });
            host.client.run("migrate-set-parameters", size);
        }
        migrate_beside_stock(&mut pair, stock);
    }
}

/// A chunk is registered as a whole, so one that exceeds `--pin-limit` is refused with a hint.
#[test]
fn a_chunk_beyond_the_pin_limit_is_refused_with_a_hint() {
    if !crate::support::lab() {
        return;
    }
    let config = Config { version: "11.1", ..config() };
    let dir = tempfile::tempdir().unwrap();
    let options = ["--fabric", "verbs", "--peer-timeout", "20", "--pin-limit", "16m"];
    let mut source = crate::support::Host::with_helper(&dir, "source", &config, &options);
    source.client.run("migrate-set-parameters", json!({ "x-rdma-chunk-size": 32 << 20 }));
    let mut destination = Qemu::start(dir.path(), "destination", &config.incoming());
    let uri = format!("rdma:{}:{}", crate::support::address(), free_port());
    destination.qmp.run("migrate-incoming", json!({ "uri": uri }));
    let said = match source.client.execute("migrate", json!({ "uri": uri })) {
        Err(error) => error["desc"].clone(),
        Ok(_) => source.await_status(&["failed", "completed"])["error-desc"].clone(),
    };
    let said = said.as_str().unwrap();
    assert!(
        said.contains("x-rdma-chunk-size") && said.contains("allows 16 MiB; raise it"),
        "{said}"
    );
    eventually("the guest to run", || (source.qemu.status() == "running").then_some(()));
}

/// Registering allocates holes, but only around what is written, so most of them stay.
#[test]
fn most_of_the_memory_that_was_never_touched_stays_a_hole() {
    if !crate::support::lab() {
        return;
    }
    let mut pair = Pair::start(&Config { mib: 512, ..config() });
    pair.migrate();
    let allocated = crate::support::memory::allocated(&mut pair.destination.qemu, "ram0");
    pair.verify();
    assert!(allocated < 100 << 20, "{} MiB are allocated at the destination", allocated >> 20);
}

/// Memory that the guest does not use, discarded and given back as by a balloon.
struct Taken {
    file: File,
    at: u64,
}

impl Taken {
    const SIZE: usize = 1 << 20;

    fn from(qemu: &mut Qemu) -> Self {
        let (file, offset) = crate::support::memory::file_of(qemu, "ram0");
        let at = offset + (88 << 20);
        file.write_all_at(&[b'a'; Self::SIZE], at).unwrap();
        Self { file, at }
    }

    /// Replace the pages by others, with other content.
    fn give_back(&self) {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, punch, self.at, Self::SIZE as u64).unwrap();
        self.file.write_all_at(&[b'b'; Self::SIZE], self.at).unwrap();
    }
}

/// Pages that a balloon discards may come back as others, so they are copied instead of registered.
/// QEMU's first pass is far from the pages that are replaced here.
#[test]
fn with_a_balloon() {
    if !crate::support::lab() {
        return;
    }
    for (pin_all, device) in
        [(false, "virtio-balloon-pci"), (true, "virtio-balloon-pci,free-page-reporting=on")]
    {
        let devices = vec![format!("-device {device}")];
        let mut pair = Pair::start(&Config { devices, ..config() });
        pair.source.client.capability("rdma-pin-all", pin_all);
        assert_eq!(pair.source.transfer("ram0"), "copied");
        let uri = pair.listen();
        let taken = Taken::from(&mut pair.source.qemu);
        in_mid_transfer(&mut pair, &uri);
        taken.give_back();
        let pinned = crate::support::helper::pinned(pair.source.helper.await_worker());
        assert!((1..32 << 20).contains(&pinned), "{} MiB are pinned", pinned >> 20);
        let limit = json!({ "max-bandwidth": 1_u64 << 32 });
        pair.source.client.run("migrate-set-parameters", limit);
        let end = pair.source.await_status(&["completed", "failed"]);
        assert_eq!(end["status"], "completed", "{end}");
        assert_eq!(pair.source.transferred_as("ram0"), "Copied");
        pair.verify();
    }
}

/// Only the virtio-mem device's memory is copied: registering would allocate what is not plugged.
#[test]
fn with_virtio_mem() {
    if !crate::support::lab() {
        return;
    }
    let devices = [
        "-m 96,slots=2,maxmem=1G",
        "-object memory-backend-memfd,id=vmem0,size=128M,share=on",
        "-device virtio-mem-pci,id=vm0,memdev=vmem0,requested-size=0",
    ];
    let devices = devices.map(str::to_owned).to_vec();
    let mut pair = Pair::start(&Config { devices, ..config() });
    pair.source.client.capability("rdma-pin-all", true);
    pair.migrate();
    assert_eq!(pair.source.transferred_as("ram0"), "Direct");
    assert_eq!(pair.source.transferred_as("0000:00:02.0/vmem0"), "Copied");
    for host in [&mut pair.source, &mut pair.destination] {
        assert_eq!(crate::support::memory::allocated(&mut host.qemu, "0000:00:02.0/vmem0"), 0);
    }
    pair.verify();
}

/// A source's private memory is written from its stream.
#[test]
fn private_memory_to_shared() {
    if !crate::support::lab() {
        return;
    }
    let private = Config { memory: Memory::Private, ..config() };
    for pin_all in [false, true] {
        let mut pair = Pair::start(&private);
        let shared = Config { memory: Memory::PcRam, ..config() };
        pair.new_destination(&shared, "shared");
        pair.source.client.capability("rdma-pin-all", pin_all);
        pair.migrate();
        assert_eq!(pair.source.transferred_as("pc.ram"), "Copied");
        pair.verify();
    }
}

/// A stock destination allows writes to all of its memory, so private memory is copied to it too.
#[test]
fn private_memory_to_stock_qemu() {
    if !crate::support::lab() {
        return;
    }
    for pin_all in [false, true] {
        let mut pair = Pair::start(&Config { memory: Memory::Private, ..config() });
        pair.source.client.capability("rdma-pin-all", pin_all);
        pair.destination.client.capability("rdma-pin-all", pin_all);
        let uri = format!("rdma:{}:{}", crate::support::address(), free_port());
        pair.destination.qemu.qmp.run("migrate-incoming", json!({ "uri": uri }));
        pair.source.client.run("migrate", json!({ "uri": uri }));
        let end = pair.source.await_status(&["completed", "failed", "cancelled"]);
        assert_eq!(end["status"], "completed", "{end}");
        assert_eq!(pair.source.transferred_as("pc.ram"), "Copied");
        assert_eq!(pair.source.transferred_as("pc.bios"), "Inline");
        pair.verify();
    }
}

/// Assert that the guest runs at the source and migrates to a new destination.
fn migrates_after_all(mut pair: Pair) {
    eventually("the guest to run", || (pair.source.qemu.status() == "running").then_some(()));
    pair.source.qemu.assert_goes_on();
    pair.source.helper.await_no_worker();
    let limit = json!({ "max-bandwidth": 1_u64 << 32 });
    pair.source.client.run("migrate-set-parameters", limit);
    pair.new_destination(&config(), "second");
    pair.migrate();
    pair.verify();
}

/// Start a slow migration to `uri`, and wait until RAM has moved.
fn in_mid_transfer(pair: &mut Pair, uri: &str) {
    let limit = json!({ "max-bandwidth": 4 << 20 });
    pair.source.client.run("migrate-set-parameters", limit);
    pair.source.client.run("migrate", json!({ "uri": uri }));
    eventually("RAM to move", || {
        let state = pair.source.client.run("query-migrate", json!({}));
        (state["ram"]["transferred"].as_u64().unwrap_or(0) > 1 << 20).then_some(())
    });
}

#[test]
fn a_destination_that_dies() {
    if !crate::support::lab() {
        return;
    }
    for stock in [false, true] {
        let mut pair = Pair::start(&config());
        let uri = if stock {
            let uri = format!("rdma:{}:{}", crate::support::address(), free_port());
            pair.destination.qemu.qmp.run("migrate-incoming", json!({ "uri": uri }));
            uri
        } else {
            pair.listen()
        };
        in_mid_transfer(&mut pair, &uri);
        if stock {
            pair.destination.qemu.kill();
        } else {
            let worker = pair.destination.helper.await_worker();
            signal_process(worker, Signal::KILL);
        }
        let end = pair.source.await_status(&["failed", "completed"]);
        println!("error-desc: {}", end["error-desc"]);
        assert_eq!(end["status"], "failed", "{end}");
        migrates_after_all(pair);
    }
}

#[test]
fn cancelled_with_a_stock_destination() {
    if !crate::support::lab() {
        return;
    }
    let mut pair = Pair::start(&config());
    let uri = format!("rdma:{}:{}", crate::support::address(), free_port());
    pair.destination.qemu.qmp.run("migrate-incoming", json!({ "uri": uri }));
    in_mid_transfer(&mut pair, &uri);
    pair.source.client.run("migrate_cancel", json!({}));
    pair.source.await_status(&["cancelled"]);
    eventually("the destination's QEMU to end", || pair.destination.qemu.child.try_wait().unwrap());
    migrates_after_all(pair);
}

#[test]
fn destinations_that_are_not_there() {
    if !crate::support::lab() {
        return;
    }
    let mut pair = Pair::start(&config());
    for (host, words) in
        [("127.0.0.1", "no RDMA device leads to"), (&*crate::support::address(), "refused")]
    {
        let uri = format!("rdma:{host}:{}", free_port());
        let error = pair.source.client.fails_to_migrate(&uri);
        println!("{error}");
        assert!(error.contains(words), "{error}");
    }
    let uri = json!({ "uri": "rdma:192.0.2.1:4444" });
    let error = pair.destination.client.refused("migrate-incoming", uri);
    println!("{error}");
    assert!(error.contains("no RDMA device") || error.contains("Cannot listen"), "{error}");
    pair.migrate();
    pair.verify();
}
