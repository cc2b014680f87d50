//! Measuring inside a lab client: short, tight loops whose samples are kept, on a chosen CPU.
//!
//! Who was reached is told without a packet: a lab may give a client pod routes whose preferred source address differs by
//! backend, and then `getsockname` after `connect` of a UDP socket names the backend group that the kernel really routes to
//! (`getpeername` names the VIP, by design).

use std::{
    io::{IoSlice, IoSliceMut, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    libc,
    sched::{CpuSet, sched_setaffinity},
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn,
        SockaddrIn6, SockaddrStorage, bind, connect, recvmsg, sendmsg, setsockopt, socket,
        sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo, Ipv6V6Only, Linger},
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use crate::{client::Client, engine::monotonic_ns};

/// Connects of one sample where a single one is too short for the clock.
const BATCH: u32 = 32;

/// A slice keeps at most so many samples: more are not needed for a median, and a report shall stay readable.
const SAMPLES_MAX: usize = 100_000;

/// Sockets that are checked before each slice.
const CHECKS: usize = 32;

/// What a lost datagram or a stuck connection may take before the slice fails.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a stream writes at once.
const STREAM_BLOCK_BYTES: usize = 64 * 1024;

/// First byte of a connection that is echoed, and of one that is swallowed.
const ECHO: u8 = b'e';
const SWALLOW: u8 = b's';

/// How long the prober of a start waits between two looks: it must not take the CPU from what it waits for.
const LOOK_PAUSE: Duration = Duration::from_micros(500);

/// An order to a lab client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Keeps destinations under an id: they are too many to be sent with each slice.
    Targets(Vec<SocketAddr>),
    /// Measures for a short time.
    Run(Slice),
    /// Starts the measuring server at a port of every address of the namespace, IPv4 and IPv6: TCP and UDP.
    Serve {
        /// Where it listens.
        port: u16,
        /// Where its threads run.
        cpu: Option<usize>,
    },
    /// Looks until the destination leads to someone else.
    AwaitChange {
        /// How to look.
        probe: Probe,
        /// Where.
        to: SocketAddr,
        /// Who is there before: a prober that comes too late shall say so.
        from: String,
        /// Where the prober runs.
        cpu: Option<usize>,
        /// When to give up.
        timeout: Duration,
    },
    /// Looks until the last destination, and then all, are led to a backend that is reached from this source address.
    AwaitAll {
        /// The destinations.
        targets: u64,
        /// The source address that tells a backend.
        source: IpAddr,
        /// When to give up.
        timeout: Duration,
    },
}

/// What came of an order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Outcome {
    /// Destinations are kept.
    Id(u64),
    /// Done.
    Done,
    /// A slice.
    Samples(Samples),
    /// A change was seen.
    Change(Change),
    /// All were seen.
    All(All),
    /// It did not work.
    Failed(String),
}

/// What is done again and again in a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum What {
    /// One UDP socket is connected to one destination after the other; a sample is the mean of a batch.
    UdpConnect,
    /// A new UDP socket is made, connected and closed; a sample is the mean of a batch.
    UdpSocket,
    /// `connect` of a new TCP socket, which is then reset.
    TcpConnect,
    /// Connect, one byte there, one back, close.
    TcpCrr,
    /// One byte there and one back, on one connection.
    TcpRr,
    /// `sendto` and `recvfrom` on one UDP socket that is not connected.
    UdpExchange,
    /// Bytes over one connection, one way.
    Stream,
}

/// A short time of measuring.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Slice {
    /// What is measured.
    pub what: What,
    /// The destinations, of one family; each time one is drawn at random.
    pub targets: u64,
    /// For how long.
    pub duration: Duration,
    /// Where the client runs.
    pub cpu: Option<usize>,
    /// Draws the destinations.
    pub seed: u64,
    /// The source address of sockets that are led to a backend; checked before the slice.
    pub source: Option<IpAddr>,
}

/// What a slice has given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Samples {
    /// One duration a sample; empty for a stream.
    pub ns: Vec<u64>,
    /// Bytes of a stream.
    pub bytes: u64,
    /// How long it took.
    pub elapsed_ns: u64,
}

/// How a prober finds out who is behind a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Probe {
    /// By the source address of a connected UDP socket: no packet, a few microseconds.
    Source,
    /// By the greeting of a lab server over TCP: works with every proxy.
    Greeting,
}

