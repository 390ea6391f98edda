//! `run`: QEMU with a relay in front of its monitors, started as management does.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{
            fs::symlink,
            net::{UnixListener, UnixStream},
            process::ExitStatusExt as _,
        },
    },
    path::Path,
    process::{Command, Output, Stdio},
};

use crate::support::{
    Config, Guest, Memory, Qmp, VERSIONS, address, cache, eventually, free_port,
    helper::{BINARY, signal_process},
    qemu::Process,
    wrapped::{Wrapped, WrappedPair, has_ended, relay_of, relays},
};
use command_fds::{CommandFdExt as _, FdMapping};
use rustix::process::Signal;
use serde_json::json;

/// A guest in the machine's default memory, which is private.
fn private() -> Config {
    Config { memory: Memory::Private, mib: 64, ..Config::default() }
}

/// A paused QEMU, for tests of its monitor.
fn paused() -> Config {
    Config { paused: true, ..private() }
}

/// Return a `run` command with these QEMU arguments, and 8 MiB of RAM.
fn run(arguments: &str) -> Command {
    let mut command = Command::new(BINARY);
    command.args(["run", "--fabric", "tcp", "--"]).arg(cache("bin/qemu-10.0"));
    command.args(["-accel", "tcg", "-nodefaults", "-display", "none", "-m", "8"]);
    command.args(arguments.split_whitespace()).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn private_memory_becomes_shared_and_migrates() {
    let mut pair = WrappedPair::start(&Config { mib: 192, ..private() });
    let info = pair.source.client.run("query-rdma-helper", json!({}));
    let block = info["blocks"].as_array().unwrap().iter().find(|block| block["name"] == "pc.ram");
    assert_eq!(block.unwrap()["transfer-mode"], "direct");
    pair.migrate();
}

#[test]
fn private_memory_of_each_version_becomes_shared_and_migrates() {
    for version in VERSIONS {
        WrappedPair::start(&Config { version, mib: 192, ..private() }).migrate();
    }
}

/// With `--keep-backends` memory is shared or private as the user configured it, and migrates.
#[test]
fn backends_are_kept_if_that_is_asked_for() {
    const KEEP: &[&str] = &[BINARY, "run", "--keep-backends", "--fabric", "tcp", "--"];
    let transfer = |memory: Memory, block: &str| {
        let mut pair = WrappedPair::start(&Config { under: KEEP, memory, ..private() });
        let info = pair.source.client.run("query-rdma-helper", json!({}));
        let blocks = info["blocks"].as_array().unwrap().clone();
        pair.migrate();
        blocks.iter().find(|found| found["name"] == block).unwrap()["transfer-mode"].clone()
    };
    assert_eq!(transfer(Memory::Memfd, "ram0"), "direct");
    assert_eq!(transfer(Memory::Private, "pc.ram"), "inline");
}

#[test]
fn numa_settings_are_kept() {
    let config = Config {
        mib: 96,
        devices: vec![
            "-object memory-backend-ram,id=a,size=32M,host-nodes=0,policy=bind".into(),
            "-object {\"qom-type\":\"memory-backend-ram\",\"id\":\"b\",\"size\":67108864,\"prealloc\":true}".into(),
            "-numa node,memdev=a -numa node,memdev=b".into(),
        ],
        ..private()
    };
    let mut pair = WrappedPair::start(&config);
    let memdev = pair.source.client.run("query-memdev", json!({}));
    let of = |id: &str| memdev.as_array().unwrap().iter().find(|dev| dev["id"] == id).unwrap();
    assert_eq!(of("a")["policy"], "bind");
    assert_eq!(of("a")["host-nodes"], json!([0]));
    assert_eq!(of("b")["prealloc"], true);
    assert_eq!(of("b")["share"], true);
    pair.migrate();
}

#[test]
fn huge_pages_are_kept() {
    if let Err(why) = crate::support::huge_pages() {
        return println!("skipped: {why}");
    }
    let backend = "-object memory-backend-memfd,id=huge,size=32M,hugetlb=on,hugetlbsize=2M,share=off \
                   -machine memory-backend=huge";
    let guest = Guest::Dirty { fill: 24, hot: 4, spin: 3000 };
    let mut pair =
        WrappedPair::start(&Config { mib: 32, devices: vec![backend.into()], guest, ..private() });
    let info = pair.source.client.run("query-rdma-helper", json!({}));
    let block = &info["blocks"][0];
    assert_eq!(block["page-size"], 2 << 20, "{info}");
    assert_eq!(block["transfer-mode"], "direct");
    // The older name and value.
    assert_eq!(block["travel"], "mapped");
    pair.migrate();
}

#[test]
fn process_tree_and_end_are_qemus() {
    let dir = tempfile::tempdir().unwrap();
    let mut wrapped = Wrapped::start(&dir, "only", &paused());
    let pid = wrapped.qemu.pid();
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert!(program.file_name().unwrap().to_str().unwrap().starts_with("qemu-system-"));
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    assert_eq!(children, "", "QEMU has children");
    let stat = fs::read_to_string(format!("/proc/{}/stat", wrapped.relay)).unwrap();
    let session: u32 =
        stat.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap().parse().unwrap();
    assert_eq!(session, wrapped.relay, "the relay is in management's session");
    let status = fs::read_to_string(format!("/proc/{}/status", wrapped.relay)).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    // CAP_IPC_LOCK, CAP_SYS_PTRACE and CAP_SYS_RESOURCE, if they were there.
    let kept = 1 << 14 | 1 << 19 | 1 << 24;
    assert_eq!(u64::from_str_radix(&field("CapPrm:"), 16).unwrap() & !kept, 0);
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".into(), "2".into()));
    wrapped.client.run("quit", json!({}));
    assert!(wrapped.qemu.child.wait().unwrap().success());
    eventually("the relay's end", || has_ended(wrapped.relay).then_some(()));
    assert!(!wrapped.qemu.helper_socket().exists());
    // QEMU's parent sees the signal that ended QEMU.
    for signal in [Signal::KILL, Signal::ABORT] {
        let mut wrapped = Wrapped::start(&dir, "killed", &paused());
        signal_process(wrapped.qemu.pid(), signal);
        assert_eq!(wrapped.qemu.child.wait().unwrap().signal(), Some(signal.as_raw()));
        eventually("the relay's end", || has_ended(wrapped.relay).then_some(()));
        while wrapped.client.line().is_some() {}
    }
    let wrong = run("-qmp unix:/nowhere/at/all,server=on,wait=off").output().unwrap();
    assert_eq!(wrong.status.code(), Some(1));
    assert!(text(&wrong.stderr).contains("/nowhere/at/all"), "{wrong:?}");
    let socket = dir.path().join("wrong");
    let wrong = run(&format!("-nonsense -qmp unix:{},server=on,wait=off", socket.display()));
    let wrong = { wrong }.output().unwrap();
    assert_eq!(wrong.status.code(), Some(1), "{wrong:?}");
    eventually("the socket to go", || (!socket.exists()).then_some(()));
}

/// A manager may start its guest again before the previous relay has ended.
#[test]
fn a_path_may_be_used_again_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp");
    let start = || {
        let arguments = format!("-S -qmp unix:{},server=on,wait=off", socket.display());
        Process::new(run(&arguments).spawn().unwrap())
    };
    let first = start();
    let mut client = Qmp::connect(&socket);
    let relay = relay_of(first.id()).unwrap();
    // Leave the replies unread, so that the relay ends late.
    for _ in 0..30 {
        client.send(b"{\"execute\": \"query-qmp-schema\"}\n");
    }
    let replies = || {
        let queue = rustix::io::ioctl_fionread(client.fd());
        queue.unwrap() > 100_000
    };
    eventually("replies that nobody reads", || replies().then_some(()));
    drop(first);
    let second = start();
    // Until it knows that its QEMU is gone, the first relay accepts connections, but greets nobody.
    eventually("the second's greeting", || {
        UnixStream::connect(&socket).ok()?.read_exact(&mut [0]).ok()
    });
    Qmp::connect(&socket).run("query-version", json!({}));
    drop(client);
    eventually("the end of the first relay", || has_ended(relay).then_some(()));
    Qmp::connect(&socket).run("quit", json!({}));
    drop(second);
}

