//! What relay and worker can't do any more: each forbidden call is tried behind the very filters, and
//! the filters are there, under `run` and under `attach`.

mod support;

use std::{
    fs,
    io::Write as _,
    process::{Command, Stdio},
};

use qemu_rdma_helper::confinement::{Room, filter};
use serde_json::json;
use support::{Config, Pair, wrapped::WrappedPair};

/// Takes a filter in hexadecimal, and calls with their numbers and arguments, one a line; installs the
/// filter and says of each call with which error it ended, 0 if with none.
const CALLER: &str = r#"
import ctypes, sys
filter, calls = bytes.fromhex(sys.argv[1]), [line.split() for line in sys.argv[2].splitlines()]
libc = ctypes.CDLL(None, use_errno=True)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
program = Program(len(filter) // 8, filter)
assert libc.prctl(38, 1, 0, 0, 0) == 0 # no_new_privs
assert libc.prctl(22, 2, ctypes.byref(program)) == 0, ctypes.get_errno() # a filter
for name, *numbers in calls:
    result = libc.syscall(*[ctypes.c_long(int(number, 0)) for number in numbers])
    print(name, ctypes.get_errno() if result == -1 else 0, flush=True)
"#;

/// Call by call: name and error.
fn tried(room: Room, calls: &[(&str, i64, &[i64])]) -> Vec<(String, i32)> {
    let program = filter(room).unwrap();
    let code = program.iter().flat_map(|it| {
        let [code, k] = [it.code.to_ne_bytes().to_vec(), it.k.to_ne_bytes().to_vec()];
        [code, vec![it.jt, it.jf], k].concat()
    });
    let code: String = code.map(|byte| format!("{byte:02x}")).collect();
    let line = |(name, number, arguments): &(&str, i64, &[i64])| {
        let words = std::iter::once(number).chain(*arguments).map(i64::to_string);
        format!("{name} {}\n", words.collect::<Vec<_>>().join(" "))
    };
    let calls: String = calls.iter().map(line).collect();
    let output = Command::new("python3")
        .args(["-c", CALLER, &code, &calls])
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let _ = std::io::stdout().write_all(text.as_bytes());
    let read = |line: &str| {
        let (name, error) = line.split_once(' ').unwrap();
        (name.to_owned(), error.parse().unwrap())
    };
    assert!(output.status.success(), "{room:?}: {:?}", output.status);
    text.lines().map(read).collect()
}

/// The number of a call for x32.
const X32: i64 = 0x4000_0000;

/// What neither may do. Arguments are such that nothing happens where it is allowed by mistake.
const FORBIDDEN: &[(&str, i64, &[i64])] = &[
    ("x32-read", X32, &[-1, 0, 0]),
    ("x32-execve", X32 | 520, &[0, 0, 0]),
    ("x32-ptrace", X32 | 521, &[-1, 0, 0, 0]),
    ("io_uring_setup", libc::SYS_io_uring_setup, &[0, 0]),
    ("io_uring_enter", libc::SYS_io_uring_enter, &[-1, 0, 0, 0, 0, 0]),
    ("io_uring_register", libc::SYS_io_uring_register, &[-1, 0, 0, 0]),
    // CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWNET with SIGCHLD.
    ("clone-user", libc::SYS_clone, &[0x1000_0011, 0, 0, 0, 0]),
    ("clone-mounts", libc::SYS_clone, &[0x0002_0011, 0, 0, 0, 0]),
    ("clone-network", libc::SYS_clone, &[0x4000_0011, 0, 0, 0, 0]),
    ("clone3", libc::SYS_clone3, &[0, 0]),
    ("unshare", libc::SYS_unshare, &[-1]),
    ("setns", libc::SYS_setns, &[-1, 0]),
    ("mount", libc::SYS_mount, &[0, 0, 0, 0, 0]),
    ("umount2", libc::SYS_umount2, &[0, -1]),
    ("open_tree", libc::SYS_open_tree, &[-1, 0, 0]),
    ("move_mount", libc::SYS_move_mount, &[-1, 0, -1, 0, 0]),
    ("fsopen", libc::SYS_fsopen, &[0, 0]),
    ("fsconfig", libc::SYS_fsconfig, &[-1, 0, 0, 0, 0]),
    ("fsmount", libc::SYS_fsmount, &[-1, 0, 0]),
    ("fspick", libc::SYS_fspick, &[-1, 0, 0]),
    ("mount_setattr", libc::SYS_mount_setattr, &[-1, 0, 0, 0, 0]),
    ("pivot_root", libc::SYS_pivot_root, &[0, 0]),
    ("chroot", libc::SYS_chroot, &[0]),
    ("ptrace", libc::SYS_ptrace, &[-1, 0, 0, 0]),
    ("process_vm_readv", libc::SYS_process_vm_readv, &[-1, 0, 0, 0, 0, 0]),
    ("process_vm_writev", libc::SYS_process_vm_writev, &[-1, 0, 0, 0, 0, 0]),
    ("bpf", libc::SYS_bpf, &[-1, 0, 0]),
    ("perf_event_open", libc::SYS_perf_event_open, &[0, 0, -1, -1, 0]),
    ("userfaultfd", libc::SYS_userfaultfd, &[-1]),
    ("kexec_load", libc::SYS_kexec_load, &[0, -1, 0, 0]),
    ("kexec_file_load", libc::SYS_kexec_file_load, &[-1, -1, 0, 0, 0]),
    ("init_module", libc::SYS_init_module, &[0, 0, 0]),
    ("finit_module", libc::SYS_finit_module, &[-1, 0, 0]),
    ("delete_module", libc::SYS_delete_module, &[0, 0]),
    ("keyctl", libc::SYS_keyctl, &[-1, 0, 0, 0, 0]),
    ("add_key", libc::SYS_add_key, &[0, 0, 0, 0, 0]),
    ("request_key", libc::SYS_request_key, &[0, 0, 0, 0]),
    ("open_by_handle_at", libc::SYS_open_by_handle_at, &[-1, 0, 0]),
    ("setuid", libc::SYS_setuid, &[-1]),
    ("setgid", libc::SYS_setgid, &[-1]),
    ("setresuid", libc::SYS_setresuid, &[-1, -1, -1]),
    ("setgroups", libc::SYS_setgroups, &[-1, 0]),
    ("mknodat", libc::SYS_mknodat, &[-1, 0, 0, 0]),
    ("swapon", libc::SYS_swapon, &[0, 0]),
    ("reboot", libc::SYS_reboot, &[0, 0, 0, 0]),
    ("settimeofday", libc::SYS_settimeofday, &[1, 1]),
    ("iopl", libc::SYS_iopl, &[-1]),
    ("modify_ldt", libc::SYS_modify_ldt, &[-1, 0, 0]),
    ("personality", libc::SYS_personality, &[0xffff_ffff]),
    ("fanotify_init", libc::SYS_fanotify_init, &[-1, 0]),
    // AF_PACKET, AF_ALG, AF_VSOCK.
    ("packets", libc::SYS_socket, &[17, 3, 0]),
    ("ciphers", libc::SYS_socket, &[38, 5, 0]),
    ("vsock", libc::SYS_socket, &[40, 1, 0]),
    // TIOCSTI.
    ("typing", libc::SYS_ioctl, &[-1, 0x5412, 0]),
    // What no kernel has yet.
    ("unknown", 1000, &[]),
];

/// What starts processes, and gets at others'. A process is begun where it is allowed by mistake.
const RELAYS: &[(&str, i64, &[i64])] = &[
    ("execve", libc::SYS_execve, &[0, 0, 0]),
    ("pidfd_open", libc::SYS_pidfd_open, &[-1, 0]),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, &[-1, 0, 0]),
];

