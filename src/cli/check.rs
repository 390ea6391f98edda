//! `check`: looks for what would stop a migration, before it is tried.

mod qemu;

use std::path::PathBuf;

use qemu_rdma_helper::{
    address::Address,
    control::FabricKind,
    fabric::{self, Finding, Question, Severity},
    qmp::uri::{self, Target},
    relay::FabricChoice,
    wire::credit::WINDOW,
};

use self::qemu::Attached;
use super::{exit, fabric::Fabric, settings::CONNECTIONS};

/// Look for what would stop a migration over rdma: from or to this host.
///
/// Checks the RDMA devices and the memlock limit. With --qemu-qmp also checks the QEMU there and what
/// its guest needs; if a helper serves the socket, its limit and its fabric count. With an address,
/// finds the route to it without connecting, and checks only the device on that route. Each finding has
/// a hint; the exit code is 1 if a migration would fail.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// QEMU's QMP socket, or a helper's
    #[arg(long, value_name = "PATH")]
    qemu_qmp: Option<PathBuf>,
    /// QEMU's PID, if another process serves the socket
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pid: Option<u32>,
    /// What carries RAM, as for attach; default: what the helper at --qemu-qmp uses, else auto
    #[arg(long, value_enum)]
    fabric: Option<Fabric>,
    /// Destination, or address to listen on: rdma:HOST:PORT
    #[arg(value_name = "URI", value_parser = parse_address)]
    address: Option<Address>,
}

fn parse_address(text: &str) -> Result<Address, String> {
    match uri::parse(text) {
        Ok(Target::Rdma(address)) => Ok(address),
        Ok(Target::Other) => Err("it must be rdma:HOST:PORT".into()),
        Err(error) => Err(error.desc),
    }
}

/// Print the findings.
pub async fn run(args: Args) -> anyhow::Result<u8> {
    let asked = args.fabric.map(FabricChoice::from);
    let attached = match &args.qemu_qmp {
        Some(path) => Some(Attached::look(path, args.pid, asked).await?),
        None => None,
    };
    let helper = attached.as_ref().and_then(|attached| attached.helper.as_ref());
    let choice = asked.or(helper.map(|helper| helper.fabric)).unwrap_or(FabricChoice::Auto);
    let question = Question {
        address: args.address.as_ref(),
        guest: attached.as_ref().and_then(|attached| attached.guest.as_ref()),
        helper: helper.map(|helper| helper.pid),
        window: WINDOW,
        lanes: helper.map_or(CONNECTIONS, |helper| helper.connections),
    };
    let mut findings = look(&question, choice);
    findings.iter().for_each(print);
    if let Some(attached) = attached {
        println!("{}", attached.heading);
        attached.findings.iter().for_each(print);
        findings.extend(attached.findings);
    }
    let is_fatal = findings.iter().any(Finding::is_fatal);
    if !is_fatal {
        print(&Finding::good("nothing that is known would stop a migration"));
    }
    Ok(if is_fatal { exit::FAILED } else { exit::DONE })
}

fn print(finding: &Finding) {
    let severity = match finding.severity {
        Severity::Good => "ok",
        Severity::Warning => "warning",
        Severity::Fatal => "fail",
    };
    println!("{severity:<8} {}", finding.text);
    if !finding.hint.is_empty() {
        println!("         hint: {}", finding.hint);
    }
}

/// Check this host.
fn look(question: &Question<'_>, choice: FabricChoice) -> Vec<Finding> {
    if let Err(error) = choice.check() {
        let missing = Finding::error(&error);
        return [missing].into_iter().chain(without_device(question)).collect();
    }
    match choice.kind() {
        FabricKind::Verbs => over_verbs(question),
        FabricKind::Tcp => {
            let mut findings = if choice == FabricChoice::Auto {
                // RDMA is not used: what it lacks stops nothing.
                let missing = without_device(question).into_iter().map(Finding::at_most_warning);
                [no_device()].into_iter().chain(missing).collect()
            } else {
                vec![Finding::good("Fabric tcp: no RDMA device is used")]
            };
            findings.extend(question.address.map(fabric::tcp::preflight));
            findings
        }
    }
}

#[cfg(feature = "verbs")]
use fabric::verbs::preflight::{check as over_verbs, check_without_device as without_device};

/// A fabric that is not built in can't be checked.
#[cfg(not(feature = "verbs"))]
fn over_verbs(_: &Question<'_>) -> Vec<Finding> {
    Vec::new()
}

#[cfg(not(feature = "verbs"))]
use over_verbs as without_device;

/// Return why `auto` takes tcp.
fn no_device() -> Finding {
    if cfg!(feature = "verbs") {
        Finding::warning(
            "RDMA devices: none; migrations use the tcp fabric",
            "load the driver of the RDMA device, or 'rdma link add rxe0 type rxe netdev DEVICE'",
        )
    } else {
        Finding::warning(
            "This build has no 'verbs' fabric; migrations use the tcp fabric",
            "build with the feature 'verbs'",
        )
    }
}
