//! What must hold for the repository itself.

mod layers;
mod specification;
