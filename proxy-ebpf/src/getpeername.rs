use aya_ebpf::programs::SockAddrContext;
use proxy_common::abi::Outcome;

use crate::{
    context::{ALLOW, Family, origin, peer, set_peer},
    maps::count,
};

pub(crate) fn run<F: Family>(ctx: &SockAddrContext) -> i32 {
    if let Some(origin) = origin(ctx) {
        if let Some(vip) = origin.vip_of(peer::<F>(ctx)) {
            set_peer::<F>(ctx, vip);
            count(Outcome::PeerTranslated);
            return ALLOW;
        }
    }
    count(Outcome::PeerUntouched);
    ALLOW
}
