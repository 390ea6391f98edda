//! Real QEMUs, helpers beside them, and inspection of both without the project's code.
#![allow(dead_code, unused_imports, missing_docs, reason = "each test program uses some of it")]

pub mod helper;
pub mod image;
pub mod memory;
pub mod proxy;
pub mod qemu;
pub mod qmp;
pub mod wire;
pub mod wrapped;

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

pub use helper::Helper;
pub use proxy::{Proxy, QmpProxy};
pub use qemu::{Config, Guest, Memory, Qemu};
pub use qmp::Qmp;

/// The QEMU versions that scripts/setup provides.
pub const VERSIONS: [&str; 3] = ["7.2", "10.0", "11.1"];

/// Time limit of every wait.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Wait until `condition` returns a value.
#[track_caller]
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "timed out waiting for {what}");
        thread::park_timeout(Duration::from_millis(10));
    }
}

/// A file of scripts/setup or scripts/qemu-patched.
pub fn cache(path: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".cache").join(path);
    let script = if path.ends_with("qemu-patched") { "qemu-patched" } else { "setup" };
    assert!(path.exists(), "{} is missing: run scripts/{script}", path.display());
    path
}

/// The address to migrate to: an RDMA device's, if there is one.
pub fn address() -> String {
    std::env::var("QEMU_RDMA_HELPER_TEST_ADDRESS").unwrap_or_else(|_| "127.0.0.1".into())
}

/// The RDMA device with that address.
pub fn device() -> String {
    std::env::var("QEMU_RDMA_HELPER_TEST_DEVICE").unwrap_or_default()
}

/// Whether the tests have an RDMA device.
pub fn in_lab() -> bool {
    std::env::var_os("QEMU_RDMA_HELPER_TEST_ADDRESS").is_some()
}

/// Like [`in_lab`], for a test that needs it: prints that it is skipped.
pub fn lab() -> bool {
    let here = in_lab();
    if !here {
        println!("skipped: no RDMA device; scripts/lab/test has one");
    }
    here
}

/// Reserve huge pages for the guests of all tests, or return why that failed.
pub fn huge_pages() -> Result<(), String> {
    const PATH: &str = "/proc/sys/vm/nr_hugepages";
    // Two guests of a Config::default(), two of 32 MiB, and some pages for one that runs short.
    let wanted = 192 + 32 + 8 + 8;
    let write = fs::write(PATH, wanted.to_string());
    write.map_err(|error| format!("{PATH} can't be written: {error}"))?;
    let text = fs::read_to_string(PATH).map_err(|error| error.to_string())?;
    match text.trim().parse::<u32>() {
        Ok(got) if got >= wanted => Ok(()),
        _ => Err(format!("the kernel gives {} huge pages of {wanted}", text.trim())),
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// One host of a migration: a QEMU, a helper beside it, and a client of the helper.
pub struct Host {
    pub client: Qmp,
    pub helper: Helper,
    pub qemu: Qemu,
}

impl Host {
    pub fn start(dir: &TempDir, name: &str, config: &Config) -> Self {
        Self::with_helper(dir, name, config, &[])
    }

    pub fn with_helper(dir: &TempDir, name: &str, config: &Config, options: &[&str]) -> Self {
        if !config.under.is_empty() {
            // Another user creates sockets here.
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        }
        let qemu = Qemu::start(dir.path(), name, config);
        let socket = qemu.helper_socket();
        let helper = Helper::attach_under(config.under, dir.path(), name, &socket, options);
        let client = Qmp::connect(&helper.socket);
        Self { client, helper, qemu }
    }

    /// The status of the migration as a client sees it.
    pub fn status(&mut self) -> String {
        let state = self.client.run("query-migrate", json!({}));
        state["status"].as_str().unwrap_or("none").to_owned()
    }

    /// Names and lengths of the RAM blocks, as a source would list them.
    pub fn blocks(&mut self) -> Vec<(String, u64)> {
        let info = self.client.run("query-rdma-helper", json!({}));
        let block = |block: &Value| {
            (block["name"].as_str().unwrap().to_owned(), block["length"].as_u64().unwrap())
        };
        info["blocks"].as_array().unwrap().iter().map(block).collect()
    }

    /// How a RAM block would be transferred from here, according to the helper.
    pub fn transfer(&mut self, block: &str) -> String {
        let info = self.client.run("query-rdma-helper", json!({}));
        let blocks = info["blocks"].as_array().unwrap();
        let found = blocks.iter().find(|found| found["name"] == block);
        found.unwrap()["transfer-mode"].as_str().unwrap().to_owned()
    }

    /// How a RAM block was transferred in the last migration, by the log.
    pub fn transferred_as(&self, block: &str) -> String {
        let (log, wanted) = (self.helper.log(), format!("block=\"{block}\" transfer="));
        let found = log.lines().rev().find_map(|line| line.split_once(&wanted));
        found.unwrap_or_else(|| panic!("nothing of {wanted}: {log}")).1.to_owned()
    }

    /// Wait for one of these states of the migration. Return the reply to `query-migrate`.
    #[track_caller]
    pub fn await_status(&mut self, wanted: &[&str]) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = self.client.run("query-migrate", json!({}));
            let status = state["status"].as_str().unwrap_or("none");
            if wanted.contains(&status) {
                return state;
            }
            let late = Instant::now() >= deadline;
            assert!(!late, "timed out waiting for one of {wanted:?}; it is {state}");
            thread::park_timeout(Duration::from_millis(10));
        }
    }
}