/// Descriptors passed as by libvirt keep their numbers: a listening monitor, and others.
#[test]
fn descriptors_keep_their_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("monitor.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let kept = File::create(dir.path().join("kept")).unwrap();
    let mut command = run("-S -chardev socket,id=charmonitor,fd=22,server=on,wait=off \
         -mon chardev=charmonitor,id=monitor,mode=control -add-fd fd=23,set=2,opaque=kept");
    let mappings = vec![
        FdMapping { parent_fd: listener.into(), child_fd: 22 },
        FdMapping { parent_fd: OwnedFd::from(kept), child_fd: 23 },
    ];
    let child = Process::new(command.fd_mappings(mappings).unwrap().spawn().unwrap());
    drop(command);
    for _ in 0..2 {
        // One after the other, like a restarted manager.
        let mut client = Qmp::connect(&path);
        let sets = client.run("query-fdsets", json!({}));
        assert_eq!(sets[0]["fds"][0]["opaque"], "kept", "{sets}");
    }
    let relay = relay_of(child.id()).unwrap();
    let is_kept = |path: &String| path.ends_with("/kept");
    assert!(files(child.id()).iter().any(is_kept));
    assert!(!files(relay).iter().any(is_kept), "the relay holds a file of QEMU's");
    let listening = listening(&path).unwrap();
    assert!(!files(child.id()).contains(&listening), "QEMU holds the manager's socket");
    assert!(files(relay).contains(&listening));
}

