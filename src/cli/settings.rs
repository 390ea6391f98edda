//! How migrations are carried: options that `attach` and `run` share.

use std::time::Duration;

use qemu_rdma_helper::relay;
use rustix::thread::CpuSet;

use super::{fabric::Fabric, migrate::parse_size};

/// Default number of connections, or queue pairs, for RAM.
pub const CONNECTIONS: u16 = 1;

/// Default number of QEMU's multifd channels.
pub const CHANNELS: u16 = 2;

/// How migrations are carried.
#[derive(Debug, clap::Args)]
pub struct Settings {
    /// What carries RAM: auto uses verbs if there is a device, else tcp
    #[arg(long, value_enum, default_value_t = Fabric::Auto)]
    fabric: Fabric,
    /// Seconds without progress after which the peer counts as lost
    #[arg(long, value_name = "SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(1..=86400))]
    stall_timeout: u64,
    /// Seconds without a sign of life from the peer's RDMA device after which the peer counts as lost
    #[arg(long, value_name = "SECONDS", default_value_t = 5,
          value_parser = clap::value_parser!(u64).range(1..=86400))]
    peer_timeout: u64,
    /// TCP connections, or RDMA queue pairs, that carry RAM, if the peer's helper allows as many
    #[arg(long, alias = "queue-pairs", value_name = "COUNT", default_value_t = CONNECTIONS,
          value_parser = clap::value_parser!(u16).range(1..=16))]
    connections: u16,
    /// Multifd channels through which a source's QEMU sends its RAM to the helper; 0 for none.
    /// Management does not see them
    #[arg(long, value_name = "COUNT", default_value_t = CHANNELS,
          value_parser = clap::value_parser!(u16).range(0..=16))]
    channels: u16,
    /// Guest RAM that may be pinned at a time for RDMA, such as 2g: a bare number is MiB, at least
    /// 16. Default: all
    #[arg(long, value_name = "SIZE", value_parser = parse_pin_limit)]
    pin_limit: Option<u64>,
    /// Processors that a migration may use, as in taskset: 0-3,8. Choose some that no guest uses.
    /// Default: all
    #[arg(long, value_name = "LIST", value_parser = parse_cpus)]
    cpus: Option<Cpus>,
}

/// CPU numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Cpus(Vec<u16>);

impl From<Settings> for relay::Settings {
    fn from(settings: Settings) -> Self {
        Self {
            fabric: settings.fabric.into(),
            stall_timeout: Duration::from_secs(settings.stall_timeout),
            peer_timeout: Duration::from_secs(settings.peer_timeout),
            connections: settings.connections,
            channels: settings.channels,
            pin_limit: settings.pin_limit,
            cpus: settings.cpus.map_or(Vec::new(), |cpus| cpus.0),
        }
    }
}

/// What writes in flight need, with a margin to register and release ranges.
const PIN_LIMIT_MIN: u64 = 16 << 20;

fn parse_pin_limit(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        limit if limit < PIN_LIMIT_MIN => Err("it is less than 16 MiB".into()),
        limit => Ok(limit),
    }
}

fn parse_cpus(text: &str) -> Result<Cpus, String> {
    let wrong = || format!("'{text}' is no list of processors, such as 0-3,8");
    let number = |text: &str| text.parse::<u16>().map_err(|_| wrong());
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last || usize::from(last) >= CpuSet::MAX_CPU {
            return Err(wrong());
        }
        cpus.extend(first..=last);
    }
    Ok(Cpus(cpus))
}

#[cfg(test)]
mod tests {
    use super::{Cpus, parse_cpus};

    #[test]
    fn processors_are_tasksets() {
        assert_eq!(parse_cpus("5"), Ok(Cpus(vec![5])));
        assert_eq!(parse_cpus("0-2,8,1023"), Ok(Cpus(vec![0, 1, 2, 8, 1023])));
        for wrong in ["", ",", "1,", "a", "-1", "3-2", "1-", "0-1024", "99999"] {
            assert!(parse_cpus(wrong).is_err(), "{wrong}");
        }
    }
}