/// When a destination began to lead to someone else; times are of `CLOCK_MONOTONIC`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Who was there.
    pub from: String,
    /// Who is there now.
    pub to: String,
    /// When the last look that saw the old one began; zero if the first look came too late.
    pub last_old_ns: u64,
    /// When the first look that saw the new one was over.
    pub first_new_ns: u64,
    /// How often it was looked.
    pub looks: u64,
    /// Looks that saw neither.
    pub failures: u64,
    /// Looks that saw the old one again after the new one.
    pub stale: u64,
}

/// When destinations began to be led somewhere; times are of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct All {
    /// The last destination was led to a backend.
    pub last_ns: u64,
    /// Every destination had been seen to be.
    pub all_ns: u64,
    /// Destinations that were not at the first look.
    pub late: u64,
}

impl Client {
    /// Keeps destinations in the client.
    pub fn targets(&self, targets: Vec<SocketAddr>) -> Result<u64> {
        let Outcome::Id(id) = self.order(Order::Targets(targets))? else { bail!("no id came back") };
        Ok(id)
    }

    /// Measures one slice.
    pub fn slice(&self, slice: Slice) -> Result<Samples> {
        let Outcome::Samples(samples) = self.order(Order::Run(slice))? else { bail!("no samples came back") };
        Ok(samples)
    }

    /// Starts the measuring server in the client's process.
    pub fn serve_measured(&self, port: u16, cpu: Option<usize>) -> Result<()> {
        let Outcome::Done = self.order(Order::Serve { port, cpu })? else {
            bail!("the server did not start")
        };
        Ok(())
    }

    /// Waits until a destination leads to someone else.
    pub fn await_change(
        &self,
        probe: Probe,
        to: SocketAddr,
        from: &str,
        cpu: Option<usize>,
        timeout: Duration,
    ) -> Result<Change> {
        let order = Order::AwaitChange { probe, to, from: from.to_owned(), cpu, timeout };
        let Outcome::Change(change) = self.order(order)? else { bail!("no change came back") };
        Ok(change)
    }

    /// Waits until all destinations lead to a backend.
    pub fn await_all(&self, targets: u64, source: IpAddr, timeout: Duration) -> Result<All> {
        let order = Order::AwaitAll { targets, source, timeout };
        let Outcome::All(all) = self.order(order)? else { bail!("no times came back") };
        Ok(all)
    }

    fn order(&self, order: Order) -> Result<Outcome> {
        let outcome = self.measure(order)?;
        if let Outcome::Failed(error) = &outcome {
            bail!("the lab client: {error}");
        }
        Ok(outcome)
    }
}

/// What a client keeps between orders.
#[derive(Debug, Default)]
pub(crate) struct Bench {
    targets: Vec<Vec<SocketAddr>>,
}

impl Bench {
    pub(crate) fn handle(&mut self, order: Order) -> Outcome {
        self.follow(order).unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")))
    }

    fn follow(&mut self, order: Order) -> Result<Outcome> {
        match order {
            Order::Targets(targets) => {
                self.targets.push(targets);
                Ok(Outcome::Id(u64::try_from(self.targets.len() - 1)?))
            }
            Order::Run(slice) => {
                pin(slice.cpu)?;
                run(&slice, self.get(slice.targets)?).map(Outcome::Samples)
            }
            Order::Serve { port, cpu } => {
                for address in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
                    serve(SocketAddr::new(address, port), cpu)?;
                }
                Ok(Outcome::Done)
            }
            Order::AwaitChange { probe, to, from, cpu, timeout } => {
                pin(cpu)?;
                await_change(probe, to, from, timeout).map(Outcome::Change)
            }
            Order::AwaitAll { targets, source, timeout } => {
                await_all(self.get(targets)?, source, timeout).map(Outcome::All)
            }
        }
    }

    fn get(&self, id: u64) -> Result<&[SocketAddr]> {
        let targets = usize::try_from(id).ok().and_then(|id| self.targets.get(id));
        targets.map(Vec::as_slice).context("no destinations under this id")
    }
}

/// Keeps the calling thread on a CPU.
pub fn pin(cpu: Option<usize>) -> Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("CPU {cpu}"))?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("staying on CPU {cpu}"))
}

/// Draws destinations: xorshift64*, which is cheap and good enough not to repeat itself.
struct Draw<'a> {
    targets: &'a [SockaddrStorage],
    state: u64,
}