/// Return the paths of a process's open files.
fn files(pid: u32) -> Vec<String> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let paths = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
    paths.map(|path| path.display().to_string()).collect()
}

/// Return the name of a listening socket among a process's descriptors.
fn listening(path: &Path) -> Option<String> {
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    let path = path.display().to_string();
    let is_it = |line: &&str| line.ends_with(&path) && line.contains(" 00010000 ");
    let line = sockets.lines().find(is_it)?;
    Some(format!("socket:[{}]", line.split_whitespace().nth(6).unwrap()))
}

#[test]
fn qemu_connects_to_its_manager() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("manager");
    let manager = UnixListener::bind(&path).unwrap();
    let _child = Process::new(run(&format!("-S -qmp unix:{}", path.display())).spawn().unwrap());
    let mut client = Qmp::accept(&manager);
    client.run("query-rdma-helper", json!({}));
    let path = dir.path().join("again");
    let manager = UnixListener::bind(&path).unwrap();
    let _child =
        Process::new(run(&format!("-S -qmp unix:{},reconnect=1", path.display())).spawn().unwrap());
    for _ in 0..2 {
        Qmp::accept(&manager).run("query-rdma-helper", json!({}));
    }
    // QEMU does not start if it can't connect to its manager.
    let nobody = run(&format!("-S -qmp unix:{}/nobody", dir.path().display())).output().unwrap();
    assert_eq!(nobody.status.code(), Some(1), "{nobody:?}");
}

/// With `wait=on`, the default, QEMU starts when a client has connected.
#[test]
fn qemu_waits_for_its_manager() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("monitor");
    let child =
        Process::new(run(&format!("-S -qmp unix:{},server", path.display())).spawn().unwrap());
    let program = || fs::read_link(format!("/proc/{}/exe", child.id())).unwrap();
    eventually("the socket", || path.exists().then_some(()));
    assert_eq!(program(), Path::new(BINARY).canonicalize().unwrap());
    let mut client = Qmp::connect(&path);
    client.run("query-status", json!({}));
    assert!(program().to_str().unwrap().contains("qemu-system"));
}

#[test]
fn nothing_stays_of_a_qemu_that_nobody_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("monitor");
    let child = run(&format!("-S -qmp unix:{},server", path.display())).spawn().unwrap();
    let child = Process::new(child);
    let socket = eventually("the socket", || listening(&path));
    // A relay that has the socket has received its order.
    let relay = eventually("the relay", || {
        relays().into_iter().find(|relay| files(*relay).contains(&socket))
    });
    drop(child);
    eventually("the relay's end", || has_ended(relay).then_some(()));
    assert!(!path.exists());
}

