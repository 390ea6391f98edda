//! What migrations and commands need of the relay: QEMU, and how it is to be migrated.

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
    /// `verbs` where there is a device, else `tcp`.
    Auto,
    /// RDMA or nothing.
    Verbs,
    /// TCP.
    Tcp,
}

impl FabricChoice {
    /// What carries a migration that starts now.
    pub fn kind(self) -> FabricKind {
        match self {
            Self::Auto => fabric::auto(),
            Self::Tcp => FabricKind::Tcp,
            Self::Verbs => FabricKind::Verbs,
        }
    }

    /// Can it be had on this host?
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
    /// How long a transfer that is due may make no progress.
    pub stall_timeout: Duration,
    /// How long the peer's RDMA device may give no sign of life.
    pub peer_timeout: Duration,
    /// Connections, or queue pairs, that carry RAM between two helpers.
    pub connections: u16,
    /// Multifd channels that a source's QEMU should use; 0 for none.
    pub channels: u16,
    /// Bytes of guest RAM that may be pinned at a time; `None`: all of it.
    pub pin_limit: Option<u64>,
    /// Processors that workers may use; none: all.
    #[serde(default)]
    pub cpus: Vec<u16>,
}

/// What migrations and commands need of the relay.
#[derive(Clone)]
pub struct Context {
    /// The session.
    pub qemu: Qemu,
    /// QEMU's own socket, for a worker whose relay is gone.
    pub qemu_qmp: Option<QmpSocket>,
    /// QEMU's process.
    pub pid: u32,
    /// The same, and its files.
    pub process: Arc<Process>,
    /// How migrations are carried.
    pub settings: Settings,
    /// Backends on memory of the helper's.
    pub memory: Arc<[OwnMemory]>,
}

impl Context {
    /// QEMU's RAM blocks.
    pub async fn blocks(&self) -> Result<Vec<RamBlock>, QemuError> {
        ram_blocks::find(&mut self.qemu.clone(), self.process.files(), &self.memory).await
    }

    /// What the client set in QEMU that matters to a worker.
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

/// By which chunks QEMU's own RDMA would register memory (since 11.1), as a stock peer does.
fn chunk_size(parameters: &Value) -> u64 {
    let size = parameters["x-rdma-chunk-size"].as_u64();
    let is_one = |size: &u64| size.is_power_of_two() && (CHUNK..=CHUNK_MAX).contains(size);
    size.filter(is_one).unwrap_or(CHUNK)
}

/// The blocks of an order.
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