impl<'a> Draw<'a> {
    fn new(targets: &'a [SockaddrStorage], seed: u64) -> Self {
        // Zero would stay zero.
        Self { targets, state: seed | 1 << 63 }
    }

    fn next(&mut self) -> &'a SockaddrStorage {
        &self.targets[self.index()]
    }

    fn index(&mut self) -> usize {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let random = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        // Multiply and shift gives an index below the length.
        let index = (random * self.targets.len() as u64) >> 32;
        usize::try_from(index).unwrap_or_default()
    }
}

fn run(slice: &Slice, targets: &[SocketAddr]) -> Result<Samples> {
    let Some(first) = targets.first() else { bail!("no destinations") };
    let family = if first.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let raw: Vec<_> = targets.iter().map(|target| SockaddrStorage::from(*target)).collect();
    let mut draw = Draw::new(&raw, slice.seed);
    if let Some(source) = slice.source {
        for _ in 0..CHECKS {
            let found = source_of(family, draw.next())?;
            if found != source {
                bail!("a destination is not led to a backend: the socket's address is {found}, not {source}");
            }
        }
    }
    let mut slices = Collector::new(slice.duration);
    match slice.what {
        What::UdpConnect => {
            let descriptor = new_socket(family, SockType::Datagram)?;
            let raw_descriptor = descriptor.as_raw_fd();
            while slices.goes_on() {
                let begin = Instant::now();
                for _ in 0..BATCH {
                    connect(raw_descriptor, draw.next()).context("connect (UDP)")?;
                }
                slices.keep(begin.elapsed() / BATCH);
            }
        }
        What::UdpSocket => {
            while slices.goes_on() {
                let begin = Instant::now();
                for _ in 0..BATCH {
                    let descriptor = new_socket(family, SockType::Datagram)?;
                    connect(descriptor.as_raw_fd(), draw.next()).context("connect (UDP)")?;
                }
                slices.keep(begin.elapsed() / BATCH);
            }
        }
        What::TcpConnect => {
            let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
            while slices.goes_on() {
                let descriptor = new_socket(family, SockType::Stream)?;
                let target = draw.next();
                let begin = Instant::now();
                connect(descriptor.as_raw_fd(), target).with_context(|| format!("connect to {target}"))?;
                slices.keep(begin.elapsed());
                setsockopt(&descriptor, Linger, &at_once).context("SO_LINGER")?;
            }
        }
        What::TcpCrr => {
            while slices.goes_on() {
                let target = draw.next();
                let begin = Instant::now();
                let mut stream = tcp(family, target)?;
                round_trip(&mut stream)?;
                drop(stream);
                slices.keep(begin.elapsed());
            }
        }
        What::TcpRr => {
            let mut stream = tcp(family, draw.next())?;
            stream.set_nodelay(true).context("TCP_NODELAY")?;
            round_trip(&mut stream)?;
            while slices.goes_on() {
                let begin = Instant::now();
                round_trip(&mut stream)?;
                slices.keep(begin.elapsed());
            }
        }
        What::UdpExchange => udp_exchange(family, targets, &mut draw, &mut slices)?,
        What::Stream => {
            let mut stream = tcp(family, draw.next())?;
            stream.write_all(&[SWALLOW]).context("starting a stream")?;
            let block = vec![0; STREAM_BLOCK_BYTES];
            while slices.goes_on() {
                stream.write_all(&block).context("sending a block")?;
                slices.bytes += block.len() as u64;
            }
            stream.shutdown(Shutdown::Write).context("ending a stream")?;
            // The server closes when it has read everything: the cost of both ends falls into the slice.
            stream.read(&mut [0]).context("waiting for the end of a stream")?;
        }
    }
    Ok(slices.end())
}

