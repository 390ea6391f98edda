//! `check`: what would stop a migration, before it is tried.

use std::path::PathBuf;

use qemu_rdma_helper::{
    fabric,
    migration::messages::FabricKind,
    qemu::{
        blockers::{self, Blocker},
        blocks,
    },
    qmp::Execute as _,
    stream::Travel,
};
use rustix::process::{Resource, getrlimit};
use serde_json::Value;

use super::client::Client;

/// Look for what would stop a migration over rdma: from or to this host.
///
/// With --qemu-qmp the QEMU there is looked at too. Each finding names its cure; the exit code is
/// 1 if a migration would fail.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// QEMU's QMP socket, or a helper's
    #[arg(long, value_name = "PATH")]
    qemu_qmp: Option<PathBuf>,
    /// QEMU's process, if it is not the one that serves the socket
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pid: Option<u32>,
}

/// Prints findings, and remembers whether one was fatal.
#[derive(Default)]
struct Findings {
    fatal: bool,
}

impl Findings {
    fn ok(&self, text: &str) {
        println!("ok       {text}");
    }

    fn warning(&self, text: &str, cure: &str) {
        println!("warning  {text}\n         cure: {cure}");
    }

    fn fail(&mut self, text: &str, cure: &str) {
        self.fatal = true;
        println!("fail     {text}\n         cure: {cure}");
    }
}

/// Print the findings.
pub async fn run(args: Args) -> anyhow::Result<u8> {
    let mut findings = Findings::default();
    let devices = fabric::devices();
    if devices.is_empty() {
        findings.warning(
            "RDMA devices: none; migrations use the tcp fabric",
            "load the driver of the RDMA device, or 'rdma link add rxe0 type rxe netdev DEVICE'",
        );
    } else {
        findings.ok(&format!("RDMA devices: {}", devices.join(", ")));
    }
    match getrlimit(Resource::Memlock).current {
        None => findings.ok("memlock: unlimited"),
        Some(limit) => findings.warning(
            &format!(
                "memlock: {} KiB, which limits the guest RAM that RDMA can register",
                limit >> 10
            ),
            "raise it: 'ulimit -l unlimited', or LimitMEMLOCK=infinity in the service",
        ),
    }
    if let Some(path) = &args.qemu_qmp {
        let mut client = Client::connect(path).await?;
        check_qemu(&mut client, args.pid, &mut findings).await?;
    }
    Ok(if findings.fatal { super::FAILED } else { super::DONE })
}

async fn check_qemu(
    client: &mut Client,
    pid: Option<u32>,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    // A helper knows its QEMU's process; asked at QEMU's own socket the command is unknown.
    let helper = client.execute("query-rdma-helper", Value::Null).await.ok();
    let fabric = match helper.as_ref().and_then(|info| info["fabric"].as_str()) {
        Some("verbs") => FabricKind::Verbs,
        Some(_) => FabricKind::Tcp,
        None => FabricKind::auto(),
    };
    let known = helper.and_then(|info| u32::try_from(info["pid"].as_u64()?).ok());
    let pid = pid.or(known).unwrap_or(client.pid);
    let version = client.execute("query-version", Value::Null).await?;
    let number = |part: &str| version["qemu"][part].as_u64().unwrap_or(0);
    println!("QEMU {}.{}.{}, process {pid}", number("major"), number("minor"), number("micro"));
    let found = match blocks::find(client, pid).await {
        Ok(found) => found,
        Err(error) => {
            let text = format!("RAM blocks: {error}");
            findings.fail(&text, "see the message");
            return Ok(());
        }
    };
    for block in &found {
        let size = format!("{} KiB", block.length >> 10);
        let (travel, why) = block.travel(fabric);
        let path = block.backing.as_ref().map(|backing| backing.path.as_str());
        let how = match travel {
            Travel::Mapped => format!("written from {}", path.unwrap_or_default()),
            Travel::Staged => format!("written from the stream ({})", why.unwrap_or_default()),
            Travel::InStream => format!("in the stream ({})", why.unwrap_or_default()),
        };
        findings.ok(&format!("RAM block '{}', {size}: {how}", block.name));
    }
    if let Some(Blocker { reason, cure }) = blockers::memory(&found) {
        findings.warning(&reason, &cure);
    }
    let blockers = blockers::find(client, &found, fabric).await?;
    for Blocker { reason, cure } in &blockers {
        findings.fail(reason, cure);
    }
    if blockers.is_empty() {
        findings.ok("nothing that is known would stop a migration");
    }
    Ok(())
}
