//! Local processes with less privilege than the helper.

use std::{
    fs::{self, File, Permissions},
    io::{BufRead as _, BufReader, ErrorKind},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use crate::support::{
    Config, Guest, Helper, Host, Memory, Pair, Qemu, Qmp, VERSIONS, eventually,
    helper::signal_process,
};
use qemu_rdma_helper::{
    memory::Region,
    qemu::{Process, ram_blocks},
    qmp::{Execute, QmpError},
};
use rustix::{
    fs::{CWD, MemfdFlags, RenameFlags, renameat_with},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open},
    thread::{CapabilitySet, capabilities, set_capabilities},
};
use serde_json::{Value, json};
use tempfile::TempDir;

const LENGTH: u64 = 1 << 20;

/// A QEMU that reports one RAM block, at this address.
struct SaysSo(u64);

impl Execute for SaysSo {
    async fn execute(&mut self, command: &str, _: Value) -> Result<Value, QmpError> {
        match command {
            "x-query-ramblock" => {
                let text = format!(
                    "Block Name PSize Offset Used Total HVA RO\nram0 4 KiB 0x0 {LENGTH:#x} {LENGTH:#x} {:#x} rw\n",
                    self.0
                );
                Ok(json!({ "human-readable-text": text }))
            }
            "query-balloon" => Err(QmpError {
                class: "DeviceNotActive".into(),
                desc: "No balloon device has been activated".into(),
            }),
            _ => Ok(json!([])),
        }
    }
}

fn is(fd: impl Into<File>, other: &File) -> bool {
    let (one, other) = (fd.into().metadata().unwrap(), other.metadata().unwrap());
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Only the file of the guest's RAM is taken from a descriptor that alternates with another file.
///
/// A search that finds it by number and opens that number takes the other now and then.
#[tokio::test]
async fn a_descriptor_that_changes_is_not_taken() {
    const TRIES: usize = 500;
    // The first descriptor that the search looks at.
    let mut changing = OwnedFd::from(File::open("/dev/null").unwrap());
    let memfd = rustix::fs::memfd_create("ram0", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memfd, LENGTH).unwrap();
    let ram = File::from(memfd.try_clone().unwrap());
    let region = Region::new("ram0", memfd, 0, LENGTH).unwrap();
    let (address, _) = region.mapped(0, LENGTH).unwrap();
    let mut qemu = SaysSo(address.as_ptr() as u64);
    let others = tempfile::tempfile().unwrap();
    others.set_len(LENGTH).unwrap();
    let process = Process::open(std::process::id());
    let path = format!("/proc/self/fd/{}", changing.as_raw_fd());
    let done = AtomicBool::new(false);
    let (tries, fooled) = thread::scope(|scope| {
        let (ram, others, done) = (&ram, &others, &done);
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                rustix::io::dup2(ram, &mut changing).unwrap();
                rustix::io::dup2(others, &mut changing).unwrap();
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let search = scope.spawn(move || {
            let (mut tries, mut fooled) = (0, 0);
            eventually("who is not careful to be fooled", || {
                let blocks = runtime.block_on(ram_blocks::find(&mut qemu, &process, &[]));
                if let Some(backing) = blocks.unwrap().remove(0).backing {
                    assert!(is(backing.file, ram), "try {tries}");
                }
                tries += 1;
                let ino = ram.metadata().unwrap().ino();
                if fs::metadata(&path).is_ok_and(|metadata| metadata.ino() == ino)
                    && File::options()
                        .read(true)
                        .write(true)
                        .open(&path)
                        .is_ok_and(|it| is(it, others))
                {
                    fooled += 1;
                }
                (tries >= TRIES && fooled > 0).then_some(())
            });
            (tries, fooled)
        });
        let result = search.join();
        done.store(true, Ordering::Relaxed);
        result.unwrap()
    });
    println!("{tries} tries; without care {fooled} would have taken the other file");
}

/// Python program that does the same. Prints the address of its RAM, the inode and the descriptor.
const CHANGES: &str = "
import ctypes, mmap, os, sys, tempfile
length = int(sys.argv[1])
changing = os.open('/dev/null', os.O_RDONLY) # the first that is looked at
ram, other = os.memfd_create('ram0'), tempfile.TemporaryFile()
os.ftruncate(ram, length)
memory = mmap.mmap(ram, length)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), os.fstat(ram).st_ino, changing, flush=True)
while True:
    os.dup2(ram, changing)
    os.dup2(other.fileno(), changing)
";

