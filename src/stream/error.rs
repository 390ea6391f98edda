//! Errors of parsing and rewriting a stream.

/// Error in a migration stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The bytes do not match the known grammar.
    #[error("Malformed migration stream at byte {at}: {why}; is its QEMU one of 7.2 to 11.1?")]
    Malformed {
        /// Offset in the stream.
        at: u64,
        /// What is wrong there.
        why: String,
    },
    /// A section of unknown length.
    #[error(
        "The guest's state contains section '{0}', whose length can't be known; remove the device \
         or feature behind it (vfio, dirty bitmaps) or migrate over tcp:"
    )]
    UnknownSection(String),
    /// A feature of the stream that can't be combined with `rdma:`.
    #[error("The stream uses {0}, which can't be combined with rdma:; turn it off")]
    Unsupported(&'static str),
    /// The stream ended too early.
    #[error("the stream was cut after {at} bytes, {phase}")]
    Cut {
        /// Bytes received.
        at: u64,
        /// Where the stream was cut.
        phase: &'static str,
    },
}

/// Error of the stream, or of the sink that receives its content.
#[derive(Debug, thiserror::Error)]
pub enum PushError<E> {
    /// The stream is malformed, cut or unsupported.
    #[error(transparent)]
    Stream(StreamError),
    /// The sink failed.
    #[error("{0}")]
    Handler(E),
}
