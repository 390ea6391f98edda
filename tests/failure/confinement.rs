//! The sandbox of relay and worker: forbidden system calls are tried under the real filters, and
//! the filters are in place under `run` and under `attach`.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
};

use crate::support::{Config, Helper, Pair, Qmp, wrapped::WrappedPair};
use qemu_rdma_helper::sandbox::{Role, filter};
use serde_json::json;

/// Python program: installs a filter, given in hexadecimal, and makes system calls, given one per
/// line as name, number and arguments.
///
/// Prints the name and errno (or 0) of each call.
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

const ROLES: [Role; 4] = [Role::Attached, Role::Started, Role::Source, Role::Destination];

/// The PID that the filters are built for. No process has it.
const OURSELVES: u32 = 0x7fff_fff0;

/// Make the calls under the filter. Return their names and errnos.
fn tried(room: Role, calls: &[(&str, i64, &[i64])]) -> Vec<(String, i32)> {
    let program = filter(room, OURSELVES).unwrap();
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

/// `__X32_SYSCALL_BIT`: set in the call numbers of the x32 ABI.
const X32: i64 = 0x4000_0000;

/// Forbidden to relay and worker. The arguments make a call harmless if it is allowed by mistake.
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
    // Limits, CPUs and priority of other processes, and signals to them.
    ("prlimit64", libc::SYS_prlimit64, &[-1, 0, 0, 0]),
    ("sched_setaffinity", libc::SYS_sched_setaffinity, &[-1, 0, 0]),
    ("setpriority", libc::SYS_setpriority, &[0, -1, 0]),
    ("pidfd_send_signal", libc::SYS_pidfd_send_signal, &[-1, 0, 0, 0]),
    ("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &[-1, 0, 0]),
    // A number that no kernel uses yet.
    ("unknown", 1000, &[]),
];

/// Allowed to the relay only.
const RELAYS: &[(&str, i64, &[i64])] = &[
    ("execve", libc::SYS_execve, &[0, 0, 0]),
    ("pidfd_open", libc::SYS_pidfd_open, &[-1, 0]),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, &[-1, 0, 0]),
    ("kill", libc::SYS_kill, &[OURSELVES as i64, 0]),
    ("unlinkat", libc::SYS_unlinkat, &[-1, 0, 0]),
    ("fchmod", libc::SYS_fchmod, &[-1, 0]),
];

/// Forbidden to a worker: starting processes (one starts if allowed by mistake), signals to others,
/// and files that are created, renamed, removed or changed in mode or owner.
const NO_WORKERS: &[(&str, i64, &[i64])] = &[
    ("fork", libc::SYS_fork, &[]),
    ("clone", libc::SYS_clone, &[17, 0, 0, 0, 0]),
    ("tgkill", libc::SYS_tgkill, &[1, 1, 0]),
    ("chmod", libc::SYS_chmod, &[0, 0]),
    ("fchmodat", libc::SYS_fchmodat, &[-1, 0, 0]),
    ("chown", libc::SYS_chown, &[0, 0, 0]),
    ("link", libc::SYS_link, &[0, 0]),
    ("linkat", libc::SYS_linkat, &[-1, 0, -1, 0, 0]),
    ("symlink", libc::SYS_symlink, &[0, 0]),
    ("rename", libc::SYS_rename, &[0, 0]),
    ("renameat", libc::SYS_renameat, &[-1, 0, -1, 0]),
    ("renameat2", libc::SYS_renameat2, &[-1, 0, -1, 0, 0]),
    ("mkdir", libc::SYS_mkdir, &[0, 0]),
    ("mkdirat", libc::SYS_mkdirat, &[-1, 0, 0]),
    ("rmdir", libc::SYS_rmdir, &[0]),
    ("unlink", libc::SYS_unlink, &[0]),
    ("creat", libc::SYS_creat, &[0, 0]),
    ("open-create", libc::SYS_open, &[0, 0o101]),
    ("openat-create", libc::SYS_openat, &[-1, 0, 0o101]),
    ("openat-truncate", libc::SYS_openat, &[-1, 0, 0o1001]),
    ("openat-unnamed", libc::SYS_openat, &[-1, 0, 0o20_200_002]),
    ("openat2", libc::SYS_openat2, &[-1, 0, 0, 0]),
];

const ALLOWED: &[(&str, i64, &[i64])] = &[
    ("getpid", libc::SYS_getpid, &[]),
    ("socket", libc::SYS_socket, &[2, 1, 0]),
    ("netlink", libc::SYS_socket, &[16, 3, 0]),
    ("memfd_create", libc::SYS_memfd_create, &[0, 0]),
    ("prlimit64", libc::SYS_prlimit64, &[0, 7, 0, 0]),
    ("sched_setaffinity", libc::SYS_sched_setaffinity, &[0, 0, 0]),
    ("openat", libc::SYS_openat, &[-1, 0, 0o2_000_002]),
    ("openat-directory", libc::SYS_openat, &[-1, 0, 0o200_000]),
    ("tgkill", libc::SYS_tgkill, &[OURSELVES as i64, OURSELVES as i64, 0]),
];

#[track_caller]
fn assert_missing(room: Role, calls: &[(&str, i64, &[i64])]) {
    let results = tried(room, calls);
    assert_eq!(results.len(), calls.len());
    let there: Vec<_> = results.iter().filter(|(_, error)| *error != libc::ENOSYS).collect();
    assert!(there.is_empty(), "{room:?}: {there:?}");
}

