//! Two tun devices and what carries packets between them: a tunnel whose frames have no link header, as those of WireGuard
//! and ipip have none.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    os::unix::fs::OpenOptionsExt,
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe,
};

use crate::netns::Netns;

/// No packet is longer.
const PACKET_MAX_BYTES: usize = 1 << 16;

/// Dropping it ends the tunnel; its devices go with it.
#[derive(Debug)]
pub(super) struct Tunnel {
    /// Closed, it tells the thread to end.
    alive: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Tunnel {
    /// Between two namespaces, each of which gets a device of this name.
    pub(super) fn new(ends: [&Netns; 2], device: &str) -> Result<Self> {
        let [one, other] = ends.map(|netns| -> Result<File> {
            netns.run(|| end(device))?.with_context(|| format!("making the tun device {device}"))
        });
        let (one, other) = (one?, other?);
        let (ended, alive) = pipe().context("making a pipe")?;
        let thread = thread::Builder::new()
            .name("tunnel".to_owned())
            .spawn(move || carry(&one, &other, &ended))
            .context("starting a thread")?;
        Ok(Self { alive: Some(alive), thread: Some(thread) })
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        drop(self.alive.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A device of the calling thread's namespace.
fn end(device: &str) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .context("opening /dev/net/tun (is the kernel built with tun devices?)")?;
    // SAFETY: the structure holds numbers only, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = libc::c_char::try_from(from)?;
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI)?;
    // SAFETY: the request is a structure of the kind that this call reads, with a name that ends.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    Errno::result(result).context("TUNSETIFF (CAP_NET_ADMIN)")?;
    Ok(file)
}

/// Until the other end of `ended` is closed. What does not fit into a device is lost, as on any wire.
fn carry(one: &File, other: &File, ended: &OwnedFd) {
    let mut packet = vec![0; PACKET_MAX_BYTES];
    loop {
        let mut waiting = [
            PollFd::new(one.as_fd(), PollFlags::POLLIN),
            PollFd::new(other.as_fd(), PollFlags::POLLIN),
            PollFd::new(ended.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
        if waiting[2].any().unwrap_or(true) {
            return;
        }
        for (mut from, mut to) in [(one, other), (other, one)] {
            while let Ok(length) = from.read(&mut packet) {
                let _ = to.write(&packet[..length]);
            }
        }
    }
}
