//! The destination host runs out of memory: the guest keeps running at the source.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::support::{Config, Guest, Memory, Pair, VERSIONS, eventually};
use serde_json::json;

/// A size-limited file system, unmounted on drop.
struct Mount(PathBuf);

impl Mount {
    fn new(kind: &str, options: &str, at: &Path) -> Result<Self, String> {
        std::fs::create_dir(at).unwrap();
        let mut command = Command::new("mount");
        let command = command.args(["-t", kind, "-o", options, "none"]).arg(at);
        match command.output() {
            Ok(output) if output.status.success() => Ok(Self(at.to_owned())),
            output => Err(format!("{kind} can't be mounted: {output:?}")),
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazy: a process that still uses it keeps it.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Migrate a guest with more memory than the destination has, then to one with enough.
fn runs_short(version: &'static str, mount: &Mount, words: &[&str]) {
    let guest = Guest::Dirty { fill: 48, hot: 8, spin: 3000 };
    let config = Config { version, mib: 64, guest, ..Config::default() };
    let mut pair = Pair::start(&config);
    let scarce = Config { memory: Memory::In(mount.0.clone()), ..config.clone() };
    pair.new_destination(&scarce, "scarce");
    let uri = pair.listen();
    let worker = pair.destination.helper.await_worker();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    let end = pair.source.await_status(&["failed", "completed", "cancelled"]);
    assert_eq!(end["status"], "failed", "{end}");
    let text = end["error-desc"].as_str().unwrap_or_default();
    println!("{version}: {text}");
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
    eventually("the guest to run", || (pair.source.qemu.status() == "running").then_some(()));
    pair.source.qemu.assert_goes_on();
    pair.source.helper.await_no_worker();
    // QEMU exits, as after a failed migration of its own.
    eventually("the destination's QEMU to end", || pair.destination.qemu.child.try_wait().unwrap());
    eventually("the destination's worker to end", || {
        (!Path::new(&format!("/proc/{worker}")).exists()).then_some(())
    });
    let log = pair.destination.helper.log();
    assert!(words.iter().all(|word| log.contains(word)), "{log}");
    pair.new_destination(&config, "ample");
    pair.migrate();
    pair.verify();
}

#[test]
fn huge_pages_run_out_in_mid_migration() {
    if let Err(why) = crate::support::huge_pages() {
        return println!("skipped: {why}");
    }
    let dir = tempfile::tempdir().unwrap();
    // Eight huge pages.
    let mount = Mount::new("hugetlbfs", "pagesize=2M,size=16M", &dir.path().join("huge"));
    let mount = match mount {
        Ok(mount) => mount,
        Err(why) => return println!("skipped: {why}"),
    };
    for version in VERSIONS {
        let words =
            ["'ram0'", "24 of the 32 huge pages of 2048 KiB", "nr_hugepages", "prealloc=on"];
        runs_short(version, &mount, &words);
    }
}

#[test]
fn a_file_system_is_full_in_mid_migration() {
    let dir = tempfile::tempdir().unwrap();
    let mount = match Mount::new("tmpfs", "size=16M", &dir.path().join("full")) {
        Ok(mount) => mount,
        Err(why) => return println!("skipped: {why}"),
    };
    for version in VERSIONS {
        runs_short(version, &mount, &["'ram0'", "48 of the 64 MiB", "enlarge the file system"]);
    }
}