/// The same holds for another user's process, whose descriptors can be duplicated but not opened.
#[test]
fn a_descriptor_that_changes_is_not_taken_from_another_user() {
    const TRIES: usize = 500;
    let mut child = crate::support::qemu::command_under(NOBODY, "/usr/bin/python3".as_ref())
        .args(["-c", CHANGES, &LENGTH.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let intruder = crate::support::qemu::Process::new(child);
    let numbers: Vec<u64> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let [address, inode, changing] = numbers[..] else { panic!("{line}") };
    let changing = i32::try_from(changing).unwrap();
    only_trace();
    let files = format!("/proc/{}", intruder.id());
    let denied = fs::read_dir(format!("{files}/fd")).unwrap_err();
    assert_eq!(denied.kind(), ErrorKind::PermissionDenied);
    let careless = || {
        let info = fs::read_to_string(format!("{files}/fdinfo/{changing}")).ok()?;
        info.contains(&format!("ino:\t{inode}\n")).then_some(())?;
        let pidfd = pidfd_open(Pid::from_child(&intruder), PidfdFlags::empty()).unwrap();
        Some(pidfd_getfd(pidfd, changing, PidfdGetfdFlags::empty()).unwrap())
    };
    let ino = |fd: OwnedFd| File::from(fd).metadata().unwrap().ino();
    let (mut qemu, process) = (SaysSo(address), Process::open(intruder.id()));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (mut tries, mut fooled) = (0, 0);
    eventually("who is not careful to be fooled", || {
        let blocks = runtime.block_on(ram_blocks::find(&mut qemu, &process, &[]));
        let backing = blocks.unwrap().remove(0).backing.unwrap();
        assert_eq!(ino(backing.file), inode, "try {tries}");
        tries += 1;
        fooled += usize::from(careless().is_some_and(|file| ino(file) != inode));
        (tries >= TRIES && fooled > 0).then_some(())
    });
    println!("{tries} tries; without care {fooled} would have taken the other file");
}

/// Let this thread trace other users' processes, but open no file that it has no permission for.
fn only_trace() {
    let mut sets = capabilities(None).unwrap();
    sets.effective -= CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
    assert!(sets.effective.contains(CapabilitySet::SYS_PTRACE));
    set_capabilities(None, sets).unwrap();
}

/// Python program: maps the file at a path, closes its descriptor and prints the address.
const MAPPER: &str = r#"
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
fd = os.open(sys.argv[1], os.O_RDWR)
address = libc.mmap(None, ctypes.c_size_t(int(sys.argv[2])), 3, 1, fd, ctypes.c_long(0))
os.close(fd)
print(address, flush=True)
sys.stdin.read()
"#;

/// A process whose RAM's file can be found by its path only.
struct ByPath {
    child: Child,
    process: Process,
    qemu: SaysSo,
}

impl ByPath {
    fn start(path: &Path) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", MAPPER])
            .arg(path)
            .arg(LENGTH.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        let qemu = SaysSo(address.trim().parse().unwrap());
        Self { process: Process::open(child.id()), child, qemu }
    }

    /// The file that the search takes for its RAM, and the path shown for it.
    async fn found(&mut self) -> Option<(OwnedFd, String)> {
        let blocks = ram_blocks::find(&mut self.qemu, &self.process, &[]).await.ok()?;
        let backing = blocks.into_iter().next()?.backing?;
        Some((backing.file, backing.path))
    }
}

impl Drop for ByPath {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn file_of_ram(path: &Path) -> File {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(LENGTH).unwrap();
    file
}

#[tokio::test]
async fn a_file_by_path_is_the_one_that_is_mapped() {
    let dir = tempfile::tempdir().unwrap();
    let (path, moved) = (dir.path().join("a\u{202e}b\u{9b}c"), dir.path().join("moved"));
    let ram = file_of_ram(&path);
    let mut qemu = ByPath::start(&path);
    let (file, shown) = qemu.found().await.unwrap();
    assert!(is(file, &ram));
    // Terminals will show it.
    assert!(shown.ends_with("a?b?c"), "{shown}");
    // Another file takes its place.
    fs::rename(&path, &moved).unwrap();
    assert!(qemu.found().await.is_some_and(|(file, _)| is(file, &ram)), "by its new name");
    file_of_ram(&path);
    assert!(qemu.found().await.is_some_and(|(file, _)| is(file, &ram)));
    fs::remove_file(&moved).unwrap();
    assert!(qemu.found().await.is_none());
}

/// Only the file of the guest's RAM is taken while its path and another's keep being exchanged.
///
/// A search that checks a path and then opens it takes the other now and then.
#[tokio::test]
async fn a_path_that_changes_is_not_followed() {
    const TRIES: usize = 500;
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (dir.path().join("ram"), dir.path().join("other"));
    let (ram, others) = (file_of_ram(&path), file_of_ram(&other));
    let mut qemu = ByPath::start(&path);
    let done = AtomicBool::new(false);
    let runtime = tokio::runtime::Handle::current();
    let (tries, found, fooled) = thread::scope(|scope| {
        let (path, other, ram, others, done) = (&path, &other, &ram, &others, &done);
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                renameat_with(CWD, path, CWD, other, RenameFlags::EXCHANGE).unwrap();
            }
        });
        let search = scope.spawn(move || {
            let (mut tries, mut found, mut fooled) = (0, 0, 0);
            eventually("who is not careful to be fooled", || {
                if let Some((file, _)) = runtime.block_on(qemu.found()) {
                    assert!(is(file, ram), "try {tries}");
                    found += 1;
                }
                tries += 1;
                let ino = ram.metadata().unwrap().ino();
                if fs::metadata(path).is_ok_and(|metadata| metadata.ino() == ino)
                    && File::open(path).is_ok_and(|it| is(it, others))
                {
                    fooled += 1;
                }
                (tries >= TRIES && found > 0 && fooled > 0).then_some(())
            });
            (tries, found, fooled)
        });
        let result = search.join();
        done.store(true, Ordering::Relaxed);
        result.unwrap()
    });
    println!("{tries} tries, {found} found; without care {fooled} would have taken the other file");
}

