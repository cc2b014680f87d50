use aya_ebpf::programs::SockAddrContext;
use proxy_common::{abi::Outcome, decide};

use crate::{
    context::{ALLOW, Family, cookie, origin, peer, set_peer},
    maps::{Maps, count},
};

pub(crate) fn run<F: Family>(ctx: &SockAddrContext) -> i32 {
    let from = peer::<F>(ctx);
    // A connected socket has its one answer in its storage; an unconnected one may talk to many VIPs.
    let mut vip = None;
    if let Some(origin) = origin(ctx) {
        vip = origin.vip_of(from);
    }
    if vip.is_none() {
        vip = decide::receive(&Maps, cookie(ctx), from);
    }
    match vip {
        Some(vip) => {
            set_peer::<F>(ctx, vip);
            count(Outcome::RecvTranslated);
        }
        None => count(Outcome::RecvUntouched),
    }
    ALLOW
}