fn udp_exchange(
    family: AddressFamily,
    targets: &[SocketAddr],
    draw: &mut Draw<'_>,
    slices: &mut Collector,
) -> Result<()> {
    let local: IpAddr = if family == AddressFamily::Inet {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((local, 0)).context("binding a UDP socket")?;
    socket.set_read_timeout(Some(PATIENCE)).context("SO_RCVTIMEO")?;
    let mut buffer = [0; 64];
    let mut number = 0_u64;
    while slices.goes_on() {
        let target = targets.get(draw.index()).context("a destination")?;
        number += 1;
        let question = number.to_ne_bytes();
        let begin = Instant::now();
        socket.send_to(&question, target).with_context(|| format!("sendto {target}"))?;
        let (length, from) =
            socket.recv_from(&mut buffer).with_context(|| format!("no answer from {target}"))?;
        slices.keep(begin.elapsed());
        if buffer.get(..length) != Some(&question[..]) || from != *target {
            bail!("asked {target}, answered by {from}");
        }
    }
    Ok(())
}

fn new_socket(family: AddressFamily, kind: SockType) -> Result<OwnedFd> {
    socket(family, kind, SockFlag::SOCK_CLOEXEC, None).context("socket")
}

fn tcp(family: AddressFamily, target: &SockaddrStorage) -> Result<TcpStream> {
    let descriptor = new_socket(family, SockType::Stream)?;
    connect(descriptor.as_raw_fd(), target).with_context(|| format!("connect to {target}"))?;
    Ok(TcpStream::from(descriptor))
}

fn round_trip(stream: &mut TcpStream) -> Result<()> {
    let mut answer = [0];
    stream.write_all(&[ECHO]).context("sending a byte")?;
    stream.read_exact(&mut answer).context("receiving a byte")?;
    if answer != [ECHO] {
        bail!("sent {ECHO}, received {answer:?}");
    }
    Ok(())
}

/// The source address that the kernel gives a new UDP socket towards a destination.
fn source_of(family: AddressFamily, target: &SockaddrStorage) -> Result<IpAddr> {
    let descriptor = new_socket(family, SockType::Datagram)?;
    connect(descriptor.as_raw_fd(), target).context("connect (UDP)")?;
    Ok(UdpSocket::from(descriptor).local_addr().context("getsockname")?.ip())
}

/// Samples until the time is over.
struct Collector {
    begin: Instant,
    duration: Duration,
    ns: Vec<u64>,
    bytes: u64,
}

impl Collector {
    fn new(duration: Duration) -> Self {
        // No growing while the clock runs.
        Self { ns: Vec::with_capacity(SAMPLES_MAX), bytes: 0, duration, begin: Instant::now() }
    }

    fn goes_on(&self) -> bool {
        self.begin.elapsed() < self.duration && self.ns.len() < SAMPLES_MAX
    }

    fn keep(&mut self, sample: Duration) {
        self.ns.push(u64::try_from(sample.as_nanos()).unwrap_or(u64::MAX));
    }

    fn end(self) -> Samples {
        let elapsed_ns = u64::try_from(self.begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Samples { ns: self.ns, bytes: self.bytes, elapsed_ns }
    }
}

fn await_change(probe: Probe, to: SocketAddr, from: String, timeout: Duration) -> Result<Change> {
    let deadline = Instant::now() + timeout;
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let raw = SockaddrStorage::from(to);
    let look = || match probe {
        Probe::Source => source_of(family, &raw).map(|source| source.to_string()),
        Probe::Greeting => greeting(family, &raw),
    };
    let mut change = Change { from, ..Change::default() };
    loop {
        let begin_ns = monotonic_ns();
        let seen = look();
        let end_ns = monotonic_ns();
        change.looks += 1;
        match seen {
            Ok(seen) if seen == change.from => change.last_old_ns = begin_ns,
            Ok(seen) => {
                (change.to, change.first_new_ns) = (seen, end_ns);
                break;
            }
            Err(_) => change.failures += 1,
        }
        if Instant::now() > deadline {
            bail!("{to} leads to {} for {timeout:?} and more", change.from);
        }
    }
    for _ in 0..CHECKS {
        if look()? == change.from {
            change.stale += 1;
        }
    }
    Ok(change)
}

fn greeting(family: AddressFamily, target: &SockaddrStorage) -> Result<String> {
    let mut stream = tcp(family, target)?;
    stream.set_read_timeout(Some(PATIENCE)).context("SO_RCVTIMEO")?;
    let mut buffer = [0; 64];
    let length = stream.read(&mut buffer).context("waiting for the greeting")?;
    // Reset, or the ports of a fast prober would all rest in TIME_WAIT.
    setsockopt(&stream, Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).context("SO_LINGER")?;
    Ok(String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).trim_end().to_owned())
}

fn await_all(targets: &[SocketAddr], source: IpAddr, timeout: Duration) -> Result<All> {
    let deadline = Instant::now() + timeout;
    let Some(last) = targets.last() else { bail!("no destinations") };
    let family = if last.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let is_led =
        |target: &SocketAddr| Ok::<_, anyhow::Error>(source_of(family, &(*target).into())? == source);
    let late = |what: &SocketAddr| format!("{what} was led nowhere within {timeout:?}");
    while !is_led(last)? {
        if Instant::now() > deadline {
            bail!("{}", late(last));
        }
        thread::sleep(LOOK_PAUSE);
    }
    let mut all = All { last_ns: monotonic_ns(), ..All::default() };
    for target in targets {
        if is_led(target)? {
            continue;
        }
        all.late += 1;
        while !is_led(target)? {
            if Instant::now() > deadline {
                bail!("{}", late(target));
            }
            thread::sleep(LOOK_PAUSE);
        }
    }
    all.all_ns = monotonic_ns();
    Ok(all)
}

/// Serves TCP and UDP at an address, each from a thread of its own, one connection after the other: the client under
/// measurement has one at a time.
fn serve(address: SocketAddr, cpu: Option<usize>) -> Result<()> {
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
            let _ = answer(stream, &mut buffer);
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
                return_datagram_v4(&descriptor)
            } else {
                return_datagram_v6(&descriptor)
            };
        }
    })?;
    Ok(())
}

