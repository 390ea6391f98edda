//! `worker`: one migration, ordered over standard input.

use std::os::fd::AsFd as _;

use anyhow::Context as _;
use qemu_rdma_helper::{
    sandbox::{Role, confine},
    worker,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use tracing::warn;

use super::exit;

/// The worker process of one migration.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The migration's side
    side: Side,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Side {
    Source,
    Destination,
}

/// Makes the worker the OOM killer's first choice.
const OOM_SCORE_ADJ: &str = "1000";

/// Run the migration; its outcome is reported to the relay.
pub fn run(args: &Args) -> anyhow::Result<u8> {
    // The process was started as /proc/self/exe, which says nothing in a process list. It also
    // works without a name.
    let _ = rustix::thread::set_name(c"rdma-worker");
    // When memory runs out, the kernel must not kill QEMU: a worker has mapped as much of the
    // guest's memory, and without it only a migration fails. Raising the score needs no privilege
    // (proc(5)).
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        warn!(%error, "out of memory, the kernel may kill QEMU first");
    }
    // Only now: the files in /proc of a process that does not dump core belong to root.
    leave_no_core();
    // After everything that needs more than a migration does, and before there is a second thread.
    confine(match args.side {
        Side::Source => Role::Source,
        Side::Destination => Role::Destination,
    });
    let control = std::io::stdin().as_fd().try_clone_to_owned();
    let control = control.context("No socket to the relay on standard input")?;
    worker::process::run(control.into()).context("The worker is started by the relay only")?;
    Ok(exit::DONE)
}

/// Disable core dumps: mappings of the guest's memory are excluded from them, buffers are not.
/// Processes without privileges can no longer trace this one, either.
fn leave_no_core() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let limited = setrlimit(Resource::Core, none);
    let denied = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    if let Err(error) = limited.and(denied) {
        warn!(%error, "a core dump may contain parts of the guest's memory");
    }
}
