//! Sheave's agent. Data flows one way:
//!
//! ```text
//! source ── Batch ──▶ model ── dirty Services ──▶ resolve, claims (wanted) ──▶ reconcile ── writes ──▶ dataplane
//! ```
//!
//! Sources only report; `model`, `resolve`, `claims` and `wanted` are pure; `reconcile` sees the kernel only through the
//! `dataplane` trait; `kernel` loads and attaches.

pub mod agent;
pub mod claims;
pub mod cli;
pub mod control;
pub mod dataplane;
pub mod dump;
pub mod kernel;
pub mod model;
pub mod netlink;
pub mod object;
pub mod packet;
pub mod parallel;
pub mod reconcile;
pub mod resolve;
pub mod served;
pub mod sockets;
pub mod source;
pub mod status;
pub mod takeover;
pub mod told;
pub mod view;
pub mod wanted;
