//! Decides whether a device can carry a migration, by its reported attributes.

use rdma_sys::ibv_port_state as state;

use super::{
    super::device::Transport,
    ports::Gid,
    probe::{Device, Link, Port},
    requirements,
};
use crate::fabric::{Finding, Guest, Question};

/// Path MTU in bytes that Ethernet's default MTU allows.
const MTU_USUAL: u32 = 1024;

/// Findings for one device.
pub(super) struct Judged {
    pub(super) findings: Vec<Finding>,
    /// A migration can use one of the checked ports.
    pub(super) is_usable: bool,
}

impl Judged {
    /// The result for a device that can't be queried.
    pub(super) fn unusable(finding: Finding) -> Self {
        Self { findings: vec![finding], is_usable: false }
    }
}

/// Judge a device and all its ports, or only port `only`.
pub(super) fn judge(device: &Device, only: Option<u8>, question: &Question<'_>) -> Judged {
    let mut findings = attributes(device, question);
    let mut is_usable = false;
    let is_capable = !findings.iter().any(Finding::is_fatal);
    for port in &device.ports {
        if only.is_none_or(|only| only == port.number) {
            let found = judge_port(&device.name, port);
            is_usable |= is_capable && !found.is_fatal();
            findings.push(found);
        }
    }
    if is_usable {
        findings.push(arrival(device));
    }
    Judged { findings, is_usable }
}

/// How a migration over the device learns that RAM has arrived.
fn arrival(device: &Device) -> Finding {
    let proof = "a message after the writes of each queue pair proves that they have landed";
    let name = &device.name;
    Finding::good(match device.transport {
        Transport::InfiniBand => format!("RDMA device {name}: InfiniBand's transport; {proof}"),
        Transport::Iwarp => format!(
            "RDMA device {name}: iWARP, whose completions say nothing of the other host; {proof}, and \
             each pass waits for that"
        ),
    })
}

/// Compare the device's attributes with what a migration needs.
fn attributes(device: &Device, question: &Question<'_>) -> Vec<Finding> {
    let &Question { guest, window, lanes, .. } = question;
    let (name, has) = (&device.name, &device.attributes);
    let needs = requirements::attributes(window, lanes, guest);
    let pairs = has.named().into_iter().zip(needs.named());
    let mut findings: Vec<_> = pairs
        .filter(|((_, has), (_, needed))| has < needed)
        .map(|((attribute, has), (_, needed))| {
            let fits_in_ranges = attribute == "max_mr_size"
                && guest.is_some_and(|guest| guest.pin_all && has >= guest.largest_range());
            let hint = if fits_in_ranges {
                "turn rdma-pin-all off, which registers each RAM block as a whole"
            } else {
                "use a device that has more, or --fabric tcp at both ends"
            };
            Finding::fatal(
                format!("RDMA device {name}: its {attribute} is {has}, and {needed} are needed"),
                hint,
            )
        })
        .collect();
    let most = guest.map_or(0, Guest::registrations);
    if findings.is_empty() && has.max_mr < most {
        findings.push(Finding::warning(
            format!(
                "RDMA device {name}: its max_mr is {}, and a guest that writes its memory in small \
                 pieces may need {most}",
                has.max_mr
            ),
            "turn rdma-pin-all on, which registers each RAM block as a whole",
        ));
    }
    if findings.is_empty() {
        let list = has.named().into_iter().zip(needs.named());
        let list = list.map(|((attribute, has), (_, needed))| match has {
            u64::MAX => format!("{attribute} unlimited"),
            _ => format!("{attribute} {has} (needed {needed})"),
        });
        let list = list.collect::<Vec<_>>().join(", ");
        findings.push(Finding::good(format!("RDMA device {name}: {list}")));
    }
    findings
}

/// Judge a port: its state, its addresses and its MTU.
fn judge_port(device: &str, port: &Port) -> Finding {
    let place = format!("RDMA device {device}, port {}", port.number);
    if port.state != state::IBV_PORT_ACTIVE {
        let text = format!(
            "{place}: the port is {}, its physical link {}",
            state_name(port.state),
            physical_name(port.physical)
        );
        return Finding::fatal(text, port_hint(port));
    }
    match port.link {
        Link::Roce => judge_roce(&place, port),
        // TCP handles segmentation: the path MTU does not matter.
        Link::Iwarp => Finding::good(format!("{place}: ACTIVE, iWARP")),
        Link::InfiniBand => Finding::good(format!(
            "{place}: ACTIVE, path MTU {} of {}; the other host's must be the same",
            port.mtu, port.mtu_max
        )),
    }
}

