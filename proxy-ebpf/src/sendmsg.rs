use aya_ebpf::programs::SockAddrContext;
use proxy_common::{
    abi::Outcome,
    decide::{self, Connect, Sent},
};

use crate::{
    context::{ALLOW, Family, client, cookie, peer, set_peer},
    maps::{Maps, count},
};

pub(crate) fn run<F: Family>(ctx: &SockAddrContext) -> i32 {
    let outcome = match decide::send(&Maps, &|| client(ctx), cookie(ctx), peer::<F>(ctx)) {
        Sent::Followed(address, port) => {
            set_peer::<F>(ctx, (address, port));
            Outcome::SendFollowed
        }
        Sent::New(Connect::Forward { backend, .. }) => {
            set_peer::<F>(ctx, (backend.address, backend.port));
            Outcome::SendForwarded
        }
        Sent::New(Connect::Untouched) => Outcome::SendUntouched,
        // sendto() of an unconnected socket succeeds whatever becomes of the datagram (B13).
        Sent::New(Connect::Reject | Connect::Drop) => Outcome::SendLeft,
        Sent::New(Connect::SourceRanges) => Outcome::SendSourceRangesLeft,
        Sent::New(Connect::Contended) => Outcome::Contended,
    };
    count(outcome);
    ALLOW
}
