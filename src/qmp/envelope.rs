//! Commands, replies and events as lines.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{QmpError, scan};
use crate::text;

/// A command's id, exactly as the client wrote it; QEMU accepts any value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Id(Box<[u8]>);

impl Id {
    fn new(value: &[u8]) -> Self {
        Self(scan::json(value).into())
    }
}

/// A client's command, parsed as far as needed to dispatch it. Relayed commands keep their bytes.
#[derive(Debug)]
pub struct Command {
    /// The command's name.
    pub name: String,
    /// Whether it is out of band (`exec-oob`), and overtakes others.
    pub out_of_band: bool,
    /// Its arguments, unparsed: they may be long, and matter only if the helper handles the
    /// command.
    arguments: Option<Box<[u8]>>,
    /// Its id.
    pub id: Option<Id>,
}

/// Longest arguments of a command that the helper handles, in bytes.
const ARGUMENTS_MAX: usize = 256 << 10;

/// Why a command could not be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Unread {
    /// Not a valid command. QEMU answers it with an error, and does nothing else.
    NoCommand,
    /// It has `exec-oob`, and the client has not enabled out-of-band execution.
    OutOfBand(Option<Id>),
}

impl Unread {
    /// QEMU's error for an out-of-band command where that is not enabled.
    pub fn not_enabled() -> QmpError {
        QmpError::generic("QMP input member 'exec-oob' is unexpected")
    }
}

impl Command {
    /// Read a command of a client that has `oob` enabled, or not.
    ///
    /// # Errors
    /// If it is not a valid command.
    pub fn read(bytes: &[u8], oob: bool) -> Result<Self, Unread> {
        let members = scan::members(bytes).filter(|_| scan::is_value(bytes));
        let members = members.ok_or(Unread::NoCommand)?;
        let [mut name, mut overtaking, mut arguments, mut id] = [None; 4];
        let mut is_proper = true;
        for (key, value) in members {
            let member = match key.as_str() {
                "execute" => &mut name,
                "exec-oob" => &mut overtaking,
                "arguments" => &mut arguments,
                "id" => &mut id,
                _ => {
                    is_proper = false;
                    continue;
                }
            };
            if member.replace(value).is_some() {
                // To QEMU that is not JSON.
                return Err(Unread::NoCommand);
            }
        }
        let id = id.map(Id::new);
        if overtaking.is_some() && !oob {
            return Err(Unread::OutOfBand(id));
        }
        is_proper &= name.is_none() || overtaking.is_none();
        is_proper &= arguments.is_none_or(|arguments| arguments.starts_with(b"{"));
        let name = name.or(overtaking).and_then(scan::string).filter(|_| is_proper);
        Ok(Self {
            name: name.ok_or(Unread::NoCommand)?,
            out_of_band: overtaking.is_some(),
            arguments: arguments.map(Into::into),
            id,
        })
    }

    /// The line of a `human-monitor-command`, however long; `None` if QEMU would find none either.
    pub fn line(&self) -> Option<String> {
        let arguments = scan::members(self.arguments.as_ref()?)?;
        let line = arguments.iter().find(|(key, _)| key == "command-line");
        scan::string(line?.1)
    }

    /// Parse its arguments.
    ///
    /// # Errors
    /// For a client: they are too long for a command of the helper's, or invalid.
    pub fn arguments(&self) -> Result<Map<String, Value>, QmpError> {
        let Some(arguments) = &self.arguments else { return Ok(Map::new()) };
        if arguments.len() > ARGUMENTS_MAX {
            return Err(QmpError::generic(format!(
                "The arguments of '{}' have more than {ARGUMENTS_MAX} bytes",
                self.name
            )));
        }
        let read: Result<Value, _> = serde_json::from_slice(&scan::json(arguments));
        let read = read.map_err(|error| {
            QmpError::generic(format!("The arguments of '{}': {error}", self.name))
        })?;
        match read {
            Value::Object(map) => Ok(map),
            _ => Err(QmpError::generic("QMP input member 'arguments' must be an object")),
        }
    }
}

/// What QEMU takes for an out-of-band command, valid or not: QEMU answers it at once.
#[derive(Debug)]
pub struct OutOfBand<'a> {
    members: Vec<(String, &'a [u8])>,
    /// Its id.
    pub id: Option<Id>,
}

