//! `worker`: one migration, ordered over standard input.

use std::os::fd::AsFd as _;

use anyhow::Context as _;
use qemu_rdma_helper::migration;

/// Run the migration; its outcome is reported to the relay.
pub fn run() -> anyhow::Result<u8> {
    let control = std::io::stdin().as_fd().try_clone_to_owned();
    let control = control.context("No socket to the relay on standard input")?;
    migration::worker::run(control.into()).context("The worker is started by 'attach' only")?;
    Ok(super::DONE)
}
