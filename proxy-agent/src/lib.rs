//! Sheave's agent. Data flows one way:
//!
//! ```text
//! source ── Change ──▶ model ── dirty Services ──▶ resolve ──▶ plan ── writes ──▶ dataplane (kernel maps)
//! ```
//!
//! Sources only report; `model`, `resolve` and `plan` are pure; only `dataplane` touches the kernel.

pub mod claims;
pub mod dataplane;
pub mod kernel;
pub mod model;
pub mod object;
pub mod reconcile;
pub mod resolve;
pub mod source;
pub mod view;
pub mod wanted;
