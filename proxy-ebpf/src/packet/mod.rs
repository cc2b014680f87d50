//! The packet path: frame → headers → decide → apply. What is decided lives in `proxy_common::decide::packet`.

mod skb;
mod tables;

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_redirect, programs::TcContext};
use proxy_common::decide::packet::{self as decide, Decision, Headers, L2_BYTES, Verdict};
use skb::Skb;
use tables::Device;

use crate::maps::{FLOW, HEADERS};

/// The next program of the hook, or the stack: `TCX_NEXT`, and `TC_ACT_UNSPEC` of the classic hook.
const NEXT: i32 = -1;
/// `TCX_DROP`, `TC_ACT_SHOT`.
const DROP: i32 = 2;

/// `ETH_P_IP`, `ETH_P_IPV6` in network order.
const IPV4: u32 = 0x0800_u16.to_be() as u32;
const IPV6: u32 = 0x86dd_u16.to_be() as u32;

/// IP protocol numbers of ICMP.
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

// Every step is a global function, which the verifier walks once and by itself. Inlined, or as functions of this object
// only, the ways through them would multiply: it gives up at a million instructions. They hand each other the headers in
// `HEADERS`, since kernels before 5.13 let a global function take no pointer but the context.

pub(crate) fn ingress(ctx: &TcContext) -> i32 {
    let answer = match packet_parse(ctx.skb.skb) {
        TRANSPORT => packet_in(ctx.skb.skb),
        CONTROL => packet_icmp_in(ctx.skb.skb),
        _ => NEXT,
    };
    if answer == REFUSE { packet_refuse(ctx.skb.skb) } else { answer }
}

pub(crate) fn egress(ctx: &TcContext) -> i32 {
    match packet_parse(ctx.skb.skb) {
        TRANSPORT => packet_out(ctx.skb.skb),
        CONTROL => packet_icmp_out(ctx.skb.skb),
        _ => NEXT,
    }
}

/// What [`packet_parse`] found: nothing of ours, ICMP, or anything else.
const NOTHING: i32 = 0;
const CONTROL: i32 = 1;
const TRANSPORT: i32 = 2;

/// Answers of a step that are none of the kernel's.
const REFUSE: i32 = 1 << 16;
const FORWARD: i32 = 1 << 17;

/// Reads the headers into `HEADERS`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_parse(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let skb = Skb::new(&ctx);
    let v6 = match skb.protocol() {
        IPV4 => false,
        IPV6 => true,
        _ => return NOTHING,
    };
    skb.pull();
    let Some(headers) = decide::parse(&skb, L2_BYTES, v6) else { return NOTHING };
    let Some(stored) = HEADERS.get_ptr_mut(0) else { return NOTHING };
    // SAFETY: a per-CPU slot, used by the packet that is on this CPU.
    unsafe { *stored = headers };
    if headers.protocol == ICMP || headers.protocol == ICMPV6 { CONTROL } else { TRANSPORT }
}

#[inline(always)]
fn headers() -> Option<&'static mut Headers> {
    let stored = HEADERS.get_ptr_mut(0)?;
    // SAFETY: as above; `packet_parse` wrote it for this packet, and each step takes it once.
    Some(unsafe { &mut *stored })
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_in(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return NEXT };
    let decide = |_: &Headers| match packet_decide(skb) {
        FORWARD => match FLOW.get(0) {
            Some(flow) => Decision::Forward(flow),
            None => Decision::Verdict(Verdict::Drop),
        },
        REFUSE => Decision::Verdict(Verdict::Refuse),
        DROP => Decision::Verdict(Verdict::Drop),
        _ => Decision::Verdict(Verdict::Next),
    };
    answer(decide::ingress(&mut Skb::new(&ctx), &Device::of(&ctx), headers, decide))
}

/// Decides a new connection; its flow goes into `FLOW`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_decide(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return NEXT };
    match decide::decide(&Device::of(&ctx), headers) {
        Decision::Forward(flow) => {
            let Some(stored) = FLOW.get_ptr_mut(0) else { return DROP };
            // SAFETY: a per-CPU slot, used by the packet that is on this CPU.
            unsafe { *stored = flow };
            FORWARD
        }
        Decision::Verdict(verdict) => answer(Some(verdict)),
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_icmp_in(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return NEXT };
    answer(decide::icmp_ingress(&mut Skb::new(&ctx), &Device::of(&ctx), headers))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_out(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return NEXT };
    answer(decide::egress(&mut Skb::new(&ctx), &Device::of(&ctx), headers))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_icmp_out(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return NEXT };
    answer(decide::icmp_egress(&mut Skb::new(&ctx), &Device::of(&ctx), headers))
}

#[inline(always)]
const fn answer(verdict: Option<Verdict>) -> i32 {
    match verdict {
        None | Some(Verdict::Next) => NEXT,
        Some(Verdict::Drop) => DROP,
        Some(Verdict::Refuse) => REFUSE,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_refuse(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let mut skb = Skb::new(&ctx);
    let Some(headers) = headers() else { return DROP };
    if decide::refuse(&mut skb, headers).is_none() {
        return DROP;
    }
    // SAFETY: any interface index is allowed; this one is the packet's own.
    (unsafe { bpf_redirect(skb.device(), 0) }) as i32
}
