//! The long-lived process between management and QEMU.
//!
//! Owns the QMP connections and nothing else that can fail: it parses no migration stream, maps no
//! guest memory and loads no RDMA library; a worker process per migration does. One task per monitor
//! takes QEMU's events, the client's commands and what migrations have to say, in turn; each command
//! runs in a task of its own, and the next in band is taken when it was answered.
//!
//! It stands beside a running QEMU ([`attach()`]), or is started with it ([`launch`]).

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
