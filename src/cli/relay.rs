//! `relay`: the relay of a QEMU that `run` is about to start, ordered over standard input.

use std::{
    io,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    process::{Command, Stdio},
};

use anyhow::Context as _;
use qemu_rdma_helper::{memory, relay::wrapped};

use super::exit;

/// The relay of a QEMU that `run` starts.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Be the relay; without this, start it detached
    #[arg(long)]
    detached: bool,
}

/// Run the relay; or start it in a process that is detached, and has no descriptors that QEMU
/// inherits.
pub fn run(args: &Args) -> anyhow::Result<u8> {
    if !args.detached {
        memory::close_on_exec_from(3).context("Cannot leave QEMU's descriptors alone")?;
        let mut relay = Command::new("/proc/self/exe");
        relay.arg0("qemu-rdma-helper").args(["relay", "--detached"]).stdout(Stdio::null());
        relay.spawn().context("Cannot start the relay")?;
        return Ok(exit::DONE);
    }
    // The process was started as /proc/self/exe, which says nothing in a process list. It also
    // works without a name.
    let _ = rustix::thread::set_name(c"rdma-relay");
    let control = io::stdin().as_fd().try_clone_to_owned();
    let control = control.context("No socket on standard input")?;
    wrapped::detach().context("Cannot leave management's process group")?;
    exit::block_on(async {
        wrapped::run(control.into()).await.context("The relay can't serve")?;
        Ok(exit::DONE)
    })
}
