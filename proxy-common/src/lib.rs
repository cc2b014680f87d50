//! What the kernel programs, the agent and the tests share.
//!
//! * [`abi`]: one module per map. A layout is defined here once and its bytes are pinned by assertions, so the kernel
//!   side and the agent cannot drift apart.
//! * [`decide`]: the decision core. Which frontend, which set, which backend: the same safe code runs inside the kernel
//!   programs, in host tests, and behind `sheave explain`.
#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]

#[cfg(test)]
extern crate std;

pub mod abi;
pub mod decide;
