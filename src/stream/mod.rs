//! QEMU's migration stream: read it, and rewrite it for a peer that gets RAM by other means.
//!
//! [`Rewriter`] is the source's side: it takes RAM records out and says what to write instead.
//! [`Forwarder`] is the destination's: it passes the rest on to QEMU and knows where RAM ends. Both
//! are fed bytes cut anywhere, do no I/O, and stand on one grammar (`parser`). Precopy streams
//! of QEMU 7.2 to 10.0 are understood (`migration/savevm.c`, `migration/ram.c`); whatever has no
//! length that can be known is refused by name.

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
