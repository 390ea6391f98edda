//! A QEMU process and the guest in it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::json;

use super::{Qmp, cache, eventually};

/// What backs the guest's RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Memory {
    /// One shared memfd.
    Memfd,
    /// Two shared memfds of the same size, as NUMA nodes, and a third as hot-pluggable DIMM.
    Numa,
    /// A file on tmpfs.
    File,
    /// A memfd of huge pages.
    Huge,
    /// A file in this directory, of which QEMU reserves no pages.
    In(PathBuf),
    /// The machine's default RAM, which is not shared.
    Private,
    /// One shared memfd under the name of the machine's default RAM.
    PcRam,
}

/// What the guest runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guest {
    /// tests/guest/dirty.S: MiB to fill, MiB to write over and over, pause.
    Dirty { fill: u32, hot: u32, spin: u32 },
    /// tests/guest/init.c, with this kernel command line.
    Linux(&'static str),
}

/// How to start a QEMU.
#[derive(Debug, Clone)]
pub struct Config {
    pub version: &'static str,
    pub machine: &'static str,
    pub mib: u32,
    pub memory: Memory,
    pub guest: Guest,
    pub devices: Vec<String>,
    pub incoming: bool,
    pub paused: bool,
    /// The program and arguments that start QEMU and its helper, whose command lines follow.
    pub under: &'static [&'static str],
}

impl Default for Config {
    /// A busy guest in 192 MiB.
    fn default() -> Self {
        Self {
            version: "10.0",
            machine: "pc",
            mib: 192,
            memory: Memory::Memfd,
            guest: Guest::Dirty { fill: 96, hot: 8, spin: 3000 },
            devices: Vec::new(),
            incoming: false,
            paused: false,
            under: &[],
        }
    }
}

impl Config {
    /// A Linux guest that keeps reading its disk with O_DIRECT, so that the host writes its memory.
    pub fn with_direct_reads(self) -> Self {
        let disk = super::cache("guest/disk");
        let drive = format!(
            "-drive file={},if=none,id=disk,format=raw,readonly=on,cache=none,aio=threads -device virtio-blk-pci,drive=disk",
            disk.display()
        );
        let guest = Guest::Linux("fill=64 readers=8");
        Self { machine: "q35", mib: 256, guest, devices: vec![drive], ..self }
    }

    pub fn incoming(mut self) -> Self {
        self.incoming = true;
        self.paused = true;
        self
    }

    fn arguments(&self, dir: &Path, name: &str) -> Vec<String> {
        let accel = std::env::var("QEMU_RDMA_HELPER_TEST_ACCEL").unwrap_or_default();
        let accel = if accel.is_empty() { "tcg" } else { &accel };
        let mut line =
            format!("-accel {accel} -nodefaults -no-user-config -display none -m {}", self.mib);
        let machine = self.machine;
        let backend = |id: &str, mib: u32| {
            format!("-object memory-backend-memfd,id={id},size={mib}M,share=on")
        };
        match self.memory {
            Memory::Memfd => {
                line += &format!(" -M {machine},memory-backend=ram0 {}", backend("ram0", self.mib));
            }
            Memory::Numa => {
                let half = self.mib / 2;
                line += &format!(
                    ",slots=2,maxmem=4G -M {machine} -smp 2 {} {}",
                    backend("ram0", half),
                    backend("ram1", half)
                );
                line += " -numa node,memdev=ram0,cpus=0 -numa node,memdev=ram1,cpus=1";
                line += &format!(" {} -device pc-dimm,id=dimm,memdev=dimm0", backend("dimm0", 64));
            }
            Memory::File => {
                let path = format!(
                    "/dev/shm/qemu-rdma-helper-test-{}-{name}",
                    dir.file_name().unwrap().to_str().unwrap()
                );
                line += &format!(
                    " -M {machine},memory-backend=ram0 -object memory-backend-file,id=ram0,size={}M,share=on,mem-path={path}",
                    self.mib
                );
            }
            Memory::Huge => {
                line += &format!(
                    " -M {machine},memory-backend=ram0 {},hugetlb=on,hugetlbsize=2M",
                    backend("ram0", self.mib)
                );
            }
            Memory::In(ref directory) => {
                line += &format!(
                    " -M {machine},memory-backend=ram0 -object memory-backend-file,id=ram0,size={}M,share=on,reserve=off,mem-path={}",
                    self.mib,
                    directory.display()
                );
            }
            Memory::Private => line += &format!(" -M {machine}"),
            Memory::PcRam => {
                let backend = backend("pc.ram", self.mib);
                line += &format!(" -M {machine},memory-backend=pc.ram {backend}");
            }
        }
        let mut arguments: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let mut add =
            |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_owned()));
        match self.guest {
            Guest::Dirty { fill, hot, spin } => {
                let append = format!("{fill} {hot} {spin}");
                add(&["-kernel", cache("guest/dirty.elf").to_str().unwrap(), "-append", &append]);
            }
            Guest::Linux(append) => {
                // KVM writes the clock page before the guest runs, so that page would differ.
                let append = format!(
                    "console=ttyS0 quiet panic=-1 nokaslr mitigations=off no-kvmclock {append}"
                );
                add(&["-kernel", cache("guest/vmlinuz").to_str().unwrap(), "-append", &append]);
                add(&["-initrd", cache("guest/initrd").to_str().unwrap()]);
            }
        }
        add(&["-serial", &format!("file:{}", dir.join(format!("{name}.console")).display())]);
        for socket in ["helper", "test", "spare"] {
            let path = dir.join(format!("{name}.{socket}.qemu"));
            add(&["-qmp", &format!("unix:{},server=on,wait=off", path.display())]);
        }
        for device in &self.devices {
            add(&device.split(' ').collect::<Vec<_>>());
        }
        if self.incoming {
            add(&["-incoming", "defer"]);
        }
        if self.paused {
            add(&["-S"]);
        }
        arguments
    }
}

