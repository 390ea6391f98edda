//! `attach`: the relay beside a running QEMU.

use std::{path::PathBuf, time::Duration};

use qemu_rdma_helper::relay::{self, AttachOptions};

use super::{fabric::Fabric, migrate::parse_size};

/// Queue pairs for RAM, unless it is told otherwise.
pub const QUEUE_PAIRS: u16 = 1;

/// Stand beside a running QEMU and serve QMP in its place.
///
/// QEMU must have been started with '-qmp unix:PATH,server=on,wait=off', and its memory should be
/// shared (-object memory-backend-memfd,...,share=on). Ends when QEMU ends; the guest runs on when
/// this ends.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// QEMU's QMP socket
    #[arg(long, value_name = "PATH")]
    qemu_qmp: PathBuf,
    /// Where to serve QMP for management
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    /// What carries RAM: auto takes verbs where it can, else tcp
    #[arg(long, value_enum, default_value_t = Fabric::Auto)]
    fabric: Fabric,
    /// Seconds without progress after which the peer counts as lost
    #[arg(long, value_name = "SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(1..=86400))]
    stall_timeout: u64,
    /// Seconds without any sign of life of the peer's RDMA device after which it counts as lost
    #[arg(long, value_name = "SECONDS", default_value_t = 5,
          value_parser = clap::value_parser!(u64).range(1..=86400))]
    peer_timeout: u64,
    /// Queue pairs that carry RAM over RDMA, if the peer's helper has as many
    #[arg(long, value_name = "COUNT", default_value_t = QUEUE_PAIRS,
          value_parser = clap::value_parser!(u16).range(1..=16))]
    queue_pairs: u16,
    /// Guest RAM that may be pinned at a time for RDMA, such as 2g: a bare number is MiB, at least
    /// 16. Without it all of it may be
    #[arg(long, value_name = "SIZE", value_parser = parse_pin_limit)]
    pin_limit: Option<u64>,
    /// QEMU's process, if a manager made its QMP socket
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pid: Option<u32>,
}

/// What writes that are on their way need, with room for ranges to come and go.
const PIN_LIMIT_MIN: u64 = 16 << 20;

fn parse_pin_limit(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        limit if limit < PIN_LIMIT_MIN => Err("it is less than 16 MiB".into()),
        limit => Ok(limit),
    }
}

/// Run until QEMU is gone or a signal comes.
pub async fn run(args: Args) -> anyhow::Result<u8> {
    relay::attach(AttachOptions {
        qemu_qmp: args.qemu_qmp,
        qmp: args.qmp,
        fabric: args.fabric.into(),
        stall_timeout: Duration::from_secs(args.stall_timeout),
        peer_timeout: Duration::from_secs(args.peer_timeout),
        queue_pairs: args.queue_pairs,
        pin_limit: args.pin_limit,
        pid: args.pid,
    })
    .await?;
    Ok(super::DONE)
}