/// A command line that only queries QEMU gets QEMU's own answer.
#[test]
fn probes_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let output = |command: &mut Command| -> Output { command.output().unwrap() };
    for arguments in ["--version", "-machine help", "-device help"] {
        let through = output(&mut run(arguments));
        let mut qemu = Command::new(cache("bin/qemu-10.0"));
        let plain = output(qemu.args(arguments.split(' ')));
        assert_eq!((through.stdout, through.status), (plain.stdout, plain.status), "{arguments}");
    }
    let socket = dir.path().join("qmp.monitor");
    let pidfile = dir.path().join("qmp.pid");
    let probe = run(&format!(
        "-S -no-user-config -machine none -qmp unix:{},server=on,wait=off \
         -pidfile {} -daemonize",
        socket.display(),
        pidfile.display()
    ))
    .output()
    .unwrap();
    // The socket exists when the command has ended.
    assert!(probe.status.success(), "{probe:?}");
    let pid: u32 = fs::read_to_string(&pidfile).unwrap().trim().parse().unwrap();
    let mut client = Qmp::connect(&socket);
    assert_eq!(
        client.execute("query-rdma-helper", json!({})).unwrap_err()["class"],
        "CommandNotFound"
    );
    assert_eq!(relay_of(pid), None);
    client.run("quit", json!({}));
    eventually("its end", || has_ended(pid).then_some(()));
}

#[test]
fn a_guest_may_go_to_the_background() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, pidfile) = (dir.path().join("qmp"), dir.path().join("pid"));
    let arguments = format!(
        "-S -qmp unix:{},server=on,wait=off -pidfile {} -daemonize",
        socket.display(),
        pidfile.display()
    );
    // This reads QEMU's output to the end.
    let output = run(&arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let pid: u32 = fs::read_to_string(&pidfile).unwrap().trim().parse().unwrap();
    let mut client = Qmp::connect(&socket);
    let info = client.run("query-rdma-helper", json!({}));
    assert_eq!(info["pid"], pid);
    let relay = relay_of(pid).unwrap();
    client.run("quit", json!({}));
    eventually("the relay's end", || has_ended(relay).then_some(()));
}

/// Signals are left to QEMU, also those that it inherits ignored.
#[test]
fn children_may_be_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp");
    let mut command = Command::new("/usr/bin/python3");
    let ignore = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); \
                  os.execv(sys.argv[1], sys.argv[1:])";
    let plain = run(&format!("-S -qmp unix:{},server=on,wait=off", socket.display()));
    command.args(["-c", ignore]).arg(plain.get_program()).args(plain.get_args());
    let child = Process::new(command.spawn().unwrap());
    let mut client = Qmp::connect(&socket);
    assert_eq!(client.run("query-rdma-helper", json!({}))["pid"], child.id());
    client.fails_to_migrate("rdma:127.0.0.1:1");
}

/// RAM that is not described by `-m` or a backend on the command line stays QEMU's.
#[test]
fn memory_of_a_configuration_file_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config");
    fs::write(&file, "[memory]\n  size = \"64M\"\n").unwrap();
    let memory = [format!("-readconfig {}", file.display()), "-machine memory.size=64M".into()];
    for (index, memory) in memory.into_iter().enumerate() {
        let socket = dir.path().join(format!("qmp{index}"));
        let mut command = Command::new(BINARY);
        command.args(["run", "--fabric", "tcp", "--"]).arg(cache("bin/qemu-10.0"));
        let rest = "-accel tcg -nodefaults -display none -S -qmp";
        command.args(
            rest.split(' ').chain([&*format!("unix:{},server=on,wait=off", socket.display())]),
        );
        command.args(memory.split(' ')).stdin(Stdio::null());
        let _child = Process::new(command.spawn().unwrap());
        let size = Qmp::connect(&socket).run("query-memory-size-summary", json!({}));
        assert_eq!(size["base-memory"], 64 << 20);
    }
}