/// A running QEMU, killed and reaped on drop.
pub struct Qemu {
    pub child: Process,
    pub qmp: Qmp,
    pub config: Config,
    log: Log,
    name: String,
    dir: PathBuf,
}

/// A process that does not outlive its test.
pub struct Process(Child);

impl Process {
    pub fn new(child: Child) -> Self {
        Self(child)
    }
}

impl std::ops::Deref for Process {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl std::ops::DerefMut for Process {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
        let _ = self.wait();
    }
}

/// The output of a QEMU, shown when its test fails.
struct Log(PathBuf);

impl Log {
    fn read(&self) -> String {
        fs::read_to_string(&self.0).unwrap_or_default()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}:\n{}", self.0.display(), self.read());
        }
    }
}

/// A command for `program`, started by `under` if any.
pub fn command_under(under: &[&str], program: &Path) -> Command {
    let [first, rest @ ..] = under else { return Command::new(program) };
    let mut command = Command::new(first);
    command.args(rest).arg(program);
    command
}

impl Qemu {
    #[track_caller]
    pub fn start(dir: &Path, name: &str, config: &Config) -> Self {
        let log = Log(dir.join(format!("{name}.log")));
        let output = File::create(&log.0).unwrap();
        let child = command_under(config.under, &cache(&format!("bin/qemu-{}", config.version)))
            .args(config.arguments(dir, name))
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        let child = Process(child);
        let socket = dir.join(format!("{name}.test.qemu"));
        let qmp = Qmp::connect(&socket);
        let (name, dir) = (name.to_owned(), dir.to_owned());
        Self { child, qmp, config: config.clone(), log, name, dir }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The QMP socket for the helper.
    pub fn helper_socket(&self) -> PathBuf {
        self.dir.join(format!("{}.helper.qemu", self.name))
    }

    /// A third QMP socket.
    pub fn spare_socket(&self) -> PathBuf {
        self.dir.join(format!("{}.spare.qemu", self.name))
    }

    pub fn log(&self) -> String {
        self.log.read()
    }

    pub fn console(&self) -> String {
        let bytes = fs::read(self.dir.join(format!("{}.console", self.name))).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub fn status(&mut self) -> String {
        let state = self.qmp.run("query-status", json!({}));
        state["status"].as_str().unwrap().to_owned()
    }

    /// The numbers that dirty.S publishes: magic, ready, passes, writes, errors.
    fn dirty_numbers(&mut self) -> Vec<u32> {
        let text = self.qmp.hmp("xp /5wx 0x1f0000");
        let words = text.split_whitespace().filter_map(|word| word.strip_prefix("0x"));
        words.filter_map(|word| u32::from_str_radix(word, 16).ok()).collect()
    }

    fn ticks(&self) -> usize {
        self.console().lines().filter(|line| line.starts_with("tick ")).count()
    }

    /// Wait until the guest's workload runs.
    #[track_caller]
    pub fn await_guest(&mut self) {
        match self.config.guest {
            Guest::Dirty { .. } => {
                eventually("the guest", || (self.dirty_numbers()[1] == 1).then_some(()))
            }
            Guest::Linux(_) => eventually("the Linux guest", || (self.ticks() >= 2).then_some(())),
        }
    }

    /// Assert that the guest makes progress and finds its memory as it left it.
    #[track_caller]
    pub fn assert_goes_on(&mut self) {
        match self.config.guest {
            Guest::Dirty { .. } => {
                let before = self.dirty_numbers();
                eventually("the guest to go on", || {
                    let now = self.dirty_numbers();
                    // Two passes, so that every page was checked.
                    (now[2] >= before[2].wrapping_add(2)).then_some(())
                });
                assert_eq!(self.dirty_numbers()[4], 0, "the guest found other values");
            }
            Guest::Linux(_) => {
                let before = self.ticks();
                eventually("the Linux guest to go on", || {
                    (self.ticks() >= before + 3).then_some(())
                });
            }
        }
        let console = self.console();
        assert!(!console.contains("MISMATCH"), "{console}");
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        for word in self.config.arguments(&self.dir, &self.name) {
            if let Some((_, path)) = word.split_once("mem-path=") {
                // Fails for a directory: QEMU's file there has no name.
                let _ = fs::remove_file(path);
            }
        }
    }
}
