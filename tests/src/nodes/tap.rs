//! Raw frames: sends any, and sees all that a device receives. For what no socket of a client can do.

use std::{
    io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send, socket},
};

use crate::netns::Netns;

/// No frame of a lab is longer, also where devices join segments.
const FRAME_MAX_BYTES: usize = 1 << 17;

/// A packet socket on one device.
#[derive(Debug)]
pub struct Tap {
    socket: OwnedFd,
}

impl Tap {
    /// Opens a device of a namespace.
    pub fn open(netns: &Netns, device: &str) -> Result<Self> {
        netns.run(|| Self::open_here(device))?.with_context(|| format!("opening the device {device}"))
    }

    /// Opens a device of the calling thread's namespace.
    pub(crate) fn open_here(device: &str) -> Result<Self> {
        let socket =
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
                .context("making a packet socket (CAP_NET_RAW)")?;
        let index = nix::net::if_::if_nametoindex(device)?;
        // SAFETY: the structure holds numbers only, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET)?;
        address.sll_protocol = u16::try_from(libc::ETH_P_ALL)?.to_be();
        address.sll_ifindex = i32::try_from(index)?;
        let length = u32::try_from(size_of::<libc::sockaddr_ll>())?;
        // SAFETY: the pointer is to a structure of that length, which the call only reads.
        let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        Errno::result(result).context("binding a packet socket")?;
        Ok(Self { socket })
    }

    /// The packet socket itself.
    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Sends a frame, its Ethernet header first.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = send(self.socket.as_raw_fd(), frame, MsgFlags::empty()).context("sending a raw frame")?;
        ensure!(sent == frame.len(), "a frame of {} bytes was cut to {sent}", frame.len());
        Ok(())
    }

    /// The next frame that the device receives within a time and that `wanted` wants. Frames it sends are not seen. A
    /// VLAN tag is not seen either: the kernel takes it off first.
    pub fn receive(&self, within: Duration, wanted: impl Fn(&[u8]) -> bool) -> Result<Option<Vec<u8>>> {
        let deadline = Instant::now() + within;
        let mut buffer = vec![0; FRAME_MAX_BYTES];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut descriptors = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut descriptors, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(0) if left.is_zero() => return Ok(None),
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(errno) => return Err(errno).context("waiting for a frame"),
            }
            let (length, kind) = self.read(&mut buffer)?;
            let frame = buffer.get(..length).unwrap_or_default();
            if kind != libc::PACKET_OUTGOING && wanted(frame) {
                return Ok(Some(frame.to_vec()));
            }
        }
    }

    /// Every frame that `wanted` wants, until none comes for a while.
    pub fn receive_all(&self, quiet: Duration, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        while let Some(frame) = self.receive(quiet, &wanted)? {
            frames.push(frame);
        }
        Ok(frames)
    }

    fn read(&self, buffer: &mut [u8]) -> Result<(usize, u8)> {
        // SAFETY: the structure holds numbers only, for which zero is a value.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut size = u32::try_from(size_of::<libc::sockaddr_ll>())?;
        // SAFETY: both buffers are as long as the call is told, and live until it returns.
        let length = unsafe {
            libc::recvfrom(
                self.socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
                (&raw mut from).cast(),
                &raw mut size,
            )
        };
        let length = usize::try_from(length).map_err(|_| io::Error::last_os_error());
        Ok((length.context("reading a frame")?, from.sll_pkttype))
    }
}

/// The hardware address of a device.
pub fn hardware_address(netns: &Netns, device: &str) -> Result<[u8; 6]> {
    let output = netns.command("ip").args(["-j", "link", "show", "dev", device]).output();
    let output = output.context("running `ip`")?;
    let links: serde_json::Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("`ip link`: {}", String::from_utf8_lossy(&output.stderr)))?;
    let text = links.pointer("/0/address").and_then(serde_json::Value::as_str);
    let text = text.with_context(|| format!("the address of {device}"))?;
    let bytes: Result<Vec<_>, _> = text.split(':').map(|part| u8::from_str_radix(part, 16)).collect();
    bytes.ok().and_then(|bytes| bytes.try_into().ok()).with_context(|| format!("the address {text}"))
}
