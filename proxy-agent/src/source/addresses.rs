//! The addresses of this node's interfaces, followed by netlink (N4).

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, recv,
    socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::UnboundedSender;
use tracing::warn;

use crate::object::{Batch, Change};

/// Pods that come and go make notices by the hundred; reading all interfaces for each would be wasted.
const REST: Duration = Duration::from_millis(20);

/// Why own addresses cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The interfaces cannot be listed.
    #[error("cannot list the addresses of this node's interfaces (getifaddrs)")]
    List(#[source] io::Error),
    /// No notices of changes.
    #[error("cannot get notices of address changes from the kernel (route netlink socket)")]
    Notices(#[source] io::Error),
}

/// All addresses on interfaces of this network namespace, sorted, without loopback ones.
pub fn read() -> io::Result<Vec<IpAddr>> {
    let addresses: BTreeSet<IpAddr> = getifaddrs()?
        .filter_map(|interface| interface.address.as_ref().and_then(ip))
        .filter(|ip| !ip.is_loopback())
        .collect();
    Ok(addresses.into_iter().collect())
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
}

/// Sends all addresses, then again whenever they differ, until `tx` is closed.
pub async fn run(tx: UnboundedSender<Batch>) -> Result<(), Error> {
    // Listen first, read then: a change in between is read twice rather than missed.
    let notices = notices().map_err(Error::Notices)?;
    let mut last = read().map_err(Error::List)?;
    if tx.send(vec![Change::OwnAddresses(last.clone())]).is_err() {
        return Ok(());
    }
    loop {
        tokio::select! {
            () = tx.closed() => return Ok(()),
            result = next(&notices) => result.map_err(Error::Notices)?,
        }
        match read() {
            Ok(addresses) if addresses == last => {}
            Ok(addresses) => {
                if tx.send(vec![Change::OwnAddresses(addresses.clone())]).is_err() {
                    return Ok(());
                }
                last = addresses;
            }
            // Not knowing is no reason to give up addresses; the next notice tries again.
            Err(error) => warn!(%error, "cannot list own addresses; the last known ones stay in use"),
        }
        tokio::time::sleep(REST).await;
    }
}

/// A socket that is readable after addresses or links changed.
fn notices() -> io::Result<AsyncFd<OwnedFd>> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let groups = libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR | libc::RTMGRP_LINK;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups.unsigned_abs()))?;
    // SAFETY: an `OwnedFd` names the same open file until it is dropped, and `AsyncFd` drops it after its registration.
    let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
    Ok(fd)
}

/// Waits for notices and throws them away: what they say is read from the interfaces, so none can be misread, and
/// none that was lost can be missed.
async fn next(notices: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = [0; 8192];
    let mut some = false;
    loop {
        let mut guard = notices.readable().await?;
        loop {
            match recv(notices.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};
    use tokio::sync::mpsc;

    use super::*;

    #[test]
    fn loopback_addresses_are_left_out() {
        let addresses = read().unwrap();
        assert!(addresses.iter().all(|ip| !ip.is_loopback()), "{addresses:?}");
        assert!(addresses.is_sorted(), "{addresses:?}");
    }

    /// N4, in a network namespace of its own.
    #[test]
    fn n4_address_changes_are_followed() {
        // A thread of its own, because a network namespace is a thread's.
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own, which needs root");
            let ip = |arguments: &str| Command::new("ip").args(arguments.split(' ')).status().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (tx, mut rx) = mpsc::unbounded_channel();
                let task = tokio::spawn(run(tx));
                let mut next = async || {
                    tokio::time::timeout(Duration::from_secs(10), rx.recv())
                        .await
                        .expect("no change")
                        .unwrap()
                };
                assert_eq!(next().await, [Change::OwnAddresses(vec![])]);
                assert!(ip("link set lo up").success());
                assert!(ip("addr add 192.0.2.1/32 dev lo").success());
                assert_eq!(next().await, [Change::OwnAddresses(vec!["192.0.2.1".parse().unwrap()])]);
                assert!(ip("addr add 2001:db8::1/128 dev lo nodad").success());
                let both = vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
                assert_eq!(next().await, [Change::OwnAddresses(both)]);
                assert!(ip("addr del 192.0.2.1/32 dev lo").success());
                assert_eq!(next().await, [Change::OwnAddresses(vec!["2001:db8::1".parse().unwrap()])]);
                drop(rx);
                task.await.unwrap().unwrap();
            });
        });
        thread.join().unwrap();
    }
}
