//! What `check` finds on a host with RDMA devices, and that its hints help.
//!
//! `scripts/lab/test` runs these where there is a device; elsewhere they are skipped. Tests that
//! need a broken device create one.

use std::{
    path::Path,
    process::{Command, Output},
};

use crate::support::{Config, Guest, Helper, Host, Pair, Qmp, eventually, helper::BINARY};
use serde_json::json;

/// Command prefix: a user without CAP_IPC_LOCK, and a limit for half of this guest's memory.
const NOBODY_WITH_64_MIB: [&str; 6] = [
    "prlimit",
    "--memlock=67108864",
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
];

/// The same with the usual default limit.
const NOBODY_WITH_8_MIB: [&str; 6] =
    ["prlimit", "--memlock=8388608", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

fn run(line: &str) {
    let status = Command::new("sh").args(["-c", line]).status().unwrap();
    assert!(status.success(), "{line}");
}

/// Return exit code and output, with the hints on the lines of their findings.
#[track_caller]
fn outcome(mut command: Command) -> (i32, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = String::from_utf8(stdout).unwrap();
    println!("{text}{}", String::from_utf8(stderr).unwrap());
    (status.code().unwrap(), text.replace("\n         hint: ", " HINT "))
}

#[track_caller]
fn check(arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(BINARY);
    command.arg("check").args(arguments);
    outcome(command)
}

/// Run `check` after `before`, in a mount namespace of its own.
#[track_caller]
fn check_after(before: &str, arguments: &str) -> (i32, String) {
    let line = format!("{before} && exec {BINARY} check {arguments}");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &line]);
    outcome(command)
}

/// Assert that exactly one line begins and ends like this.
#[track_caller]
fn assert_line(text: &str, begin: &str, end: &str) {
    let is_it = |line: &&str| line.starts_with(begin) && line.ends_with(end);
    assert_eq!(text.lines().filter(is_it).count(), 1, "no line '{begin} … {end}' in:\n{text}");
}

/// A soft-RoCE device for one test, on an interface that is down and has no address.
struct Device {
    name: String,
    interface: String,
}

impl Device {
    fn new(name: &str, mtu: u32) -> Self {
        let device = Self { name: format!("rxe-{name}"), interface: format!("eth-{name}") };
        let Self { name, interface } = &device;
        run(&format!("ip link add {interface} mtu {mtu} type dummy"));
        run(&format!("rdma link add {name} type rxe netdev {interface}"));
        device
    }

    /// Run `ip` with these words, where DEV stands for the interface.
    fn ip(&self, words: &str) {
        run(&format!("ip {}", words.replace("DEV", &self.interface)));
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let Self { name, interface } = self;
        let line = format!("rdma link delete {name}; ip link delete {interface}");
        let _ = Command::new("sh").args(["-c", &line]).status();
    }
}

#[test]
fn a_device_that_is_as_it_should_be() {
    if !crate::support::lab() {
        return;
    }
    for host in [&*crate::support::address(), "0.0.0.0", "[::]", ""] {
        let (code, text) = check(&["--fabric", "verbs", &format!("rdma:{host}:4444")]);
        assert_eq!(code, 0);
        assert_line(&text, "ok       RDMA device rxe0: max_qp ", "max_mr_size unlimited");
        let port = "ok       RDMA device rxe0, port 1: ACTIVE, RoCE v2 GID of 10.77.0.1 on lab0, \
                    path MTU 4096 of 4096 (netdev MTU 9000)";
        assert_line(&text, port, "the other host's must be the same");
        assert_line(&text, "ok       memlock of a helper that is started from here: ", "");
        assert_line(&text, "ok       nothing that is known would stop a migration", "");
    }
    let (code, text) = check(&["rdma:10.77.0.1:4444"]);
    assert_line(&text, "ok       10.77.0.1:4444 is an address of RDMA device rxe0, port 1", "");
    assert_eq!(code, 0);
    let (code, text) = check(&["rdma:10.77.0.200:4444"]);
    let route = "ok       Route to 10.77.0.200:4444: RDMA device rxe0, port 1, from 10.77.0.1";
    assert_line(&text, route, "");
    assert_eq!(code, 0);
}

