//! Where the kernel's routing tables send a packet.

use aya_ebpf::{
    bindings::{__sk_buff, bpf_fib_lookup as Lookup},
    helpers::bpf_fib_lookup,
};
use proxy_common::{abi::Address, decide::packet::Route};

/// `AF_INET`, `AF_INET6`.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// `BPF_FIB_LKUP_RET_*`: found; for this node itself; found, but the neighbour's link address is not known yet.
const SUCCESS: i64 = 0;
const NOT_FORWARDED: i64 = 4;
const NO_NEIGHBOUR: i64 = 7;

/// Asks as if the packet had come in by `device`; `BPF_FIB_LOOKUP_OUTPUT` would look no further than that device. Also
/// the neighbour's link address, where it is known.
#[inline(always)]
pub(super) fn lookup(skb: *mut __sk_buff, device: u32, to: &Address, v6: bool) -> (Route, Option<[u8; 6]>) {
    // SAFETY: plain integers; all zero is a value.
    let mut question: Lookup = unsafe { core::mem::zeroed() };
    question.ifindex = device;
    if v6 {
        question.family = AF_INET6;
        question.__bindgen_anon_4.ipv6_dst = to.words();
    } else {
        question.family = AF_INET;
        question.__bindgen_anon_4.ipv4_dst = to.words()[3];
    }
    // SAFETY: the context is valid, and so is the buffer for its whole size.
    let answer = unsafe { bpf_fib_lookup(skb.cast(), &raw mut question, size_of::<Lookup>() as i32, 0) };
    match answer {
        SUCCESS => (Route::Device(question.ifindex), Some(question.dmac)),
        NO_NEIGHBOUR => (Route::Device(question.ifindex), None),
        NOT_FORWARDED => (Route::Local, None),
        _ => (Route::None, None),
    }
}