fn family_of(address: SocketAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn listen_only_to_own_family(descriptor: &OwnedFd, address: SocketAddr) -> Result<()> {
    if address.is_ipv6() {
        setsockopt(descriptor, Ipv6V6Only, &true).context("IPV6_V6ONLY")?;
    }
    Ok(())
}

fn answer(mut stream: TcpStream, buffer: &mut [u8]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let length = stream.read(buffer)?;
        let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else { return Ok(()) };
        if bytes.first() == Some(&SWALLOW) {
            while stream.read(buffer)? > 0 {}
            return Ok(());
        }
        stream.write_all(bytes)?;
    }
}

/// Answers from the address that was asked, which a socket bound to every address must say itself.
fn return_datagram_v4(descriptor: &OwnedFd) -> nix::Result<()> {
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
    let parts = [IoSlice::new(buffer.get(..length).unwrap_or_default())];
    sendmsg(descriptor.as_raw_fd(), &parts, control.as_slice(), MsgFlags::empty(), from.as_ref())?;
    Ok(())
}

/// [`return_datagram_v4`], with the structures of the other family.
fn return_datagram_v6(descriptor: &OwnedFd) -> nix::Result<()> {
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
    let parts = [IoSlice::new(buffer.get(..length).unwrap_or_default())];
    sendmsg(descriptor.as_raw_fd(), &parts, control.as_slice(), MsgFlags::empty(), from.as_ref())?;
    Ok(())
}

/// Keeps CPUs from going idle: on a virtual machine an idle CPU stops, and waking it costs more than what is measured.
/// The spinners yield to everybody (`SCHED_IDLE`).
#[derive(Debug)]
pub struct Spinners {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Spinners {
    /// One on each CPU.
    pub fn start(cpus: usize) -> Result<Self> {
        use std::sync::atomic::Ordering;
        let mut spinners = Self { stop: std::sync::Arc::default(), threads: Vec::new() };
        for cpu in 0..cpus {
            let stop = std::sync::Arc::clone(&spinners.stop);
            spinners.threads.push(thread::Builder::new().name("spinner".to_owned()).spawn(move || {
                if pin(Some(cpu)).is_err() || !yield_to_everybody() {
                    return;
                }
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })?);
        }
        Ok(spinners)
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Puts the calling thread behind all others; whether that worked.
fn yield_to_everybody() -> bool {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure lives across the call, which changes nothing but how this thread is scheduled.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) == 0 }
}

/// The time that a process has been on a CPU, all threads together.
pub fn cpu_ns(pid: u32) -> Result<u64> {
    let directory = format!("/proc/{pid}/task");
    let mut sum = 0;
    for thread in std::fs::read_dir(&directory).with_context(|| format!("listing {directory}"))? {
        let path = thread.context("a thread")?.path().join("schedstat");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let first = text.split(' ').next().and_then(|field| field.parse::<u64>().ok());
        sum += first.with_context(|| format!("{}: {text}", path.display()))?;
    }
    Ok(sum)
}
