//! The destination's side: the rewritten stream goes to QEMU without the hooks.

use super::{
    error::{PushError, StreamError},
    parser::{Item, ItemHandler, Parser, Payload, StreamBlock},
};

/// Carries out what [`Forwarder`] finds, in the order of the calls.
pub trait ForwardSink {
    /// Why it can't.
    type Error;

    /// The block list is complete.
    ///
    /// # Errors
    /// The sink's own; any ends the stream. So for the other calls.
    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<(), Self::Error>;

    /// Bytes for QEMU.
    ///
    /// # Errors
    /// The sink's own.
    fn stream(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;

    /// A HOOK: writes follow until REGISTER_FINISHED.
    ///
    /// # Errors
    /// The sink's own.
    fn hook(&mut self) -> Result<(), Self::Error>;

    /// The last RAM section's records have all been passed on; its end has not.
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
    /// Take the bytes of a QEMU_FILE message.
    ///
    /// # Errors
    /// When they are malformed, or a HOOK is not the message's last word; or the sink's.
    pub fn push<I: ForwardSink>(
        &mut self,
        message: &[u8],
        sink: &mut I,
    ) -> Result<(), PushError<I::Error>> {
        self.parser.push(message, &mut Passing { sink, hooked: false })
    }

    /// The source says that the stream is complete.
    ///
    /// # Errors
    /// [`StreamError::Cut`] before the last RAM section.
    pub fn finish(self) -> Result<(), StreamError> {
        self.parser.finish()
    }
}

struct Passing<'a, I> {
    sink: &'a mut I,
    /// The message's last word must have been this HOOK.
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
            let why = "bytes behind a HOOK in its message".to_owned();
            return Err(PushError::Stream(StreamError::Malformed { at: 0, why }));
        }
        // QEMU would take the content for granted.
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
