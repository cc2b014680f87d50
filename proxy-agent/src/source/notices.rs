//! That links or addresses of this network namespace changed; what changed is read anew.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Pods that come and go make notices by the hundred; reading all interfaces for each would be wasted.
pub(super) const REST: Duration = Duration::from_millis(20);

/// A route netlink socket that is readable after changes.
pub(super) struct Notices(AsyncFd<OwnedFd>);

impl Notices {
    pub(super) fn new() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        let groups = libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR | libc::RTMGRP_LINK;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups.unsigned_abs()))?;
        // SAFETY: an `OwnedFd` names the same open file until it is dropped, and `AsyncFd` drops it after its
        // registration.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Self(fd))
    }

    /// Waits for notices and throws them away: what they say is read from the interfaces, so none can be misread, and
    /// none that was lost can be missed.
    pub(super) async fn next(&self) -> io::Result<()> {
        let mut buffer = [0; 8192];
        let mut some = false;
        loop {
            let mut guard = self.0.readable().await?;
            loop {
                match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                    // ENOBUFS: the kernel dropped notices because too many were waiting.
                    Ok(_) | Err(Errno::ENOBUFS) => some = true,
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            guard.clear_ready();
            if some {
                return Ok(());
            }
        }
    }
}
