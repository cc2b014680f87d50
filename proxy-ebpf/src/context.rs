//! What the hooks read from and write to `bpf_sock_addr`, and the settings that the agent gives at load time.

use core::ptr::null_mut;

use aya_ebpf::{
    EbpfContext, Global,
    bindings::bpf_sock_addr,
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    programs::SockAddrContext,
};
use proxy_common::{
    abi::{Address, ClientKey, Origin, Port, SocketOrigin, SocketPlace},
    decide::{Client, Peer},
};

use crate::maps::{SOCKET_ORIGIN, SOCKET_PLACES};

/// Return code of every sock_addr program: the call goes on.
pub(crate) const ALLOW: i32 = 1;
/// The call fails, with EPERM if nothing else was set.
pub(crate) const DENY: i32 = 0;

/// Cookie of the network namespace that counts as "the node" (B3); 0: the initial one.
#[unsafe(no_mangle)]
static HOST_NETNS: Global<u64> = Global::new(0);

/// 1 if the kernel has `bpf_set_retval` (5.18). The verifier prunes the branch otherwise.
#[unsafe(no_mangle)]
static SET_RETVAL: Global<u32> = Global::new(0);

/// How a family's addresses lie in the context.
pub(crate) trait Family {
    fn address(ctx: &SockAddrContext) -> Address;
    fn set_address(ctx: &SockAddrContext, address: Address);
}

pub(crate) struct V4;
pub(crate) struct V6;

impl Family for V4 {
    #[inline(always)]
    fn address(ctx: &SockAddrContext) -> Address {
        // SAFETY: the kernel gives a valid context; the verifier checks the offset.
        Address::from_v4_word(unsafe { (*ctx.sock_addr).user_ip4 })
    }

    #[inline(always)]
    fn set_address(ctx: &SockAddrContext, address: Address) {
        // SAFETY: as above. A frontend and its backends are of one family, so the last word is the whole address.
        unsafe { (*ctx.sock_addr).user_ip4 = address.words()[3] };
    }
}

impl Family for V6 {
    #[inline(always)]
    fn address(ctx: &SockAddrContext) -> Address {
        let ip6 = ip6(ctx.sock_addr);
        // One volatile load for each half keeps the offset in the instruction. A copy of the array becomes
        // "ctx + 8" plus loads: "dereference of modified ctx ptr".
        // SAFETY: `ip6` points to two halves of the context, aligned for them.
        Address::from_halves(unsafe { [ip6.read_volatile(), ip6.add(1).read_volatile()] })
    }

    #[inline(always)]
    fn set_address(ctx: &SockAddrContext, address: Address) {
        let ip6 = ip6(ctx.sock_addr);
        let [upper, lower] = address.halves();
        // Halves, since the kernel goes on with these: what is stored in words and read in halves, the processor holds up
        // until all of it is written.
        // SAFETY: as above.
        unsafe {
            ip6.write_volatile(upper);
            ip6.add(1).write_volatile(lower);
        }
    }
}

/// The context lets this field, of words, be read and written in halves too.
#[inline(always)]
fn ip6(sock_addr: *mut bpf_sock_addr) -> *mut u64 {
    const { assert!(core::mem::offset_of!(bpf_sock_addr, user_ip6) % 8 == 0) };
    // SAFETY: takes an address, reads nothing.
    unsafe { (&raw mut (*sock_addr).user_ip6).cast() }
}

/// The peer that the call names or that the kernel is about to show.
#[inline(always)]
pub(crate) fn peer<F: Family>(ctx: &SockAddrContext) -> Peer {
    // SAFETY: the kernel gives a valid context; the verifier checks the offset.
    let port = Port::from_word(unsafe { (*ctx.sock_addr).user_port });
    (F::address(ctx), port)
}

/// Replaces that peer.
#[inline(always)]
pub(crate) fn set_peer<F: Family>(ctx: &SockAddrContext, peer: Peer) {
    F::set_address(ctx, peer.0);
    // SAFETY: the kernel gives a valid context; the verifier checks the offset.
    unsafe { (*ctx.sock_addr).user_port = peer.1.word() };
}

/// IP protocol number of the socket.
#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the kernel gives a valid context; the verifier checks the offset.
    unsafe { (*ctx.sock_addr).protocol }
}

