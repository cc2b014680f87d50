use aya_ebpf::programs::SockAddrContext;
use proxy_common::abi::Outcome;

use crate::{
    context::{ALLOW, Family, origin, peer, set_peer},
    maps::count,
};

pub(crate) fn run<F: Family>(ctx: &SockAddrContext) -> i32 {
    let vip = match origin(ctx) {
        Some(origin) => origin.vip_of(peer::<F>(ctx)),
        None => None,
    };
    if let Some(vip) = vip {
        set_peer::<F>(ctx, vip);
        count(Outcome::PeerTranslated);
    } else {
        count(Outcome::PeerUntouched);
    }
    ALLOW
}
