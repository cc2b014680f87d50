//! The packet path beyond the matrix: what is refused, dropped and left alone, what lives on, and packets of every kind.
//! Rules are cited by their numbers.

#![expect(clippy::unwrap_used, clippy::panic, reason = "the helpers of tests fail as tests do")]

mod any_frames;
mod bare;
mod devices;
mod fast;
mod flood;
mod flows;
mod frames;
mod refusal;
mod sizes;
mod stage;
mod talk;
mod tools;