impl<'a> OutOfBand<'a> {
    /// Read one. `None` also if it is longer than any real one: QEMU answers what it can't parse in
    /// band and without an id, so the helper must be certain that QEMU can parse it.
    pub fn read(bytes: &'a [u8]) -> Option<Self> {
        if bytes.len() > ARGUMENTS_MAX || !scan::is_value(bytes) {
            return None;
        }
        let members = scan::members(bytes)?;
        let member = |name: &str| members.iter().find(|(key, _)| key == name);
        let is_its = member("exec-oob").is_some() && member("execute").is_none();
        let id = member("id").map(|(_, id)| Id::new(id));
        is_its.then_some(Self { members, id })
    }

    /// The same command under another id.
    pub fn under(&self, id: &str) -> Vec<u8> {
        let id = json!(id).to_string();
        let others = self.members.iter().filter(|(key, _)| key != "id");
        let others = others.map(|(key, value)| (key.as_str(), *value));
        line(others.chain([("id", id.as_bytes())]))
    }
}

/// A line of these members in QMP's framing. libvirt relies on the `\r\n`.
fn line<'a>(members: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut line = Vec::new();
    for (key, value) in members {
        line.extend_from_slice(if line.is_empty() { b"{" } else { b", " });
        line.extend_from_slice(json!(key).to_string().as_bytes());
        line.extend_from_slice(b": ");
        line.extend_from_slice(value);
    }
    line.extend_from_slice(b"}\r\n");
    line
}

