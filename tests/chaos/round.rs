//! One migration, how it is disturbed, and what must hold at its end.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use fastrand::Rng;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    commands::{Besides, Command, Commands, LEFT_OUT_AT_SOURCE, left_out_at_destination},
    end::{Carrier, End, Kind, Wrong, signal_workers},
    support::{
        Config, Guest, Memory, Qmp, free_port, memory,
        qmp::{HUNG_UP, STUCK},
    },
};

/// How long commands are sent. After that, the migration is helped to its end.
const DISTURBED: Duration = Duration::from_secs(6);

/// How long the migration may then take before it is cancelled, and how long after the cancel.
const UNDISTURBED: Duration = Duration::from_secs(25);

/// How long a reply may take. `migrate` is answered when two helpers have agreed.
pub const PATIENCE: Duration = Duration::from_secs(45);

/// Polling interval.
pub const LOOK: Duration = Duration::from_millis(10);

/// States of a migration that is over.
const ENDS: [&str; 4] = ["none", "completed", "failed", "cancelled"];

/// When a worker dies: after the client at its end has sent this many commands.
#[derive(Debug)]
struct Kill {
    source: bool,
    commands: usize,
    signal: Signal,
}

/// What is done in a round.
#[derive(Debug)]
pub struct Round {
    version: &'static str,
    seed: u64,
    kill: Option<Kill>,
    capabilities: Vec<String>,
    /// MiB/s.
    rate: u64,
    besides: Besides,
}

/// What the disturbing client at one end shares with other threads.
#[derive(Default)]
struct Disturbance {
    sent: AtomicUsize,
    /// The client has resumed a guest whose migration had completed.
    let_run: AtomicBool,
    /// The client has stopped the guest, and has not resumed it since.
    stopped: AtomicBool,
    /// Commands and their replies.
    trail: Mutex<Vec<String>>,
}

fn ensure(holds: bool, kind: Kind, what: impl FnOnce() -> String) -> Result<(), Wrong> {
    if holds { Ok(()) } else { Err(Wrong::new(kind, what())) }
}

