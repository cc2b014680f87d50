//! The packet path: frame → headers → decide → apply. What is decided lives in `proxy_common::decide::packet`.

mod route;
mod skb;
mod tables;

use core::ptr::null_mut;

use aya_ebpf::{
    Global,
    bindings::__sk_buff,
    helpers::{bpf_redirect, bpf_redirect_neigh},
    programs::TcContext,
};
use proxy_common::{
    abi::packet::{ACCEPT, EGRESS, FAST, INGRESS},
    decide::packet::{self as decide, Decision, Headers, L2_BYTES, PacketTables, Route, Verdict},
};
use skb::Skb;
use tables::Device;

use crate::maps::{CLAIM, FLOW, HEADERS, PACKET_PROGRAMS, REDIRECT_TO};

/// `BPF_F_INGRESS`.
const BPF_F_INGRESS: u64 = 1;

/// The next program of the hook, or the stack: `TCX_NEXT`, and `TC_ACT_UNSPEC` of the classic hook.
const NEXT: i32 = -1;
/// `TCX_DROP`, `TC_ACT_SHOT`.
const DROP: i32 = 2;

/// What ingress leaves in `tc_index` for egress: the packet has all that it needs. Every ingress hook says anew what holds,
/// and a program of somebody else that changes it costs a look-up, no more.
const SETTLED: u32 = 0x5ea1;

/// What [`watch_bare_egress`] leaves there for [`egress`]: the link header is to be taken off again.
const BARE: u32 = 0x5ea2;

/// What [`fast`] leaves there for the first egress hook: the packet is to be seen leaving.
const ASKED: u32 = 0x5ea3;

/// 1 if packets may skip the stack. The verifier prunes what is for that otherwise.
#[unsafe(no_mangle)]
static FAST_PATH: Global<u32> = Global::new(0);

#[inline(always)]
fn is_fast() -> bool {
    FAST_PATH.load() != 0
}

/// Spares those that Sheave has nothing to do with: nearly all. These programs never write to a frame. For one that
/// does, wherever it does, the kernel first copies every frame that TCP still holds, and so each one that a pod sends.
pub(crate) fn watch_ingress(ctx: &TcContext) -> i32 {
    let skb = Skb::new(ctx);
    skb.set_hint(0);
    if is_ours(&skb, |v6| decide::passes_in(&skb, &Device::of(ctx), L2_BYTES, v6)) {
        if is_fast() {
            // SAFETY: the context is this program's own.
            unsafe { PACKET_PROGRAMS.tail_call(ctx, FAST) };
        }
        // SAFETY: as above.
        unsafe { PACKET_PROGRAMS.tail_call(ctx, INGRESS) };
    }
    NEXT
}

/// As [`watch_ingress`].
pub(crate) fn watch_egress(ctx: &TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let hint = skb.hint();
    if hint != SETTLED && is_ours(&skb, |v6| decide::passes_out(&skb, &Device::leaving(ctx), L2_BYTES, v6)) {
        if is_fast() && hint == ASKED {
            // SAFETY: as above.
            unsafe { PACKET_PROGRAMS.tail_call(ctx, ACCEPT) };
        }
        // SAFETY: as above.
        unsafe { PACKET_PROGRAMS.tail_call(ctx, EGRESS) };
    }
    NEXT
}

/// As [`watch_ingress`], at a device whose frames have no link header. What may be ours gets one, so that the programs find
/// everything where it always is; the stack looks behind it.
pub(crate) fn watch_bare_ingress(ctx: &TcContext) -> i32 {
    let skb = Skb::new(ctx);
    skb.set_hint(0);
    if is_ours(&skb, |v6| decide::passes_in(&skb, &Device::of(ctx), 0, v6)) {
        if skb.add_link_header().is_none() {
            return DROP;
        }
        // SAFETY: as above.
        unsafe { PACKET_PROGRAMS.tail_call(ctx, INGRESS) };
    }
    NEXT
}

/// As [`watch_bare_ingress`]. The device is not to see the link header: a redirection to it takes it off ([`egress`]).
pub(crate) fn watch_bare_egress(ctx: &TcContext) -> i32 {
    let skb = Skb::new(ctx);
    if skb.hint() != SETTLED && is_ours(&skb, |v6| decide::passes_out(&skb, &Device::leaving(ctx), 0, v6)) {
        if skb.add_link_header().is_none() {
            return DROP;
        }
        skb.set_hint(BARE);
        // SAFETY: as above.
        unsafe { PACKET_PROGRAMS.tail_call(ctx, EGRESS) };
        return DROP;
    }
    NEXT
}

