//! What the threads of a destination share.

use std::{os::unix::net::UnixStream, sync::Arc};

use super::{input::Input, inquiry::Inquiry};
use crate::{
    control::Options,
    worker::{drive::Events, statistics::Statistics},
};

/// What they share.
pub struct Context {
    /// QEMU's migration socket.
    pub qemu: Arc<UnixStream>,
    /// Asks for the destination's blocks.
    pub inquiry: Arc<Inquiry>,
    /// Options.
    pub options: Options,
    /// Counters.
    pub statistics: Arc<Statistics>,
    /// Where to say what happens.
    pub events: Events<Input>,
}
