//! The kernel programs of Sheave: one file per hook, each of them context → destination → decide → apply.
//!
//! What is decided lives in `proxy_common::decide`; here is only how a hook reads its context and what it does with the
//! answer. Hooks that come in an IPv4 and an IPv6 form are generic over [`context::Family`].
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod connect;
mod context;
mod getpeername;
mod maps;
mod packet;
mod recvmsg;
mod release;
mod sendmsg;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, classifier},
    programs::{SockAddrContext, SockContext, TcContext},
};
use context::{V4, V6};

/// TCP and UDP `connect()` over IPv4.
#[cgroup_sock_addr(connect4)]
pub fn sock_connect4(ctx: SockAddrContext) -> i32 {
    connect::run::<V4>(&ctx)
}

/// TCP and UDP `connect()` of IPv6 sockets, IPv4-mapped destinations included.
#[cgroup_sock_addr(connect6)]
pub fn sock_connect6(ctx: SockAddrContext) -> i32 {
    connect::run::<V6>(&ctx)
}

/// `sendto()` and `sendmsg()` with an address over IPv4; IPv6 sockets with an IPv4-mapped destination come here too.
#[cgroup_sock_addr(sendmsg4)]
pub fn sock_sendmsg4(ctx: SockAddrContext) -> i32 {
    sendmsg::run::<V4>(&ctx)
}

/// `sendto()` and `sendmsg()` with an address over IPv6.
#[cgroup_sock_addr(sendmsg6)]
pub fn sock_sendmsg6(ctx: SockAddrContext) -> i32 {
    sendmsg::run::<V6>(&ctx)
}

/// `recvfrom()` and `recvmsg()` that ask for the source, over IPv4.
#[cgroup_sock_addr(recvmsg4)]
pub fn sock_recvmsg4(ctx: SockAddrContext) -> i32 {
    recvmsg::run::<V4>(&ctx)
}

/// The same for IPv6 sockets, IPv4-mapped sources included.
#[cgroup_sock_addr(recvmsg6)]
pub fn sock_recvmsg6(ctx: SockAddrContext) -> i32 {
    recvmsg::run::<V6>(&ctx)
}

/// `getpeername()` over IPv4.
#[cgroup_sock_addr(getpeername4)]
pub fn sock_getpeer4(ctx: SockAddrContext) -> i32 {
    getpeername::run::<V4>(&ctx)
}

/// `getpeername()` of IPv6 sockets, IPv4-mapped peers included.
#[cgroup_sock_addr(getpeername6)]
pub fn sock_getpeer6(ctx: SockAddrContext) -> i32 {
    getpeername::run::<V6>(&ctx)
}

/// The last `close()` of a TCP or UDP socket.
#[cgroup_sock(sock_release)]
pub fn sock_release(ctx: SockContext) -> i32 {
    release::run(&ctx)
}

/// Packets that come in by a device of the node: which of them may be ours.
#[classifier]
pub fn tc_ingress(ctx: TcContext) -> i32 {
    packet::watch_ingress(&ctx)
}

/// Packets that leave by a device of the node: which of them may be ours.
#[classifier]
pub fn tc_egress(ctx: TcContext) -> i32 {
    packet::watch_egress(&ctx)
}

/// As [`tc_ingress`], for devices whose frames have no link header.
#[classifier]
pub fn tc_ingress_bare(ctx: TcContext) -> i32 {
    packet::watch_bare_ingress(&ctx)
}

/// As [`tc_egress`], for devices whose frames have no link header.
#[classifier]
pub fn tc_egress_bare(ctx: TcContext) -> i32 {
    packet::watch_bare_egress(&ctx)
}

/// Goes on for [`tc_ingress`]: what is for a VIP goes to a backend, and replies find their client.
#[classifier]
pub fn packet_ingress(ctx: TcContext) -> i32 {
    packet::ingress(&ctx)
}

/// Goes on for [`tc_egress`]: replies get the VIP back, and sources are replaced (M).
#[classifier]
pub fn packet_egress(ctx: TcContext) -> i32 {
    packet::egress(&ctx)
}

/// Comes before [`packet_ingress`] where packets may skip the stack.
#[classifier]
pub fn packet_first(ctx: TcContext) -> i32 {
    packet::fast(&ctx)
}

/// Comes before [`packet_egress`] for those that the stack lets pass, to learn from them.
#[classifier]
pub fn packet_learn(ctx: TcContext) -> i32 {
    packet::accept(&ctx)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // A panic that stays reachable makes the program fail to load; it never runs.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
