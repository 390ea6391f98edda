//! `attach`: the relay of a running QEMU.

use std::{path::PathBuf, time::Duration};

use qemu_rdma_helper::relay::{self, AttachOptions};

use super::{exit, settings::Settings};

/// Attach to a running QEMU and serve QMP in its place.
///
/// QEMU must have been started with '-qmp unix:PATH,server=on,wait=off', and its memory should be
/// shared (-object memory-backend-memfd,...,share=on). QEMU may start a little later. Exits when
/// QEMU exits; the guest keeps running when this exits.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// QEMU's QMP socket
    #[arg(long, value_name = "PATH")]
    qemu_qmp: PathBuf,
    /// Where to serve QMP for management
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    /// How long to wait for QEMU's socket; 0 for not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(..=86400))]
    wait: u64,
    #[command(flatten)]
    settings: Settings,
    /// QEMU's PID, if a manager made its QMP socket
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pid: Option<u32>,
}

/// Run until QEMU is gone or a signal arrives.
pub async fn run(args: Args) -> anyhow::Result<u8> {
    relay::attach(AttachOptions {
        qemu_qmp: args.qemu_qmp,
        qmp: args.qmp,
        wait: Duration::from_secs(args.wait),
        settings: args.settings.into(),
        pid: args.pid,
    })
    .await?;
    Ok(exit::DONE)
}
