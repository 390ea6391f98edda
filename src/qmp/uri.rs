//! Migration addresses that name the `rdma` transport.

use serde_json::{Map, Value};

use super::QmpError;
use crate::{address::Address, text};

/// What a `migrate` or `migrate-incoming` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A migration over `rdma:`.
    Rdma(Address),
    /// Another transport, left to QEMU.
    Other,
}

/// Scheme of the helper's addresses; case-sensitive, as in QEMU.
pub const SCHEME: &str = "rdma:";

/// Read `rdma:HOST:PORT`.
///
/// # Errors
/// If host or port is missing or invalid.
pub fn parse(uri: &str) -> Result<Target, QmpError> {
    let Some(rest) = uri.strip_prefix(SCHEME) else { return Ok(Target::Other) };
    let bad = |why: &str| {
        QmpError::generic(format!(
            "Bad migration address '{uri}': {why}; it must be rdma:HOST:PORT, with an IPv6 \
             address in brackets"
        ))
    };
    // QEMU's rdma parses `,to=` and the like, but does not use them.
    let rest = rest.split_once(',').map_or(rest, |(address, _)| address);
    let (host, port) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once("]:").ok_or_else(|| bad("no port after the brackets"))?,
        None => rest.rsplit_once(':').ok_or_else(|| bad("no port"))?,
    };
    if host.contains(':') && !rest.starts_with('[') {
        return Err(bad("more than one colon"));
    }
    address(host, port).map_err(|why| bad(&why))
}

/// Refuse the options of `migrate` that can't be combined with `rdma:`, if they are on.
///
/// # Errors
/// The refusal, or an error of `is_on`.
pub fn refuse(is_on: impl Fn(&str) -> Result<bool, QmpError>) -> Result<(), QmpError> {
    if is_on("resume")? {
        return Err(not_resumed());
    }
    for storage in ["blk", "inc"] {
        if is_on(storage)? {
            return Err(QmpError::generic(format!(
                "Parameter '{storage}' can't be combined with rdma:; copy the disks with \
                 blockdev-mirror, or share them"
            )));
        }
    }
    Ok(())
}

/// The refusal to resume a postcopy migration over `rdma:`.
pub fn not_resumed() -> QmpError {
    QmpError::generic("A migration over rdma: can't be resumed")
}

fn address(host: &str, port: &str) -> Result<Target, String> {
    let port =
        port.parse().map_err(|_| format!("port '{port}' is not a number from 0 to 65535"))?;
    if !host.chars().all(text::is_plain) {
        return Err("the host is neither a name nor an address".into());
    }
    Ok(Target::Rdma(Address { host: host.to_owned(), port }))
}

/// Read the target from the arguments `uri` or `channels`.
///
/// Errors in addresses of other transports are left to QEMU.
///
/// # Errors
/// If the arguments name rdma and are invalid.
pub fn target(arguments: &Map<String, Value>) -> Result<Target, QmpError> {
    // QEMU treats an empty list as absent.
    let channels = arguments.get("channels").and_then(Value::as_array);
    let channels = channels.filter(|channels| !channels.is_empty());
    let rdma = |channel: &&Value| channel["addr"]["transport"] == "rdma";
    let channel = channels.and_then(|channels| channels.iter().find(rdma));
    if let Some(uri) = arguments.get("uri") {
        let target = uri.as_str().map_or(Ok(Target::Other), parse)?;
        if channel.is_some() || (target != Target::Other && channels.is_some()) {
            return Err(QmpError::generic("need either 'uri' or 'channels' argument"));
        }
        return Ok(target);
    }
    let (Some(channels), Some(channel)) = (channels, channel) else { return Ok(Target::Other) };
    if channels.len() > 1 || channel["channel-type"] != "main" {
        return Err(QmpError::generic(
            "Transport 'rdma' takes exactly one channel, of type 'main'",
        ));
    }
    let field = |name: &str| match &channel["addr"][name] {
        Value::String(text) => Ok(text.clone()),
        Value::Null => {
            Err(QmpError::generic(format!("Parameter 'channels[0].addr.{name}' is missing")))
        }
        _ => Err(QmpError::generic(format!(
            "Invalid parameter type for 'channels[0].addr.{name}', expected: string"
        ))),
    };
    address(&field("host")?, &field("port")?)
        .map_err(|why| QmpError::generic(format!("Bad migration address in 'channels': {why}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rdma(host: &str, port: u16) -> Target {
        Target::Rdma(Address { host: host.into(), port })
    }

    #[test]
    fn addresses_are_qemus() {
        assert_eq!(parse("rdma:host:4444").unwrap(), rdma("host", 4444));
        assert_eq!(parse("rdma:[fe80::1]:4444").unwrap(), rdma("fe80::1", 4444));
        assert_eq!(parse("rdma:[::]:49152").unwrap(), rdma("::", 49152));
        assert_eq!(parse("rdma::4444").unwrap(), rdma("", 4444));
        assert_eq!(parse("rdma:host:4444,to=4450").unwrap(), rdma("host", 4444));
        assert_eq!(parse("tcp:host:4444").unwrap(), Target::Other);
        for bad in [
            "rdma:",
            "rdma:host",
            "rdma:host:",
            "rdma:host:x",
            "rdma:host:65536",
            "rdma:a:b:1",
            "rdma:[::1]",
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.desc.contains("rdma:HOST:PORT"), "{bad}: {error}");
        }
    }

    #[test]
    fn channels_name_the_transport() {
        let channels = |channel: Value| json!({ "channels": [channel] });
        let addr = json!({"transport": "rdma", "host": "h", "port": "1"});
        let good = channels(json!({"channel-type": "main", "addr": addr}));
        assert_eq!(target(good.as_object().unwrap()).unwrap(), rdma("h", 1));
        let mut both = good.clone();
        for uri in ["rdma:h:1", "tcp:h:1"] {
            both["uri"] = uri.into();
            let error = target(both.as_object().unwrap()).unwrap_err();
            assert_eq!(error.desc, "need either 'uri' or 'channels' argument");
        }
        let socket = channels(json!({"channel-type": "main", "addr": {"transport": "socket"}}));
        assert_eq!(target(socket.as_object().unwrap()).unwrap(), Target::Other);
        for (expected, addr) in [
            ("'channels[0].addr.port' is missing", json!({"transport": "rdma", "host": "h"})),
            ("expected: string", json!({"transport": "rdma", "host": "h", "port": 1})),
            ("not a number", json!({"transport": "rdma", "host": "h", "port": "x"})),
        ] {
            let bad = channels(json!({"channel-type": "main", "addr": addr}));
            let error = target(bad.as_object().unwrap()).unwrap_err();
            assert!(error.desc.contains(expected), "{error}");
        }
    }
}
