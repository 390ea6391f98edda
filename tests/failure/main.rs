//! Failures: cancelled migrations, killed or stopped processes, hostile peers and users.

#[path = "../support/mod.rs"]
mod support;

mod cancel;
mod confinement;
mod cut_streams;
mod hostile;
mod intruders;
mod kills;
mod processes;
mod shortage;
mod stops;
mod strangers;
mod threads;
