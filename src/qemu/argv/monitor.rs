//! QMP monitors on Unix sockets: `-qmp unix:`, and `-mon` with `-chardev socket`.

use std::{os::fd::RawFd, path::PathBuf, time::Duration};

use serde_json::json;

use super::{Changes, Given, Part, options::Options};

/// Keys of a socket chardev that say where it is, and what is different on a connected one.
const PLACE: [&str; 6] = ["path", "fd", "server", "wait", "reconnect", "reconnect-ms"];

/// Keys of socket chardevs that we do not stand before.
const FOREIGN: [&str; 10] = [
    "abstract",
    "host",
    "mux",
    "port",
    "telnet",
    "tight",
    "tls-authz",
    "tls-creds",
    "tn3270",
    "websocket",
];

/// Where management meets a monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// QEMU would listen at a path; with `wait` it starts only when a client is there.
    Listen {
        /// The socket.
        path: PathBuf,
        /// `wait=on`.
        wait: bool,
    },
    /// QEMU would inherit a listening socket.
    Listening {
        /// Its number.
        fd: RawFd,
        /// `wait=on`.
        wait: bool,
    },
    /// QEMU would connect.
    Connect {
        /// The socket.
        path: PathBuf,
        /// How long after a loss it would try again, if it would.
        reconnect: Option<Duration>,
    },
    /// QEMU would inherit a connected socket.
    Connected {
        /// Its number.
        fd: RawFd,
    },
    /// Nobody meets it.
    Nobody,
}

/// A monitor that the helper stands before.
#[derive(Debug)]
pub struct Monitor {
    /// Where management meets it.
    pub endpoint: Endpoint,
    /// The chardev, without its place.
    chardev: Options,
}

impl Monitor {
    /// The descriptor that QEMU's end must have, if it was given one.
    pub fn fd(&self) -> Option<RawFd> {
        match self.endpoint {
            Endpoint::Listening { fd, .. } | Endpoint::Connected { fd } => Some(fd),
            _ => None,
        }
    }

    /// The value of `-chardev` for a connected socket.
    pub(super) fn chardev(&self, fd: RawFd) -> String {
        self.chardev.clone().with("fd", json!(fd)).to_string()
    }
}

/// Find the monitors that can be proxied.
pub(super) fn find(given: &[Given<'_>], monitors: &mut Vec<Monitor>, changes: &mut Changes) {
    for option in given {
        let value = option.value.unwrap_or_default();
        match option.name {
            "mon" => {
                let options = Options::read(value, "chardev");
                // What is pretty for people has no end of line behind each object.
                let plain = options.switch("pretty") != Some(true);
                if options.get("mode").as_deref() == Some("control") && plain {
                    chardev(&options.get("chardev").unwrap_or_default(), given, monitors, changes);
                }
            }
            "qmp" => match value.strip_prefix("chardev:") {
                Some(id) => chardev(id, given, monitors, changes),
                None => legacy(option, value, monitors, changes),
            },
            _ => {}
        }
    }
}

/// A monitor on the chardev with this id.
fn chardev(id: &str, given: &[Given<'_>], monitors: &mut Vec<Monitor>, changes: &mut Changes) {
    for option in given.iter().filter(|option| option.name == "chardev") {
        let options = Options::read(option.value.unwrap_or_default(), "backend");
        let is_it = options.get("backend").as_deref() == Some("socket")
            && options.get("id").as_deref() == Some(id);
        let taken = monitors.iter().any(|monitor| monitor.chardev.get("id").as_deref() == Some(id));
        if !is_it || taken {
            continue;
        }
        if let Some(endpoint) = endpoint(&options) {
            changes.value(option, [Part::text("-chardev"), Part::Monitor(monitors.len())]);
            monitors.push(Monitor { endpoint, chardev: options.without(&PLACE) });
        }
    }
}

/// `-qmp unix:PATH[,server][,...]`.
fn legacy(option: &Given<'_>, value: &str, monitors: &mut Vec<Monitor>, changes: &mut Changes) {
    let Some(rest) = value.strip_prefix("unix:") else { return };
    let options = Options::read(rest, "path");
    let Some(endpoint) = endpoint(&options) else { return };
    let id = own_id(monitors.len());
    changes.value(
        option,
        [
            Part::text("-chardev"),
            Part::Monitor(monitors.len()),
            Part::text("-qmp"),
            Part::text(format!("chardev:{id}")),
        ],
    );
    let socket = Options::read(&format!("socket,id={id}"), "backend");
    let Options::Pairs(mut pairs) = socket else { return };
    if let Options::Pairs(more) = options.without(&PLACE) {
        pairs.extend(more);
    }
    monitors.push(Monitor { endpoint, chardev: Options::Pairs(pairs) });
}

/// A monitor for the helper alone.
pub(super) fn add_own(monitors: &mut Vec<Monitor>, changes: &mut Changes) {
    let id = own_id(monitors.len());
    changes.added.extend([
        Part::text("-chardev"),
        Part::Monitor(monitors.len()),
        Part::text("-mon"),
        Part::text(format!("chardev={id},mode=control")),
    ]);
    let chardev = Options::read(&format!("socket,id={id}"), "backend");
    monitors.push(Monitor { endpoint: Endpoint::Nobody, chardev });
}

fn own_id(index: usize) -> String {
    format!("qemu-rdma-helper{index}")
}

/// Where a socket chardev is; `None` if it is not for us.
fn endpoint(options: &Options) -> Option<Endpoint> {
    if FOREIGN.iter().any(|key| options.get(key).is_some()) {
        return None;
    }
    let server = options.switch("server") == Some(true);
    let wait = options.switch("wait") != Some(false);
    let fd = options.get("fd").map(|fd| fd.parse::<RawFd>().ok().filter(|fd| *fd >= 0));
    match (options.get("path"), fd, server) {
        (Some(path), None, true) => Some(Endpoint::Listen { path: path.into(), wait }),
        (Some(path), None, false) => {
            let seconds = || options.get("reconnect")?.parse().ok().map(Duration::from_secs);
            let exact = || options.get("reconnect-ms")?.parse().ok().map(Duration::from_millis);
            let reconnect = seconds().or_else(exact).filter(|again| !again.is_zero());
            Some(Endpoint::Connect { path: path.into(), reconnect })
        }
        // The name of a descriptor in a monitor is none of the command line.
        (None, Some(fd), true) => Some(Endpoint::Listening { fd: fd?, wait }),
        (None, Some(fd), false) => Some(Endpoint::Connected { fd: fd? }),
        _ => None,
    }
}
