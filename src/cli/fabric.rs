//! `--fabric`.

use clap::ValueEnum;
use qemu_rdma_helper::relay::FabricChoice;

/// What carries RAM.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Fabric {
    Auto,
    Verbs,
    Tcp,
}

impl From<Fabric> for FabricChoice {
    fn from(fabric: Fabric) -> Self {
        match fabric {
            Fabric::Auto => Self::Auto,
            Fabric::Verbs => Self::Verbs,
            Fabric::Tcp => Self::Tcp,
        }
    }
}
