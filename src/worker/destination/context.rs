//! What the threads of a destination share.

use std::{os::unix::net::UnixStream, sync::Arc};

use super::{input::Input, inquiry::Inquiry};
use crate::{
    control::Options,
    worker::{drive::Events, statistics::Statistics},
};

/// What the threads of a destination share.
pub struct Context {
    /// QEMU's migration socket.
    pub qemu: Arc<UnixStream>,
    /// Queries the destination's blocks.
    pub inquiry: Arc<Inquiry>,
    /// The migration's options.
    pub options: Options,
    /// Counters.
    pub statistics: Arc<Statistics>,
    /// Where to send events.
    pub events: Events<Input>,
}