/// The reply to a command with this id. Members are in QEMU's order.
pub fn reply(result: &Result<Value, QmpError>, id: Option<&Id>) -> Vec<u8> {
    let id = id.map(|Id(id)| ("id", &**id));
    match result {
        Ok(value) => {
            let value = value.to_string();
            line([("return", value.as_bytes())].into_iter().chain(id))
        }
        Err(QmpError { class, desc }) => {
            let error = format!(r#"{{"class": {}, "desc": {}}}"#, json!(class), json!(desc));
            line(id.into_iter().chain([("error", error.as_bytes())]))
        }
    }
}

/// QEMU's reply with this id in place of its own, or without one.
pub fn with_id(reply: &[u8], id: Option<&Id>) -> Vec<u8> {
    let members = scan::members(reply).unwrap_or_default();
    line(members.iter().filter_map(|(key, value)| match key.as_str() {
        "id" => id.map(|Id(id)| ("id", &**id)),
        key => Some((key, *value)),
    }))
}

/// An event that happens now.
pub fn event(name: &str, data: &Value) -> Vec<u8> {
    // A clock before 1970 counts as unreadable: -1, as in QEMU.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok();
    let seconds = now.map_or(-1, |now| i64::try_from(now.as_secs()).unwrap_or(-1));
    let microseconds = now.map_or(-1, |now| i64::from(now.subsec_micros()));
    let timestamp = json!({ "seconds": seconds, "microseconds": microseconds }).to_string();
    let (name, data) = (json!(name).to_string(), data.to_string());
    let members = [("timestamp", &timestamp), ("event", &name), ("data", &data)];
    line(members.map(|(key, value)| (key, value.as_bytes())))
}

/// The kind of a line from QEMU. Its values are not examined: they may not be JSON.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// An event.
    Event,
    /// A reply, with the bytes of its id.
    Reply(Option<&'a [u8]>),
    /// The greeting, or anything unspecified.
    Other,
}

impl<'a> Kind<'a> {
    /// Classify a line; `None` if it is not an object.
    pub fn of(bytes: &'a [u8]) -> Option<Self> {
        let members = scan::members(bytes)?;
        let member = |name: &str| members.iter().find(|(key, _)| key == name);
        Some(if member("event").is_some() {
            Self::Event
        } else if member("return").or_else(|| member("error")).is_some() {
            Self::Reply(member("id").map(|(_, id)| *id))
        } else {
            Self::Other
        })
    }
}

/// A MIGRATION event with this status.
pub fn status(status: &str) -> Vec<u8> {
    event("MIGRATION", &json!({ "status": status }))
}

/// A line from QEMU.
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
        /// The result; an error if the reply is not understood.
        result: Result<Value, QmpError>,
    },
    /// The greeting, or anything unspecified.
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
    /// Read a line for the helper's own use: its text is sanitized. `None` if it is not a JSON
    /// object.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        Self::read_with(bytes, text::reply)
    }

    /// Read a line whose result is passed to a client unchanged.
    pub fn read_verbatim(bytes: &[u8]) -> Option<Self> {
        Self::read_with(bytes, |result| result)
    }

    fn read_with(bytes: &[u8], result: fn(Value) -> Value) -> Option<Self> {
        let members = scan::members(bytes)?;
        let member = |name: &str| members.iter().find(|(key, _)| key == name).map(|(_, it)| *it);
        if let Some(name) = member("event") {
            let name = text::line(&scan::string(name)?).into_owned();
            let data = member("data").and_then(|data| serde_json::from_slice(data).ok());
            return Some(Self::Event { name, data: text::reply(data.unwrap_or_default()) });
        }
        let unread = |error| QmpError::generic(format!("QEMU's reply is not understood: {error}"));
        if let Some(value) = member("return") {
            let result = serde_json::from_slice(value).map(result).map_err(unread);
            return Some(Self::Reply { result });
        }
        if let Some(error) = member("error") {
            let error = match serde_json::from_slice(error) {
                Ok(RawError { class, desc }) => QmpError { class, desc },
                Err(error) => unread(error),
            };
            return Some(Self::Reply { result: Err(error) });
        }
        Some(Self::Other(text::reply(serde_json::from_slice(bytes).unwrap_or_default())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Command, Unread> {
        Command::read(text.as_bytes(), false)
    }

    #[test]
    fn ids_are_echoed_byte_for_byte() {
        let deep = "[".repeat(1000) + &"]".repeat(1000);
        for id in [
            "7",
            "\"x\"",
            "1.0e3",
            "{\"a\" :  [1]}",
            "123456789012345678901234567890",
            "null",
            "1e400",
            &deep,
        ] {
            let command = read(&format!("{{\"execute\": \"x\", \"id\": {id}}}")).unwrap();
            let text = |result| String::from_utf8(reply(&result, command.id.as_ref())).unwrap();
            assert_eq!(text(Ok(json!({}))), format!("{{\"return\": {{}}, \"id\": {id}}}\r\n"));
            let error = r#"{"class": "GenericError", "desc": "no"}"#;
            let expected = format!("{{\"id\": {id}, \"error\": {error}}}\r\n");
            assert_eq!(text(Err(QmpError::generic("no"))), expected);
            let qemus = format!("{{\"id\": \"other\", \"error\": {error}}}\r\n");
            assert_eq!(with_id(qemus.as_bytes(), command.id.as_ref()), expected.as_bytes());
        }
        let none = read("{\"execute\": \"x\"}").unwrap();
        assert_eq!(reply(&Ok(json!(1)), none.id.as_ref()), b"{\"return\": 1}\r\n");
        let without = with_id(b"{\"return\": [{}], \"id\": \"other\"}\r\n", None);
        assert_eq!(without, b"{\"return\": [{}]}\r\n");
    }

    #[test]
    fn single_quotes_are_read() {
        let text =
            r#"{'execute': 'migrate', 'arguments': {'uri': 'r"d\'ma', "x": "it's"}, 'id': 'i"d'}"#;
        let command = read(text).unwrap();
        assert_eq!(command.name, "migrate");
        let arguments = command.arguments().unwrap();
        assert_eq!(arguments["uri"], "r\"d'ma");
        assert_eq!(arguments["x"], "it's");
        assert_eq!(
            reply(&Ok(json!(1)), command.id.as_ref()),
            b"{\"return\": 1, \"id\": \"i\\\"d\"}\r\n"
        );
    }

    #[test]
    fn what_is_no_command_is_qemus_to_answer() {
        for text in [
            "{\"execute\": 5}",
            "[]",
            "{\"execute\" \"x\"}",
            "{\"execute\": \"x\", \"arguments\": []}",
            "{\"execute\": \"x\", \"more\": 1}",
            "{\"execute\": \"x\", \"id\": 1, \"id\": 2}",
            "{\"execute\": \"x\", \"id\": [1 2]}",
            "{\"id\": 1}",
        ] {
            assert_eq!(read(text).unwrap_err(), Unread::NoCommand, "{text}");
        }
    }

    #[test]
    fn out_of_band_is_for_who_has_enabled_it() {
        let text = b"{\"exec-oob\": \"x\", \"id\": 5}";
        let id = Some(Id::new(b"5"));
        assert_eq!(Command::read(text, false).unwrap_err(), Unread::OutOfBand(id.clone()));
        let command = Command::read(text, true).unwrap();
        assert!(command.out_of_band && command.id == id);
        let both = b"{\"exec-oob\": \"x\", \"execute\": \"x\"}";
        assert_eq!(Command::read(both, true).unwrap_err(), Unread::NoCommand);
        assert_eq!(Command::read(both, false).unwrap_err(), Unread::OutOfBand(None));
    }

    /// Whatever else is invalid in the command.
    #[test]
    fn out_of_band_is_what_qemu_takes_for_it() {
        let text = b"{'exec-oob': 'x', 'id': [1.50], \"a\": {'b': []}}";
        let read = OutOfBand::read(text).unwrap();
        assert_eq!(read.id, Some(Id::new(b"[1.50]")));
        assert_eq!(read.under("n"), b"{\"exec-oob\": 'x', \"a\": {'b': []}, \"id\": \"n\"}\r\n");
        let read = OutOfBand::read(b"{\"exec-oob\": 5}").unwrap();
        assert!(read.id.is_none() && read.under("n") == b"{\"exec-oob\": 5, \"id\": \"n\"}\r\n");
        for none in [
            "{'execute': 'x'}",
            "{'execute': 'x', 'exec-oob': 'x'}",
            "{'exec-oob': 'x', 'id': 1, 'id': 2}",
            "{'exec-oob': 'x', 'arguments': {'a': 1, 'a': 2}}",
            "{'exec-oob': nul}",
            "{}",
        ] {
            assert!(OutOfBand::read(none.as_bytes()).is_none(), "{none}");
        }
    }

    #[test]
    fn arguments_that_are_none_are_refused() {
        let deep = "[".repeat(200) + &"]".repeat(200);
        for (value, why) in [("1e400", "range"), (&deep, "recursion")] {
            let text = format!("{{\"execute\": \"x\", \"arguments\": {{\"a\": {value}}}}}");
            let error = read(&text).unwrap().arguments().unwrap_err();
            assert!(error.desc.contains(why), "{error}");
        }
    }

    #[test]
    fn qemus_lines_are_told_apart() {
        let event = br#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "NEW", "data": {"a": 1}}"#;
        assert!(
            matches!(FromQemu::read(event).unwrap(), FromQemu::Event { name, .. } if name == "NEW")
        );
        assert_eq!(Kind::of(event), Some(Kind::Event));
        let error = br#"{"id": "x", "error": {"class": "NewClass", "desc": "d"}}"#;
        let FromQemu::Reply { result: Err(read) } = FromQemu::read(error).unwrap() else {
            panic!("no error reply")
        };
        assert_eq!(read.class, "NewClass");
        assert_eq!(Kind::of(error), Some(Kind::Reply(Some(b"\"x\""))));
        assert_eq!(Kind::of(b"{\"QMP\": {}}"), Some(Kind::Other));
        assert!(FromQemu::read(b"nonsense").is_none() && Kind::of(b"nonsense").is_none());
    }

    /// A line with unreadable values is still a reply: no other one follows.
    #[test]
    fn what_is_not_understood_is_a_reply() {
        let deep = "[".repeat(5000) + &"]".repeat(5000);
        for value in ["inf", "-nan", "1e400", &deep] {
            let line = format!("{{\"return\": [{value}], \"id\": {value}}}\r\n");
            assert_eq!(Kind::of(line.as_bytes()), Some(Kind::Reply(Some(value.as_bytes()))));
            let Some(FromQemu::Reply { result: Err(error) }) = FromQemu::read(line.as_bytes())
            else {
                panic!("no error: {value}")
            };
            assert!(error.desc.contains("not understood"), "{error}");
            let event = format!("{{\"event\": \"X\", \"data\": {value}}}");
            let read = FromQemu::read(event.as_bytes());
            assert!(matches!(read, Some(FromQemu::Event { data: Value::Null, .. })));
        }
    }
}
