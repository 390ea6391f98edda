//! What can be wrong with a stream.

/// What is wrong with a stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The bytes follow no grammar that is known.
    #[error("Malformed migration stream at byte {at}: {why}; is its QEMU one of 7.2 to 11.1?")]
    Malformed {
        /// Offset in the stream.
        at: u64,
        /// What was met.
        why: String,
    },
    /// A section whose end can't be found.
    #[error(
        "The guest's state contains section '{0}', whose length can't be known; remove the device \
         or feature behind it (vfio, dirty bitmaps) or migrate over tcp:"
    )]
    UnknownSection(String),
    /// A feature of the stream that excludes this way of migrating.
    #[error("The stream uses {0}, which can't be combined with rdma:; turn it off")]
    Unsupported(&'static str),
    /// The stream ended too early.
    #[error("the stream was cut after {at} bytes, {phase}")]
    Cut {
        /// Bytes that came.
        at: u64,
        /// Where that is.
        phase: &'static str,
    },
}

/// An error of the stream, or of whoever takes its content.
#[derive(Debug, thiserror::Error)]
pub enum PushError<E> {
    /// The stream's.
    #[error(transparent)]
    Stream(StreamError),
    /// The taker's.
    #[error("{0}")]
    Handler(E),
}
