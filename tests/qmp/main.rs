//! QMP and HMP as a client sees them, and the program's own command line.

#[path = "../support/mod.rs"]
mod support;

mod commands;
mod hmp;
mod management;
mod monitors;
mod protocol;
mod settings;
mod text;