impl Round {
    pub fn draw(version: &'static str, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let kill = (rng.u8(..4) > 0).then(|| Kill {
            source: rng.bool(),
            commands: rng.usize(..80),
            signal: *rng.choice(&[Signal::KILL, Signal::SEGV, Signal::TERM, Signal::STOP]).unwrap(),
        });
        let besides = match rng.u8(..6) {
            0 => Besides::Devices,
            1..3 => Besides::Snapshots,
            _ => Besides::Multifd,
        };
        let some = ["return-path", "pause-before-switchover", "auto-converge", "multifd"];
        let some = some
            .into_iter()
            .filter(|name| rng.u8(..3) == 0 && (*name != "multifd" || besides == Besides::Multifd));
        let capabilities = some.map(str::to_owned).collect();
        let rate = *rng.choice(&[8, 32, 128, 4096]).unwrap();
        Self { version, seed, kill, capabilities, rate, besides }
    }

    /// Run the round.
    ///
    /// # Errors
    /// What went wrong.
    pub fn run(&self, carrier: Carrier) -> Result<(), Wrong> {
        println!("{} {self:?}", carrier.scheme());
        let config = Config {
            version: self.version,
            memory: Memory::Private,
            mib: 64,
            guest: Guest::Dirty { fill: 48, hot: 8, spin: 3000 },
            devices: vec!["-device qemu-xhci,id=usb".to_owned()],
            ..Config::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let mut source = End::start(&dir, "source", &config, carrier);
        let defaults = source.run("query-migrate-parameters", json!({}))?;
        source.qemu.await_guest();
        let incoming = config.incoming();
        let mut destination = End::start(&dir, "destination", &incoming, carrier);

        let migrated = self.migrate(&mut source, &mut destination, carrier);
        for end in [&mut source, &mut destination] {
            if let Some(crash) = end.crash() {
                return Err(crash);
            }
        }
        let Some(destination_runs) = migrated? else { return Ok(()) };
        if destination_runs {
            return destination.goes_on();
        }
        let usable = source.goes_on().and_then(|()| reset(&mut source, &defaults));
        usable.map_err(|wrong| Wrong { what: wrong.what + "\n" + &source.qemu.log(), ..wrong })?;
        let mut destination = End::start(&dir, "next", &incoming, carrier);
        let logs = |source: &End, destination: &End| {
            format!("\n{}\n{}", source.qemu.log(), destination.qemu.log())
        };
        let moved = once_more(&mut source, &mut destination, carrier);
        moved.map_err(|wrong| Wrong { what: wrong.what + &logs(&source, &destination), ..wrong })
    }

    /// Migrate and disturb. Return whether the guest has moved, if that can be determined.
    fn migrate(
        &self,
        source: &mut End,
        destination: &mut End,
        carrier: Carrier,
    ) -> Result<Option<bool>, Wrong> {
        for end in [&mut *source, &mut *destination] {
            end.set_capabilities(&self.capabilities, true)?;
        }
        source.run("migrate-set-parameters", json!({ "max-bandwidth": self.rate << 20 }))?;
        let commands = [
            Commands::of(&mut source.client, LEFT_OUT_AT_SOURCE),
            Commands::of(&mut destination.client, left_out_at_destination(self.version)),
        ];
        let mut rng = Rng::with_seed(!self.seed);
        let over = &AtomicBool::new(false);
        let disturbances = &[Disturbance::default(), Disturbance::default()];
        let relays = [source.relay, destination.relay];
        let sockets = [&*source, &*destination].map(|end| end.qemu.spare_socket());
        let ended = thread::scope(|scope| {
            for ((socket, commands), disturbance) in sockets.iter().zip(&commands).zip(disturbances)
            {
                let mut rng = rng.fork();
                let draw = move || commands.draw(&mut rng, self.besides);
                scope.spawn(move || disturb(Qmp::connect(socket), draw, over, disturbance));
            }
            scope.spawn(|| self.kill(relays, over, disturbances));
            let ended = follow(source, destination, carrier, over);
            over.store(true, SeqCst);
            ended
        });
        let sent = disturbances.each_ref().map(|disturbance| disturbance.sent.load(SeqCst));
        println!("commands: {sent:?}");
        let may_run = disturbances[0].let_run.load(SeqCst);
        let stopped = disturbances[0].stopped.load(SeqCst);
        let moved = ended.and_then(|()| has_moved(source, destination, stopped));
        // A QEMU may also have crashed without an error.
        if moved.is_err()
            || [&mut *source, &mut *destination].iter_mut().any(|end| end.crash().is_some())
        {
            for disturbance in disturbances {
                println!("{:#?}", disturbance.trail.lock().unwrap());
            }
        }
        match moved {
            Err(Wrong { kind: Kind::Twice, .. }) if may_run => Ok(None),
            moved => moved.map(|moved| (!may_run).then_some(moved)),
        }
    }

    fn kill(&self, relays: [Option<u32>; 2], over: &AtomicBool, disturbances: &[Disturbance; 2]) {
        let Some(kill) = &self.kill else { return };
        let index = usize::from(!kill.source);
        while disturbances[index].sent.load(SeqCst) < kill.commands {
            if over.load(SeqCst) {
                return;
            }
            thread::park_timeout(LOOK);
        }
        if let Some(relay) = relays[index] {
            signal_workers(relay, kill.signal);
        }
    }
}

