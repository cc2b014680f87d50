//! Objects in, symbolic tables out: everything between a source and the kernel, on memory tables.

#![expect(clippy::unwrap_used, clippy::panic, reason = "the helpers of tests fail as tests do")]

mod bad_input;
mod engine;
mod objects;
mod scenarios;