/// `check` reports how the arrival of writes is proved, on InfiniBand's transport and on iWARP.
#[test]
fn how_arrival_is_proved() {
    if !crate::support::lab() {
        return;
    }
    let (code, text) =
        check(&["--fabric", "verbs", &format!("rdma:{}:4444", crate::support::address())]);
    assert_eq!(code, 0);
    match crate::support::device().as_str() {
        "siw0" => {
            let iwarp =
                "ok       RDMA device siw0: iWARP, whose completions say nothing of the other";
            assert_line(&text, iwarp, "and each pass waits for that");
            assert_line(&text, "ok       RDMA device siw0: max_qp ", "");
            assert_line(&text, "ok       RDMA device siw0, port 1: ACTIVE", "");
        }
        device => {
            let infiniband = format!("ok       RDMA device {device}: InfiniBand's transport; ");
            assert_line(&text, &infiniband, "proves that they have landed");
        }
    }
}

#[test]
fn a_link_that_is_down() {
    if !crate::support::lab() {
        return;
    }
    let device = Device::new("down", 9000);
    device.ip("address add 10.78.1.1/24 dev DEV");
    let (code, text) = check(&["rdma:10.78.1.1:4444"]);
    let down = "RDMA device rxe-down, port 1: the port is DOWN, its physical link Disabled HINT \
                bring netdev eth-down up ('ip link set eth-down up'), and check its cable";
    assert_line(&text, &format!("fail     {down}"), "");
    assert!(!text.contains("rxe0"), "only the device on the route is judged:\n{text}");
    assert_eq!(code, 1);
    // Without an address another working device is enough.
    let (code, text) = check(&[]);
    assert_line(&text, &format!("warning  {down}"), "");
    assert_eq!(code, 0);
    device.ip("link set DEV up");
    let (code, text) = check(&["rdma:10.78.1.1:4444"]);
    assert_line(&text, "ok       RDMA device rxe-down, port 1: ACTIVE", "");
    assert_eq!(code, 0);
}

#[test]
fn an_interface_without_an_address() {
    if !crate::support::lab() {
        return;
    }
    let device = Device::new("bare", 9000);
    device.ip("link set DEV up");
    let (_, text) = check(&[]);
    let bare = "warning  RDMA device rxe-bare, port 1: it has no GID to migrate with, because netdev \
                eth-bare has no IP address HINT give it one: 'ip addr add ADDRESS/PREFIX dev eth-bare'";
    assert_line(&text, bare, "");
    let (code, text) = check(&["rdma:10.78.2.1:4444"]);
    assert_line(&text, "fail     No route leads to 10.78.2.1:4444", "");
    assert_line(&text, bare, "");
    assert_eq!(code, 1);
    device.ip("address add 10.78.2.1/24 dev DEV");
    let (code, text) = check(&["rdma:10.78.2.1:4444"]);
    let port =
        "ok       RDMA device rxe-bare, port 1: ACTIVE, RoCE v2 GID of 10.78.2.1 on eth-bare";
    assert_line(&text, port, "");
    assert_eq!(code, 0);
}

#[test]
fn an_interface_with_a_small_mtu() {
    if !crate::support::lab() {
        return;
    }
    let device = Device::new("mtu", 1000);
    device.ip("address add 10.78.3.1/24 dev DEV");
    device.ip("link set DEV up");
    let (code, text) = check(&["rdma:10.78.3.1:4444"]);
    let small = "warning  RDMA device rxe-mtu, port 1: its path MTU is only 512 (netdev MTU 1000), \
                 which makes it slow HINT 'ip link set eth-mtu mtu 9000' at both hosts";
    assert_line(&text, small, "");
    assert_eq!(code, 0);
    for (mtu, path_mtu) in [(1500, 1024), (9000, 4096)] {
        device.ip(&format!("link set DEV mtu {mtu}"));
        let (_, text) = check(&["rdma:10.78.3.1:4444"]);
        let words = format!("path MTU {path_mtu} of 4096 (netdev MTU {mtu})");
        assert!(text.contains(&words), "{words}:\n{text}");
    }
}