/// Two hosts, the guest at the source.
pub struct Pair {
    pub source: Host,
    pub destination: Host,
    pub dir: TempDir,
}

impl Pair {
    /// Start both with the same machine.
    ///
    /// The destination waits for a migration and does not run the guest by itself.
    pub fn start(config: &Config) -> Self {
        Self::with_helpers(config, &[])
    }

    /// Like [`Self::start`], with these options for the helpers.
    pub fn with_helpers(config: &Config, options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = Host::with_helper(&dir, "source", config, options);
        let incoming = config.clone().incoming();
        let destination = Host::with_helper(&dir, "destination", &incoming, options);
        let mut pair = Self { source, destination, dir };
        for host in [&mut pair.source, &mut pair.destination] {
            host.client.capability("events", true);
        }
        // Fast enough for tests, but slow enough to act meanwhile.
        let limit = json!({ "max-bandwidth": 1_u64 << 32 });
        pair.source.client.run("migrate-set-parameters", limit);
        pair.source.qemu.await_guest();
        pair
    }

    /// Replace the destination with a new one, as management does after a failure.
    pub fn new_destination(&mut self, config: &Config, name: &str) {
        self.destination = Host::start(&self.dir, name, &config.clone().incoming());
    }

    /// Drop the source, and make the destination the source for a new destination.
    pub fn turn_around(&mut self, config: &Config, name: &str) {
        let next = Host::start(&self.dir, name, &config.clone().incoming());
        self.source = std::mem::replace(&mut self.destination, next);
        let limit = json!({ "max-bandwidth": 1_u64 << 32 });
        self.source.client.run("migrate-set-parameters", limit);
        for host in [&mut self.source, &mut self.destination] {
            host.client.capability("events", true);
        }
    }

    /// Let the destination listen. Return its URI.
    pub fn listen(&mut self) -> String {
        let uri = format!("rdma:{}:{}", address(), free_port());
        self.destination.client.run("migrate-incoming", json!({ "uri": uri }));
        uri
    }

    /// Start a migration over a link that can stall, and wait for pre-switchover.
    #[track_caller]
    pub fn at_pre_switchover(&mut self, return_path: bool) -> Proxy {
        for host in [&mut self.source, &mut self.destination] {
            host.client.capability("return-path", return_path);
        }
        self.source.client.capability("pause-before-switchover", true);
        let uri = self.listen();
        let proxy = Proxy::start(uri.rsplit(':').next().unwrap().parse().unwrap());
        let uri = format!("rdma:127.0.0.1:{}", proxy.port);
        self.source.client.run("migrate", json!({ "uri": uri }));
        self.source.await_status(&["pre-switchover"]);
        proxy
    }

    /// Migrate, and wait for completion.
    #[track_caller]
    pub fn migrate(&mut self) -> Value {
        let uri = self.listen();
        self.source.client.run("migrate", json!({ "uri": uri }));
        let end = self.source.await_status(&["completed", "failed", "cancelled"]);
        assert_eq!(end["status"], "completed", "{end}");
        let info = self.source.client.run("query-rdma-helper", json!({}));
        assert_eq!(info["fabric"], if in_lab() { "verbs" } else { "tcp" });
        end
    }

    /// Compare all RAM of the two stopped QEMUs, then assert that the guest runs.
    #[track_caller]
    pub fn verify(&mut self) {
        self.compare();
        self.destination.client.run("cont", json!({}));
        self.destination.qemu.assert_goes_on();
    }

    #[track_caller]
    pub fn compare(&mut self) {
        // QEMU reports `completed` a moment earlier.
        eventually("the source to be done", || {
            (self.source.qemu.status() == "postmigrate").then_some(())
        });
        let differences = memory::compare(&mut self.source.qemu, &mut self.destination.qemu);
        assert!(differences.is_empty(), "RAM differs: {differences:#?}");
    }
}
