//! Every state meets every event.

use std::{
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    control::{Command, FabricKind},
    fabric::tcp::Tcp,
    worker::idle_link,
};

fn context(past_ram: bool) -> (Context, Receiver<Event>) {
    let (events, received) = mpsc::channel();
    let options = Options {
        pin_all: false,
        return_path: false,
        stall_timeout: 60,
        peer_timeout: 60,
        connections: 1,
        channels: 0,
        pin_limit: None,
        chunk_size: crate::ram::CHUNK,
        cpus: Vec::new(),
        fabric: FabricKind::Tcp,
    };
    let fabric = Arc::new(Tcp { stall_timeout: Duration::from_secs(60), connections: 1 });
    let address = Address { host: "127.0.0.1".into(), port: 1 };
    let context = Context {
        way: Arc::new(Way { fabric, address, options }),
        qemu: OnceCell::new(),
        give_back: RefCell::default(),
        qmp: None,
        is_alone: Cell::new(false),
        takeover: Cell::default(),
        guest_runs: Cell::new(true),
        guest_ran: Cell::new(None),
        stream_read: Cell::new(false),
        over: Cell::new(false),
        cancelled: Cell::new(false),
        reports: Arc::new(Reports::new(UnixStream::pair().unwrap().0)),
        statistics: Statistics::new("tcp"),
        switchover: Arc::default(),
        rate_limit: Arc::default(),
        read: Vec::new(),
        events,
    };
    assert!(!past_ram || context.switchover.try_commit());
    (context, received)
}

fn cut() -> MigrationError {
    FabricError::Closed.into()
}

fn lost() -> Lost {
    Lost::NotStarted { thread: "one of them" }
}

fn early() -> MigrationError {
    MigrationError::Qemu("ended its migration stream early".into())
}

fn all_events() -> Vec<(&'static str, Event)> {
    let abort = Order::Abort { reason: "told".into() };
    let told = MigrationError::PeerFailed { text: "no".into(), guest_never_ran: false };
    vec![
        ("Abort", Event::Order(abort)),
        ("Cancel", Event::Order(Order::Cancel { reason: "cancelled".into() })),
        ("Guest", Event::Order(Order::Guest { runs: false })),
        ("Pace", Event::Order(Order::Pace { rate: None })),
        ("Over", Event::Order(Order::Over)),
        ("RelayGone", Event::RelayGone("gone".into())),
        ("GiveBack", Event::Order(Order::GiveBack { commands: Vec::new() })),
        ("GuestBefore", Event::GuestBefore("running".into())),
        ("Take", Event::Take(None)),
        ("StreamTaken: ok", Event::StreamTaken(Ok(()))),
        ("StreamTaken: cut", Event::StreamTaken(Err(cut()))),
        ("StreamTaken: lost", Event::StreamTaken(Err(lost().into()))),
        ("StreamTaken: QEMU", Event::StreamTaken(Err(early()))),
        ("PeerFailed: told", Event::PeerFailed(told)),
        ("PeerFailed: lost", Event::PeerFailed(lost().into())),
        ("PeerFailed: cut", Event::PeerFailed(cut())),
        ("HolesFilled", Event::HolesFilled(Ok(()))),
        ("StreamRead", Event::StreamRead),
        ("Late", Event::Late),
    ]
}

/// Those that have a link; one of them waits for the verdict already.
fn states(link: &Arc<Link>) -> Vec<(&'static str, Outgoing)> {
    let unheard = Ending::unheard(cut(), false, Some(link.clone()));
    let told = Ending::of_ours(early(), false, Some(link.clone()));
    vec![
        ("streaming", Outgoing::Streaming(link.clone())),
        ("confirming", Outgoing::Confirming(link.clone())),
        ("ending, cut", Outgoing::Ending(unheard)),
        ("ending, told", Outgoing::Ending(told)),
    ]
}

/// All pairs of them with events, if the guest may run at the destination, each with what has happened
/// already behind it; to a peer that takes nothing.
fn pairs(then: fn() -> Event, look: impl Fn(&str, Outgoing)) {
    for state in 0..4 {
        for event in 0..all_events().len() {
            let (link, _receiver) = idle_link::link();
            let (context, events) = context(true);
            let (state_name, state) = states(&link).swap_remove(state);
            let (event_name, event) = all_events().swap_remove(event);
            if state_name == "ending, told" && event_name == "Late" {
                // It waits for ever.
                continue;
            }
            context.events.send(then()).unwrap();
            let next = ended(state.handle(event, &context), &context, &events);
            look(&format!("{state_name}, {event_name}"), next);
            link.close();
        }
    }
}