/// `attach` follows no link to another guest's socket, planted by the directory's owner.
#[test]
fn another_guests_socket_is_not_attached_to() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Qemu::start(dir.path(), "guest", &Config::default());
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(guest.helper_socket(), &link).unwrap();
    let socket = dir.path().join("qmp");
    let attach = Command::new(crate::support::helper::BINARY)
        .args(["attach", "--fabric", "tcp", "--qemu-qmp"])
        .arg(&link)
        .arg("--qmp")
        .arg(&socket)
        .output()
        .unwrap();
    let said = String::from_utf8(attach.stderr).unwrap();
    assert_eq!(attach.status.code(), Some(1), "{said}");
    assert!(said.contains("it is a symbolic link") && !socket.exists(), "{said}");
}

/// Runs a program as the unprivileged user nobody.
const NOBODY: &[&str] = &["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

/// The same, with files that no other user may open.
const NOBODY_ALONE: &[&str] = &[
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "sh",
    "-c",
    "umask 77; exec \"$@\"",
    "sh",
];

/// Runs a program as another user with the one capability of the packaged unit.
const TRACER: &[&str] = &[
    "setpriv",
    "--reuid=65533",
    "--regid=65533",
    "--clear-groups",
    "--inh-caps=-all,+sys_ptrace",
    "--ambient-caps=-all,+sys_ptrace",
    "--bounding-set=-all,+sys_ptrace",
];

/// Memory is found by any user that may inspect QEMU's process, whatever user may open the memory.
#[test]
fn memory_of_another_users_qemu_is_found() {
    for version in VERSIONS {
        for memory in [Memory::Memfd, Memory::File] {
            for helper in [&[][..], NOBODY, TRACER] {
                let dir = tempfile::tempdir().unwrap();
                let config = Config { version, memory: memory.clone(), ..Config::default() };
                let mut host = beside(&dir, "host", &config, helper);
                assert_eq!(host.transfer("ram0"), "direct", "{version}, {memory:?}, {helper:?}");
            }
        }
    }
}

/// A QEMU of user nobody with private files, and a helper that may use its socket.
fn beside(dir: &TempDir, name: &str, config: &Config, helper: &[&str]) -> Host {
    let let_in = |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
    let_in(dir.path());
    let qemu = Qemu::start(dir.path(), name, &Config { under: NOBODY_ALONE, ..config.clone() });
    let socket = qemu.helper_socket();
    let_in(&socket);
    let helper = Helper::attach_under(helper, dir.path(), name, &socket, &[]);
    Host { client: Qmp::connect(&helper.socket), helper, qemu }
}

/// Assert that a process will not be dumped: root owns its files in /proc, whatever its user.
///
/// This also works where the host sends core dumps elsewhere.
#[track_caller]
fn assert_not_dumped(worker: u32) {
    let status = fs::metadata(format!("/proc/{worker}/status")).unwrap();
    assert_eq!((status.uid(), status.gid()), (0, 0));
}

#[test]
fn a_worker_of_nobodys_is_not_dumped() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = beside(&dir, "host", &Config::default().incoming(), NOBODY);
    let relay = fs::metadata(format!("/proc/{}/status", host.helper.pid())).unwrap();
    assert_eq!(relay.uid(), 65534);
    let uri = format!("rdma:127.0.0.1:{}", crate::support::free_port());
    host.client.run("migrate-incoming", json!({ "uri": uri }));
    assert_not_dumped(host.helper.await_worker());
}

