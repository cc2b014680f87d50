use aya_ebpf::{EbpfContext, helpers::bpf_get_socket_cookie, programs::SockContext};

use crate::context::{ALLOW, leave_place};

pub(crate) fn run(ctx: &SockContext) -> i32 {
    // SAFETY: the helper takes the context as it is.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    leave_place(cookie);
    ALLOW
}
