//! Sheave's agent. Data flows one way:
//!
//! ```text
//! source ── Change ──▶ model ── dirty Services ──▶ resolve ──▶ plan ── writes ──▶ dataplane (kernel maps)
//! ```
//!
//! Sources only report; `model`, `resolve` and `plan` are pure; only `dataplane` touches the kernel.

pub mod agent;
pub mod claims;
pub mod cli;
pub mod control;
pub mod dataplane;
pub mod dump;
pub mod kernel;
pub mod model;
pub mod object;
pub mod reconcile;
pub mod resolve;
pub mod source;
pub mod status;
pub mod view;
pub mod wanted;
