//! What goes wrong: cancellation, processes that are killed or stopped, peers and users that are hostile.

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
