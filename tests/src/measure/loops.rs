//! What the client does: the loops of a slice, and the probers.

use std::{
    fmt::Display,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    libc,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage, connect,
        setsockopt, socket, sockopt::Linger,
    },
};

use super::{
    All, Change, Check, ECHO, STREAM_BLOCK_BYTES, SWALLOW, Samples, Slice, WHO, What, first::Handshakes,
};
use crate::{engine::monotonic_ns, random::Random};

/// Connects of one sample where a single one is too short for the clock.
const BATCH: u32 = 32;

/// A slice keeps at most so many samples: more are not needed for a median, and a report shall stay readable.
const SAMPLES_MAX: usize = 100_000;

/// Sockets that are checked before each slice.
const CHECKS: usize = 32;

/// Closing resets the connection.
const AT_ONCE: libc::linger = libc::linger { l_onoff: 1, l_linger: 0 };

/// What a lost datagram or a stuck connection may take before the slice fails.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long the prober of a start waits between two looks: it must not take the CPU from what it waits for.
const LOOK_PAUSE: Duration = Duration::from_micros(500);

/// Draws destinations.
///
/// They lie as densely as their family allows: a list that fills the caches would be measured along with the connects.
struct Draw<'a, A> {
    targets: &'a [A],
    random: Random,
}

impl<'a, A> Draw<'a, A> {
    fn new(targets: &'a [A], seed: u64) -> Self {
        Self { targets, random: Random::new(seed) }
    }

    fn next(&mut self) -> &'a A {
        &self.targets[self.index()]
    }

    fn index(&mut self) -> usize {
        self.random.below(self.targets.len())
    }
}

pub(super) fn run(slice: &Slice, targets: &[SocketAddr]) -> Result<Samples> {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for target in targets {
        match target {
            SocketAddr::V4(target) => v4.push(SockaddrIn::from(*target)),
            SocketAddr::V6(target) => v6.push(SockaddrIn6::from(*target)),
        }
    }
    match (v4.is_empty(), v6.is_empty()) {
        (false, true) => run_in(AddressFamily::Inet, slice, targets, &v4),
        (true, false) => run_in(AddressFamily::Inet6, slice, targets, &v6),
        (true, true) => bail!("no destinations"),
        (false, false) => bail!("destinations of both families"),
    }
}

