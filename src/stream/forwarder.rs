//! The destination's side: forwards the rewritten stream to QEMU without the hooks.

use super::{
    error::{PushError, StreamError},
    parser::{Item, ItemHandler, Parser, Payload, StreamBlock},
};

/// Carries out what [`Forwarder`] finds, in call order.
pub trait ForwardSink {
    /// The sink's error.
    type Error;

    /// Called with the complete block list.
    ///
    /// # Errors
    /// The sink's own. An error of any method ends the stream.
    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<(), Self::Error>;

    /// Send these bytes to QEMU.
    ///
    /// # Errors
    /// The sink's own.
    fn stream(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Called at a HOOK: writes follow until REGISTER_FINISHED.
    ///
    /// # Errors
    /// The sink's own.
    fn hook(&mut self) -> Result<(), Self::Error>;

    /// Called after all records of the last RAM section were passed on, and before its end is.
    ///
    /// # Errors
    /// The sink's own.
    fn ram_end(&mut self) -> Result<(), Self::Error>;
}

/// The destination's reader; feed it with [`Forwarder::push`].
#[derive(Debug)]
pub struct Forwarder {
    parser: Parser,
}

impl Default for Forwarder {
    fn default() -> Self {
        Self { parser: Parser::new() }
    }
}

impl Forwarder {
    /// Process the bytes of a QEMU_FILE message.
    ///
    /// # Errors
    /// If they are malformed or a HOOK is not the message's last word, or if the sink fails.
    pub fn push<I: ForwardSink>(
        &mut self,
        message: &[u8],
        sink: &mut I,
    ) -> Result<(), PushError<I::Error>> {
        self.parser.push(message, &mut Passing { sink, hooked: false })
    }

    /// End the stream, after the source has reported it complete.
    ///
    /// # Errors
    /// [`StreamError::Cut`] before the end of the last RAM section.
    pub fn finish(self) -> Result<(), StreamError> {
        self.parser.finish()
    }
}

struct Passing<'a, I> {
    sink: &'a mut I,
    /// A HOOK was read, which must be the message's last word.
    hooked: bool,
}

impl<I: ForwardSink> Passing<'_, I> {
    fn pass(&mut self, item: Item, raw: &[u8], blocks: &[StreamBlock]) -> Result<(), I::Error> {
        match item {
            Item::Hook => {
                self.hooked = true;
                return self.sink.hook();
            }
            Item::Eos { last: true } => self.sink.ram_end()?,
            _ => {}
        }
        self.sink.stream(raw)?;
        if item == Item::BlocksEnd { self.sink.ram_blocks(blocks) } else { Ok(()) }
    }
}

impl<I: ForwardSink> ItemHandler for Passing<'_, I> {
    type Error = I::Error;

    fn item(
        &mut self,
        item: Item,
        raw: &[u8],
        blocks: &[StreamBlock],
    ) -> Result<Payload, PushError<I::Error>> {
        if self.hooked {
            let why = "bytes after a HOOK in its message".to_owned();
            return Err(PushError::Stream(StreamError::Malformed { at: 0, why }));
        }
        // QEMU would assume that it has the content.
        if matches!(item, Item::Announced { .. }) {
            let why = "pages without content".to_owned();
            return Err(PushError::Stream(StreamError::Malformed { at: 0, why }));
        }
        self.pass(item, raw, blocks).map_err(PushError::Handler)?;
        Ok(Payload::Take)
    }

    fn payload(&mut self, bytes: &[u8]) -> Result<(), PushError<I::Error>> {
        self.sink.stream(bytes).map_err(PushError::Handler)
    }
}
