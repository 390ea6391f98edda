//! What must hold: the guest never runs twice, and if it stays stopped, the operator is told why.

use qemu_rdma_helper::proto::relay::{MigrationStatus, source::End};

use super::{qemu::Run, world::World};

/// After every step.
pub fn always(world: &World) -> Result<(), String> {
    let (source, destination) = (&world.source_qemu, &world.destination_qemu);
    if world.is_deserted {
        // QEMU alone sees its connection break: its guest resumes, as over `tcp:`.
        return Ok(());
    }
    if source.guest_runs() && destination.guest_runs() {
        return Err("the guest runs at both ends".into());
    }
    if let Some(why) = source.aborted {
        return Err(format!("the source's QEMU aborted: {why}"));
    }
    if world.shown() == Some(&End::Completed) && !world.has_arrived {
        return Err("completed is shown, and the destination's QEMU has no guest".into());
    }
    Ok(())
}

/// When nothing more happens.
pub fn at_end(world: &World) -> Result<(), String> {
    let (source, destination) = (&world.source_qemu, &world.destination_qemu);
    let completed = destination.migration == MigrationStatus::Completed;
    if completed && !world.was_disturbed && world.shown() != Some(&End::Completed) {
        return Err(format!("nothing broke and the guest has moved; shown is {:?}", world.shown()));
    }
    if !source.is_alive || world.has_arrived || world.is_deserted {
        // The guest is gone with its QEMU, or has arrived.
        return Ok(());
    }
    let ran = world.start.guest == Run::Running && !world.was_stopped;
    if source.guest_runs() || !ran {
        return Ok(());
    }
    if destination.guest_runs() {
        return Ok(());
    }
    match world.shown() {
        // The operator is told that the guest stays stopped, and why.
        Some(End::Failed(reason)) if reason.contains("The guest ") => Ok(()),
        Some(end) => Err(format!("the guest is {:?} at the source, and {end:?} shown", source.run)),
        None => Err(format!("the guest is {:?} at the source, and nobody says why", source.run)),
    }
}