/// Judge a RoCE port that is up, by the addresses and the MTU of its network interface.
fn judge_roce(place: &str, port: &Port) -> Finding {
    let interface = interface_name(port);
    let routed = port.gids.iter().filter(|gid| !gid.is_link_local());
    let Some(Gid { ip, v2 }) = routed.max_by_key(|gid| gid.v2) else {
        return Finding::fatal(
            format!(
                "{place}: it has no GID to migrate with, because netdev {interface} has no IP address"
            ),
            format!("give it one: 'ip addr add ADDRESS/PREFIX dev {interface}'"),
        );
    };
    if !v2 {
        return Finding::warning(
            format!("{place}: the GID of {ip} is of RoCE v1 only, which crosses no router"),
            "use RoCE v2 at both hosts, or hosts of one Ethernet network",
        );
    }
    let netdev = port.interface.as_ref().map(|it| format!(" (netdev MTU {})", it.mtu));
    let netdev = netdev.unwrap_or_default();
    if port.mtu < MTU_USUAL {
        return Finding::warning(
            format!("{place}: its path MTU is only {}{netdev}, which makes it slow", port.mtu),
            format!(
                "'ip link set {interface} mtu 9000' at both hosts, or 1500 where the network has no \
                 jumbo frames"
            ),
        );
    }
    Finding::good(format!(
        "{place}: ACTIVE, RoCE v2 GID of {ip} on {interface}, path MTU {} of {}{netdev}; the other \
         host's must be the same",
        port.mtu, port.mtu_max
    ))
}

fn interface_name(port: &Port) -> &str {
    port.interface.as_ref().map_or("of the device", |interface| &interface.name)
}

fn port_hint(port: &Port) -> String {
    let interface = interface_name(port);
    match (port.link, port.state) {
        (Link::InfiniBand, state::IBV_PORT_INIT | state::IBV_PORT_ARMED) => {
            "start a subnet manager ('opensm') in the fabric".into()
        }
        (Link::InfiniBand, _) => "check the cable and the switch's port".into(),
        _ => format!(
            "bring netdev {interface} up ('ip link set {interface} up'), and check its cable"
        ),
    }
}

fn state_name(port_state: state::Type) -> &'static str {
    match port_state {
        state::IBV_PORT_DOWN => "DOWN",
        state::IBV_PORT_INIT => "INIT",
        state::IBV_PORT_ARMED => "ARMED",
        state::IBV_PORT_ACTIVE => "ACTIVE",
        state::IBV_PORT_ACTIVE_DEFER => "ACTIVE_DEFER",
        _ => "in an unknown state",
    }
}

