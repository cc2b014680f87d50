//! What the client is answered by.

use std::{
    io::{IoSlice, IoSliceMut, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    thread,
};

use anyhow::{Context, Result};
use nix::{
    libc,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockType, SockaddrIn, SockaddrIn6, SockaddrStorage,
        bind, recvmsg, sendmsg, setsockopt,
        sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo, Ipv6V6Only},
    },
};

use super::{
    STREAM_BLOCK_BYTES, SWALLOW, WHO,
    cpu::pin,
    loops::{family_of, new_socket},
};

/// HTTP as far as `wrk` needs it: its requests are short and come whole.
const GET: &[u8] = b"GET ";
const CLOSE: &[u8] = b"Connection: close";
const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// Serves TCP and UDP at an address, each from a thread of its own, one connection after the other: the client under
/// measurement has one at a time.
pub(super) fn serve(address: SocketAddr, cpu: Option<usize>, tag: u8) -> Result<()> {
    let descriptor = new_socket(family_of(address), SockType::Stream)?;
    listen_only_to_own_family(&descriptor, address)?;
    setsockopt(&descriptor, nix::sys::socket::sockopt::ReuseAddr, &true).context("SO_REUSEADDR")?;
    bind(descriptor.as_raw_fd(), &SockaddrStorage::from(address))
        .with_context(|| format!("binding {address}/TCP"))?;
    nix::sys::socket::listen(&descriptor, nix::sys::socket::Backlog::MAXCONN).context("listen")?;
    let listener = TcpListener::from(descriptor);
    thread::Builder::new().name("measured tcp".to_owned()).spawn(move || {
        let _ = pin(cpu);
        let mut buffer = vec![0; STREAM_BLOCK_BYTES * 4];
        for stream in listener.incoming().flatten() {
            // A connection that ends in an error was reset by a client that wanted no more than to connect.
            let _ = answer(stream, &mut buffer, tag);
        }
    })?;

    let descriptor = new_socket(family_of(address), SockType::Datagram)?;
    listen_only_to_own_family(&descriptor, address)?;
    bind(descriptor.as_raw_fd(), &SockaddrStorage::from(address))
        .with_context(|| format!("binding {address}/UDP"))?;
    if address.is_ipv4() {
        setsockopt(&descriptor, Ipv4PacketInfo, &true).context("IP_PKTINFO")?;
    } else {
        setsockopt(&descriptor, Ipv6RecvPacketInfo, &true).context("IPV6_RECVPKTINFO")?;
    }
    thread::Builder::new().name("measured udp".to_owned()).spawn(move || {
        let _ = pin(cpu);
        loop {
            // An error here is one of an earlier answer whose receiver has gone: the next datagram is as good as any.
            let _ = if address.is_ipv4() {
                return_datagram_v4(&descriptor, tag)
            } else {
                return_datagram_v6(&descriptor, tag)
            };
        }
    })?;
    Ok(())
}

fn listen_only_to_own_family(descriptor: &OwnedFd, address: SocketAddr) -> Result<()> {
    if address.is_ipv6() {
        setsockopt(descriptor, Ipv6V6Only, &true).context("IPV6_V6ONLY")?;
    }
    Ok(())
}

fn answer(mut stream: TcpStream, buffer: &mut [u8], tag: u8) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let length = stream.read(buffer)?;
        let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else { return Ok(()) };
        if bytes.first() == Some(&SWALLOW) {
            while stream.read(buffer)? > 0 {}
            return Ok(());
        }
        if bytes == [WHO] {
            let (tag, seen) = (char::from(tag), stream.peer_addr()?.ip());
            return stream.write_all(format!("{tag} {seen}").as_bytes());
        }
        if bytes.starts_with(GET) {
            let ends = bytes.windows(CLOSE.len()).any(|part| part == CLOSE);
            stream.write_all(OK)?;
            if ends {
                return Ok(());
            }
            continue;
        }
        stream.write_all(bytes)?;
    }
}

/// Answers from the address that was asked, which a socket bound to every address must say itself.
fn return_datagram_v4(descriptor: &OwnedFd, tag: u8) -> nix::Result<()> {
    let mut buffer = [0; 512];
    let mut space = nix::cmsg_space!(libc::in_pktinfo);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let received =
        recvmsg::<SockaddrIn>(descriptor.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    let (length, from) = (received.bytes, received.address);
    let asked = received.cmsgs()?.find_map(|message| {
        if let ControlMessageOwned::Ipv4PacketInfo(info) = message { Some(info.ipi_addr) } else { None }
    });
    let info = asked.map(|ipi_spec_dst| libc::in_pktinfo {
        ipi_ifindex: 0,
        ipi_spec_dst,
        ipi_addr: libc::in_addr { s_addr: 0 },
    });
    let control = info.as_ref().map(ControlMessage::Ipv4PacketInfo);
    let answer = buffer.get(..length).unwrap_or_default();
    let parts = [IoSlice::new(if answer == [WHO] { std::slice::from_ref(&tag) } else { answer })];
    sendmsg(descriptor.as_raw_fd(), &parts, control.as_slice(), MsgFlags::empty(), from.as_ref())?;
    Ok(())
}

/// [`return_datagram_v4`], with the structures of the other family.
fn return_datagram_v6(descriptor: &OwnedFd, tag: u8) -> nix::Result<()> {
    let mut buffer = [0; 512];
    let mut space = nix::cmsg_space!(libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let received =
        recvmsg::<SockaddrIn6>(descriptor.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    let (length, from) = (received.bytes, received.address);
    let info = received.cmsgs()?.find_map(|message| {
        if let ControlMessageOwned::Ipv6PacketInfo(info) = message {
            Some(libc::in6_pktinfo { ipi6_ifindex: 0, ..info })
        } else {
            None
        }
    });
    let control = info.as_ref().map(ControlMessage::Ipv6PacketInfo);
    let answer = buffer.get(..length).unwrap_or_default();
    let parts = [IoSlice::new(if answer == [WHO] { std::slice::from_ref(&tag) } else { answer })];
    sendmsg(descriptor.as_raw_fd(), &parts, control.as_slice(), MsgFlags::empty(), from.as_ref())?;
    Ok(())
}
