//! Plain sockets of the test itself, made in a client's namespace: no agent's hook sees them.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsRawFd, FromRawFd, IntoRawFd},
    time::Duration,
};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use sheave_tests::{
    client::Outcome,
    lab::Place,
    nodes::World,
    protocol::{Dial, Transport},
};

pub(crate) const BOTH: [Transport; 2] = [Transport::Tcp, Transport::UdpConnected];

/// Longer than any answer takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// What shall not be heard is not waited for as long.
pub(crate) const SILENCE: Duration = Duration::from_millis(500);

/// One attempt from a place, of a process that no hook sees.
pub(crate) fn try_once(
    world: &World,
    from: &Place,
    transport: Transport,
    to: SocketAddr,
    patience: Duration,
) -> Outcome {
    world.unhooked(from).unwrap().connect(transport, Dial::new(to).timeout(patience)).unwrap()
}

#[track_caller]
pub(crate) fn is_refused(world: &World, from: &Place, transport: Transport, to: SocketAddr) {
    let outcome = try_once(world, from, transport, to, PATIENCE);
    let refused = outcome.as_ref().is_err_and(|failure| failure.is_refused());
    assert!(refused, "{} {transport:?} {to}: {outcome:?}", from.name());
}

#[track_caller]
pub(crate) fn is_dropped(world: &World, from: &Place, transport: Transport, to: SocketAddr) {
    let outcome = try_once(world, from, transport, to, SILENCE);
    let dropped = outcome.as_ref().is_err_and(|failure| failure.is_timeout());
    assert!(dropped, "{} {transport:?} {to}: {outcome:?}", from.name());
}

#[track_caller]
pub(crate) fn is_answered(world: &World, from: &Place, transport: Transport, to: SocketAddr) {
    let outcome = try_once(world, from, transport, to, PATIENCE);
    assert!(outcome.is_ok(), "{} {transport:?} {to}: {outcome:?}", from.name());
}

/// The server that answers.
#[track_caller]
pub(crate) fn answered(outcome: &Outcome) -> &str {
    outcome.as_ref().unwrap().answer.as_deref().unwrap().split(' ').next().unwrap()
}

fn any(address: SocketAddr) -> SocketAddr {
    let text = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    text.parse().unwrap()
}

/// A TCP connection from a port of one's own choice, which several connections may share. The server has greeted.
pub(crate) struct Talk {
    stream: TcpStream,
    pub(crate) server: String,
}

impl Talk {
    pub(crate) fn open(from: &Place, port: u16, to: SocketAddr) -> Self {
        let open = || {
            let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            let descriptor = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
            setsockopt(&descriptor, sockopt::ReuseAddr, &true).unwrap();
            let mut own = any(to);
            own.set_port(port);
            bind(descriptor.as_raw_fd(), &SockaddrStorage::from(own)).unwrap();
            // SAFETY: the descriptor is a socket that nobody else owns from here on.
            let stream = unsafe { TcpStream::from_raw_fd(descriptor.into_raw_fd()) };
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            // Bounds the wait for a connection too.
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            connect(stream.as_raw_fd(), &SockaddrStorage::from(to))
                .unwrap_or_else(|error| panic!("{to}: {error}"));
            stream
        };
        let mut stream = from.netns().run(open).unwrap();
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        let line = String::from_utf8(line).unwrap();
        let (server, _) = line.split_once(' ').unwrap();
        Self { stream, server: server.to_owned() }
    }

    pub(crate) fn local(&self) -> SocketAddr {
        self.stream.local_addr().unwrap()
    }

    /// How long an answer may take.
    pub(crate) fn patience(&self, patience: Duration) {
        self.stream.set_read_timeout(Some(patience)).unwrap();
    }

    /// [`Self::echo`] in long pieces, which travel as few frames where devices cut them; whole ones only.
    pub(crate) fn stream(&mut self, bytes: usize) -> std::io::Result<()> {
        let piece: Vec<u8> = (0..1 << 15).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect();
        let mut back = vec![0; piece.len()];
        for _ in 0..bytes / piece.len() {
            self.stream.write_all(&piece)?;
            self.stream.read_exact(&mut back)?;
            assert!(back == piece, "the echo is another");
        }
        Ok(())
    }

    /// Says that nothing more is sent, and hears that from the server.
    pub(crate) fn ends(mut self) -> std::io::Result<()> {
        self.stream.shutdown(std::net::Shutdown::Write)?;
        match self.stream.read(&mut [0])? {
            0 => Ok(()),
            more => panic!("{more} bytes at the end"),
        }
    }

    /// Sends so many bytes and has them back; in pieces that fit the server's buffer.
    pub(crate) fn echo(&mut self, bytes: usize) -> std::io::Result<()> {
        let mut left = bytes;
        let mut back = [0; 8192];
        while left > 0 {
            let piece: Vec<u8> =
                (0..left.min(back.len())).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect();
            self.stream.write_all(&piece)?;
            let back = &mut back[..piece.len()];
            self.stream.read_exact(back)?;
            assert_eq!(back, piece, "the echo is another");
            left -= piece.len();
        }
        Ok(())
    }
}

/// A connected UDP socket of a place.
pub(crate) fn datagrams(from: &Place, to: SocketAddr) -> UdpSocket {
    let open = || {
        let socket = UdpSocket::bind(any(to)).unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    };
    from.netns().run(open).unwrap()
}

/// Asks on a connected socket: the server's name, or the error.
pub(crate) fn ask(socket: &UdpSocket, question: &[u8]) -> std::io::Result<String> {
    socket.send(question)?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let length = socket.recv(&mut buffer)?;
        let end = buffer.iter().position(|byte| *byte == b'\n').unwrap();
        // An answer to an earlier question may be late.
        if &buffer[end + 1..length] == question {
            let line = String::from_utf8_lossy(&buffer[..end]).into_owned();
            return Ok(line.split(' ').next().unwrap().to_owned());
        }
    }
}

/// A UDP socket of a place that talks to many of one family.
pub(crate) fn unconnected(from: &Place, port: u16, like: SocketAddr) -> UdpSocket {
    let mut own = any(like);
    own.set_port(port);
    let socket = from.netns().run(|| UdpSocket::bind(own).unwrap()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// The next answer on such a socket, as "server question", and who it is from.
pub(crate) fn hear_on(socket: &UdpSocket) -> std::io::Result<(String, SocketAddr)> {
    let mut buffer = vec![0; 1 << 16];
    let (length, by) = socket.recv_from(&mut buffer)?;
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    let (line, question) = text.split_once('\n').unwrap();
    Ok((format!("{} {question}", line.split(' ').next().unwrap()), by))
}
