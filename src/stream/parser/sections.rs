//! What surrounds RAM: section headers, commands, and the state that QEMU sends before RAM.

use super::{Found, Item, Parser, Ram, State, section, shown};
use crate::{
    ram::PAGE,
    stream::{
        error::StreamError,
        fields::{FIELD_MAX, Fields},
    },
};

/// Name, after the device's path, of the section that virtio-mem sends before RAM from QEMU 8.0 on:
/// QEMU must know which memory is plugged before the first page (hw/virtio/virtio-mem.c).
const VIRTIO_MEM: &[u8] = b"virtio-mem-device-early";

impl Parser {
    /// Parse a subsection of the configuration.
    pub(super) fn subsection(&self, fields: &mut Fields<'_>) -> Result<Option<Found>, StreamError> {
        fields.next = 1;
        let (Some(name), Some(_version)) = (fields.string(), fields.u32()) else { return Ok(None) };
        let mut next = State::Subsection;
        let whole = match name {
            b"configuration/target-page-bits" => match fields.u32() {
                Some(bits) if bits != PAGE.trailing_zeros() => {
                    return Err(StreamError::Unsupported("a target page size other than 4 KiB"));
                }
                bits => bits.is_some(),
            },
            b"configuration/uuid" => fields.skip(16).is_some(),
            b"configuration/capabilities" => match fields.u32() {
                Some(0) => true,
                Some(count @ 1..=64) => {
                    next = State::Capabilities(count);
                    true
                }
                Some(count) => return Err(self.malformed(format!("{count} capabilities"))),
                None => false,
            },
            other => {
                let name = shown(other);
                return Err(self.malformed(format!("unknown configuration '{name}'")));
            }
        };
        Ok(whole.then_some(Found { size: fields.next, item: Item::Other, payload: 0, next }))
    }

    /// Parse a section's header, or a command.
    pub(super) fn section(
        &mut self,
        fields: &mut Fields<'_>,
    ) -> Result<Option<Found>, StreamError> {
        let Some(kind) = fields.u8() else { return Ok(None) };
        let next = match kind {
            section::COMMAND => return self.command(fields),
            section::START | section::FULL => {
                let (Some(id), Some(name)) = (fields.u32(), fields.string()) else {
                    return Ok(None);
                };
                let (Some(_instance), Some(version)) = (fields.u32(), fields.u32()) else {
                    return Ok(None);
                };
                if kind == section::FULL && version == 1 && is_virtio_mem(name) {
                    return self.virtio_mem(fields, id);
                }
                if (kind, name) != (section::START, b"ram".as_slice()) {
                    let name = shown(name);
                    return Err(StreamError::UnknownSection(name));
                }
                if version != 4 || self.ram_id.is_some() {
                    return Err(self
                        .malformed(format!("RAM section of version {version}, or a second one")));
                }
                self.ram_id = Some(id);
                State::MemSize
            }
            section::PART | section::END => {
                let Some(id) = fields.u32() else { return Ok(None) };
                if Some(id) != self.ram_id {
                    return Err(self.malformed(format!("a part of unknown section {id}")));
                }
                State::Body(if kind == section::PART { Ram::Part } else { Ram::End })
            }
            section::EOF => return Err(self.malformed("an end before the last RAM section")),
            other => return Err(self.malformed(format!("section type {other:#x}"))),
        };
        Ok(Some(Found { size: fields.next, item: Item::Other, payload: 0, next }))
    }

    /// Parse the rest of a virtio-mem section.
    fn virtio_mem(&self, fields: &mut Fields<'_>, id: u32) -> Result<Option<Found>, StreamError> {
        let Some(length) = virtio_mem_state(fields) else { return Ok(None) };
        let payload = length.map_err(|why| self.malformed(why))?;
        let next = State::DeviceFooter(id);
        Ok(Some(Found { size: fields.next, item: Item::Other, payload, next }))
    }

    /// Parse a command (MIG_CMD_* of `migration/savevm.c`).
    fn command(&self, fields: &mut Fields<'_>) -> Result<Option<Found>, StreamError> {
        let (Some(command), Some(length)) = (fields.u16(), fields.u16()) else { return Ok(None) };
        match command {
            // OPEN_RETURN_PATH, PING, SWITCHOVER_START.
            1 | 2 | 11 => {}
            3..=7 | 9 | 10 => return Err(StreamError::Unsupported("postcopy")),
            8 => return Err(StreamError::Unsupported("COLO")),
            other => return Err(self.malformed(format!("command {other}"))),
        }
        self.bounded(Some(length.into()), FIELD_MAX, "a command")?;
        let whole = fields.skip(length.into());
        let next = State::Section;
        Ok(whole.map(|()| Found { size: fields.next, item: Item::Other, payload: 0, next }))
    }
}

/// Whether this is the name of virtio-mem's section.
fn is_virtio_mem(name: &[u8]) -> bool {
    name.rsplit(|byte| *byte == b'/').next() == Some(VIRTIO_MEM)
}

/// Parse the fields at the start of virtio-mem's section. Return the length of the plugged size and
/// the block bitmap, which follow. `None` if the fields are incomplete, an error if they are
/// inconsistent.
fn virtio_mem_state(fields: &mut Fields<'_>) -> Option<Result<u64, String>> {
    let (_address, size, block) = (fields.u64()?, fields.u64()?, fields.u64()?);
    let _node = fields.u32()?;
    if block < PAGE || !block.is_power_of_two() || !size.is_multiple_of(block) {
        return Some(Err(format!("virtio-mem of {size} bytes in blocks of {block}")));
    }
    let words = (size / block).div_ceil(u64::BITS.into());
    Some(Ok((1 + words) * size_of::<u64>() as u64))
}
