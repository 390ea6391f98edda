//! What `check` finds at a QMP socket.

use std::path::Path;

use qemu_rdma_helper::{
    fabric::{Finding, Guest},
    qemu::{
        blockers::{self, Blocker},
        blocks::{self, RamBlock},
    },
    qmp::Execute as _,
    relay::FabricChoice,
};
use serde_json::Value;

use crate::cli::client::Client;

/// A helper that serves the socket.
pub struct Helper {
    /// Its process.
    pub pid: u32,
    /// What carries its migrations.
    pub fabric: FabricChoice,
}

/// The QEMU at the socket, or behind the helper there.
pub struct Attached {
    /// Which it is.
    pub heading: String,
    /// What was found of it.
    pub findings: Vec<Finding>,
    /// `None` if its RAM blocks are not known.
    pub guest: Option<Guest>,
    /// `None` at QEMU's own socket.
    pub helper: Option<Helper>,
}

impl Attached {
    /// Look at the QEMU at `path`, whose process is `pid`, if that is not known otherwise.
    pub async fn look(path: &Path, pid: Option<u32>) -> anyhow::Result<Self> {
        let client = &mut Client::connect(path).await?;
        // A helper knows its QEMU's process; asked at QEMU's own socket the command is unknown.
        let info = client.execute("query-rdma-helper", Value::Null).await.ok();
        let known = info.as_ref().and_then(|info| u32::try_from(info["pid"].as_u64()?).ok());
        let pid = pid.or(known).unwrap_or(client.pid);
        let helper = info.map(|info| Helper {
            pid: client.pid,
            fabric: if info["fabric"] == "verbs" { FabricChoice::Verbs } else { FabricChoice::Tcp },
        });
        let version = client.execute("query-version", Value::Null).await?;
        let number = |part: &str| version["qemu"][part].as_u64().unwrap_or(0);
        let (major, minor, micro) = (number("major"), number("minor"), number("micro"));
        let heading = format!("QEMU {major}.{minor}.{micro}, process {pid}");
        let (findings, guest) = match blocks::find(client, pid).await {
            Ok(blocks) => {
                let mut findings: Vec<_> = blocks.iter().map(describe).collect();
                let blockers = blockers::find(client, &blocks).await?;
                let fatal = |Blocker { reason, cure }| Finding::fatal(reason, cure);
                findings.extend(blockers.into_iter().map(fatal));
                (findings, Some(guest(client, &blocks).await?))
            }
            Err(error) => (vec![Finding::error(&format!("RAM blocks: {error}"))], None),
        };
        Ok(Self { heading, findings, guest, helper })
    }
}

/// How a block travels.
fn describe(block: &RamBlock) -> Finding {
    let RamBlock { name, length, .. } = block;
    let size = format!("{} KiB", length >> 10);
    Finding::good(match (&block.backing, &block.why_not) {
        (Some(backing), _) => format!("RAM block '{name}', {size}: written from {}", backing.path),
        (None, why) => {
            let why = why.as_deref().unwrap_or("it is not shared");
            format!("RAM block '{name}', {size}: in the stream ({why})")
        }
    })
}

/// What matters of the guest to a device.
async fn guest(client: &mut Client, blocks: &[RamBlock]) -> anyhow::Result<Guest> {
    let capabilities = client.execute("query-migrate-capabilities", Value::Null).await?;
    let status = client.execute("query-status", Value::Null).await?;
    let leaves = status["status"] != "inmigrate";
    Ok(Guest {
        blocks: blocks.iter().filter(|it| it.backing.is_some()).map(|it| it.length).collect(),
        pin_all: blockers::is_on(&capabilities, "rdma-pin-all"),
        // There is a balloon if it can be asked how large the guest is.
        copied: leaves && client.execute("query-balloon", Value::Null).await.is_ok(),
    })
}
