//! Each test cites the rules of semantics.md that it pins.

pub(crate) mod build;
mod endpoints;
mod exhaustive;
mod facts;
mod services;
