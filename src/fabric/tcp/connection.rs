//! A link before it is split into halves.

use std::{io, iter, net::TcpStream, sync::Arc, time::Duration};

use super::{
    receiving::{Incoming, TcpRecvHalf},
    sending::TcpSendHalf,
    shared::Shared,
    socket::{Socket, set_options},
};
use crate::fabric::{Connection, FabricError, Handle, RecvHalf, Result, SendHalf};

pub(super) struct TcpConnection {
    shared: Arc<Shared>,
    first: Incoming,
    others: Vec<Incoming>,
}

impl TcpConnection {
    /// Create a link over `first` and `others`.
    pub(super) fn new(
        first: TcpStream,
        others: Vec<TcpStream>,
        stall_timeout: Duration,
    ) -> Result<Self> {
        let host = |source| FabricError::Host { call: "Setting up the connection", source };
        let socket = |stream| {
            set_options(&stream, stall_timeout)?;
            Ok(Socket::new(stream, stall_timeout))
        };
        let streams = iter::once(first).chain(others);
        let sockets = streams.map(socket).collect::<io::Result<_>>().map_err(host)?;
        let shared = Arc::new(Shared::new(sockets, stall_timeout));
        let incoming = |index| Incoming::new(&shared, index).map_err(host);
        let others = (1..shared.sockets.len()).map(incoming).collect::<Result<_>>()?;
        Ok(Self { first: incoming(0)?, others, shared })
    }
}

impl Connection for TcpConnection {
    fn split(self: Box<Self>) -> (Arc<dyn SendHalf>, Box<dyn RecvHalf>) {
        let Self { shared, first, others } = *self;
        let receiver = TcpRecvHalf::begin(shared.clone(), first, others);
        (Arc::new(TcpSendHalf { shared }), Box::new(receiver))
    }

    fn handle(&self) -> Handle {
        let shared = self.shared.clone();
        Handle::new(move || shared.close())
    }
}
