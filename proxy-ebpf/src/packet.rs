//! The packet path: what a frame says, what becomes of it.

use aya_ebpf::programs::TcContext;

/// The next program of the hook, or the stack: `TCX_NEXT`, and `TC_ACT_UNSPEC` of the classic hook.
const NEXT: i32 = -1;

pub(crate) const fn ingress(_ctx: &TcContext) -> i32 {
    NEXT
}

pub(crate) const fn egress(_ctx: &TcContext) -> i32 {
    NEXT
}