/// Send whatever QMP allows, until the migration is over or QEMU is gone.
fn disturb(
    mut client: Qmp,
    mut draw: impl FnMut() -> Command,
    over: &AtomicBool,
    disturbance: &Disturbance,
) {
    client.patience(PATIENCE);
    while !over.load(SeqCst) {
        let (command, arguments) = draw();
        let mut done = client.try_execute(command, &arguments);
        let trail = format!("{command} {arguments} -> {done:?}");
        disturbance.trail.lock().unwrap().push(trail);
        if done.is_ok() && ["stop", "cont"].contains(&command) {
            disturbance.stopped.store(command == "stop", SeqCst);
        }
        if command == "cont" && done.is_ok() {
            done = client.try_execute("query-migrate", &json!({}));
            if done.as_ref().is_ok_and(|state| state["status"] == "completed") {
                disturbance.let_run.store(true, SeqCst);
            }
        }
        if done.is_err_and(|error| error == HUNG_UP || error == STUCK) {
            return;
        }
        disturbance.sent.fetch_add(1, SeqCst);
    }
}

/// Start a migration, and help it to its end when it was disturbed for long enough.
fn follow(
    source: &mut End,
    destination: &mut End,
    carrier: Carrier,
    over: &AtomicBool,
) -> Result<(), Wrong> {
    let uri = json!({ "uri": format!("{}:127.0.0.1:{}", carrier.scheme(), free_port()) });
    for (end, command) in [(destination, "migrate-incoming"), (&mut *source, "migrate")] {
        match end.run(command, uri.clone()) {
            // QEMU refuses some combinations of settings.
            Err(Wrong { kind: Kind::Refused(_), .. }) => return Ok(()),
            Err(wrong) => return Err(wrong),
            Ok(_) => {}
        }
    }
    let begun = Instant::now();
    let mut cancelled = false;
    loop {
        let state = source.migration()?;
        let status = state["status"].as_str().unwrap_or("none");
        if ENDS.contains(&status) {
            return Ok(());
        }
        let taken = begun.elapsed();
        if taken > DISTURBED {
            over.store(true, SeqCst);
            let fast = json!({ "max-bandwidth": 4_u64 << 30, "downtime-limit": 1000 });
            match source.run("migrate-set-parameters", fast) {
                // Refused because of earlier settings.
                Err(Wrong { kind: Kind::Refused(_), .. }) | Ok(_) => {}
                Err(wrong) => return Err(wrong),
            }
        }
        if taken > DISTURBED && status == "pre-switchover" {
            // The migration may have continued by itself.
            let _ = source.run("migrate-continue", json!({ "state": status }));
        }
        if taken > DISTURBED + UNDISTURBED && !cancelled {
            cancelled = true;
            source.run("migrate_cancel", json!({}))?;
        }
        ensure(taken < DISTURBED + 2 * UNDISTURBED, Kind::Endless, || state.to_string())?;
        thread::park_timeout(LOOK);
    }
}

/// Check that the guest is at exactly one end, and return whether it has moved.
///
/// A guest `stopped` by a client stays so; QEMU 7.2 makes it `postmigrate`, as if it had left
/// (`migration_iteration_finish`).
fn has_moved(source: &mut End, destination: &mut End, stopped: bool) -> Result<bool, Wrong> {
    let deadline = Instant::now() + UNDISTURBED;
    // A QEMU that is gone cannot run the guest.
    let there = loop {
        let there = destination.migration().unwrap_or_else(|_| json!({ "status": "gone" }));
        // At `setup` no source has connected, and none will.
        if there["status"] != "active" || Instant::now() > deadline {
            break there;
        }
        thread::park_timeout(LOOK);
    };
    let (here, guest) = (source.migration()?, source.guest()?);
    let moved = there["status"] == "completed";
    // The guest has left, or was reset after that.
    let left = guest == "postmigrate" || moved && guest == "prelaunch";
    let why = || {
        format!(
            "the guest is {guest} at the source, which says {here}; the destination says {there}"
        )
    };
    let said = here["error-desc"].as_str().is_some_and(|text| text.contains("stays stopped"));
    match (left, moved) {
        (true, true) | (false, false) => Ok(moved),
        (true, false) if said || stopped => Ok(false),
        (true, false) => Err(Wrong::new(Kind::Nowhere, why())),
        (false, true) => Err(Wrong::new(Kind::Twice, why())),
    }
}

