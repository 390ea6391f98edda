//! `run`: starts QEMU with a relay in front of its monitors, as management's emulator.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use qemu_rdma_helper::relay::launch::{self, Launch};

use super::settings::Settings;

/// Variable with the options of `run` for an emulator that is a link: management passes none.
const OPTIONS: &str = "QEMU_RDMA_HELPER_OPTIONS";

/// This program's name.
const HELPER: &str = env!("CARGO_BIN_NAME");

/// Where to look for emulators that are not in PATH.
const DIRECTORIES: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/usr/libexec"];

/// Start QEMU, and serve QMP in place of its monitors.
///
/// This process becomes QEMU, with its exit status, its signals and its descriptors; the helper runs
/// next to it and exits with it. The helper serves QMP monitors on Unix sockets (-qmp unix:..., and
/// -mon mode=control or -object monitor-qmp on -chardev socket). A warning names each other monitor: it
/// is left alone, and a migration over rdma: there is QEMU's own. Private RAM becomes shared.
/// -incoming rdma:HOST:PORT works. Command lines that only query QEMU run unchanged.
///
/// A link to this program whose name begins with 'qemu-system-' does the same with the QEMU of that
/// name (without an '-rdma' at its end), so that it can be libvirt's <emulator>. Its options come
/// from the environment variable QEMU_RDMA_HELPER_OPTIONS.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    settings: Settings,
    /// Leave RAM backends unchanged; private ones are migrated from QEMU's stream, and not written by
    /// RDMA at a destination
    #[arg(long)]
    keep_backends: bool,
    /// QEMU and its arguments
    #[arg(last = true, required = true, value_name = "QEMU")]
    command: Vec<OsString>,
}

/// Become QEMU.
pub fn run(args: Args) -> anyhow::Result<u8> {
    let Args { settings, keep_backends, command } = args;
    let mut command = command.into_iter();
    let binary = command.next().unwrap_or_default();
    let arguments = command.collect();
    match launch::launch(Launch { binary, arguments, settings: settings.into(), keep_backends })? {}
}

/// Return this process's arguments; under an emulator's name, those of `run`.
///
/// # Errors
/// There is no emulator of that name.
pub fn arguments() -> anyhow::Result<Vec<OsString>> {
    let arguments: Vec<OsString> = env::args_os().collect();
    let name = arguments.first().map(Path::new).and_then(Path::file_name);
    let Some(name) = name.filter(|name| is_emulator(name)) else { return Ok(arguments) };
    let Some(qemu) = find(name) else {
        anyhow::bail!(
            "No QEMU named {} is in PATH or {}, other than this link to the helper; install it, \
             or let a script run 'qemu-rdma-helper run -- /path/of/qemu \"$@\"'",
            shorter(name).unwrap_or(name).display(),
            DIRECTORIES.join(", ")
        );
    };
    let mut words = vec!["qemu-rdma-helper".into(), "run".into()];
    let options = env::var(OPTIONS).unwrap_or_default();
    words.extend(options.split_whitespace().map(OsString::from));
    words.extend(["--".into(), qemu.into()]);
    words.extend(arguments.into_iter().skip(1));
    Ok(words)
}

fn is_emulator(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b"qemu-system-")
}

/// Return the name of the QEMU that a link of this name stands for.
fn shorter(name: &OsStr) -> Option<&OsStr> {
    name.to_str()?.strip_suffix("-rdma").map(OsStr::new)
}

/// Find the QEMU of this name, or of the part before its `-rdma`.
fn find(name: &OsStr) -> Option<PathBuf> {
    let own = fs::metadata("/proc/self/exe").ok()?;
    let is_own = |file: &fs::Metadata| (file.dev(), file.ino()) == (own.dev(), own.ino());
    let is_program = |file: &fs::Metadata| file.is_file() && file.mode() & 0o111 != 0;
    let is_other = |path: &PathBuf| {
        // A link to another copy of the helper would end up here again, forever.
        let is_helper = fs::canonicalize(path).is_ok_and(|file| file.ends_with(HELPER));
        !is_helper && fs::metadata(path).is_ok_and(|file| is_program(&file) && !is_own(&file))
    };
    let path = env::var_os("PATH").unwrap_or_default();
    [Some(name), shorter(name)].into_iter().flatten().find_map(|name| {
        let directories = env::split_paths(&path).chain(DIRECTORIES.iter().map(PathBuf::from));
        directories.map(|directory| directory.join(name)).find(is_other)
    })
}
