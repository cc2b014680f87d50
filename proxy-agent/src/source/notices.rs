//! That something of this network namespace changed: links or addresses, for whoever reads them anew; or what else the
//! kernel tells of by netlink.

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
pub(crate) const REST: Duration = Duration::from_millis(20);

/// A netlink socket that is readable after changes.
pub(crate) struct Notices(AsyncFd<OwnedFd>);

impl Notices {
    /// Of links and addresses.
    pub(super) fn new() -> io::Result<Self> {
        let groups = libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR | libc::RTMGRP_LINK;
        Self::of(SockProtocol::NetlinkRoute, groups.unsigned_abs())
    }

    /// Of groups of a family, a bit each.
    pub(crate) fn of(family: SockProtocol, groups: u32) -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, family)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        // SAFETY: an `OwnedFd` names the same open file until it is dropped, and `AsyncFd` drops it after its
        // registration.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Self(fd))
    }

    /// Waits for notices and throws them away: what they say is read where it is, so none can be misread, and none that
    /// was lost can be missed.
    pub(crate) async fn next(&self) -> io::Result<()> {
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
