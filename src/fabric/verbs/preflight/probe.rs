//! Queries devices without using them.

use std::{ffi::CStr, io, mem::MaybeUninit, path::Path, ptr::NonNull};

use rdma_sys::{ibv_context, ibv_device, ibv_device_attr, ibv_port_attr, ibv_port_state};

use super::{
    super::{
        device::Transport,
        library::{Library, check_errno},
    },
    ports::{self, Gid, Interface},
    requirements::Attributes,
};
use crate::fabric::{FabricError, Result};

/// IBV_LINK_LAYER_ETHERNET (infiniband/verbs.h).
const ETHERNET: u8 = 2;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) transport: Transport,
    pub(super) attributes: Attributes,
    pub(super) ports: Vec<Port>,
}

/// Link protocol of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    InfiniBand,
    Iwarp,
    Roce,
}

/// A port of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Port {
    /// Port number, from 1.
    pub(super) number: u8,
    pub(super) link: Link,
    /// `ibv_port_state`.
    pub(super) state: ibv_port_state::Type,
    /// Physical state (ibv_query_port(3)): 5 is LinkUp.
    pub(super) physical: u8,
    /// Active and maximum path MTU in bytes.
    pub(super) mtu: u32,
    pub(super) mtu_max: u32,
    /// From sysfs, for RoCE only.
    pub(super) interface: Option<Interface>,
    pub(super) gids: Vec<Gid>,
}

/// Query all devices that libibverbs finds; return them with their names.
///
/// # Errors
/// If the libraries are missing, or the kernel has no verbs.
pub(super) fn devices() -> Result<Vec<(String, Result<Device>)>> {
    let list = DeviceList::new(Library::get()?)?;
    let devices = list.devices();
    Ok(devices.iter().map(|&raw| (list.name(raw), list.open(raw))).collect())
}

/// The name of an open device.
pub(in super::super) fn name(library: &'static Library, context: NonNull<ibv_context>) -> String {
    // SAFETY: the device is open, so its record exists.
    device_name(library, unsafe { context.as_ref().device })
}

fn device_name(library: &'static Library, device: *mut ibv_device) -> String {
    // SAFETY: the device is from a list that was not freed, or is open.
    let name = unsafe { (library.ibv_get_device_name)(device) };
    // SAFETY: it is a string in the device's record.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// libibverbs' device list.
struct DeviceList {
    raw: NonNull<*mut ibv_device>,
    count: usize,
    library: &'static Library,
}

impl DeviceList {
    fn new(library: &'static Library) -> Result<Self> {
        let mut count = 0;
        // SAFETY: `count` is written.
        let raw = unsafe { (library.ibv_get_device_list)(&mut count) };
        let raw = NonNull::new(raw).ok_or_else(|| {
            let why = io::Error::last_os_error();
            FabricError::Unavailable(format!(
                "the kernel has no verbs ({why}); load the module ib_uverbs and the device's driver"
            ))
        })?;
        Ok(Self { raw, count: usize::try_from(count).unwrap_or(0), library })
    }

    fn devices(&self) -> &[*mut ibv_device] {
        // SAFETY: the list has `count` entries until it is freed.
        unsafe { std::slice::from_raw_parts(self.raw.as_ptr(), self.count) }
    }

    fn name(&self, device: *mut ibv_device) -> String {
        device_name(self.library, device)
    }

    fn open(&self, device: *mut ibv_device) -> Result<Device> {
        let name = self.name(device);
        // SAFETY: the device is from this list.
        let raw = unsafe { (self.library.ibv_open_device)(device) };
        let raw = NonNull::new(raw).ok_or_else(|| {
            let source = io::Error::last_os_error();
            FabricError::Open { device: name.clone(), source }
        })?;
        let opened = Opened { raw, library: self.library };
        // SAFETY: the device is from this list.
        let transport = Transport::of(raw);
        let (attributes, port_count) = opened.attributes()?;
        let ports = (1..=port_count).map(|number| opened.port(&name, number, transport));
        Ok(Device { attributes, ports: ports.collect::<Result<_>>()?, name, transport })
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: freed once; open devices stay open.
        unsafe { (self.library.ibv_free_device_list)(self.raw.as_ptr()) };
    }
}

/// An open device.
struct Opened {
    raw: NonNull<ibv_context>,
    library: &'static Library,
}

impl Opened {
    /// Query the attributes and the number of ports.
    fn attributes(&self) -> Result<(Attributes, u8)> {
        let mut found = MaybeUninit::<ibv_device_attr>::zeroed();
        // SAFETY: the device is open, and `found` has space for the result.
        let errno =
            unsafe { (self.library.ibv_query_device)(self.raw.as_ptr(), found.as_mut_ptr()) };
        check_errno("ibv_query_device", errno)?;
        // SAFETY: the call initialised it; it consists of integers, for which zero is a valid value
        // too.
        let found = unsafe { found.assume_init() };
        let count = |value: i32| u64::try_from(value).unwrap_or(0);
        let attributes = Attributes {
            max_qp: count(found.max_qp),
            max_qp_wr: count(found.max_qp_wr),
            max_sge: count(found.max_sge),
            max_cqe: count(found.max_cqe),
            max_mr: count(found.max_mr),
            max_mr_size: found.max_mr_size,
        };
        Ok((attributes, found.phys_port_cnt))
    }

    fn port(&self, device: &str, number: u8, transport: Transport) -> Result<Port> {
        let mut found = MaybeUninit::<ibv_port_attr>::zeroed();
        // SAFETY: the device is open, and `found` has space: the function writes all but the last
        // field, which was added to the structure later.
        let errno = unsafe {
            (self.library.ibv_query_port)(self.raw.as_ptr(), number, found.as_mut_ptr().cast())
        };
        check_errno("ibv_query_port", errno)?;
        // SAFETY: as in `attributes`.
        let found = unsafe { found.assume_init() };
        let link = match found.link_layer {
            _ if transport == Transport::Iwarp => Link::Iwarp,
            ETHERNET => Link::Roce,
            // Also for an unspecified link layer.
            _ => Link::InfiniBand,
        };
        let (interface, gids) = match link {
            Link::Roce => ports::read(&Path::new(ports::DEVICES).join(device), number),
            _ => (None, Vec::new()),
        };
        Ok(Port {
            number,
            link,
            state: found.state,
            physical: found.phys_state,
            mtu: bytes(found.active_mtu),
            mtu_max: bytes(found.max_mtu),
            interface,
            gids,
        })
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: opened once, and no object was created on it.
        unsafe { (self.library.ibv_close_device)(self.raw.as_ptr()) };
    }
}

/// Convert an `ibv_mtu` to bytes: 1 is 256 bytes, each further step doubles it.
fn bytes(mtu: u32) -> u32 {
    if mtu == 0 { 0 } else { 128_u32.checked_shl(mtu).unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn mtus_are_powers_of_two() {
        assert_eq!([0, 1, 3, 5].map(bytes), [0, 256, 1024, 4096]);
        assert_eq!(bytes(u32::MAX), 0);
    }
}