#[test]
fn a_device_that_may_not_be_opened() {
    if !crate::support::lab() {
        return;
    }
    let _device = Device::new("shut", 9000);
    let node = "$(basename $(dirname $(grep -lx rxe-shut /sys/class/infiniband_verbs/*/ibdev)))";
    run(&format!("chmod 600 /dev/infiniband/{node}"));
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", BINARY, "check"]);
    let (_, text) = outcome(command);
    let shut = "warning  RDMA device rxe-shut: it can't be opened (";
    let hint = "let the helper's user read and write /dev/infiniband/uverbs*";
    assert_line(&text, shut, hint);
}

#[test]
fn no_device_and_no_libraries() {
    if !crate::support::lab() {
        return;
    }
    let hidden = "mount -t tmpfs none /sys/class/infiniband";
    let (code, text) = check_after(hidden, "");
    assert_line(
        &text,
        "warning  RDMA devices: none; migrations use the tcp fabric",
        "netdev DEVICE'",
    );
    assert_eq!(code, 0);
    let (code, text) = check_after(hidden, "--fabric verbs");
    assert_line(
        &text,
        "fail     This host has no RDMA device HINT load its driver",
        "--fabric tcp",
    );
    assert_eq!(code, 1);
    let library = Path::new("/usr/lib/x86_64-linux-gnu/libibverbs.so.1").canonicalize().unwrap();
    let hidden = format!("mount --bind /dev/null {}", library.display());
    let (code, text) = check_after(&hidden, "");
    assert_line(
        &text,
        "fail     This host can't do RDMA: ",
        "(libibverbs1, librdmacm1, ibverbs-providers)",
    );
    assert!(text.contains("libibverbs.so.1"), "{text}");
    assert_eq!(code, 1);
    let (code, _) = check_after(&hidden, "--fabric tcp");
    assert_eq!(code, 0);
}

/// A migration to an address that no device leads to reports the same.
#[test]
fn addresses_that_no_device_leads_to() {
    if !crate::support::lab() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::start(&dir, "source", &Config { paused: true, ..Config::default() });
    for (host_name, finding) in [
        ("192.0.2.1", "No route leads to 192.0.2.1:4444: Network is unreachable"),
        ("127.0.0.1", "This host can't do RDMA: no RDMA device leads to 127.0.0.1:4444"),
        ("nowhere.invalid", "Cannot resolve 'nowhere.invalid': "),
    ] {
        let uri = format!("rdma:{host_name}:4444");
        let (code, text) = check(&[&uri]);
        assert_line(&text, &format!("fail     {finding}"), "");
        assert_eq!(code, 1);
        let error = host.client.fails_to_migrate(&uri);
        println!("{error}\n");
        assert!(error.contains(finding), "{error}");
        let hint = text.lines().next().unwrap().split_once(" HINT ").unwrap().1;
        assert!(error.ends_with(hint), "{error}");
    }
}

fn config() -> Config {
    let guest = Guest::Dirty { fill: 80, hot: 4, spin: 3000 };
    Config { mib: 96, guest, ..Config::default() }
}

/// Run `check` at the socket of a helper.
#[track_caller]
fn check_helper(host: &mut Host) -> (i32, String) {
    let socket = host.helper.socket.clone();
    // The helper serves one client at a time.
    host.client = crate::support::Qmp::connect(&host.qemu.spare_socket());
    let found = check(&["--qemu-qmp", socket.to_str().unwrap()]);
    host.client = crate::support::Qmp::connect(&socket);
    found
}

#[track_caller]
fn assert_limited(host: &mut Host, what: &str) {
    let (code, text) = check_helper(host);
    let pid = host.helper.pid();
    let finding = format!("fail     memlock of the helper, process {pid}: {what}");
    let hint =
        "and LimitMEMLOCK=infinity in its service (under libvirt, <hard_limit> in its domain)";
    assert_line(&text, &finding, hint);
    assert!(text.contains(&format!("'prlimit --pid {pid} --memlock=unlimited' as root")));
    assert_eq!(code, 1);
}