/// Whether it is an IP packet that does not certainly pass.
#[inline(always)]
fn is_ours(skb: &Skb<'_>, passes: impl Fn(bool) -> bool) -> bool {
    skb.is_v6().is_some_and(|v6| !passes(v6))
}

// Every step is a global function, which the verifier walks once and by itself. Inlined, or as functions of this object
// only, the ways through them would multiply: it gives up at a million instructions. They hand each other the headers in
// `HEADERS`, since kernels before 5.13 let a global function take no pointer but the context.

pub(crate) fn ingress(ctx: &TcContext) -> i32 {
    let mut answer = match packet_parse(ctx.skb.skb) {
        TRANSPORT => packet_in(ctx.skb.skb),
        CONTROL => packet_icmp_in(ctx.skb.skb),
        _ => NEXT,
    };
    if answer == BEGIN {
        answer = match packet_decide(ctx.skb.skb) {
            FORWARD => packet_begin(ctx.skb.skb),
            otherwise => packet_stay(ctx.skb.skb, otherwise as u32),
        };
    }
    if answer == DIRECT {
        answer = packet_direct(ctx.skb.skb);
    }
    match answer {
        REFUSE => packet_refuse(ctx.skb.skb),
        BRIDGE_SETTLED => {
            let skb = Skb::new(ctx);
            if !is_fast() || skb.hint() != ASKED {
                skb.set_hint(SETTLED);
            }
            bridge(ctx)
        }
        BRIDGE => bridge(ctx),
        COME_IN => come_in(),
        answer => answer,
    }
}

/// Comes before [`ingress`] with `--fast-path`. A program of its own: these steps would not fit on the other's stack.
pub(crate) fn fast(ctx: &TcContext) -> i32 {
    let device = packet_fast(ctx.skb.skb);
    if device != 0 {
        Skb::new(ctx).set_hint(SETTLED);
        // SAFETY: any interface index is allowed.
        return (unsafe { bpf_redirect(device, 0) }) as i32;
    }
    if packet_ask(ctx.skb.skb) != 0 {
        Skb::new(ctx).set_hint(ASKED);
    }
    // SAFETY: the context is this program's own.
    unsafe { PACKET_PROGRAMS.tail_call(ctx, INGRESS) };
    NEXT
}

/// Comes before [`egress`] for what [`fast`] asked for. Hooks that come later see another device.
///
/// No step of its own: its stack is nearly all that kernels before 6.9 give a program with all that it calls.
pub(crate) fn accept(ctx: &TcContext) -> i32 {
    let skb = Skb::new(ctx);
    if let Some(v6) = skb.is_v6() {
        skb.pull();
        let _ = decide::accept(&skb, &Device::leaving(ctx), v6);
    }
    skb.set_hint(0);
    // SAFETY: as above.
    unsafe { PACKET_PROGRAMS.tail_call(ctx, EGRESS) };
    NEXT
}

pub(crate) fn egress(ctx: &TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let bare = skb.hint() == BARE;
    if bare {
        skb.set_hint(0);
    }
    let mut answer = match packet_parse(ctx.skb.skb) {
        TRANSPORT => match packet_out(ctx.skb.skb) {
            OTHER_PORT => packet_other_port(ctx.skb.skb),
            GIVE_WAY => packet_give_way(ctx.skb.skb),
            answer => answer,
        },
        CONTROL => match packet_icmp_out(ctx.skb.skb) {
            OTHER_PORT => packet_icmp_other_port(ctx.skb.skb),
            answer => answer,
        },
        _ => NEXT,
    };
    if answer == OWN_NODE {
        answer = packet_own_node(ctx.skb.skb);
    }
    if answer == BEGIN {
        answer = match packet_decide(ctx.skb.skb) {
            FORWARD => packet_begin_own(ctx.skb.skb),
            otherwise => packet_stay_own(ctx.skb.skb, otherwise as u32),
        };
    }
    match answer {
        LEAVE_OWN => answer = packet_leave_own(ctx.skb.skb),
        REPLACE_SOURCE => answer = packet_replace_source(ctx.skb.skb),
        _ => {}
    }
    match answer {
        REFUSE => packet_refuse_own(ctx.skb.skb),
        // SAFETY: any interface index is allowed; without a next hop the routing tables tell it.
        LEAVE => (unsafe { bpf_redirect_neigh(redirect_to(), null_mut(), 0, 0) }) as i32,
        COME_IN => come_in(),
        NEXT if bare => {
            // It comes by here once more.
            skb.set_hint(SETTLED);
            // SAFETY: any interface index is allowed; this one is the packet's own.
            (unsafe { bpf_redirect(skb.device(), 0) }) as i32
        }
        answer => answer,
    }
}

