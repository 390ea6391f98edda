//! Commands, replies and events as lines.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value, json, value::RawValue};

use super::QmpError;
use crate::text;

/// A client's command, read for what is to be done with it. What is only relayed keeps its bytes.
#[derive(Debug)]
pub struct Command {
    /// The command's name.
    pub name: String,
    /// Its arguments, unread: they may be many, and are nobody's business unless the command is
    /// ours.
    arguments: Option<Box<RawValue>>,
    /// Its id, exactly as the client wrote it.
    pub id: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct RawCommand<'a> {
    #[serde(borrow)]
    execute: Option<&'a RawValue>,
    #[serde(borrow)]
    arguments: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
}

/// Longest arguments of a command of ours, in bytes.
const ARGUMENTS_MAX: usize = 256 << 10;

/// Why a command is not read.
#[derive(Debug, PartialEq, Eq)]
pub enum Unread {
    /// It is no JSON.
    NoJson,
    /// It is JSON and no proper command: QEMU knows what to say.
    NoCommand,
}

impl Command {
    /// Read a command.
    ///
    /// # Errors
    /// When it is none.
    pub fn read(bytes: &[u8]) -> Result<Self, Unread> {
        // What is skipped is not looked at, and QEMU answers one line of other bytes with several
        // errors.
        let text = std::str::from_utf8(bytes).map_err(|_| Unread::NoJson)?;
        match serde_json::from_str::<RawCommand>(text) {
            Ok(raw) => Self::from_raw(&raw),
            Err(_) => {
                let normal = double_quoted(bytes);
                serde_json::from_slice::<IgnoredAny>(&normal).map_err(|_| Unread::NoJson)?;
                let raw = serde_json::from_slice(&normal).map_err(|_| Unread::NoCommand)?;
                Self::from_raw(&raw)
            }
        }
    }

    fn from_raw(raw: &RawCommand<'_>) -> Result<Self, Unread> {
        let name = raw.execute.and_then(|name| serde_json::from_str(name.get()).ok());
        let name = name.ok_or(Unread::NoCommand)?;
        if raw.arguments.is_some_and(|arguments| !arguments.get().starts_with('{')) {
            return Err(Unread::NoCommand);
        }
        Ok(Self {
            name,
            arguments: raw.arguments.map(ToOwned::to_owned),
            id: raw.id.map(ToOwned::to_owned),
        })
    }

    /// The line of a `human-monitor-command`, however long; `None` where QEMU finds none either.
    pub fn line(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Arguments {
            #[serde(rename = "command-line")]
            line: String,
        }
        let arguments: Arguments = serde_json::from_str(self.arguments.as_ref()?.get()).ok()?;
        Some(arguments.line)
    }

    /// Read its arguments.
    ///
    /// # Errors
    /// For a client: they are too long for any command of ours.
    pub fn arguments(&self) -> Result<Map<String, Value>, QmpError> {
        let Some(arguments) = &self.arguments else { return Ok(Map::new()) };
        let too_long = || {
            let desc =
                format!("The arguments of '{}' have more than {ARGUMENTS_MAX} bytes", self.name);
            QmpError::generic(desc)
        };
        let text = Some(arguments.get()).filter(|text| text.len() <= ARGUMENTS_MAX);
        let text = text.ok_or_else(too_long)?;
        serde_json::from_str(text).map_err(|error| QmpError::generic(error.to_string()))
    }
}

/// The same JSON with QEMU's single-quoted strings in double quotes.
fn double_quoted(bytes: &[u8]) -> Vec<u8> {
    let mut normal = Vec::with_capacity(bytes.len());
    let mut quote = None;
    let mut escaped = false;
    for &byte in bytes {
        match quote {
            None if byte == b'\'' || byte == b'"' => {
                quote = Some(byte);
                normal.push(b'"');
            }
            Some(_) if escaped => {
                escaped = false;
                if byte == b'\'' {
                    // JSON has no such escape.
                    normal.pop();
                }
                normal.push(byte);
            }
            Some(open) if byte == open => {
                quote = None;
                normal.push(b'"');
            }
            Some(b'\'') if byte == b'"' => normal.extend_from_slice(b"\\\""),
            _ => {
                escaped = quote.is_some() && byte == b'\\';
                normal.push(byte);
            }
        }
    }
    normal
}

/// A line in QMP's framing, which libvirt takes at its word: `\r\n`.
fn line(mut text: String) -> Vec<u8> {
    text.push_str("\r\n");
    text.into_bytes()
}

/// The reply to a command with this id.
pub fn reply(result: &Result<Value, QmpError>, id: Option<&RawValue>) -> Vec<u8> {
    let body = match result {
        Ok(value) => format!("\"return\": {value}"),
        Err(QmpError { class, desc }) => {
            format!("\"error\": {}", json!({ "class": class, "desc": desc }))
        }
    };
    match id {
        Some(id) => line(format!("{{{body}, \"id\": {}}}", id.get())),
        None => line(format!("{{{body}}}")),
    }
}