/// Raise the limit of a running helper, as `check` hints.
fn raise_limit(helper: &Helper) {
    run(&format!("prlimit --pid {} --memlock=unlimited", helper.pid()));
}

/// Migrate to a new destination, and return why that failed.
#[track_caller]
fn failed_attempt(pair: &mut Pair, config: &Config, name: &str, pin_all: bool) -> String {
    pair.new_destination(config, name);
    for host in [&mut pair.source, &mut pair.destination] {
        host.client.capability("rdma-pin-all", pin_all);
    }
    let uri = pair.listen();
    let error = pair.source.client.fails_to_migrate(&uri);
    println!("{error}");
    eventually("the guest to run", || (pair.source.qemu.status() == "running").then_some(()));
    pair.source.qemu.assert_goes_on();
    pair.source.helper.await_no_worker();
    error
}

#[test]
fn a_memlock_limit_below_the_guests_memory() {
    if !crate::support::lab() {
        return;
    }
    let config = Config { under: &NOBODY_WITH_64_MIB, ..config() };
    let mut pair = Pair::start(&config);
    for host in [&mut pair.source, &mut pair.destination] {
        assert_limited(host, "65536 KiB, less than the 112 MiB that are registered");
    }
    let words = "Cannot register 96 MiB of RAM block 'ram0': Cannot allocate memory";
    let error = failed_attempt(&mut pair, &config, "first", true);
    assert!(error.starts_with(words) && error.contains("raise the memlock limit"), "{error}");

    // If only the destination's limit is too low, the source is told.
    raise_limit(&pair.source.helper);
    for (name, pin_all) in [("second", true), ("third", false)] {
        let error = failed_attempt(&mut pair, &config, name, pin_all);
        assert!(error.starts_with("The other host says: Cannot register "), "{error}");
        assert!(error.contains("raise the memlock limit"), "{error}");
    }

    pair.new_destination(&config, "fourth");
    raise_limit(&pair.destination.helper);
    for host in [&mut pair.source, &mut pair.destination] {
        let (code, text) = check_helper(host);
        assert_line(&text, "ok       memlock of the helper, process ", ": unlimited");
        assert_eq!(code, 0);
    }
    pair.migrate();
    pair.verify();
}

/// A memlock limit below the message buffers is refused before either side begins.
#[test]
fn a_memlock_limit_below_the_messages_buffers() {
    if !crate::support::lab() {
        return;
    }
    let mut command = Command::new(NOBODY_WITH_8_MIB[0]);
    command.args(&NOBODY_WITH_8_MIB[1..]).args([BINARY, "check", "rdma:10.77.0.1:4444"]);
    let (code, text) = outcome(command);
    let finding = "fail     memlock of a helper that is started from here: 8192 KiB, less than the \
                   16 MiB of message buffers HINT raise it: 'ulimit -l unlimited'";
    assert_line(&text, finding, "");
    assert_eq!(code, 1);
    let config = Config { under: &NOBODY_WITH_8_MIB, ..config() };
    let mut pair = Pair::start(&config);
    let uri = format!("rdma:{}:{}", crate::support::address(), crate::support::free_port());
    let listens = |qmp: &mut Qmp| qmp.refused("migrate-incoming", json!({ "uri": uri }));
    let connects = |qmp: &mut Qmp| qmp.fails_to_migrate(&uri);
    for (host, fail) in [
        (&mut pair.destination, &listens as &dyn Fn(&mut Qmp) -> String),
        (&mut pair.source, &connects),
    ] {
        assert_limited(host, "8192 KiB, less than the 16 MiB of message buffers");
        let error = fail(&mut host.client);
        println!("{error}");
        assert!(error.starts_with("Cannot register "), "{error}");
        let words = " MiB of message buffers: Cannot allocate memory";
        assert!(error.contains(words) && error.contains("raise the memlock limit"), "{error}");
    }
    pair.source.qemu.assert_goes_on();
    for host in [&pair.source, &pair.destination] {
        host.helper.await_no_worker();
        raise_limit(&host.helper);
    }
    pair.migrate();
    pair.verify();
}