const ALLOWED: &[(&str, i64, &[i64])] = &[
    ("getpid", libc::SYS_getpid, &[]),
    ("socket", libc::SYS_socket, &[2, 1, 0]),
    ("netlink", libc::SYS_socket, &[16, 3, 0]),
    ("memfd_create", libc::SYS_memfd_create, &[0, 0]),
];

#[test]
fn no_forbidden_call_is_there() {
    for room in [Room::Attached, Room::Started, Room::Worker] {
        let results = tried(room, FORBIDDEN);
        assert_eq!(results.len(), FORBIDDEN.len());
        let there: Vec<_> = results.iter().filter(|(_, error)| *error != libc::ENOSYS).collect();
        assert!(there.is_empty(), "{room:?}: {there:?}");
        // And what is needed is.
        let missing: Vec<_> =
            tried(room, ALLOWED).into_iter().filter(|(_, error)| *error == libc::ENOSYS).collect();
        assert!(missing.is_empty(), "{room:?}: {missing:?}");
    }
}

#[test]
fn a_worker_starts_no_process() {
    let fork: (&str, i64, &[i64]) = ("fork", libc::SYS_fork, &[]);
    let clone: (&str, i64, &[i64]) = ("clone", libc::SYS_clone, &[17, 0, 0, 0, 0]);
    let calls = [RELAYS, &[fork, clone]].concat();
    let there: Vec<_> =
        tried(Room::Worker, &calls).into_iter().filter(|it| it.1 != libc::ENOSYS).collect();
    assert!(there.is_empty(), "{there:?}");
    for room in [Room::Attached, Room::Started] {
        let missing: Vec<_> =
            tried(room, RELAYS).into_iter().filter(|it| it.1 == libc::ENOSYS).collect();
        assert!(missing.is_empty(), "{room:?}: {missing:?}");
    }
}

