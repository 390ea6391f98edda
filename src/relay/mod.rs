//! The long-lived process between management and QEMU.
//!
//! Owns the QMP connections and nothing else that can fail: it parses no migration stream, maps no
//! guest memory and loads no RDMA library; each migration's worker process does. Each monitor has a
//! task that handles QEMU's events, the client's commands and the migrations' output in turn. Each
//! command runs in a task of its own; the next in-band command is taken after the reply to the
//! previous one.
//!
//! It attaches to a running QEMU ([`attach()`]), or is started with one ([`launch`]).

mod attach;
mod context;
mod error;
pub mod launch;
mod migration;
mod monitor;
mod process;
mod qemu_session;
pub mod schema;
mod socket_file;
pub mod wrapped;

pub use attach::{AttachOptions, attach};
pub use context::{FabricChoice, Settings};
pub use error::RelayError;
