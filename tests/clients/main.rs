//! The clients of `docs/examples`.

#[path = "../support/mod.rs"]
mod support;

mod examples;
