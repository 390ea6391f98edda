//! QEMU's migration stream: parse it, and rewrite it for a peer that receives RAM separately.
//!
//! [`Rewriter`] is the source's side: it removes RAM records and tells its sink what to write
//! instead. [`Forwarder`] is the destination's: it passes the rest on to QEMU and detects where RAM
//! ends. Both accept input split at any byte, do no I/O and share one grammar (`parser`). Precopy
//! streams of QEMU 7.2 to 10.0 are understood (`migration/savevm.c`, `migration/ram.c`); anything
//! of unknown length is refused, and named in the error.

mod error;
mod fields;
mod forwarder;
mod global_state;
pub mod multifd;
mod parser;
mod records;
mod rewriter;
#[cfg(test)]
mod tests;

pub use error::{PushError, StreamError};
pub use forwarder::{ForwardSink, Forwarder};
pub use parser::StreamBlock;
pub use records::Records;
pub use rewriter::{ChannelPage, Extent, Limits, RewriteSink, Rewriter};