/// Where no device is a port of a bridge, none is looked up for that.
#[inline(always)]
fn bridge(ctx: &TcContext) -> i32 {
    if tables::has_bridge_ports() { packet_bridge(ctx.skb.skb) } else { NEXT }
}

#[inline(always)]
fn come_in() -> i32 {
    // SAFETY: any interface index is allowed, and the flag is one of the helper's.
    (unsafe { bpf_redirect(redirect_to(), BPF_F_INGRESS) }) as i32
}

#[inline(always)]
fn redirect_to() -> u32 {
    REDIRECT_TO.get(0).copied().unwrap_or(0)
}

/// What [`packet_parse`] found: nothing of ours, ICMP, or anything else.
const NOTHING: i32 = 0;
const CONTROL: i32 = 1;
const TRANSPORT: i32 = 2;

/// Answers of a step that are none of the kernel's.
const REFUSE: i32 = 1 << 16;
const FORWARD: i32 = 1 << 17;
const BRIDGE: i32 = 1 << 18;
const OWN_NODE: i32 = 1 << 19;
const LEAVE: i32 = 1 << 20;
const COME_IN: i32 = 1 << 21;
const BEGIN: i32 = 1 << 22;
const LEAVE_OWN: i32 = 1 << 23;
const REPLACE_SOURCE: i32 = 1 << 24;
const OTHER_PORT: i32 = 1 << 25;
const DIRECT: i32 = 1 << 26;
const GIVE_WAY: i32 = 1 << 27;
const BRIDGE_SETTLED: i32 = 1 << 28;

/// The device by which the packet leaves at once; [`NOWHERE`] if it is to leave by none, 0 if the stack is to see it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_fast(skb: *mut __sk_buff) -> u32 {
    let ctx = TcContext::new(skb);
    let mut packet = Skb::new(&ctx);
    let Some(v6) = packet.is_v6() else { return 0 };
    packet.pull();
    match decide::fast(&mut packet, &Device::of(&ctx), v6) {
        None => 0,
        Some(0) => NOWHERE,
        Some(device) => device,
    }
}

/// No interface has this index: what is redirected there is dropped.
const NOWHERE: u32 = u32::MAX;

/// Not 0: the packet is to be seen leaving.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_ask(skb: *mut __sk_buff) -> u32 {
    let ctx = TcContext::new(skb);
    let packet = Skb::new(&ctx);
    let Some(v6) = packet.is_v6() else { return 0 };
    decide::ask(&packet, &Device::of(&ctx), v6) as u32
}

/// Reads the headers into `HEADERS`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_parse(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let skb = Skb::new(&ctx);
    let Some(v6) = skb.is_v6() else { return NOTHING };
    skb.pull();
    let Some(headers) = decide::parse(&skb, L2_BYTES, v6) else { return NOTHING };
    let Some(stored) = HEADERS.get_ptr_mut(0) else { return NOTHING };
    // SAFETY: a per-CPU slot, used by the packet that is on this CPU.
    unsafe { *stored = headers };
    if headers.is_icmp() { CONTROL } else { TRANSPORT }
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
    answer(decide::ingress(&mut Skb::new(&ctx), &Device::of(&ctx), headers))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_begin(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return DROP };
    let Some(flow) = FLOW.get(0) else { return DROP };
    answer(decide::begin(&mut Skb::new(&ctx), &Device::of(&ctx), headers, flow))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_stay(skb: *mut __sk_buff, otherwise: u32) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return DROP };
    answer(decide::stay(&mut Skb::new(&ctx), &Device::of(&ctx), headers, verdict(otherwise)))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_direct(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return NEXT };
    answer(decide::direct(&mut Skb::new(&ctx), &Device::of(&ctx), headers))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_other_port(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return NEXT };
    answer(decide::other_port(&mut Skb::new(&ctx), &Device::leaving(&ctx), headers))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_give_way(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return NEXT };
    answer(Some(decide::give_way(&Device::leaving(&ctx), headers)))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_own_node(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return NEXT };
    answer(Some(decide::own_node(&Device::leaving(&ctx), headers)))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_begin_own(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return DROP };
    let Some(flow) = FLOW.get(0) else { return DROP };
    answer(Some(decide::begin_own(&Device::leaving(&ctx), headers, flow)))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_stay_own(skb: *mut __sk_buff, otherwise: u32) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return DROP };
    answer(Some(decide::stay_own(&Device::leaving(&ctx), headers, verdict(otherwise))))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_leave_own(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return DROP };
    answer(decide::leave_own(&mut Skb::new(&ctx), &Device::leaving(&ctx), headers))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_replace_source(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return DROP };
    answer(decide::replace_source(&mut Skb::new(&ctx), &Device::leaving(&ctx), headers))
}

