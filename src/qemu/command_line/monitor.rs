//! QMP monitors on Unix sockets: `-qmp unix:`, and `-mon` or `-object monitor-qmp` with `-chardev`.

use std::{os::fd::RawFd, path::PathBuf, time::Duration};

use serde_json::json;

use super::{
    arguments::{Changes, Given, Part},
    options::Options,
};

/// Keys of a socket chardev that give its place, or differ on a connected one.
const PLACE: [&str; 6] = ["path", "fd", "server", "wait", "reconnect", "reconnect-ms"];

/// Keys of socket chardevs that the helper does not proxy.
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

/// The socket by which management reaches a monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// QEMU would listen at a path; with `wait` it starts only once a client has connected.
    Listen {
        /// The socket.
        path: PathBuf,
        /// `wait=on`.
        wait: bool,
    },
    /// QEMU would inherit a listening socket.
    Listening {
        /// Its descriptor number.
        fd: RawFd,
        /// `wait=on`.
        wait: bool,
    },
    /// QEMU would connect.
    Connect {
        /// The socket.
        path: PathBuf,
        /// Delay after which QEMU would reconnect, if it would.
        reconnect: Option<Duration>,
    },
    /// QEMU would inherit a connected socket.
    Connected {
        /// Its descriptor number.
        fd: RawFd,
    },
    /// None: the monitor is the helper's alone.
    Nobody,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Listen { path, .. } | Self::Connect { path, .. } => path.display().fmt(f),
            Self::Listening { fd, .. } | Self::Connected { fd } => write!(f, "descriptor {fd}"),
            Self::Nobody => f.write_str("no socket"),
        }
    }
}

/// A monitor that the helper proxies.
#[derive(Debug)]
pub struct Monitor {
    /// The socket by which management reaches it.
    pub endpoint: Endpoint,
    /// The chardev's options, without its place.
    chardev: Options,
}

impl Monitor {
    /// The descriptor number that QEMU's end must have, if the command line gives one.
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

/// Why a monitor stays QEMU's own.
type Left = &'static str;

const HUMAN: Left = "it is a human one";
const PRETTY: Left = "its output is for people (pretty)";
const ELSEWHERE: Left = "it is on no Unix socket that the command line describes";
const FLEETING: Left = "it is deleted with its client (close-action=delete)";

const UNREAD: Left = "the helper does not read that file";

/// The search for monitors on a command line.
pub(super) struct Search<'a> {
    pub given: &'a [Given<'a>],
    /// The monitors that can be proxied.
    pub monitors: &'a mut Vec<Monitor>,
    /// Notes for the user on the others.
    pub notes: &'a mut Vec<String>,
    pub changes: &'a mut Changes,
}