/// A file backend keeps its RAM block's name, and its file is not written.
#[test]
fn files_of_backends_stay_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    for (index, place) in ["", "/ram"].into_iter().enumerate() {
        let socket = dir.path().join(format!("qmp{index}"));
        let child = run(&format!(
            "-M pc-q35-3.1,memory-backend=x -object \
             memory-backend-file,id=x,size=8M,mem-path={}{place} -qmp unix:{},server=on,wait=off",
            dir.path().display(),
            socket.display()
        ));
        let child = Process::new({ child }.spawn().unwrap());
        let mut client = Qmp::connect(&socket);
        let blocks = client.run("query-rdma-helper", json!({}))["blocks"].clone();
        let names = blocks.as_array().unwrap().iter().map(|block| block["name"].as_str().unwrap());
        assert!(names.clone().any(|name| name == "/objects/x"), "{blocks}");
        let shared = client.run("query-memdev", json!({}))[0]["share"].clone();
        assert_eq!(shared, place.is_empty());
        drop(child);
    }
    use std::os::unix::fs::MetadataExt as _;
    assert_eq!(fs::metadata(dir.path().join("ram")).unwrap().blocks(), 0);
}

/// A link to the helper that is named after a QEMU works as an emulator.
#[test]
fn a_link_is_an_emulator() {
    let dir = tempfile::tempdir().unwrap();
    let (links, real) = (dir.path().join("links"), dir.path().join("real"));
    fs::create_dir(&links).unwrap();
    fs::create_dir(&real).unwrap();
    let name = "qemu-system-x86_64";
    symlink(BINARY, links.join(name)).unwrap();
    symlink(BINARY, links.join("qemu-system-x86_64-rdma")).unwrap();
    symlink(BINARY, links.join("qemu-system-nothing")).unwrap();
    fs::write(
        real.join(name),
        format!("#!/bin/sh\nexec {} \"$@\"\n", cache("bin/qemu-10.0").display()),
    )
    .unwrap();
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(real.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}:/usr/bin:/bin", links.display(), real.display());
    for link in [name, "qemu-system-x86_64-rdma"] {
        let version = Command::new(links.join(link)).arg("--version").env("PATH", &path).output();
        assert!(text(&version.unwrap().stdout).contains("QEMU emulator version 10.0"));
    }
    let socket = dir.path().join("qmp");
    let child = Command::new(links.join(name))
        .args(["-accel", "tcg", "-nodefaults", "-display", "none", "-m", "8", "-S", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .env("PATH", &path)
        .env("QEMU_RDMA_HELPER_OPTIONS", "--fabric tcp --queue-pairs 3")
        .spawn();
    let _child = Process::new(child.unwrap());
    let info = Qmp::connect(&socket).run("query-rdma-helper", json!({}));
    assert_eq!(info["connections"], 3);
    let nothing = Command::new(links.join("qemu-system-nothing")).output().unwrap();
    assert_eq!(nothing.status.code(), Some(1));
    assert!(text(&nothing.stderr).contains("No QEMU named qemu-system-nothing"), "{nothing:?}");
}

/// Two copies of the helper, each with its links, both find QEMU.
#[test]
fn two_copies_of_the_helper_find_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let copies = ["first", "second"].map(|name| dir.path().join(name));
    for copy in &copies {
        fs::create_dir(copy).unwrap();
        fs::copy(BINARY, copy.join("qemu-rdma-helper")).unwrap();
        for link in ["qemu-system-x86_64", "qemu-system-x86_64-rdma"] {
            symlink("qemu-rdma-helper", copy.join(link)).unwrap();
        }
    }
    let path = format!("{}:{}:/usr/bin:/bin", copies[0].display(), copies[1].display());
    for link in ["qemu-system-x86_64", "qemu-system-x86_64-rdma"] {
        // Helpers that find each other would never end.
        let version = Command::new("timeout")
            .arg("20")
            .args([copies[0].join(link), "--version".into()])
            .env("PATH", &path)
            .output()
            .unwrap();
        assert!(text(&version.stdout).contains("QEMU emulator version"), "{version:?}");
    }
}

#[test]
fn incoming_rdma_on_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("rdma:{}:{}", address(), free_port());
    let incoming = Config { devices: vec![format!("-incoming {uri}")], ..paused() };
    let mut destination = Wrapped::start(&dir, "destination", &incoming);
    let mut source = Wrapped::start(&dir, "source", &private());
    source.qemu.await_guest();
    // The destination listens as soon as its monitor exists.
    source.client.run("migrate", json!({ "uri": uri }));
    let end = source.await_status(&["completed", "failed"]);
    assert_eq!(end["status"], "completed", "{end}");
    let differences = crate::support::memory::compare(&mut source.qemu, &mut destination.qemu);
    assert!(differences.is_empty(), "RAM differs: {differences:#?}");
    destination.client.run("cont", json!({}));
    destination.qemu.assert_goes_on();
    // If the helper can't listen, QEMU exits, as it does by itself.
    let nowhere = run("-incoming rdma:192.0.2.1:4444").output().unwrap();
    assert_eq!(nowhere.status.code(), Some(1), "{nowhere:?}");
    assert!(text(&nowhere.stderr).contains("192.0.2.1"), "{nowhere:?}");
}