fn run_in<A: SockaddrLike + Display>(
    family: AddressFamily,
    slice: &Slice,
    targets: &[SocketAddr],
    raw: &[A],
) -> Result<Samples> {
    let mut draw = Draw::new(raw, slice.seed);
    for _ in 0..CHECKS {
        check(family, draw.next(), slice.check)?;
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
            while slices.goes_on() {
                let descriptor = new_socket(family, SockType::Stream)?;
                let target = draw.next();
                let begin = Instant::now();
                connect(descriptor.as_raw_fd(), target).with_context(|| format!("connect to {target}"))?;
                slices.keep(begin.elapsed());
                setsockopt(&descriptor, Linger, &AT_ONCE).context("SO_LINGER")?;
            }
        }
        What::FirstPacket => {
            let watch = Handshakes::watch()?;
            // That took a while.
            slices = Collector::new(slice.duration);
            while slices.goes_on() {
                let stream = tcp(family, draw.next())?;
                let port = stream.local_addr().context("getsockname")?.port();
                slices.keep(watch.round_trip(port)?);
                setsockopt(&stream, Linger, &AT_ONCE).context("SO_LINGER")?;
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
    draw: &mut Draw<'_, impl SockaddrLike>,
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

pub(super) fn new_socket(family: AddressFamily, kind: SockType) -> Result<OwnedFd> {
    socket(family, kind, SockFlag::SOCK_CLOEXEC, None).context("socket")
}

fn tcp(family: AddressFamily, target: &(impl SockaddrLike + Display)) -> Result<TcpStream> {
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

/// Whether a destination is led to a backend, and the backend sees who asks as it should.
fn check(family: AddressFamily, target: &(impl SockaddrLike + Display), check: Check) -> Result<()> {
    match check {
        Check::Socket(source) => {
            let found = source_of(family, target)?;
            ensure!(
                found == source,
                "{target} is led nowhere: the socket's address is {found}, not {source}"
            );
        }
        Check::Server { tag, source, is_kept } => {
            let mut stream = tcp(family, target)?;
            stream.set_read_timeout(Some(PATIENCE)).context("SO_RCVTIMEO")?;
            stream.write_all(&[WHO]).context("asking who answers")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).context("waiting for who answers")?;
            let told =
                answer.split_once(' ').and_then(|(tag, seen)| Some((tag, seen.parse::<IpAddr>().ok()?)));
            let is_right =
                |(found, seen): (&str, IpAddr)| found.as_bytes() == [tag] && (seen == source) == is_kept;
            ensure!(
                told.is_some_and(is_right),
                "{target} was asked by {source}, and answered {answer:?}; the source shall be {}",
                if is_kept { "kept" } else { "replaced" }
            );
        }
    }
    Ok(())
}

/// The source address that the kernel gives a new UDP socket towards a destination.
fn source_of(family: AddressFamily, target: &impl SockaddrLike) -> Result<IpAddr> {
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

/// As [`source_of`], again and again with one socket. One for each look would have to be freed: the kernel does so in heaps
/// of thousands, and what happens in those milliseconds is not seen.
struct Looks {
    socket: UdpSocket,
    to: SockaddrStorage,
}

impl Looks {
    fn new(to: SocketAddr) -> Result<Self> {
        let descriptor = new_socket(family_of(to), SockType::Datagram)?;
        Ok(Self { socket: descriptor.into(), to: to.into() })
    }

    fn look(&self) -> Result<String> {
        // Without a peer it has no source either, and gets a new one.
        let nobody =
            libc::sockaddr { sa_family: AddressFamily::Unspec as libc::sa_family_t, sa_data: [0; 14] };
        let length = libc::socklen_t::try_from(size_of_val(&nobody))?;
        loop {
            // SAFETY: an address of this length, which lives during the call.
            let result = unsafe { libc::connect(self.socket.as_raw_fd(), &raw const nobody, length) };
            Errno::result(result).context("connect to nobody (UDP)")?;
            connect(self.socket.as_raw_fd(), &self.to).context("connect (UDP)")?;
            let source = self.socket.local_addr().context("getsockname")?.ip();
            // Its endpoint is gone, and this socket of all was closed in between (B5).
            if !source.is_unspecified() {
                return Ok(source.to_string());
            }
        }
    }
}

pub(super) fn await_change(to: SocketAddr, from: String, timeout: Duration) -> Result<Change> {
    let deadline = Instant::now() + timeout;
    let looks = Looks::new(to)?;
    let look = || looks.look();
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

pub(super) fn await_all(targets: &[SocketAddr], source: IpAddr, timeout: Duration) -> Result<All> {
    let deadline = Instant::now() + timeout;
    let Some(last) = targets.last() else { bail!("no destinations") };
    let family = family_of(*last);
    let is_led = |target: &SocketAddr| {
        Ok::<_, anyhow::Error>(source_of(family, &SockaddrStorage::from(*target))? == source)
    };
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

/// Destinations that are tried once the last one answers.
const SAMPLE: usize = 64;

/// How long the last destination's answer is waited for before it is asked again, and how long any other's.
const ASKED_AGAIN: Duration = Duration::from_millis(20);
const ANSWERED_WITHIN: Duration = Duration::from_millis(500);

pub(super) fn await_answers(targets: &[SocketAddr], timeout: Duration) -> Result<All> {
    let deadline = Instant::now() + timeout;
    let Some(last) = targets.last() else { bail!("no destinations") };
    while let Err(error) = asked(last, ECHO, ASKED_AGAIN) {
        if Instant::now() > deadline {
            return Err(error).with_context(|| format!("{last} did not answer within {timeout:?}"));
        }
        thread::sleep(LOOK_PAUSE);
    }
    let mut all = All { last_ns: monotonic_ns(), ..All::default() };
    for target in targets.iter().step_by(targets.len().div_ceil(SAMPLE)) {
        while let Err(error) = asked(target, ECHO, ANSWERED_WITHIN) {
            all.late += 1;
            if Instant::now() > deadline {
                return Err(error).with_context(|| format!("{target} did not answer within {timeout:?}"));
            }
        }
    }
    all.all_ns = monotonic_ns();
    Ok(all)
}

pub(super) fn await_server(to: SocketAddr, tag: u8, looks: u32, timeout: Duration) -> Result<Change> {
    let deadline = Instant::now() + timeout;
    let name = |tag: u8| char::from(tag).to_string();
    let mut change = Change { to: name(tag), ..Change::default() };
    loop {
        let begin_ns = monotonic_ns();
        let found = asked(&to, WHO, ASKED_AGAIN);
        change.looks += 1;
        match &found {
            Ok(found) if *found == tag => {
                change.first_new_ns = monotonic_ns();
                break;
            }
            Ok(found) => (change.from, change.last_old_ns) = (name(*found), begin_ns),
            Err(_) => change.failures += 1,
        }
        if Instant::now() > deadline {
            bail!("{to} was not answered by {tag} within {timeout:?}, the last time: {found:?}");
        }
        thread::sleep(LOOK_PAUSE / 5);
    }
    for _ in 0..looks {
        match asked(&to, WHO, ASKED_AGAIN) {
            Ok(found) => change.stale += u64::from(found != tag),
            Err(_) => change.failures += 1,
        }
    }
    Ok(change)
}

/// Asks from a new socket, so that nothing of an earlier question is in the way.
fn asked(target: &SocketAddr, question: u8, within: Duration) -> Result<u8> {
    let descriptor = new_socket(family_of(*target), SockType::Datagram)?;
    connect(descriptor.as_raw_fd(), &SockaddrStorage::from(*target)).context("connect (UDP)")?;
    let socket = UdpSocket::from(descriptor);
    socket.set_read_timeout(Some(within)).context("SO_RCVTIMEO")?;
    socket.send(&[question]).context("asking")?;
    let mut answer = [0];
    socket.recv(&mut answer).context("waiting for an answer")?;
    Ok(answer[0])
}

pub(super) fn family_of(address: SocketAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers from a script: the old one, nobody (0), the new one, and the old one once more.
    #[test]
    fn a_removed_server_that_answers_again_is_seen() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = server.local_addr().unwrap();
        let script = *b"AA\0BBABB";
        let serving = thread::spawn(move || {
            for tag in script {
                let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
                if tag > 0 {
                    server.send_to(&[tag], from).unwrap();
                }
            }
        });
        let looks = u32::try_from(script.len()).unwrap() - 4;
        let change = await_server(to, b'B', looks, Duration::from_secs(5)).unwrap();
        serving.join().unwrap();
        assert_eq!((change.from.as_str(), change.to.as_str()), ("A", "B"));
        assert_eq!((change.looks, change.failures, change.stale), (4, 1, 1));
        assert!(change.last_old_ns < change.first_new_ns);
    }
}