/// The names are those of sysfs (`ports/N/phys_state`).
fn physical_name(physical: u8) -> &'static str {
    match physical {
        1 => "Sleep",
        2 => "Polling",
        3 => "Disabled",
        4 => "PortConfigurationTraining",
        5 => "LinkUp",
        6 => "LinkErrorRecovery",
        7 => "PhyTest",
        _ => "in an unknown state",
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ports::Interface, requirements::Attributes};
    use super::*;
    use crate::fabric::Severity;

    fn question(guest: Option<&Guest>) -> Question<'_> {
        Question { address: None, guest, helper: None, window: 16, lanes: 1 }
    }

    fn port() -> Port {
        Port {
            number: 1,
            link: Link::Roce,
            state: state::IBV_PORT_ACTIVE,
            physical: 5,
            mtu: 4096,
            mtu_max: 4096,
            interface: Some(Interface { name: "eth1".into(), mtu: 9000 }),
            gids: vec![
                Gid { ip: "fe80::1".parse().unwrap(), v2: true },
                Gid { ip: "10.0.0.1".parse().unwrap(), v2: false },
                Gid { ip: "10.0.0.1".parse().unwrap(), v2: true },
            ],
        }
    }

    /// A device with exactly what is needed.
    fn device(ports: Vec<Port>) -> Device {
        let attributes = requirements::attributes(16, 1, None);
        Device { name: "mlx5_0".into(), transport: Transport::InfiniBand, attributes, ports }
    }

    #[track_caller]
    fn assert_found(finding: &Finding, severity: Severity, text: &str, hint: &str) {
        println!("{finding:?}");
        assert_eq!(finding.severity, severity, "{finding:?}");
        assert!(finding.text.contains(text) && finding.hint.contains(hint), "{finding:?}");
    }

    #[test]
    fn a_port_is_judged() {
        use Severity::{Fatal, Good, Warning};

        let judged = |change: fn(&mut Port)| {
            let mut port = port();
            change(&mut port);
            judge_port("mlx5_0", &port)
        };
        let good = judged(|_| {});
        let words = "port 1: ACTIVE, RoCE v2 GID of 10.0.0.1 on eth1, path MTU 4096 of 4096";
        assert_found(&good, Good, words, "");
        let down = judged(|port| {
            (port.state, port.physical, port.gids) = (state::IBV_PORT_DOWN, 3, Vec::new());
        });
        assert_found(&down, Fatal, "DOWN, its physical link Disabled", "'ip link set eth1 up'");
        let unmanaged = judged(|port| {
            (port.link, port.state) = (Link::InfiniBand, state::IBV_PORT_INIT);
        });
        assert_found(&unmanaged, Fatal, "is INIT, its physical link LinkUp", "subnet manager");
        let no_address = judged(|port| port.gids.truncate(1));
        assert_found(&no_address, Fatal, "netdev eth1 has no IP address", "'ip addr add");
        let v1 = judged(|port| port.gids.truncate(2));
        assert_found(&v1, Warning, "10.0.0.1 is of RoCE v1 only", "RoCE v2 at both hosts");
        let small = judged(|port| {
            (port.mtu, port.interface) = (512, Some(Interface { name: "eth1".into(), mtu: 1000 }));
        });
        assert_found(&small, Warning, "MTU is only 512 (netdev MTU 1000)", "eth1 mtu 9000");
        let usual = judged(|port| port.mtu = 1024);
        assert_found(&usual, Good, "path MTU 1024 of 4096", "");
        let infiniband = judged(|port| {
            (port.link, port.gids, port.interface) = (Link::InfiniBand, Vec::new(), None);
        });
        assert_found(&infiniband, Good, "ACTIVE, path MTU 4096 of 4096; the other", "");
        let iwarp = judged(|port| (port.link, port.gids) = (Link::Iwarp, Vec::new()));
        assert_found(&iwarp, Good, "port 1: ACTIVE, iWARP", "");
    }

    #[test]
    fn a_usable_device_says_how_arrival_is_proved() {
        let judged = |transport| {
            let device = Device { transport, ..device(vec![port()]) };
            judge(&device, None, &question(None)).findings.pop().unwrap()
        };
        let words = "mlx5_0: InfiniBand's transport; a message after the writes";
        assert_found(&judged(Transport::InfiniBand), Severity::Good, words, "");
        let words = "mlx5_0: iWARP, whose completions say nothing of the other host; a message";
        assert_found(&judged(Transport::Iwarp), Severity::Good, words, "");
    }

    #[test]
    fn attributes_are_held_against_what_is_needed() {
        let found = attributes(&device(vec![]), &question(None));
        assert_found(&found[0], Severity::Good, "max_qp_wr 512 (needed 512), max_sge 1", "");
        type Attribute = fn(&mut Attributes) -> &mut u64;
        let changes: [(&str, Attribute); 6] = [
            ("max_qp", |it| &mut it.max_qp),
            ("max_qp_wr", |it| &mut it.max_qp_wr),
            ("max_sge", |it| &mut it.max_sge),
            ("max_cqe", |it| &mut it.max_cqe),
            ("max_mr", |it| &mut it.max_mr),
            ("max_mr_size", |it| &mut it.max_mr_size),
        ];
        for (name, attribute) in changes {
            let mut device = device(vec![port()]);
            *attribute(&mut device.attributes) -= 1;
            let Judged { findings, is_usable } = judge(&device, None, &question(None));
            assert!(!is_usable);
            assert_found(&findings[0], Severity::Fatal, &format!("its {name} is"), "--fabric tcp");
            // The port itself is good.
            assert_eq!((findings.len(), findings[1].severity), (2, Severity::Good));
        }
    }

    #[test]
    fn the_guest_decides_what_is_needed() {
        let mut device = device(vec![port()]);
        let mut guest =
            Guest { blocks: vec![1 << 30, 1 << 20], pin_all: true, pin_limit: None, staged: false };
        device.attributes.max_mr = 100;
        let found = attributes(&device, &question(Some(&guest)));
        assert_found(&found[0], Severity::Fatal, "max_mr_size", "turn rdma-pin-all off");
        guest.pin_all = false;
        let found = attributes(&device, &question(Some(&guest)));
        assert_found(&found[0], Severity::Warning, "may need 1025", "turn rdma-pin-all on");
        device.attributes.max_mr = 1025;
        let found = attributes(&device, &question(Some(&guest)));
        assert_found(&found[0], Severity::Good, "max_mr_size 67108864 (needed 67108864)", "");
    }

    #[test]
    fn one_good_port_is_enough_unless_another_is_asked_for() {
        let down = Port { number: 2, state: state::IBV_PORT_DOWN, ..port() };
        let both = device(vec![port(), down]);
        let usable = |device: &Device, only| judge(device, only, &question(None)).is_usable;
        assert!(usable(&both, None) && usable(&both, Some(1)));
        assert!(!usable(&both, Some(2)));
        assert_eq!(judge(&both, Some(2), &question(None)).findings.len(), 2);
        assert!(!usable(&device(vec![]), None));
    }
}
