//! What `check` finds at a QMP socket.

use std::path::Path;

use qemu_rdma_helper::{
    control::FabricKind,
    fabric::{Finding, Guest},
    qemu::{
        Process, Version,
        blocker::Blocker,
        blockers,
        ram_blocks::{self, RamBlock},
    },
    qmp::Execute as _,
    ram::Transfer,
    relay::FabricChoice,
};
use serde_json::Value;

use crate::cli::{client::Client, settings::CONNECTIONS};

/// A helper that serves the socket.
pub struct Helper {
    /// Its PID.
    pub pid: u32,
    /// Fabric of its migrations.
    pub fabric: FabricChoice,
    /// Connections, or queue pairs, that carry RAM.
    pub connections: u16,
    /// Bytes of guest RAM that may be pinned at a time.
    pin_limit: Option<u64>,
    /// PID of its QEMU.
    qemu: Option<u32>,
}

impl Helper {
    /// Query the helper, which knows its QEMU's PID. On QEMU's own socket the command is unknown.
    async fn ask(client: &mut Client) -> Option<Self> {
        let info = client.execute("query-rdma-helper", Value::Null).await.ok()?;
        let connections = info["connections"].as_u64().and_then(|count| count.try_into().ok());
        Some(Self {
            pid: client.pid,
            fabric: if info["fabric"] == "verbs" { FabricChoice::Verbs } else { FabricChoice::Tcp },
            connections: connections.unwrap_or(CONNECTIONS),
            pin_limit: info["pin-limit"].as_u64(),
            qemu: info["pid"].as_u64().and_then(|pid| pid.try_into().ok()),
        })
    }
}

/// The QEMU at the socket, or at the helper that serves it.
pub struct Attached {
    /// Names the QEMU.
    pub heading: String,
    /// Findings about it.
    pub findings: Vec<Finding>,
    /// `None` if its RAM blocks are not known.
    pub guest: Option<Guest>,
    /// `None` at QEMU's own socket.
    pub helper: Option<Helper>,
}

impl Attached {
    /// Inspect the QEMU at `path`. Its PID is `pid`, or else what is known of it; its migrations
    /// use the fabric `asked` for, or else the helper's.
    pub async fn look(
        path: &Path,
        pid: Option<u32>,
        asked: Option<FabricChoice>,
    ) -> anyhow::Result<Self> {
        let client = &mut Client::connect(path).await?;
        let helper = Helper::ask(client).await;
        let known = helper.as_ref().and_then(|helper| helper.qemu);
        let pid = pid.or(known).unwrap_or(client.pid);
        let fabric = asked.or(helper.as_ref().map(|helper| helper.fabric));
        let fabric = fabric.unwrap_or(FabricChoice::Auto).kind();
        let version = Version::ask(client).await?;
        let heading = format!("QEMU {version}, process {pid}");
        let (mut findings, guest) = match ram_blocks::find(client, &Process::open(pid), &[]).await {
            Ok(blocks) => {
                let pin_limit = helper.as_ref().and_then(|helper| helper.pin_limit);
                let guest = guest(client, &blocks, pin_limit).await?;
                (judge(client, &blocks, fabric).await?, Some(guest))
            }
            Err(error) => (vec![Finding::error(&format!("RAM blocks: {error}"))], None),
        };
        findings.extend(version.too_new().map(warning));
        Ok(Self { heading, findings, guest, helper })
    }
}

fn warning(Blocker { reason, hint }: Blocker) -> Finding {
    Finding::warning(reason, hint)
}

/// Describe how each block transfers, and find what would stop a migration.
async fn judge(
    client: &mut Client,
    blocks: &[RamBlock],
    fabric: FabricKind,
) -> anyhow::Result<Vec<Finding>> {
    let mut findings: Vec<_> = blocks.iter().map(|block| describe(block, fabric)).collect();
    findings.extend(blockers::memory(blocks).map(warning));
    let blockers = blockers::find(client, blocks, fabric).await?;
    let fatal = |Blocker { reason, hint }| Finding::fatal(reason, hint);
    findings.extend(blockers.into_iter().map(fatal));
    Ok(findings)
}

/// Describe how a block transfers.
fn describe(block: &RamBlock, fabric: FabricKind) -> Finding {
    let (transfer, why) = block.transfer(fabric);
    let path = block.backing.as_ref().map(|backing| backing.path.as_str());
    let how = match transfer {
        Transfer::Direct => format!("written from {}", path.unwrap_or_default()),
        Transfer::Copied => format!("written from the stream ({})", why.unwrap_or_default()),
        Transfer::Inline => format!("in the stream ({})", why.unwrap_or_default()),
    };
    Finding::good(format!("RAM block '{}', {} KiB: {how}", block.name, block.length >> 10))
}

/// Return what a device must know of the guest: at the source the device reads direct blocks, at
/// the destination it writes all blocks that have a file.
async fn guest(
    client: &mut Client,
    blocks: &[RamBlock],
    pin_limit: Option<u64>,
) -> anyhow::Result<Guest> {
    let capabilities = client.execute("query-migrate-capabilities", Value::Null).await?;
    let status = client.execute("query-status", Value::Null).await?;
    let leaves = status["status"] != "inmigrate";
    let transfers = |block: &RamBlock, wanted| block.transfer(FabricKind::Verbs).0 == wanted;
    let is_registered = |block: &&RamBlock| match leaves {
        true => transfers(block, Transfer::Direct),
        false => block.backing.is_some(),
    };
    Ok(Guest {
        blocks: blocks.iter().filter(is_registered).map(|block| block.length).collect(),
        pin_all: blockers::is_on(&capabilities, "rdma-pin-all"),
        pin_limit,
        staged: leaves && blocks.iter().any(|block| transfers(block, Transfer::Copied)),
    })
}
