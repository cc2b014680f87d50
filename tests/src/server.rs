//! Servers that say who they are. They run as threads of the test, on sockets made inside a pod's namespace.
//!
//! TCP: the server greets with its name and a line end, then echoes what it gets. UDP: each datagram is answered with the
//! name, a line end and the datagram. A server that tells says behind its name whom it sees: `name address:port`.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result};
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    socket::{Backlog, listen},
};

use crate::netns::Netns;

/// Held connections and bursts of a stress test wait in the backlog, not in retransmissions.
const BACKLOG: i32 = 4096;

/// The token of the descriptor that ends the thread; sockets have tokens from 1.
const STOP: u64 = 0;

/// A server; it ends, with its connections, when dropped.
#[derive(Debug)]
pub struct Server {
    name: String,
    addresses: Vec<SocketAddr>,
    counts: Arc<Counts>,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Counts {
    connections: AtomicU64,
    datagrams: AtomicU64,
}

impl Server {
    /// Listens on TCP and UDP at each address inside a namespace.
    pub fn start(netns: &Netns, name: &str, addresses: &[SocketAddr]) -> Result<Self> {
        netns.run(|| Self::start_here(name, addresses))?
    }

    /// [`Server::start`], and tells each client which address it has for the server.
    pub fn start_telling(netns: &Netns, name: &str, addresses: &[SocketAddr]) -> Result<Self> {
        netns.run(|| Self::start_with(name, addresses, true))?
    }

    /// Listens on TCP and UDP at each address of the calling thread's namespace.
    pub fn start_here(name: &str, addresses: &[SocketAddr]) -> Result<Self> {
        Self::start_with(name, addresses, false)
    }

    fn start_with(name: &str, addresses: &[SocketAddr], tells: bool) -> Result<Self> {
        let mut sockets = Vec::new();
        for address in addresses {
            let listener =
                TcpListener::bind(address).with_context(|| format!("{name}: listening on {address}/TCP"))?;
            listen(&listener, Backlog::new(BACKLOG).context("backlog")?).context("setting the backlog")?;
            listener.set_nonblocking(true).context("setting a listener non-blocking")?;
            sockets.push(Socket::Listener(listener));
            let datagrams =
                UdpSocket::bind(address).with_context(|| format!("{name}: listening on {address}/UDP"))?;
            datagrams.set_nonblocking(true).context("setting a UDP socket non-blocking")?;
            sockets.push(Socket::Datagrams(datagrams));
        }
        let (stop, stopped) = UnixStream::pair().context("making the server's stop signal")?;
        let counts = Arc::new(Counts::default());
        let worker = Worker::new(name, tells, sockets, stopped, Arc::clone(&counts))?;
        let thread = thread::Builder::new()
            .name(format!("server {name}"))
            .spawn(move || worker.run())
            .context("starting a server's thread")?;
        Ok(Self {
            name: name.to_owned(),
            addresses: addresses.to_vec(),
            counts,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// What it answers.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// How many connections it has accepted.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.counts.connections.load(Ordering::Relaxed)
    }

    /// How many datagrams it has received.
    #[must_use]
    pub fn datagrams(&self) -> u64 {
        self.counts.datagrams.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Closing our end wakes the thread.
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

enum Socket {
    Listener(TcpListener),
    Datagrams(UdpSocket),
    Connection(TcpStream),
    Stop(UnixStream),
}

impl AsFd for Socket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Listener(socket) => socket.as_fd(),
            Self::Datagrams(socket) => socket.as_fd(),
            Self::Connection(socket) => socket.as_fd(),
            Self::Stop(socket) => socket.as_fd(),
        }
    }
}

struct Worker {
    name: String,
    /// Whether it says whom it sees.
    tells: bool,
    epoll: Epoll,
    sockets: HashMap<u64, Socket>,
    next_token: u64,
    counts: Arc<Counts>,
}

impl Worker {
    fn new(
        name: &str,
        tells: bool,
        sockets: Vec<Socket>,
        stopped: UnixStream,
        counts: Arc<Counts>,
    ) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("making an epoll instance")?;
        let mut worker =
            Self { name: name.to_owned(), tells, epoll, sockets: HashMap::new(), next_token: STOP, counts };
        worker.add(Socket::Stop(stopped)).context("watching the stop signal")?;
        for socket in sockets {
            worker.add(socket).context("watching a socket")?;
        }
        Ok(worker)
    }

    fn add(&mut self, socket: Socket) -> io::Result<()> {
        let token = self.next_token;
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
        self.sockets.insert(token, socket);
        self.next_token += 1;
        Ok(())
    }

    fn run(mut self) {
        let mut events = [EpollEvent::empty(); 64];
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => continue,
                // The descriptor is ours and valid: nothing else can come back.
                Err(_) => return,
            };
            for token in events.iter().take(ready).map(EpollEvent::data) {
                if token == STOP {
                    return;
                }
                self.serve(token, &mut buffer);
            }
        }
    }

    fn serve(&mut self, token: u64, buffer: &mut [u8]) {
        let mut accepted = Vec::new();
        let keep = match self.sockets.get_mut(&token) {
            Some(Socket::Listener(listener)) => {
                while let Ok(connection) = listener.accept() {
                    accepted.push(connection);
                }
                true
            }
            Some(Socket::Datagrams(socket)) => {
                // An error here is one of an earlier answer (its port was closed): the next datagram is as good as any.
                while let Ok((length, from)) = socket.recv_from(buffer) {
                    self.counts.datagrams.fetch_add(1, Ordering::Relaxed);
                    let mut answer = greeting(&self.name, self.tells, from);
                    answer.extend_from_slice(buffer.get(..length).unwrap_or_default());
                    let _ = socket.send_to(&answer, from);
                }
                true
            }
            Some(Socket::Connection(connection)) => match connection.read(buffer) {
                Ok(0) => false,
                // A client that does not read what it asked for is let go rather than waited for.
                Ok(length) => connection.write_all(buffer.get(..length).unwrap_or_default()).is_ok(),
                Err(error) => error.kind() == io::ErrorKind::WouldBlock,
            },
            Some(Socket::Stop(_)) | None => true,
        };
        if !keep {
            // Closing the descriptor also takes it out of the epoll instance.
            self.sockets.remove(&token);
        }
        for (mut connection, from) in accepted {
            self.counts.connections.fetch_add(1, Ordering::Relaxed);
            if connection.set_nonblocking(true).is_ok()
                && connection.write_all(&greeting(&self.name, self.tells, from)).is_ok()
            {
                let _ = self.add(Socket::Connection(connection));
            }
        }
    }
}

fn greeting(name: &str, tells: bool, client: SocketAddr) -> Vec<u8> {
    if tells { format!("{name} {client}\n") } else { format!("{name}\n") }.into_bytes()
}
