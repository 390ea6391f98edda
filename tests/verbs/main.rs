//! Migrations over verbs, and `check`. They need an RDMA device: `scripts/lab/test` runs them in a
//! machine that has one. Elsewhere they are skipped.

#[path = "../support/mod.rs"]
mod support;

#[cfg(feature = "verbs")]
mod arrival;
mod check;
#[cfg(feature = "verbs")]
mod hostile;
mod migrations;
mod options;
mod run;
