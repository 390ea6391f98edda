//! Checks for migrations over verbs. They do not start one.

mod checks;
pub(super) mod memlock;
mod ports;
pub(super) mod probe;
mod requirements;

use std::time::Duration;

use self::{checks::Judged, probe::Device};
use super::{
    cm::EventChannel,
    library::Library,
    route::{self, Route},
};
use crate::{
    address::Address,
    fabric::{self, Finding, Question, Result},
};

/// Time limit for finding a route.
const RESOLVING: Duration = Duration::from_secs(5);

/// Check the libraries, the route, the devices and the memlock limit. Without an address, one
/// usable device is enough.
pub fn check(question: &Question<'_>) -> Vec<Finding> {
    let mut findings = devices(question).unwrap_or_else(|error| vec![Finding::error(&error)]);
    findings.push(memlock::finding(question.helper, question.window, question.guest));
    findings
}

/// Check what would be missing if there were a device.
pub fn check_without_device(question: &Question<'_>) -> Vec<Finding> {
    let library = Library::get().err().map(|error| Finding::error(&error));
    let memlock = memlock::finding(question.helper, question.window, question.guest);
    library.into_iter().chain([memlock]).collect()
}

fn devices(question: &Question<'_>) -> Result<Vec<Finding>> {
    let devices = probe::devices()?;
    // Without the connection manager there is no route to anything.
    EventChannel::new()?;
    let mut findings = Vec::new();
    let mut route = None;
    if let Some(address) = question.address {
        match route::find(address, RESOLVING) {
            Ok(Some(found)) => {
                findings.push(leads(address, &found));
                route = Some(found);
            }
            // The address stands for every device of this host.
            Ok(None) => {}
            Err(error) => findings.push(Finding::error(&error)),
        }
    }
    let is_on_route = |name: &str| route.as_ref().is_none_or(|route: &Route| route.device == name);
    let port = route.as_ref().map(|route| route.port);
    let judged: Vec<_> = devices
        .iter()
        .filter(|(name, _)| is_on_route(name))
        .map(|(_, device)| match device {
            Ok(device) => checks::judge(device, port, question),
            Err(error) => Judged::unusable(Finding::error(error)),
        })
        .chain(unknown(&devices).filter(|_| route.is_none()).map(Judged::unusable))
        .collect();
    let is_enough = route.is_none() && judged.iter().any(|device| device.is_usable);
    let judged = judged.into_iter().flat_map(|device| device.findings);
    findings.extend(judged.map(|it| if is_enough { it.at_most_warning() } else { it }));
    Ok(findings)
}

/// The finding for a route to the address.
fn leads(address: &Address, route: &Route) -> Finding {
    let Route { device, port, from, is_own } = route;
    Finding::good(match from {
        Some(from) if !is_own => {
            format!("Route to {address}: RDMA device {device}, port {port}, from {}", from.ip())
        }
        _ => format!("{address} is an address of RDMA device {device}, port {port}"),
    })
}

/// Findings for devices known to the kernel that libibverbs can't use.
fn unknown(devices: &[(String, Result<Device>)]) -> impl Iterator<Item = Finding> {
    let is_known = |name: &String| devices.iter().any(|(known, _)| known == name);
    fabric::devices().into_iter().filter(move |name| !is_known(name)).map(|name| {
        Finding::fatal(
            format!("RDMA device {name}: libibverbs can't use it"),
            "install its provider (ibverbs-providers), and load the module ib_uverbs",
        )
    })
}