/// A process of another architecture's calls is told that there are none, and lives.
#[test]
fn nothing_is_killed() {
    for room in [Room::Attached, Room::Started, Room::Worker] {
        let program = filter(room).unwrap();
        let kills = program.iter().filter(|it| it.code == 6 && it.k >> 31 == 1);
        assert_eq!(kills.count(), 0, "{room:?}");
    }
}

/// A field of a process' status.
fn field(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().to_owned()
}

/// It can get no privilege, has these capabilities at the most, and so many filters.
#[track_caller]
fn assert_confined(pid: u32, capabilities: u64, filters: u32) {
    assert_eq!((field(pid, "NoNewPrivs:"), field(pid, "Seccomp:")), ("1".into(), "2".into()));
    let permitted = u64::from_str_radix(&field(pid, "CapPrm:"), 16).unwrap();
    assert_eq!(permitted & !capabilities, 0, "{permitted:x}");
    // Those of who runs the tests count too.
    let before: u32 = field(std::process::id(), "Seccomp_filters:").parse().unwrap();
    assert_eq!(field(pid, "Seccomp_filters:").parse(), Ok(before + filters));
}

/// CAP_IPC_LOCK, CAP_SYS_PTRACE and CAP_SYS_RESOURCE.
const STARTED: u64 = 1 << 14 | 1 << 19 | 1 << 24;
/// CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_NET_BIND_SERVICE besides.
const ATTACHED: u64 = STARTED | 1 << 1 | 1 << 2 | 1 << 10;
/// CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH, which the relay finds QEMU's memory with.
const FINDING: u64 = 1 << 19 | 1 << 2;

#[test]
fn relay_and_worker_are_confined_under_attach() {
    let mut pair = Pair::start(&Config::default());
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 16 << 20 }));
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    for host in [&pair.source, &pair.destination] {
        assert_confined(host.helper.pid(), ATTACHED, 1);
        assert_confined(host.helper.await_worker(), ATTACHED & !FINDING, 2);
    }
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    pair.source.await_status(&["completed"]);
    pair.verify();
}

#[test]
fn relay_and_worker_are_confined_under_run() {
    let mut pair = WrappedPair::start(&Config::default());
    pair.begin(16);
    for host in [&pair.source, &pair.destination] {
        assert_confined(host.relay, STARTED, 1);
        assert_confined(host.await_worker(), STARTED & !FINDING, 2);
    }
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    pair.source.await_status(&["completed"]);
}
