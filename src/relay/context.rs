//! What migrations and commands need from the relay: QEMU, and how to migrate it.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{error::RelayError, process::Process, qemu_session::Qemu};
use crate::{
    control::{self, FabricKind, Options, QmpSocket},
    fabric,
    qemu::{
        QemuError, blockers,
        ram_blocks::{self, OwnMemory, RamBlock},
    },
    qmp::{Execute as _, QmpError},
    ram::{CHUNK, CHUNK_MAX},
};

/// Which fabric migrations use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FabricChoice {
    /// `verbs` if there is an RDMA device, else `tcp`.
    Auto,
    /// RDMA only.
    Verbs,
    /// TCP.
    Tcp,
}

impl FabricChoice {
    /// Return the fabric of a migration that starts now.
    pub fn kind(self) -> FabricKind {
        match self {
            Self::Auto => fabric::auto(),
            Self::Tcp => FabricKind::Tcp,
            Self::Verbs => FabricKind::Verbs,
        }
    }

    /// Check that this fabric is available on this host.
    ///
    /// # Errors
    /// [`RelayError::NoVerbs`] or [`RelayError::NoDevice`].
    pub fn check(self) -> Result<(), RelayError> {
        match self {
            Self::Verbs if !cfg!(feature = "verbs") => Err(RelayError::NoVerbs),
            Self::Verbs if fabric::devices().is_empty() => Err(RelayError::NoDevice),
            _ => Ok(()),
        }
    }
}

/// How migrations are carried.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// Which fabric to use.
    pub fabric: FabricChoice,
    /// Longest time without progress of a transfer that is due.
    pub stall_timeout: Duration,
    /// Longest time without a sign of life from the peer's RDMA device.
    pub peer_timeout: Duration,
    /// Connections, or queue pairs, that carry RAM between two helpers.
    pub connections: u16,
    /// Multifd channels that a source's QEMU should use; 0 for none.
    pub channels: u16,
    /// Bytes of guest RAM that may be pinned at a time; `None`: all of it.
    pub pin_limit: Option<u64>,
    /// CPUs that workers may use; empty for all.
    #[serde(default)]
    pub cpus: Vec<u16>,
}

/// What migrations and commands need from the relay.
#[derive(Clone)]
pub struct Context {
    /// The session with QEMU.
    pub qemu: Qemu,
    /// QEMU's own QMP socket, for a worker whose relay is gone.
    pub qemu_qmp: Option<QmpSocket>,
    /// QEMU's PID.
    pub pid: u32,
    /// QEMU's process and its files in /proc.
    pub process: Arc<Process>,
    /// How migrations are carried.
    pub settings: Settings,
    /// RAM backends in memory that the helper made.
    pub memory: Arc<[OwnMemory]>,
}

impl Context {
    /// Find QEMU's RAM blocks.
    pub async fn blocks(&self) -> Result<Vec<RamBlock>, QemuError> {
        ram_blocks::find(&mut self.qemu.clone(), self.process.files(), &self.memory).await
    }

    /// Query the settings in QEMU that matter to a worker.
    pub async fn options(&self, qemu: &mut Qemu) -> Result<Options, QmpError> {
        let capabilities = qemu.execute("query-migrate-capabilities", Value::Null).await?;
        let parameters = qemu.execute("query-migrate-parameters", Value::Null).await?;
        Ok(Options {
            pin_all: blockers::is_on(&capabilities, "rdma-pin-all"),
            return_path: blockers::is_on(&capabilities, "return-path"),
            stall_timeout: self.settings.stall_timeout.as_secs().max(1),
            peer_timeout: self.settings.peer_timeout.as_secs().max(1),
            connections: self.settings.connections,
            channels: self.settings.channels,
            pin_limit: self.settings.pin_limit,
            chunk_size: chunk_size(&parameters),
            cpus: self.settings.cpus.clone(),
            fabric: self.settings.fabric.kind(),
        })
    }
}

/// Return the size of the chunks in which QEMU's own RDMA would register memory, as a stock peer
/// does (settable since 11.1).
fn chunk_size(parameters: &Value) -> u64 {
    let size = parameters["x-rdma-chunk-size"].as_u64();
    let is_one = |size: &u64| size.is_power_of_two() && (CHUNK..=CHUNK_MAX).contains(size);
    size.filter(is_one).unwrap_or(CHUNK)
}

/// Convert blocks for an order to a worker.
pub fn listed(blocks: &[RamBlock]) -> Vec<control::Block> {
    let listed = |block: &RamBlock| control::Block {
        name: block.name.clone(),
        length: block.length,
        page_size: block.page_size,
        file_offset: block.backing.as_ref().map(|backing| backing.offset),
        read_whole: block.read_whole,
    };
    blocks.iter().map(listed).collect()
}
