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

/// A worker.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Of which side
    side: Side,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Side {
    Source,
    Destination,
}

/// The first to be ended where memory ends.
const OOM_SCORE_ADJ: &str = "1000";

/// Run the migration; its outcome is reported to the relay.
pub fn run(args: &Args) -> anyhow::Result<u8> {
    // It was started as /proc/self/exe, which says nothing in a list of processes. Without a name it
    // works too.
    let _ = rustix::thread::set_name(c"rdma-worker");
    // Where memory ends, it is not QEMU that has to go: a worker has mapped as much of the guest's,
    // and without it only a migration fails. Anybody may offer himself (proc(5)).
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        warn!(%error, "if memory ends, the kernel may choose QEMU");
    }
    // What is in /proc of a process that is not dumped is root's.
    leave_no_core();
    // Behind all that needs more than a migration does, and before there is a second thread.
    confine(match args.side {
        Side::Source => Role::Source,
        Side::Destination => Role::Destination,
    });
    let control = std::io::stdin().as_fd().try_clone_to_owned();
    let control = control.context("No socket to the relay on standard input")?;
    worker::process::run(control.into()).context("The worker is started by the relay only")?;
    Ok(exit::DONE)
}

/// The guest's memory is in mappings that are not dumped, but also in buffers. Whoever has no
/// privilege can't trace this process any more, either.
fn leave_no_core() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let limited = setrlimit(Resource::Core, none);
    let denied = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    if let Err(error) = limited.and(denied) {
        warn!(%error, "a core dump may have parts of the guest's memory");
    }
}