/// The port that was found for what is in `CLAIM`, as it lies in memory; 0: none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_claim(skb: *mut __sk_buff) -> u32 {
    let ctx = TcContext::new(skb);
    let Some(claim) = CLAIM.get_ptr_mut(0) else { return 0 };
    // SAFETY: a per-CPU slot, used by the packet that is on this CPU.
    let (key, client) = unsafe { &mut *claim };
    decide::claim_port(&Device::of(&ctx), key, client).map_or(0, |port| port.raw() as u32)
}

/// The verdicts of a decision that makes no flow.
#[inline(always)]
const fn verdict(answer: u32) -> Verdict {
    match answer as i32 {
        NEXT => Verdict::Next,
        REFUSE => Verdict::Refuse,
        _ => Verdict::Drop,
    }
}

/// Decides a new connection; its flow goes into `FLOW`. At ingress too a packet may have come in by no device, but then
/// it is one that a program or the loopback device handed over.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_decide(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return NEXT };
    match decide::decide(&Device::leaving(&ctx), headers) {
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
    answer(decide::egress(&mut Skb::new(&ctx), &Device::leaving(&ctx), headers))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_icmp_out(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return NEXT };
    answer(decide::icmp_egress(&mut Skb::new(&ctx), &Device::of(&ctx), headers))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_icmp_other_port(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(headers) = headers() else { return NEXT };
    answer(decide::icmp_other_port(&mut Skb::new(&ctx), &Device::of(&ctx), headers))
}

#[inline(always)]
fn answer(verdict: Option<Verdict>) -> i32 {
    let (device, answer) = match verdict {
        None | Some(Verdict::Next) => return NEXT,
        Some(Verdict::Drop) => return DROP,
        Some(Verdict::Refuse) => return REFUSE,
        Some(Verdict::Begin) => return BEGIN,
        Some(Verdict::ToBackend) => return BRIDGE_SETTLED,
        Some(Verdict::ToBackendByPort) => return BRIDGE,
        Some(Verdict::OwnNode) => return OWN_NODE,
        Some(Verdict::LeaveOwn) => return LEAVE_OWN,
        Some(Verdict::ReplaceSource) => return REPLACE_SOURCE,
        Some(Verdict::Direct) => return DIRECT,
        Some(Verdict::GiveWay) => return GIVE_WAY,
        Some(Verdict::OtherPort) => return OTHER_PORT,
        Some(Verdict::Leave(device)) => (device, LEAVE),
        Some(Verdict::ComeIn(device)) => (device, COME_IN),
    };
    let Some(stored) = REDIRECT_TO.get_ptr_mut(0) else { return DROP };
    // SAFETY: a per-CPU slot, used by the packet that is on this CPU.
    unsafe { *stored = device };
    answer
}

/// A packet that now goes to a backend behind the bridge that it came in by stays in that bridge: routed, it would be
/// tracked on its way there, but its reply not. So the backend's link address takes the place of the node's.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_bridge(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let mut packet = Skb::new(&ctx);
    let Some(device) = Device::of(&ctx).device() else { return NEXT };
    if device.bridge == 0 {
        return NEXT;
    }
    let Some(stored) = headers() else { return NEXT };
    let Some(now) = decide::parse(&packet, L2_BYTES, stored.v6) else { return NEXT };
    if let (Route::Device(out), Some(mac)) = route::lookup(skb, device.bridge, &now.destination.0, stored.v6)
        && out == device.bridge
    {
        let _ = decide::address_to(&mut packet, mac);
    }
    NEXT
}

/// The answer to a process of this node: it comes in by the device that the packet would have left by.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn packet_refuse_own(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let mut packet = Skb::new(&ctx);
    let Some(headers) = headers() else { return DROP };
    if decide::refuse(&mut packet, headers).is_none() {
        return DROP;
    }
    let Some(device) = Device::of(&ctx).device() else { return DROP };
    let _ = decide::address_to(&mut packet, device.mac);
    // SAFETY: any interface index is allowed, and the flag is one of the helper's.
    (unsafe { bpf_redirect(packet.device(), BPF_F_INGRESS) }) as i32
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
