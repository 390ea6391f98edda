//! Checks of the repository itself.

mod layers;
mod specification;