/// An event that happens now.
pub fn event(name: &str, data: &Value) -> Vec<u8> {
    // A clock before 1970 is as unreadable as none: -1, as QEMU says.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok();
    let seconds = now.map_or(-1, |now| i64::try_from(now.as_secs()).unwrap_or(-1));
    let microseconds = now.map_or(-1, |now| i64::from(now.subsec_micros()));
    let timestamp = json!({ "seconds": seconds, "microseconds": microseconds });
    line(json!({ "timestamp": timestamp, "event": name, "data": data }).to_string())
}

/// MIGRATION with this status.
pub fn status(status: &str) -> Vec<u8> {
    event("MIGRATION", &json!({ "status": status }))
}

/// A line of QEMU's.
#[derive(Debug)]
pub enum FromQemu {
    /// An event.
    Event {
        /// Its name.
        name: String,
        /// Its data, or null.
        data: Value,
    },
    /// A reply.
    Reply {
        /// What it says.
        result: Result<Value, QmpError>,
        /// The id, if it has one that is a string.
        id: Option<String>,
    },
    /// The greeting, or what no specification knows.
    Other(Value),
}

#[derive(Deserialize)]
struct RawError {
    #[serde(deserialize_with = "text::deserialize")]
    class: String,
    #[serde(deserialize_with = "text::deserialize")]
    desc: String,
}

impl FromQemu {
    /// Read a line. What it says is for the helper's own use, so its text is made plain.
    ///
    /// # Errors
    /// When it is no JSON object.
    pub fn read(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        Self::read_with(bytes, text::reply)
    }

    /// Read a line whose result goes to a client, who gets it as it is from QEMU.
    ///
    /// # Errors
    /// When it is no JSON object.
    pub fn read_verbatim(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        Self::read_with(bytes, |result| result)
    }

    fn read_with(bytes: &[u8], result: fn(Value) -> Value) -> Result<Self, serde_json::Error> {
        let mut object: Map<String, Value> = serde_json::from_slice(bytes)?;
        if let Some(Value::String(name)) = object.get("event") {
            let name = text::line(name).into_owned();
            let data = text::reply(object.remove("data").unwrap_or_default());
            return Ok(Self::Event { name, data });
        }
        let id = object.get("id").and_then(Value::as_str).map(str::to_owned);
        if let Some(value) = object.remove("return") {
            return Ok(Self::Reply { result: Ok(result(value)), id });
        }
        if let Some(error) = object.remove("error") {
            let RawError { class, desc } = serde_json::from_value(error)?;
            return Ok(Self::Reply { result: Err(QmpError { class, desc }), id });
        }
        Ok(Self::Other(text::reply(Value::Object(object))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_echoed_byte_for_byte() {
        for id in
            ["7", "\"x\"", "1.0e3", "{\"a\" :  [1]}", "123456789012345678901234567890", "null"]
        {
            let text = format!("{{\"execute\": \"x\", \"id\": {id}}}");
            let command = Command::read(text.as_bytes()).unwrap();
            let line = reply(&Ok(json!({})), command.id.as_deref());
            let expected = match id {
                "null" => "{\"return\": {}}\r\n".to_owned(),
                id => format!("{{\"return\": {{}}, \"id\": {id}}}\r\n"),
            };
            assert_eq!(String::from_utf8(line).unwrap(), expected);
        }
    }

    #[test]
    fn single_quotes_are_read() {
        let command = Command::read(
            br#"{'execute': 'migrate', 'arguments': {'uri': 'r"d\'ma', "x": "it's"}}"#,
        )
        .unwrap();
        assert_eq!(command.name, "migrate");
        let arguments = command.arguments().unwrap();
        assert_eq!(arguments["uri"], "r\"d'ma");
        assert_eq!(arguments["x"], "it's");
    }

    #[test]
    fn what_is_no_command_is_qemus_to_answer() {
        assert_eq!(Command::read(b"{\"execute\": 5}").unwrap_err(), Unread::NoCommand);
        assert_eq!(Command::read(b"[]").unwrap_err(), Unread::NoCommand);
        assert_eq!(Command::read(b"{\"exec-oob\": \"x\"}").unwrap_err(), Unread::NoCommand);
        assert_eq!(Command::read(b"{\"execute\" \"x\"}").unwrap_err(), Unread::NoJson);
    }

    #[test]
    fn qemus_lines_are_told_apart() {
        let event = br#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "NEW", "data": {"a": 1}}"#;
        assert!(
            matches!(FromQemu::read(event).unwrap(), FromQemu::Event { name, .. } if name == "NEW")
        );
        let error = br#"{"id": "x", "error": {"class": "NewClass", "desc": "d"}}"#;
        let FromQemu::Reply { result: Err(error), id } = FromQemu::read(error).unwrap() else {
            panic!("no error reply")
        };
        assert_eq!((error.class.as_str(), id.as_deref()), ("NewClass", Some("x")));
        assert!(FromQemu::read(b"nonsense").is_err());
    }
}