/// Restore the settings, and unplug the device.
fn reset(source: &mut End, parameters: &Value) -> Result<(), Wrong> {
    let capabilities = source.run("query-migrate-capabilities", json!({}))?;
    let on = capabilities.as_array().unwrap().iter().filter(|entry| entry["state"] == true);
    let on: Vec<_> = on.map(|entry| entry["capability"].as_str().unwrap().to_owned()).collect();
    source.set_capabilities(&on, false)?;
    source.run("migrate-set-parameters", parameters.clone())?;
    // The device may not be there.
    let _ = source.run("device_del", json!({ "id": "tablet" }));
    Ok(())
}

/// Check that the next migration succeeds.
fn once_more(source: &mut End, destination: &mut End, carrier: Carrier) -> Result<(), Wrong> {
    let uri = json!({ "uri": format!("{}:127.0.0.1:{}", carrier.scheme(), free_port()) });
    destination.run("migrate-incoming", uri.clone())?;
    source.run("migrate-set-parameters", json!({ "max-bandwidth": 4_u64 << 30 }))?;
    source.run("migrate", uri)?;
    for end in [&mut *source, &mut *destination] {
        loop {
            let state = end.migration()?;
            match state["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => {
                    return Err(Wrong::new(Kind::Next, state.to_string()));
                }
                _ => thread::park_timeout(LOOK),
            }
        }
    }
    let differences = memory::compare(&mut source.qemu, &mut destination.qemu);
    ensure(differences.is_empty(), Kind::Differs, || format!("{differences:?}"))?;
    destination.goes_on()
}

/// Migrate over `tcp:`. Return how a QEMU died, if one did.
///
/// Both ends compress, and the source is told to use more threads; or the destination is given a
/// capability in mid-stream.
pub fn fate_of_qemu_alone(version: &'static str, given: Option<&str>) -> Option<Kind> {
    let guest = Guest::Dirty { fill: 48, hot: 8, spin: 3000 };
    let config = Config { version, memory: Memory::Private, mib: 64, guest, ..Config::default() };
    let dir = tempfile::tempdir().unwrap();
    let mut source = End::start(&dir, "source", &config, Carrier::Qemu);
    source.qemu.await_guest();
    let mut destination = End::start(&dir, "destination", &config.incoming(), Carrier::Qemu);
    let uri = json!({ "uri": format!("tcp:127.0.0.1:{}", free_port()) });
    for end in [&mut source, &mut destination].into_iter().filter(|_| given.is_none()) {
        end.set_capabilities(&["compress".to_owned()], true).unwrap();
    }
    source.run("migrate-set-parameters", json!({ "max-bandwidth": 64 << 10 })).unwrap();
    destination.run("migrate-incoming", uri.clone()).unwrap();
    source.run("migrate", uri).unwrap();
    for end in [&mut source, &mut destination] {
        while end.migration().unwrap()["status"] != "active" {
            thread::park_timeout(LOOK);
        }
    }
    let mut fast = json!({ "max-bandwidth": 1_u64 << 32 });
    match given {
        Some(given) => {
            let given = ["return-path", given].map(str::to_owned);
            destination.set_capabilities(&given, true).unwrap();
        }
        None => fast["compress-threads"] = 255.into(),
    }
    // A QEMU that is gone by now is found below.
    let _ = source.run("migrate-set-parameters", fast);
    while source.migration().is_ok_and(|state| !ENDS.contains(&state["status"].as_str().unwrap())) {
        thread::park_timeout(LOOK);
    }
    let _ = destination.migration();
    let crash = source.crash().or_else(|| destination.crash());
    crash.map(|crash| crash.kind)
}
