//! What the kernel programs, the agent and the tests share.
//!
//! * [`abi`]: one module per map. A layout is defined here once and its bytes are pinned by assertions, so the kernel
//!   side and the agent cannot drift apart.
//! * [`decide`]: the decision core. Which frontend, which set, which backend: the same safe code runs inside the kernel
//!   programs, in host tests, and behind `sheave explain`.
#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![forbid(unsafe_op_in_unsafe_fn)]

#[cfg(test)]
extern crate std;

pub mod abi;
pub mod decide;

/// The same word, of which the compiler knows nothing any more. As [`core::hint::black_box`], without its way through memory.
#[inline(always)]
#[must_use]
pub fn opaque(word: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let unknown: u64;
        // An instruction, not none: the kernel refuses two lines of source at one.
        // SAFETY: copies a register.
        unsafe { core::arch::asm!("{} = {}", out(reg) unknown, in(reg) word, options(pure, nomem, nostack)) };
        unknown
    }
    #[cfg(not(target_arch = "bpf"))]
    core::hint::black_box(word)
}