#[track_caller]
fn assert_there(room: Role, calls: &[(&str, i64, &[i64])]) {
    let results = tried(room, calls);
    assert_eq!(results.len(), calls.len());
    let missing: Vec<_> = results.iter().filter(|(_, error)| *error == libc::ENOSYS).collect();
    assert!(missing.is_empty(), "{room:?}: {missing:?}");
}

#[test]
fn no_forbidden_call_is_there() {
    for room in ROLES {
        assert_missing(room, FORBIDDEN);
        // What every role needs is allowed.
        assert_there(room, ALLOWED);
    }
}

#[test]
fn a_worker_starts_no_process_and_makes_no_file() {
    for room in [Role::Source, Role::Destination] {
        assert_missing(room, RELAYS);
        assert_missing(room, NO_WORKERS);
    }
    for room in [Role::Attached, Role::Started] {
        assert_there(room, RELAYS);
    }
}

/// A process that makes system calls of another architecture gets ENOSYS and is not killed.
#[test]
fn nothing_is_killed() {
    for room in ROLES {
        let program = filter(room, OURSELVES).unwrap();
        let kills = program.iter().filter(|it| it.code == 6 && it.k >> 31 == 1);
        assert_eq!(kills.count(), 0, "{room:?}");
    }
}

/// A field of `/proc/PID/status`.
fn field(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().to_owned()
}

/// One of the capability sets of a process.
fn capabilities(pid: u32, set: &str) -> u64 {
    u64::from_str_radix(&field(pid, set), 16).unwrap()
}

/// Upper bounds of a process's capabilities: permitted, and passed on to processes it starts.
struct AtMost(u64, u64);

/// Assert `no_new_privs`, the upper bounds of the capabilities and the number of seccomp filters.
#[track_caller]
fn assert_confined(pid: u32, AtMost(permitted, inherited): AtMost, filters: u32) {
    assert_eq!((field(pid, "NoNewPrivs:"), field(pid, "Seccomp:")), ("1".into(), "2".into()));
    for (set, allowed) in [
        ("CapPrm:", permitted),
        ("CapEff:", permitted),
        ("CapInh:", inherited),
        ("CapAmb:", inherited),
    ] {
        let there = capabilities(pid, set);
        assert_eq!(there & !allowed, 0, "{set} {there:x}");
    }
    // Filters inherited from the test process count too.
    let before: u32 = field(std::process::id(), "Seccomp_filters:").parse().unwrap();
    assert_eq!(field(pid, "Seccomp_filters:").parse(), Ok(before + filters));
}

const DAC_OVERRIDE: u64 = 1 << 1;
const DAC_READ_SEARCH: u64 = 1 << 2;
const NET_BIND_SERVICE: u64 = 1 << 10;
const SYS_PTRACE: u64 = 1 << 19;
/// CAP_IPC_LOCK and CAP_SYS_RESOURCE.
const ALL: u64 = 1 << 14 | 1 << 24;

/// A relay of `run`.
const STARTED: AtMost = AtMost(ALL | SYS_PTRACE, ALL);
/// A relay of `attach`.
const ATTACHED: AtMost = AtMost(
    ALL | SYS_PTRACE | DAC_OVERRIDE | DAC_READ_SEARCH | NET_BIND_SERVICE,
    ALL | DAC_OVERRIDE | NET_BIND_SERVICE,
);
/// Workers: of `attach` at either end, and of `run`.
const SOURCE: AtMost = AtMost(ALL | DAC_OVERRIDE, 0);
const DESTINATION: AtMost = AtMost(ALL | NET_BIND_SERVICE, 0);
const WORKER: AtMost = AtMost(ALL, 0);

/// Assert that both ends are confined during a migration.
fn confined_under_attach(pair: &mut Pair) {
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 16 << 20 }));
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    for (host, worker) in [(&pair.source, SOURCE), (&pair.destination, DESTINATION)] {
        assert_confined(host.helper.pid(), ATTACHED, 1);
        assert_confined(host.helper.await_worker(), worker, 2);
    }
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    pair.source.await_status(&["completed"]);
    pair.verify();
}

#[test]
fn relay_and_worker_are_confined_under_attach() {
    confined_under_attach(&mut Pair::start(&Config::default()));
}

/// A helper of another user may get ambient capabilities, as from the packaged unit.
///
/// Its workers do not keep those that open other processes and files.
#[test]
fn a_worker_does_not_get_what_its_relay_was_given() {
    const GIVEN: u64 = DAC_READ_SEARCH | SYS_PTRACE;
    const NOBODY: &[&str] = &[
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=-all,+dac_read_search,+sys_ptrace,+dac_override",
        "--ambient-caps=-all,+dac_read_search,+sys_ptrace,+dac_override",
    ];
    let mut pair = Pair::start(&Config::default());
    fs::set_permissions(pair.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    for name in ["source", "destination"] {
        let host = if name == "source" { &mut pair.source } else { &mut pair.destination };
        host.helper.kill();
        let socket = host.qemu.helper_socket();
        host.helper = Helper::attach_under(NOBODY, pair.dir.path(), name, &socket, &[]);
        host.client = Qmp::connect(&host.helper.socket);
        // The relay has the capabilities under test.
        assert_eq!(capabilities(host.helper.pid(), "CapEff:"), GIVEN | DAC_OVERRIDE);
    }
    confined_under_attach(&mut pair);
}

#[test]
fn relay_and_worker_are_confined_under_run() {
    let mut pair = WrappedPair::start(&Config::default());
    pair.begin(16);
    for host in [&pair.source, &pair.destination] {
        assert_confined(host.relay, STARTED, 1);
        assert_confined(host.await_worker(), WORKER, 2);
    }
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    pair.source.await_status(&["completed"]);
}