/// Let a state come to its end: by what has happened already, and then by its time, if it has one.
fn ended(mut state: Outgoing, context: &Context, events: &Receiver<Event>) -> Outgoing {
    while !matches!(state, Outgoing::Ended(_)) {
        let event = match events.try_recv() {
            Ok(event) => event,
            Err(_) if state.patience().is_some() => Event::Late,
            Err(_) => break,
        };
        state = state.handle(event, context);
    }
    state
}

/// All pairs, to a destination that takes nothing: none waits for it.
#[test]
fn no_state_waits_and_none_lies() {
    let (link, _receiver) = idle_link::link();
    for past_ram in [false, true] {
        for state in 0..2 {
            for event in 0..all_events().len() {
                let (context, events) = context(past_ram);
                let (name, event) = all_events().swap_remove(event);
                let (_, state) = states(&link).swap_remove(state);
                let begun = Instant::now();
                let next = ended(state.handle(event, &context), &context, &events);
                assert!(begun.elapsed() < Duration::from_secs(1), "{name}");
                if let Outgoing::Ended(Outcome::Failed { guest_never_ran, .. }) = next {
                    assert_eq!(guest_never_ran, !past_ram, "{name}");
                }
            }
        }
    }
    link.close();
}

/// The destination's word counts, whatever came just before it.
#[test]
fn an_acknowledgement_is_never_lost() {
    pairs(
        || Event::Acknowledged,
        |pair, next| {
            // There it has said otherwise, or its time was over.
            let is_other = pair.ends_with("PeerFailed: told") || pair.contains("cut, Late");
            let is_done = matches!(next, Outgoing::Ended(Outcome::Done));
            assert!(is_done || is_other, "{pair}");
        },
    );
}

/// So does it that its guest never ran; and the reason is the first one.
#[test]
fn that_the_guest_never_ran_is_never_lost() {
    let told = || {
        let text = "its QEMU failed".to_owned();
        Event::PeerFailed(MigrationError::PeerFailed { text, guest_never_ran: true })
    };
    pairs(told, |pair, next| {
        let Outgoing::Ended(Outcome::Failed { error, guest_never_ran, .. }) = next else {
            panic!("{pair}")
        };
        // It has said otherwise, or its time was over.
        let is_ended = pair.contains("cut, Late")
            || pair.starts_with("ending") && pair.ends_with("PeerFailed: told");
        assert!(guest_never_ran || is_ended, "{pair}");
        if pair == "streaming, Cancel" {
            assert_eq!(error.to_string(), "cancelled");
        }
        if pair == "ending, cut, Pace" {
            assert_eq!(error.to_string(), "its QEMU failed");
        }
    });
}

/// Nobody knows where the guest runs but the destination: it is not left while it stands.
#[test]
fn what_fails_here_behind_ram_waits_for_the_verdict() {
    let failures = [
        ("streaming", Event::StreamTaken(Err(early()))),
        ("streaming", Event::StreamTaken(Err(lost().into()))),
        ("streaming", Event::Take(None)),
        ("streaming", Event::Order(Order::Cancel { reason: "cancelled".into() })),
        ("confirming", Event::Order(Order::Cancel { reason: "cancelled".into() })),
    ];
    for (name, event) in failures {
        let (link, _receiver) = idle_link::link();
        let (context, events) = context(true);
        let is_cancel = matches!(event, Event::Order(_));
        let (_, state) = states(&link).into_iter().find(|(known, _)| *known == name).unwrap();
        let mut state = state.handle(event, &context);
        let patience = state.patience().map(|patience| patience.slice());
        assert_eq!(patience.is_some_and(|slice| !slice.is_zero()), is_cancel);
        // Which the client need not do for ever.
        let cancel = Order::Cancel { reason: "again".into() };
        let mut state = state.handle(Event::Order(cancel), &context);
        assert!(matches!(state, Outgoing::Ending(_)) && state.patience().is_some());
        let next = ended(state, &context, &events);
        assert!(matches!(next, Outgoing::Ended(Outcome::Failed { guest_never_ran: false, .. })));
        link.close();
    }
}

/// A helper that is told to end leaves nothing half done there, as if it were killed.
#[test]
fn who_is_told_to_end_behind_ram_goes_on() {
    for event in [
        || Event::Order(Order::Abort { reason: "SIGTERM".into() }),
        || Event::RelayGone("gone".into()),
    ] {
        let (link, _receiver) = idle_link::link();
        let (context, _events) = context(true);
        let state = Outgoing::Streaming(link.clone()).handle(event(), &context);
        assert!(matches!(state, Outgoing::Streaming(_)));
        let state = state.handle(Event::StreamTaken(Ok(())), &context);
        let state = state.handle(event(), &context);
        let Outgoing::Confirming(_) = state else { panic!() };
        let state = state.handle(Event::Acknowledged, &context);
        assert!(matches!(state, Outgoing::Ended(Outcome::Done)));
        // Before that it fails, and nothing more goes there.
        let (context, events) = self::context(false);
        let state = Outgoing::Streaming(link.clone()).handle(event(), &context);
        let state = ended(state, &context, &events);
        let Outgoing::Ended(Outcome::Failed { guest_never_ran: true, .. }) = state else {
            panic!()
        };
        assert!(!context.switchover.try_commit());
        link.close();
    }
}