impl Search<'_> {
    /// Look at all options.
    pub fn run(mut self) {
        for option in self.given {
            let Err(why) = self.look(option) else { continue };
            let which = if option.name == "readconfig" { "Any" } else { "The" };
            self.notes.push(format!(
                "{which} monitor of '-{} {}' stays QEMU's own, because {why}: what is asked for there, a \
                 migration over rdma: too, is not the helper's; use a QMP monitor on a Unix socket",
                option.name,
                option.value.unwrap_or_default()
            ));
        }
    }

    fn look(&mut self, option: &Given<'_>) -> Result<(), Left> {
        let value = option.value.unwrap_or_default();
        match option.name {
            "mon" => {
                let options = Options::read(value, "chardev");
                match options.get("mode").as_deref() {
                    Some("control") => self.on_chardev(&options),
                    _ => Err(HUMAN),
                }
            }
            // Since 11.1.
            "object" => {
                let options = Options::read(value, "qom-type");
                match options.get("qom-type").as_deref() {
                    Some("monitor-qmp") => self.on_chardev(&options),
                    Some("monitor-hmp") => Err(HUMAN),
                    _ => Ok(()),
                }
            }
            "qmp" => match value.strip_prefix("chardev:") {
                Some(id) => self.chardev(id),
                None => self.legacy(option, value),
            },
            "qmp-pretty" => Err(PRETTY),
            "monitor" if value != "none" => Err(HUMAN),
            "readconfig" => Err(UNREAD),
            "serial" | "parallel" if value.starts_with("mon:") => Err(HUMAN),
            _ => Ok(()),
        }
    }

    /// Take a monitor with these options, if it can be proxied.
    fn on_chardev(&mut self, options: &Options) -> Result<(), Left> {
        // Pretty-printed output is not one object per line.
        if options.switch("pretty") == Some(true) {
            return Err(PRETTY);
        }
        // The helper's own session would keep such a monitor alive.
        if options.get("close-action").is_some_and(|action| action != "none") {
            return Err(FLEETING);
        }
        self.chardev(&options.get("chardev").unwrap_or_default())
    }

    /// Take a monitor on the chardev with this id.
    fn chardev(&mut self, id: &str) -> Result<(), Left> {
        for option in self.given.iter().filter(|option| option.name == "chardev") {
            let options = Options::read(option.value.unwrap_or_default(), "backend");
            let is_it = options.get("backend").as_deref() == Some("socket")
                && options.get("id").as_deref() == Some(id);
            let Some(endpoint) = is_it.then(|| endpoint(&options)).flatten() else { continue };
            let is_id = |monitor: &Monitor| monitor.chardev.get("id").as_deref() == Some(id);
            // QEMU refuses a second monitor on a chardev.
            if !self.monitors.iter().any(is_id) {
                let parts = [Part::text("-chardev"), Part::Monitor(self.monitors.len())];
                self.changes.value(option, parts);
                self.monitors.push(Monitor { endpoint, chardev: options.without(&PLACE) });
            }
            return Ok(());
        }
        Err(ELSEWHERE)
    }

    /// Take `-qmp unix:PATH[,server][,...]`.
    fn legacy(&mut self, option: &Given<'_>, value: &str) -> Result<(), Left> {
        let options = value.strip_prefix("unix:").map(|rest| Options::read(rest, "path"));
        let place = options.and_then(|options| Some((endpoint(&options)?, options)));
        let (endpoint, options) = place.ok_or(ELSEWHERE)?;
        let id = own_id(self.monitors.len());
        self.changes.value(
            option,
            [
                Part::text("-chardev"),
                Part::Monitor(self.monitors.len()),
                Part::text("-qmp"),
                Part::text(format!("chardev:{id}")),
            ],
        );
        let socket = Options::read(&format!("socket,id={id}"), "backend");
        if let (Options::Pairs(mut pairs), Options::Pairs(more)) = (socket, options.without(&PLACE))
        {
            pairs.extend(more);
            self.monitors.push(Monitor { endpoint, chardev: Options::Pairs(pairs) });
        }
        Ok(())
    }
}

/// Add a monitor for the helper alone.
pub(super) fn add_own(monitors: &mut Vec<Monitor>, changes: &mut Changes) {
    let id = own_id(monitors.len());
    changes.added.extend([
        Part::text("-chardev"),
        Part::Monitor(monitors.len()),
        Part::text("-qmp"),
        Part::text(format!("chardev:{id}")),
    ]);
    let chardev = Options::read(&format!("socket,id={id}"), "backend");
    monitors.push(Monitor { endpoint: Endpoint::Nobody, chardev });
}

fn own_id(index: usize) -> String {
    format!("qemu-rdma-helper{index}")
}

/// The endpoint of a socket chardev; `None` if the helper can't proxy it.
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
        // A descriptor's name is known in a monitor, not on the command line.
        (None, Some(fd), true) => Some(Endpoint::Listening { fd: fd?, wait }),
        (None, Some(fd), false) => Some(Endpoint::Connected { fd: fd? }),
        _ => None,
    }
}
