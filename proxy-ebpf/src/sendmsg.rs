use aya_ebpf::programs::SockAddrContext;
use proxy_common::{abi::Outcome, decide};

use crate::{
    context::{ALLOW, Family, client, cookie, peer, set_peer},
    maps::{Maps, count},
};

pub(crate) fn run<F: Family>(ctx: &SockAddrContext) -> i32 {
    let sent = decide::send(&Maps, &|| client(ctx), cookie(ctx), peer::<F>(ctx));
    if matches!(sent.outcome, Outcome::SendFollowed | Outcome::SendForwarded) {
        set_peer::<F>(ctx, sent.to);
    }
    count(sent.outcome);
    ALLOW
}