/// It closes when it has the guest, which QEMU says on the return path before; and may do so before our
/// QEMU's stream has ended, or this thread knows that.
#[test]
fn a_stock_destination_that_closes_has_the_guest() {
    let (link, _receiver) = idle_link::stock();
    let (context, events) = context(true);
    let streaming = || Outgoing::Streaming(link.clone());
    let done = |state| matches!(ended(state, &context, &events), Outgoing::Ended(Outcome::Done));
    assert!(done(streaming().handle(Event::Acknowledged, &context)));
    context.events.send(Event::Acknowledged).unwrap();
    assert!(done(streaming().handle(Event::PeerFailed(cut()), &context)));
    context.events.send(Event::StreamTaken(Ok(()))).unwrap();
    assert!(done(streaming().handle(Event::PeerFailed(cut()), &context)));
    context.events.send(Event::PeerFailed(cut())).unwrap();
    assert!(done(streaming().handle(Event::StreamTaken(Ok(())), &context)));
    // One that has not got all of the stream has no guest.
    context.events.send(Event::StreamTaken(Err(early()))).unwrap();
    assert!(!done(streaming().handle(Event::PeerFailed(cut()), &context)));
    assert!(!done(streaming().handle(Event::PeerFailed(cut()), &context)));
}

/// But not before the guest can be there.
#[test]
fn nobody_confirms_what_was_not_sent() {
    let (link, _receiver) = idle_link::link();
    let (context, events) = context(false);
    let next = Outgoing::Streaming(link).handle(Event::Acknowledged, &context);
    let next = ended(next, &context, &events);
    let Outgoing::Ended(Outcome::Failed { guest_never_ran: true, .. }) = next else { panic!() };
}

/// A relay that dies while it sets QEMU back leaves that to us, even before QEMU has migrated.
#[test]
fn what_was_borrowed_concerns_the_relay() {
    let (context, _events) = context(false);
    assert!(!context.concerns_relay());
    let commands = vec![Command {
        execute: "migrate-set-capabilities".into(),
        arguments: serde_json::Value::Null,
    }];
    context.note(&Event::Order(Order::GiveBack { commands }));
    assert!(context.concerns_relay());
    context.note(&Event::Order(Order::GiveBack { commands: Vec::new() }));
    assert!(!context.concerns_relay());
}

/// What a client has stopped after the failure nobody starts.
#[test]
fn orders_count_behind_the_verdict() {
    let (context, events) = context(false);
    context.events.send(Event::Order(Order::Guest { runs: false })).unwrap();
    context.events.send(Event::RelayGone("gone".into())).unwrap();
    assert!(!context.relay_finishes(&events));
    assert!(!context.guest_runs.get() && context.is_alone.get());
    let (context, events) = self::context(false);
    context.events.send(Event::Order(Order::Over)).unwrap();
    assert!(context.relay_finishes(&events));
}

/// The same before QEMU's stream: the destination has nothing, so its guest never ran.
#[test]
fn no_state_waits_and_none_lies_before_the_stream() {
    let agreement = |(link, receiver)| {
        let blocks = handshake::SourceBlocks::Agreed(Vec::new());
        Box::new(Agreement { link, receiver, blocks, pin_limit: None, any_time: true })
    };
    for agreed in [false, true] {
        for event in 0..all_events().len() {
            let (context, _events) = context(false);
            let (name, event) = all_events().swap_remove(event);
            let state = match agreed {
                true => Outgoing::Agreed(agreement(idle_link::link())),
                false => Outgoing::Connecting,
            };
            let begun = Instant::now();
            let next = state.handle(event, &context);
            assert!(begun.elapsed() < Duration::from_secs(1), "{name}");
            match next {
                Outgoing::Ended(Outcome::Failed { guest_never_ran, .. }) => {
                    assert!(guest_never_ran, "{name}");
                }
                // It waits for no more than what has come already.
                Outgoing::Ending(ending) => assert!(ending.patience.is_some(), "{name}"),
                Outgoing::Connecting => assert!(!agreed, "{name}"),
                Outgoing::Agreed(_) => assert!(agreed, "{name}"),
                _ => panic!("{name} leads elsewhere"),
            }
        }
    }
}