/// A relay keeps working if its messages are read by nobody, or can't be.
#[test]
fn nobody_has_to_read_its_messages() {
    let dir = tempfile::tempdir().unwrap();
    for close in [false, true] {
        let socket = dir.path().join(format!("qmp-{close}"));
        let (reader, writer) = std::io::pipe().unwrap();
        if !close {
            // The pipe is full and stays so.
            rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
            (&writer).write_all(&[b'\n'; 4096]).unwrap();
        }
        let mut command = run(&format!("-S -qmp unix:{},server=on,wait=off", socket.display()));
        command.env("RUST_LOG", "debug").stderr(writer);
        let child = Process::new(command.spawn().unwrap());
        drop(command);
        let mut reader = Some(reader);
        reader.take_if(|_| close);
        let mut client = Qmp::connect(&socket);
        for _ in 0..200 {
            // Each of these logs something.
            client.fails_to_migrate("rdma:127.0.0.1:1");
        }
        assert!(!has_ended(relay_of(child.id()).unwrap()));
        client.run("quit", json!({}));
        drop((child, reader));
    }
}

/// A migration that one monitor starts, and the helper's events, show at the other.
#[test]
fn two_monitors_see_one_migration() {
    let mut pair = WrappedPair::start(&private());
    let mut other = Qmp::connect(&pair.source.qemu.spare_socket());
    pair.begin(4096);
    let end = pair.source.await_status(&["completed", "failed"]);
    assert_eq!(end["status"], "completed", "{end}");
    other.await_event("RDMA_MIGRATION_THROUGHPUT", |_| true);
    other.await_event("MIGRATION", |data| data["status"] == "completed");
    let seen = other.run("query-migrate", json!({}));
    assert_eq!(seen["ram"]["transferred"], end["ram"]["transferred"]);
}

/// From 11.1 on monitors are objects that may come and go. The helper serves QMP monitors of the
/// command line, and logs which others it does not serve.
#[test]
fn monitors_that_are_objects() {
    let dir = tempfile::tempdir().unwrap();
    let start = |name: &str, incoming: bool| {
        let place = |id: &str| dir.path().join(format!("{name}.{id}"));
        let monitor = |kind: &str, id: &str| {
            let chardev = format!("socket,id={id},path={},server=on,wait=off", place(id).display());
            format!("-chardev {chardev} -object {kind},id=monitor-{id},chardev={id}")
        };
        let devices = vec![monitor("monitor-qmp", "control"), monitor("monitor-hmp", "human")];
        let config = Config { version: "11.1", devices, ..private() };
        let config = if incoming { config.incoming() } else { config };
        let mut wrapped = Wrapped::start(&dir, name, &config);
        let log = wrapped.qemu.log();
        assert!(log.contains("-object monitor-hmp,id=monitor-human,chardev=human' stays"), "{log}");
        assert!(!log.contains("monitor-control") && !log.contains("deprecated"), "{log}");
        wrapped.client = Qmp::connect(&place("control"));
        wrapped
    };
    let (mut source, mut destination) = (start("source", false), start("destination", true));
    source.qemu.await_guest();

    let path = dir.path().join("added");
    let address = json!({ "type": "unix", "data": { "path": path } });
    let socket =
        json!({ "type": "socket", "data": { "addr": address, "server": true, "wait": false } });
    let added = json!({ "qom-type": "monitor-qmp", "id": "added", "chardev": "new" });
    source.client.run("chardev-add", json!({ "id": "new", "backend": socket }));
    source.client.run("object-add", added);
    Qmp::connect(&path).refused("query-rdma-helper", json!({}));
    source.client.run("object-del", json!({ "id": "added" }));
    let log = source.qemu.log();
    assert!(log.contains("A client adds the monitor 'added' to QEMU"), "{log}");

    let uri = format!("rdma:{}:{}", crate::support::address(), free_port());
    destination.client.run("migrate-incoming", json!({ "uri": uri }));
    source.client.run("migrate", json!({ "uri": uri }));
    let end = source.await_status(&["completed", "failed"]);
    assert_eq!(end["status"], "completed", "{end}");
    let differences = crate::support::memory::compare(&mut source.qemu, &mut destination.qemu);
    assert!(differences.is_empty(), "RAM differs: {differences:#?}");
}

