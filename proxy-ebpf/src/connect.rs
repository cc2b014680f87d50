use aya_ebpf::{helpers::bpf_set_retval, programs::SockAddrContext};
use proxy_common::{
    abi::{Outcome, Protocol, SocketOrigin},
    decide::{self, Connect, Peer},
};

use crate::{
    context::{
        ALLOW, DENY, Family, can_set_error, client, forget_origin, peer, protocol, remember_origin, set_peer,
    },
    maps::{Maps, count},
};

const ECONNREFUSED: i32 = 111;

pub(crate) fn run<F: Family>(ctx: &SockAddrContext) -> i32 {
    const TCP: u32 = Protocol::Tcp as u32;
    const UDP: u32 = Protocol::Udp as u32;
    let protocol = match protocol(ctx) {
        TCP => Protocol::Tcp,
        UDP => Protocol::Udp,
        _ => return leave(ctx, Outcome::ConnectUntouched),
    };
    let vip = peer::<F>(ctx);
    match decide::connect_at_once(&Maps, vip, protocol) {
        Some(decision) => apply::<F>(ctx, vip, protocol, decision),
        None => {
            let decision = decide::connect_closely(&Maps, &|| client(ctx), vip, protocol);
            apply::<F>(ctx, vip, protocol, decision)
        }
    }
}

#[inline(always)]
fn apply<F: Family>(ctx: &SockAddrContext, vip: Peer, protocol: Protocol, decision: Connect) -> i32 {
    match decision {
        Connect::Untouched => leave(ctx, Outcome::ConnectUntouched),
        Connect::Forward { id, to } => {
            set_peer::<F>(ctx, to);
            remember_origin(ctx, SocketOrigin::new(vip, id, to));
            count(Outcome::ConnectForwarded);
            ALLOW
        }
        // connect() of a UDP socket sends nothing and succeeds; the refusal is the packet path's to send (B13).
        Connect::Reject => match protocol {
            Protocol::Tcp if can_set_error() => {
                // SAFETY: any value is allowed.
                unsafe { bpf_set_retval(-ECONNREFUSED) };
                count(Outcome::ConnectRejected);
                DENY
            }
            Protocol::Tcp | Protocol::Udp | Protocol::Sctp => leave(ctx, Outcome::ConnectRejectLeft),
        },
        Connect::Drop => leave(ctx, Outcome::ConnectDropLeft),
        Connect::SourceRanges => leave(ctx, Outcome::ConnectSourceRangesLeft),
        Connect::Contended => leave(ctx, Outcome::Contended),
    }
}

/// The address stays as dialled. The socket may have been connected through a VIP before.
#[inline(always)]
fn leave(ctx: &SockAddrContext, outcome: Outcome) -> i32 {
    forget_origin(ctx);
    count(outcome);
    ALLOW
}
