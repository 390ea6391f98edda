//! How migrations are carried: what `attach` and `run` are told alike.

use std::time::Duration;

use qemu_rdma_helper::relay;

use super::{fabric::Fabric, migrate::parse_size};

/// Queue pairs for RAM, unless it is told otherwise.
pub const QUEUE_PAIRS: u16 = 1;

/// How migrations are carried.
#[derive(Debug, clap::Args)]
pub struct Settings {
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
}

impl From<Settings> for relay::Settings {
    fn from(settings: Settings) -> Self {
        Self {
            fabric: settings.fabric.into(),
            stall_timeout: Duration::from_secs(settings.stall_timeout),
            peer_timeout: Duration::from_secs(settings.peer_timeout),
            queue_pairs: settings.queue_pairs,
            pin_limit: settings.pin_limit,
        }
    }
}

/// What writes that are on their way need, with room for ranges to come and go.
const PIN_LIMIT_MIN: u64 = 16 << 20;

fn parse_pin_limit(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        limit if limit < PIN_LIMIT_MIN => Err("it is less than 16 MiB".into()),
        limit => Ok(limit),
    }
}
