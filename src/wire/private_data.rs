//! Private data of the connection request and its reply: version, flags, and our extension.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U16, U32},
};

use super::error::WireError;

/// The protocol version (RDMA_CONTROL_VERSION_CURRENT).
pub const VERSION: u32 = 1;

/// Flag: register all memory at the start (RDMA_CAPABILITY_PIN_ALL).
const PIN_ALL: u32 = 1;

/// "QRH1": starts the extension, which a stock QEMU ignores.
const EXTENSION_MAGIC: u32 = u32::from_be_bytes(*b"QRH1");

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Base {
    version: U32,
    flags: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtension {
    magic: U32,
    version: U16,
    window: U16,
    pin_limit: U32,
}

/// What two helpers agree on beyond version 1 of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extension {
    /// Version of the extension; both sides use the lower one.
    pub version: u16,
    /// Number of control messages that the sender has buffers for; at least 1.
    pub window: u16,
    /// Guest RAM that the sender may have pinned at a time, in MiB; 0 for all of it.
    pub pin_limit: u32,
}

impl Extension {
    /// The version described in `docs/protocol.md`.
    pub const VERSION: u16 = 2;

    /// Whether messages about RAM may arrive at any time, as they may from version 2 on.
    pub fn any_time(&self) -> bool {
        self.version >= 2
    }
}

/// Private data, in either direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrivateData {
    /// All memory is registered at the start.
    pub pin_all: bool,
    /// Absent from a stock QEMU.
    pub extension: Option<Extension>,
}

impl PrivateData {
    /// Encode the bytes to send.
    pub fn encode(&self) -> Vec<u8> {
        let flags = if self.pin_all { PIN_ALL } else { 0 };
        let base = Base { version: VERSION.into(), flags: flags.into() };
        let mut bytes = base.as_bytes().to_vec();
        if let Some(extension) = self.extension {
            let raw = RawExtension {
                magic: EXTENSION_MAGIC.into(),
                version: extension.version.into(),
                window: extension.window.into(),
                pin_limit: extension.pin_limit.into(),
            };
            bytes.extend_from_slice(raw.as_bytes());
        }
        bytes
    }

    /// Decode a peer's. Unknown flags are masked and unknown trailing bytes ignored, as in QEMU.
    ///
    /// # Errors
    /// Fewer than 8 bytes, another version, or an extension without buffers.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let Ok((base, rest)) = Base::read_from_prefix(bytes) else {
            let why = format!("{} bytes, less than 8", bytes.len());
            return Err(WireError::malformed("private data", why));
        };
        if base.version.get() != VERSION {
            return Err(WireError::Incompatible(format!(
                "The peer speaks version {} of the RDMA migration protocol and this helper \
                 version {VERSION}; use a QEMU or a helper that speaks it",
                base.version.get()
            )));
        }
        let extension = match RawExtension::read_from_prefix(rest) {
            Ok((raw, _)) if raw.magic.get() == EXTENSION_MAGIC && raw.version.get() > 0 => {
                if raw.window.get() == 0 {
                    return Err(WireError::malformed("private data", "a window of no messages"));
                }
                Some(Extension {
                    version: raw.version.get(),
                    window: raw.window.get(),
                    pin_limit: raw.pin_limit.get(),
                })
            }
            _ => None,
        };
        Ok(Self { pin_all: base.flags.get() & PIN_ALL != 0, extension })
    }
}