/// A guest of another user migrates, even if that user alone may open its memory.
#[test]
fn another_users_guest_migrates() {
    for (helper, memory) in
        [(&[][..], Memory::Memfd), (NOBODY, Memory::Memfd), (TRACER, Memory::File)]
    {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { memory, ..Config::default() };
        let mut pair = Pair {
            source: beside(&dir, "source", &config, helper),
            destination: beside(&dir, "destination", &config.clone().incoming(), helper),
            dir,
        };
        pair.source.qemu.await_guest();
        pair.migrate();
        pair.verify();
    }
}

/// The `VmFlags` of each mapping that a worker shares with QEMU.
fn guest_memory(worker: u32) -> Vec<String> {
    let smaps = fs::read_to_string(format!("/proc/{worker}/smaps")).unwrap_or_default();
    let (mut ours, mut all) = (false, Vec::new());
    for line in smaps.lines() {
        let permissions = line.split(' ').nth(1).unwrap_or_default();
        if line.split(' ').next().unwrap_or_default().contains('-') {
            ours = permissions == "rw-s" && line.contains("memory-backend");
        } else if ours && line.starts_with("VmFlags:") {
            all.push(line.to_owned());
        }
    }
    all
}

/// Does this host write core dumps to the working directory?
fn writes_cores(under: &[&str], cores: &Path) -> bool {
    let mut sleeps =
        crate::support::qemu::command_under(under, "sleep".as_ref()).arg("1000").spawn().unwrap();
    let exe = format!("/proc/{}/exe", sleeps.id());
    eventually("a program", || fs::read_link(&exe).ok()?.ends_with("sleep").then_some(()));
    signal_process(sleeps.id(), Signal::SEGV);
    sleeps.wait().unwrap();
    let files: Vec<_> = fs::read_dir(cores).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.iter().for_each(|file| fs::remove_file(file).unwrap());
    !files.is_empty()
}

/// A worker that crashes leaves no guest memory behind, even with core dumps enabled.
#[test]
fn a_core_dump_has_no_guest_memory() {
    let dir = tempfile::tempdir().unwrap();
    let cores = dir.path().join("cores");
    fs::create_dir(&cores).unwrap();
    let shell = format!("ulimit -c unlimited; cd {}; exec \"$@\"", cores.display());
    let under = ["sh", "-c", &shell, "sh"];
    if !writes_cores(&under, &cores) {
        println!("core dumps go elsewhere on this host: that there is none is not seen");
    }
    let memory = if crate::support::huge_pages().is_ok() { Memory::Huge } else { Memory::Memfd };
    let guest = Guest::Dirty { fill: 24, hot: 1, spin: 3000 };
    let config = Config { mib: 32, memory, guest, ..Config::default() };
    let mut pair = Pair::start(&config);
    for name in ["source", "destination"] {
        let host = if name == "source" { &mut pair.source } else { &mut pair.destination };
        host.helper.kill();
        let socket = host.qemu.helper_socket();
        host.helper = Helper::attach_under(&under, pair.dir.path(), name, &socket, &[]);
        host.client = Qmp::connect(&host.helper.socket);
    }
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 2 << 20 }));
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    let workers = [&pair.source, &pair.destination].map(|host| host.helper.await_worker());
    eventually("RAM to move", || {
        let state = pair.source.client.run("query-migrate", json!({}));
        (state["ram"]["transferred"].as_u64().unwrap_or(0) > 1 << 20).then_some(())
    });
    for worker in workers {
        let limits = fs::read_to_string(format!("/proc/{worker}/limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
        let mapped = guest_memory(worker);
        assert!(config.memory != Memory::Huge || !mapped.is_empty());
        for flags in mapped {
            assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
        }
    }
    for worker in workers {
        // The first signal removes the handler of Rust's library, which looks for stack overflows.
        eventually("the worker to end", || {
            let there = fs::exists(format!("/proc/{worker}")).unwrap();
            if there {
                signal_process(worker, Signal::SEGV);
            }
            (!there).then_some(())
        });
    }
    let end = pair.source.await_status(&["failed", "completed"]);
    assert_eq!(end["status"], "failed");
    let left: Vec<_> = fs::read_dir(&cores).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}
