//! A source that has failed, unless the destination says otherwise: it, or another thread, may know better.

use std::{sync::Arc, time::Duration};

use tracing::warn;

use super::{Event, Outgoing};
use crate::{
    control::Order,
    fabric::FabricError,
    patience::Patience,
    threads,
    worker::{Outcome, error::MigrationError, link::Link, patience_of},
};

/// How long to wait for the peer's own words after it closed the connection.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Failed, and not over yet.
pub struct Ending {
    error: MigrationError,
    /// Of a connection that was closed: why, as another thread of ours knows. It may be the consequence of
    /// what the peer says next.
    known: Option<MigrationError>,
    /// Nothing that makes the guest run at the destination has left, or will.
    guest_never_ran: bool,
    link: Option<Arc<Link>>,
    /// How long somebody may still say something; `None`: as long as the connection stands.
    pub patience: Option<Patience>,
}

impl Ending {
    /// Of `error`, behind which nothing more is heard of the peer but what has come already. When the
    /// connection has ended, it may have said why before.
    pub fn unheard(error: MigrationError, guest_never_ran: bool, link: Option<Arc<Link>>) -> Self {
        let limit = if is_cut(&error) { LAST_WORDS } else { Duration::ZERO };
        let patience = patience_of(limit);
        Self { error, known: None, guest_never_ran, link, patience }
    }

    /// Of `error`, which is this side's. Behind RAM only the destination knows where the guest runs: it is
    /// told, makes its QEMU end one way or the other, and says which. A stock one says nothing.
    pub fn of_ours(error: MigrationError, guest_never_ran: bool, link: Option<Arc<Link>>) -> Self {
        match &link {
            Some(link) if !guest_never_ran && !link.is_stock() && !is_cut(&error) => {
                warn!(%error, "the destination's verdict is awaited");
                let (telling, text) = (link.clone(), error.to_string());
                let unsaid = link.clone();
                threads::start(
                    "last words",
                    move || telling.tell(text, false),
                    move |said| {
                        if said.is_err() {
                            // It notices by that.
                            unsaid.close();
                        }
                    },
                );
                Self {
                    error,
                    known: None,
                    guest_never_ran,
                    link: Some(link.clone()),
                    patience: None,
                }
            }
            _ => Self::unheard(error, guest_never_ran, link),
        }
    }

    /// The client has cancelled: it waits for no destination for ever.
    pub fn hurry(mut self) -> Self {
        let limit = self.link.as_ref().map_or(Duration::ZERO, |link| link.stall_timeout());
        self.patience = self.patience.or_else(|| patience_of(limit));
        self
    }

    /// Somebody says something, or the time is over.
    pub(super) fn handle(mut self, event: Event, is_past_ram: bool) -> Outgoing {
        match event {
            Event::Acknowledged if is_past_ram => self.done(),
            // All of the stream was sent before a stock destination closed, which is all that it says
            // when it has loaded the guest.
            Event::StreamTaken(Ok(()))
                if is_past_ram && is_close(&self.error) && self.is_stock() =>
            {
                self.done()
            }
            Event::PeerFailed(error @ MigrationError::PeerFailed { .. }) => self.told(error),
            // A thread that was stopped because of this, and knows no more.
            Event::StreamTaken(Err(MigrationError::Aborted(_))) => Outgoing::Ending(self),
            Event::PeerFailed(other) if !is_cut(&self.error) => {
                warn!(error = %other, "nothing more is heard of the destination");
                self.patience = patience_of(Duration::ZERO);
                Outgoing::Ending(self)
            }
            Event::PeerFailed(other) | Event::StreamTaken(Err(other))
                if is_close(&self.error) && !is_close(&other) =>
            {
                self.known.get_or_insert(other);
                Outgoing::Ending(self)
            }
            Event::Order(Order::Cancel { .. }) => Outgoing::Ending(self.hurry()),
            Event::Late => self.ended(),
            _ => Outgoing::Ending(self),
        }
    }

    fn is_stock(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.is_stock())
    }

    /// The destination has the guest.
    fn done(self) -> Outgoing {
        warn!(error = %self.error, "the destination has the guest all the same");
        if let Some(link) = self.link {
            link.close();
        }
        Outgoing::Ended(Outcome::Done)
    }

    /// The destination failed too. Its own reason counts where the end of the connection is all that is
    /// known here; that its guest never ran counts in any case.
    fn told(mut self, told: MigrationError) -> Outgoing {
        let MigrationError::PeerFailed { guest_never_ran, .. } = &told else { return self.ended() };
        self.guest_never_ran |= *guest_never_ran;
        if is_cut(&self.error) {
            self.known = Some(told);
        }
        self.ended()
    }

    fn ended(self) -> Outgoing {
        let error = self.known.unwrap_or(self.error);
        Outgoing::Ended(Outcome::failed(error, self.guest_never_ran, self.link))
    }
}

/// The connection has ended.
fn is_cut(error: &MigrationError) -> bool {
    matches!(error, MigrationError::Fabric(error) if !error.leaves_connection())
}

/// The peer ended it.
fn is_close(error: &MigrationError) -> bool {
    matches!(error, MigrationError::Fabric(FabricError::Closed))
}