/// Who calls, told by network namespace (B3, B4).
#[inline(always)]
pub(crate) fn client(ctx: &SockAddrContext) -> Client {
    // SAFETY: the helper takes the context as it is.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let mut host = HOST_NETNS.load();
    if host == 0 {
        // SAFETY: null asks for the initial namespace.
        host = unsafe { bpf_get_netns_cookie(null_mut()) };
    }
    Client { origin: if cookie == host { Origin::Node } else { Origin::Pod }, key: ClientKey::netns(cookie) }
}

/// Whether a hook can choose the error of a refused call.
#[inline(always)]
pub(crate) fn can_set_error() -> bool {
    SET_RETVAL.load() != 0
}

/// The kernel's cookie of the calling socket.
#[inline(always)]
pub(crate) fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes the context as it is.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// What the socket dialled, if it went through a VIP.
#[inline(always)]
pub(crate) fn origin(ctx: &SockAddrContext) -> Option<SocketOrigin> {
    let cookie = cookie(ctx);
    let place = place(cookie)?;
    // SAFETY: in bounds, for ever. Another socket may be taking it; the seal tells.
    let found = unsafe { *place };
    if let Some(origin) = found.origin_of(cookie) {
        return Some(*origin);
    }
    if found.overflowed == 0 {
        return None;
    }
    // SAFETY: the context's socket is valid while the program runs.
    let stored = unsafe { SOCKET_ORIGIN.get_ptr_mut(ctx) };
    if stored.is_null() {
        return None;
    }
    // SAFETY: not null, so it points to this socket's storage, which lives as long as the socket.
    Some(unsafe { *stored })
}

/// Remembers what the socket dialled. Without memory for it, the peer is shown as it is.
#[inline(always)]
pub(crate) fn remember_origin(ctx: &SockAddrContext, origin: SocketOrigin) {
    let cookie = cookie(ctx);
    let Some(place) = place(cookie) else { return };
    // SAFETY: in bounds, for ever.
    let (owner, overflowed) = unsafe { ((*place).cookie, (*place).overflowed) };
    if owner == 0 || owner == cookie {
        // SAFETY: as above. Another socket may be doing the same; the seal then is neither's.
        unsafe { *place = SocketPlace::new(cookie, origin, overflowed) };
        return;
    }
    // SAFETY: as above.
    unsafe { (*place).overflowed = 1 };
    // A copy, so that only who comes here has one in memory.
    let mut first = origin;
    // SAFETY: the context's socket is valid while the program runs.
    let stored = unsafe { SOCKET_ORIGIN.get_or_insert_ptr_mut(ctx, Some(&mut first)) };
    if !stored.is_null() {
        // SAFETY: as above; the socket may have had an older origin, which the helper does not overwrite.
        unsafe { *stored = origin };
    }
}

/// Forgets it: the socket now talks to somebody else.
#[inline(always)]
pub(crate) fn forget_origin(ctx: &SockAddrContext) {
    let Some(overflowed) = leave_place(cookie(ctx)) else { return };
    if overflowed {
        // SAFETY: the context's socket is valid while the program runs.
        let stored = unsafe { SOCKET_ORIGIN.get_ptr_mut(ctx) };
        if !stored.is_null() {
            // SAFETY: reads a pointer from the context.
            let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
            // SAFETY: the socket is valid while the program runs. Failing means that nothing was stored.
            let _ = unsafe { SOCKET_ORIGIN.delete(sk) };
        }
    }
}

/// Frees the place of a socket, if it has one. Returns whether it may have storage instead.
#[inline(always)]
pub(crate) fn leave_place(cookie: u64) -> Option<bool> {
    let place = place(cookie)?;
    // SAFETY: in bounds, for ever.
    let (owner, overflowed) = unsafe { ((*place).cookie, (*place).overflowed) };
    if owner == cookie {
        // SAFETY: as above; nobody else takes it while it bears this cookie.
        unsafe { (*place).cookie = 0 };
    }
    Some(overflowed != 0)
}

#[inline(always)]
fn place(cookie: u64) -> Option<*mut SocketPlace> {
    SOCKET_PLACES.get_ptr_mut(SocketPlace::index(cookie))
}
