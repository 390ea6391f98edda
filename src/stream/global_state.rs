//! The guest's run state before the switchover, which QEMU sends to the destination.
//!
//! Only QEMU knows where the sections of the device state after RAM begin. This one is recognised
//! by its header (`vmstate_globalstate` of `migration/global_state.c`).

/// The section's name with its length, instance 0, version 1.
const HEAD: &[u8] = b"\x0bglobalstate\0\0\0\0\0\0\0\x01";

/// Length of what follows: the text's length, and the text in a field of 100 bytes.
const FIELDS: usize = 4 + 100;

/// Searches for the section in input split at any byte.
#[derive(Debug, Default)]
pub(super) struct GlobalState {
    /// Bytes in which the section may have begun.
    rest: Vec<u8>,
    found: bool,
}

impl GlobalState {
    /// Search the next bytes after RAM. Return the state, as in `query-status`, once.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Option<String> {
        if self.found {
            return None;
        }
        self.rest.extend_from_slice(bytes);
        let status = self.rest.windows(HEAD.len()).position(|window| window == HEAD);
        let Some(start) = status.map(|head| head + HEAD.len()) else {
            let keep = self.rest.len().min(HEAD.len() - 1);
            self.rest.drain(..self.rest.len() - keep);
            return None;
        };
        let Some(fields) = self.rest.get(start..start + FIELDS) else {
            self.rest.drain(..start - HEAD.len());
            return None;
        };
        self.found = true;
        let status = fields[4..].split(|byte| *byte == 0).next().unwrap_or_default();
        let plain = status.iter().all(|byte| byte.is_ascii_lowercase() || *byte == b'-');
        let status = String::from_utf8_lossy(status).into_owned();
        self.rest = Vec::new();
        (plain && !status.is_empty()).then_some(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(status: &str) -> Vec<u8> {
        let mut bytes = vec![4, 0, 0, 0, 40];
        bytes.extend_from_slice(HEAD);
        bytes.extend_from_slice(&(status.len() as u32 + 1).to_be_bytes());
        bytes.extend_from_slice(status.as_bytes());
        bytes.resize(5 + HEAD.len() + FIELDS, 0);
        bytes
    }

    #[test]
    fn it_is_found_wherever_it_is_cut() {
        let stream = [&[7; 300][..], &section("guest-panicked"), &[9; 50], &section("running")];
        let stream = stream.concat();
        for size in 1..stream.len() {
            let mut state = GlobalState::default();
            let found: Vec<_> = stream.chunks(size).filter_map(|piece| state.push(piece)).collect();
            assert_eq!(found, ["guest-panicked"], "{size} bytes at a time");
        }
    }

    #[test]
    fn what_is_no_state_is_not_said() {
        for status in ["", "\x1b[31m", "Running"] {
            assert_eq!(GlobalState::default().push(&section(status)), None, "{status:?}");
        }
        let mut state = GlobalState::default();
        assert_eq!(state.push(&[0x0b; 100_000]), None);
        assert!(state.rest.len() < HEAD.len());
    }
}