/// Clients that break off, send junk or do not read harm neither the relay nor a migration.
#[test]
fn hostile_clients_harm_nobody() {
    let mut pair = WrappedPair::start(&private());
    pair.begin(16);
    let socket = pair.source.qemu.helper_socket();
    let idle = crate::support::helper::peak_rss(pair.source.relay);
    drop(std::mem::replace(
        &mut pair.source.client,
        Qmp::connect(&pair.source.qemu.spare_socket()),
    ));
    for nonsense in [
        &b"{\"execute\":"[..],
        b"\0\0\0\0",
        b"[[[[[[[[[[[[",
        b"{\"execute\": \"migrate\", \"arguments\": {\"uri\": \"rdma:\"}}\n",
        b"\xff\xfe{}\n",
        b"{\"execute\": \"query-qmp-schema\"}\n",
    ] {
        let mut client = eventually("the socket", || UnixStream::connect(&socket).ok());
        let mut first = [0];
        client.read_exact(&mut first).unwrap();
        client.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
        client.write_all(nonsense).unwrap();
    }
    // Endless commands, and nobody reads the replies.
    let mut lazy = eventually("the socket", || UnixStream::connect(&socket).ok());
    lazy.set_write_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
    lazy.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
    while lazy.write_all(b"{\"execute\": \"query-qmp-schema\"}\n").is_ok() {}
    let grown = crate::support::helper::peak_rss(pair.source.relay) - idle;
    assert!(grown < 96 << 20, "the relay grew by {} MiB", grown >> 20);
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 4096_u64 << 20 }));
    let end = pair.source.await_status(&["completed", "failed"]);
    assert_eq!(end["status"], "completed", "{end}");
    drop(lazy);
    assert!(!has_ended(pair.source.relay));
}

/// A hostile QEMU does not harm the relay either.
#[test]
fn a_hostile_qemu_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("qemu.py");
    let fake = r#"
import socket, sys
chardev = sys.argv[sys.argv.index("-chardev") + 1]
fd = int(dict(pair.split("=") for pair in chardev.split(","))["fd"])
qmp = socket.socket(fileno=fd)
def say(data): qmp.sendall(data)
say(b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}\r\n')
lines = qmp.makefile("rb")
for line in lines:
    import json
    request = json.loads(line)
    reply = {"return": {}}
    if "id" in request: reply["id"] = request["id"]
    say(json.dumps(reply).encode() + b"\r\n")
    if request["execute"] == "query-status":
        for nonsense in (b"nonsense\r\n", b"[]\r\n", b"{}\r\n", b"\0\xff\r\n", b'{"return": 1, "id": "qemu-rdma-helper-0"}\r\n', b'{"event": 7}\r\n', b"{" * 100000 + b"\r\n"):
            say(nonsense)
        for piece in range(64): say(b"x" * (1 << 20))
        say(b'\r\n{"event": "LAST", "data": {}, "timestamp": {"seconds": 1, "microseconds": 1}}\r\n')
    if request["execute"] == "quit": break
"#;
    fs::write(&script, fake).unwrap();
    let socket = dir.path().join("qmp");
    let child = Command::new(BINARY)
        .args(["run", "--keep-backends", "--", "/usr/bin/python3"])
        .arg(&script)
        .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
        .spawn();
    let child = Process::new(child.unwrap());
    let mut client = Qmp::connect(&socket);
    let relay = relay_of(child.id()).unwrap();
    client.run("query-status", json!({}));
    client.await_event("LAST", |_| true);
    assert!(crate::support::helper::peak_rss(relay) < 96 << 20);
    client.run("quit", json!({}));
    eventually("the relay's end", || has_ended(relay).then_some(()));
}
