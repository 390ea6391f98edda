//! Reads a port's GIDs and network interface from sysfs.
//!
//! libibverbs names the types of GIDs only since version 32; sysfs has always done so.

use std::{
    fs,
    net::{IpAddr, Ipv6Addr},
    path::Path,
};

/// RDMA devices in sysfs.
pub(super) const DEVICES: &str = "/sys/class/infiniband";

/// Network interfaces in sysfs.
const INTERFACES: &str = "/sys/class/net";

/// A used entry of the GID table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gid {
    /// The IP address that it was derived from.
    pub ip: IpAddr,
    /// It is for RoCE v2, which is routable; v1 is not.
    pub v2: bool,
}

impl Gid {
    /// Whether the address is link-local. Every interface derives one from its MAC address;
    /// migrations do not use it.
    pub(super) fn is_link_local(&self) -> bool {
        matches!(self.ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
    }
}

/// The network interface of a RoCE port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Name of the interface.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
}

/// Read the network interface and the GIDs of a port of the device in directory `device`.
pub(super) fn read(device: &Path, port: u8) -> (Option<Interface>, Vec<Gid>) {
    let port = device.join("ports").join(port.to_string());
    let mut indices: Vec<u32> = fs::read_dir(port.join("gids"))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    indices.sort_unstable();
    let attribute = |path: &str, index: u32| text(&port.join(path).join(index.to_string()));
    let gids = indices.iter().filter_map(|&index| {
        // Unused entries have no type.
        let kind = attribute("gid_attrs/types", index)?;
        Some(Gid { ip: ip(&attribute("gids", index)?)?, v2: kind == "RoCE v2" })
    });
    let name = indices.iter().find_map(|&index| attribute("gid_attrs/ndevs", index));
    let interface = name.and_then(|name| {
        let mtu = text(&Path::new(INTERFACES).join(&name).join("mtu"))?;
        Some(Interface { mtu: mtu.parse().ok()?, name })
    });
    (interface, gids.collect())
}

/// Read the single line of an attribute.
fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim_end().to_owned()).filter(|text| !text.is_empty())
}

/// The IP address that a GID was derived from.
fn ip(gid: &str) -> Option<IpAddr> {
    Some(gid.parse::<Ipv6Addr>().ok()?.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gid_table_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let port = dir.path().join("ports/1");
        let write = |path: &str, text: &str| {
            let path = port.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("gids/0", "fe80:0000:0000:0000:0c8c:c2ff:fe6d:a332\n");
        write("gid_attrs/types/0", "IB/RoCE v1\n");
        write("gid_attrs/ndevs/0", "lo\n");
        write("gids/1", "0000:0000:0000:0000:0000:ffff:0a4d:0001\n");
        write("gid_attrs/types/1", "RoCE v2\n");
        // Unused: the kernel does not let its type be read.
        write("gids/2", "0000:0000:0000:0000:0000:0000:0000:0000\n");
        let (interface, gids) = read(dir.path(), 1);
        let [local, routed] = gids[..] else { panic!("{gids:?}") };
        assert!(local.is_link_local() && !local.v2);
        assert_eq!(routed, Gid { ip: [10, 77, 0, 1].into(), v2: true });
        assert!(!routed.is_link_local());
        assert_eq!(interface.unwrap().name, "lo");
        assert_eq!(read(dir.path(), 2), (None, Vec::new()));
    }
}
