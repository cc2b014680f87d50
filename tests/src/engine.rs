//! What the lab client does with a request: plain sockets, every step timed and every error number kept.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket,
        sockopt::{Linger, SocketError},
    },
    time::{ClockId, clock_gettime},
};

use crate::{
    measure::Bench,
    protocol::{
        Datagram, Dial, Exchange, Failure, Family, HeldReport, LoopReport, LoopSpec, Record, Reply, Request,
        Stage, Summary, Transport,
    },
    server::Server,
};

/// A loop without end keeps at most so many connect times for its summary (the first ones): 8 MB a thread.
const SAMPLES_MAX: usize = 1_000_000;

/// So many failures are reported in full.
const FIRST_FAILURES: usize = 8;

/// Lines and datagrams of the lab are short.
const ANSWER_MAX_BYTES: usize = 512;

/// Questions are numbered, so that a late answer is not taken for the next one's.
static QUESTION: AtomicU64 = AtomicU64::new(1);

/// The clock of [`Record`], which all processes of the machine share.
#[must_use]
pub fn monotonic_ns() -> u64 {
    // This clock always exists; zero would show in every record.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| nanoseconds(Duration::from(now)))
}

/// Answers requests until the other side closes its end.
pub fn serve(requests: impl BufRead, mut replies: impl Write) -> Result<()> {
    let mut state = State::default();
    for line in requests.lines() {
        let line = line.context("reading a request")?;
        let reply = match serde_json::from_str(&line) {
            Ok(request) => state.handle(request),
            Err(error) => Reply::Error(format!("not a request: {error}: {line}")),
        };
        let mut bytes = serde_json::to_vec(&reply).context("encoding a reply")?;
        bytes.push(b'\n');
        replies.write_all(&bytes).and_then(|()| replies.flush()).context("writing a reply")?;
    }
    Ok(())
}

#[derive(Default)]
struct State {
    next_id: u64,
    sockets: BTreeMap<u64, Open>,
    loops: BTreeMap<u64, Loop>,
    held: BTreeMap<u64, Held>,
    servers: Vec<Server>,
    bench: Bench,
}

impl State {
    fn handle(&mut self, request: Request) -> Reply {
        match request {
            Request::Connect { transport, dial, keep } => match Open::connect(transport, &dial) {
                Ok((open, mut exchange)) => {
                    if keep {
                        let id = self.id();
                        exchange.id = Some(id);
                        self.sockets.insert(id, open);
                    }
                    Reply::Exchange(exchange)
                }
                Err(failure) => Reply::Failure(failure),
            },
            Request::Send { id, to, timeout } => match self.sockets.get_mut(&id) {
                Some(open) => match open.ask_again(to, timeout) {
                    Ok(exchange) => Reply::Exchange(Exchange { id: Some(id), ..exchange }),
                    Err(failure) => Reply::Failure(failure),
                },
                None => unknown(id),
            },
            Request::Chain { transport, dials } => Reply::Chain(Open::chain(transport, &dials)),
            Request::SendDatagram { id, to, bytes } => match self.sockets.get(&id) {
                Some(open) => open.send_datagram(to, &bytes).map_or_else(Reply::Failure, |()| Reply::Done),
                None => unknown(id),
            },
            Request::ReceiveDatagram { id, timeout } => match self.sockets.get(&id) {
                Some(open) => open.receive_datagram(timeout).map_or_else(Reply::Failure, Reply::Datagram),
                None => unknown(id),
            },
            Request::Close { id } => {
                if self.sockets.remove(&id).is_some() || self.held.remove(&id).is_some() {
                    Reply::Done
                } else {
                    unknown(id)
                }
            }
            Request::StartLoop(spec) => {
                let id = self.id();
                self.loops.insert(id, Loop::start(&spec));
                Reply::Id(id)
            }
            Request::ReadLoop { id, stop, wait } => {
                let Some(running) = self.loops.get_mut(&id) else { return unknown(id) };
                if stop {
                    running.stop.store(true, Ordering::Relaxed);
                }
                if wait {
                    running.join();
                }
                let report = running.report();
                if wait {
                    self.loops.remove(&id);
                }
                Reply::Loop(report)
            }
            Request::Hold { dial, count } => {
                let id = self.id();
                let (held, mut report) = Held::open(&dial, count);
                report.id = id;
                self.held.insert(id, held);
                Reply::Held(report)
            }
            Request::CheckHeld { id } => match self.held.get_mut(&id) {
                Some(held) => Reply::Held(HeldReport { id, ..held.check() }),
                None => unknown(id),
            },
            Request::Serve { name, addresses } => match Server::start_here(&name, &addresses) {
                Ok(server) => {
                    self.servers.push(server);
                    Reply::Done
                }
                Err(error) => Reply::Error(format!("{error:#}")),
            },
            Request::Measure(order) => Reply::Measured(self.bench.handle(order)),
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

fn unknown(id: u64) -> Reply {
    Reply::Error(format!("nothing has the id {id}"))
}

/// A socket that is open.
struct Open {
    /// Where it was to go, in the form of the socket's family.
    to: SocketAddr,
    kind: Kind,
}

enum Kind {
    Tcp { stream: TcpStream, greeting: Option<String> },
    UdpConnected(UdpSocket),
    UdpUnconnected(UdpSocket),
}

impl Open {
    fn connect(transport: Transport, dial: &Dial) -> Result<(Self, Exchange), Failure> {
        let clock = Clock::start();
        let descriptor = open_socket(transport, dial.family, &clock)?;
        Self::connect_on(descriptor, transport, dial, &clock)
    }

    /// Each destination gets the same socket; a copy of its descriptor outlives those that fail.
    fn chain(transport: Transport, dials: &[Dial]) -> Vec<Result<Exchange, Failure>> {
        let mut kept: Option<OwnedFd> = None;
        let mut one = |dial: &Dial| {
            let clock = Clock::start();
            let copied = |error: io::Error| clock.io_failure(Stage::Connect, &error);
            let descriptor = match kept.take() {
                Some(descriptor) => descriptor,
                None => open_socket(transport, dial.family, &clock)?,
            };
            let copy = descriptor.try_clone().map_err(copied)?;
            kept = Some(descriptor);
            Self::connect_on(copy, transport, dial, &clock).map(|(_, exchange)| exchange)
        };
        dials.iter().map(&mut one).collect()
    }

    fn connect_on(
        descriptor: OwnedFd,
        transport: Transport,
        dial: &Dial,
        clock: &Clock,
    ) -> Result<(Self, Exchange), Failure> {
        let to = in_family(dial.to, dial.family);
        let (kind, connect_ns) = match transport {
            Transport::Tcp => {
                let before = clock.elapsed_ns();
                set_nonblocking(&descriptor, true).map_err(|errno| clock.failure(Stage::Connect, errno))?;
                connect_within(&descriptor, to, dial.timeout, clock)?;
                let connect_ns = clock.elapsed_ns() - before;
                set_nonblocking(&descriptor, false).map_err(|errno| clock.failure(Stage::Connect, errno))?;
                (Kind::Tcp { stream: TcpStream::from(descriptor), greeting: None }, connect_ns)
            }
            Transport::UdpConnected => {
                let before = clock.elapsed_ns();
                connect(descriptor.as_raw_fd(), &SockaddrStorage::from(to))
                    .map_err(|errno| clock.failure(Stage::Connect, errno))?;
                let connect_ns = clock.elapsed_ns() - before;
                (Kind::UdpConnected(UdpSocket::from(descriptor)), connect_ns)
            }
            Transport::UdpUnconnected => (Kind::UdpUnconnected(UdpSocket::from(descriptor)), 0),
        };
        let mut open = Self { to, kind };
        let (answer, source) =
            if dial.exchange { open.exchange(to, dial.timeout, clock)? } else { (None, None) };
        let exchange = open.describe(answer, source, connect_ns, clock)?;
        Ok((open, exchange))
    }

    fn datagrams(&self) -> Result<&UdpSocket, Failure> {
        match &self.kind {
            Kind::UdpUnconnected(socket) => Ok(socket),
            Kind::Tcp { .. } | Kind::UdpConnected(_) => {
                Err(Clock::start().failure(Stage::Send, Errno::EISCONN))
            }
        }
    }

    fn send_datagram(&self, to: SocketAddr, bytes: &[u8]) -> Result<(), Failure> {
        let clock = Clock::start();
        let to = in_family(to, self.family());
        let sent = self.datagrams()?.send_to(bytes, to);
        sent.map(drop).map_err(|error| clock.io_failure(Stage::Send, &error))
    }

    fn receive_datagram(&self, timeout: Duration) -> Result<Datagram, Failure> {
        let clock = Clock::start();
        let failed = |error: io::Error| clock.io_failure(Stage::Receive, &error);
        let socket = self.datagrams()?;
        socket.set_read_timeout(Some(timeout)).map_err(failed)?;
        let mut buffer = [0; ANSWER_MAX_BYTES];
        let (length, source) = socket.recv_from(&mut buffer).map_err(failed)?;
        Ok(Datagram { source, bytes: buffer.get(..length).unwrap_or_default().to_vec() })
    }

    fn family(&self) -> Family {
        if self.to.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    fn ask_again(&mut self, to: Option<SocketAddr>, timeout: Duration) -> Result<Exchange, Failure> {
        let clock = Clock::start();
        let to = to.map_or(self.to, |to| in_family(to, self.family()));
        let (answer, source) = self.exchange(to, timeout, &clock)?;
        self.describe(answer, source, 0, &clock)
    }

    /// Has the server say its name; for a TCP connection that was greeted already: has it echo.
    fn exchange(
        &mut self,
        to: SocketAddr,
        timeout: Duration,
        clock: &Clock,
    ) -> Result<(Option<String>, Option<SocketAddr>), Failure> {
        let deadline = Instant::now() + timeout;
        let question = format!("q{}\n", QUESTION.fetch_add(1, Ordering::Relaxed));
        match &mut self.kind {
            Kind::Tcp { stream, greeting } => match greeting {
                None => {
                    let name = read_line(stream, deadline, clock)?;
                    *greeting = Some(name.clone());
                    Ok((Some(name), None))
                }
                Some(name) => {
                    stream
                        .write_all(question.as_bytes())
                        .map_err(|error| clock.io_failure(Stage::Send, &error))?;
                    if format!("{}\n", read_line(stream, deadline, clock)?) == question {
                        Ok((Some(name.clone()), None))
                    } else {
                        Err(clock.named(Stage::Receive, Failure::GARBLED))
                    }
                }
            },
            Kind::UdpConnected(socket) => {
                socket.send(question.as_bytes()).map_err(|error| clock.io_failure(Stage::Send, &error))?;
                let (answer, _) = read_answer(socket, &question, deadline, clock)?;
                Ok((Some(answer), None))
            }
            Kind::UdpUnconnected(socket) => {
                socket
                    .send_to(question.as_bytes(), to)
                    .map_err(|error| clock.io_failure(Stage::Send, &error))?;
                let (answer, source) = read_answer(socket, &question, deadline, clock)?;
                Ok((Some(answer), Some(source)))
            }
        }
    }

    fn describe(
        &self,
        answer: Option<String>,
        source: Option<SocketAddr>,
        connect_ns: u64,
        clock: &Clock,
    ) -> Result<Exchange, Failure> {
        let total_ns = clock.elapsed_ns();
        let (peer, local) = match &self.kind {
            Kind::Tcp { stream, .. } => (stream.peer_addr().map(Some), stream.local_addr()),
            Kind::UdpConnected(socket) => (socket.peer_addr().map(Some), socket.local_addr()),
            Kind::UdpUnconnected(socket) => (Ok(None), socket.local_addr()),
        };
        let failed = |error: io::Error| clock.io_failure(Stage::Receive, &error);
        Ok(Exchange {
            id: None,
            answer,
            peer: peer.map_err(failed)?,
            source,
            local: local.map_err(failed)?,
            connect_ns,
            total_ns,
        })
    }

    /// Closes a TCP connection by a reset, so that a loop does not run out of ports to TIME_WAIT.
    fn abort(self) {
        if let Kind::Tcp { stream, .. } = &self.kind {
            let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            // Without it the port merely rests a minute.
            let _ = setsockopt(stream, Linger, &at_once);
        }
    }
}

fn open_socket(transport: Transport, family: Family, clock: &Clock) -> Result<OwnedFd, Failure> {
    let kind = match transport {
        Transport::Tcp => SockType::Stream,
        Transport::UdpConnected | Transport::UdpUnconnected => SockType::Datagram,
    };
    let family = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    socket(family, kind, SockFlag::SOCK_CLOEXEC, None).map_err(|errno| clock.failure(Stage::Connect, errno))
}

fn set_nonblocking(descriptor: &OwnedFd, nonblocking: bool) -> nix::Result<()> {
    let flags = if nonblocking { OFlag::O_NONBLOCK } else { OFlag::empty() };
    fcntl(descriptor, FcntlArg::F_SETFL(flags)).map(drop)
}

/// An IPv4 address as an IPv6 socket dials it.
fn in_family(to: SocketAddr, family: Family) -> SocketAddr {
    match (to.ip(), family) {
        (IpAddr::V4(address), Family::V6) => SocketAddr::new(address.to_ipv6_mapped().into(), to.port()),
        (IpAddr::V4(_), Family::V4) | (IpAddr::V6(_), _) => to,
    }
}

/// Connects a non-blocking socket, and waits.
fn connect_within(
    descriptor: &OwnedFd,
    to: SocketAddr,
    timeout: Duration,
    clock: &Clock,
) -> Result<(), Failure> {
    match connect(descriptor.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => return Ok(()),
        Err(Errno::EINPROGRESS) => {}
        Err(errno) => return Err(clock.failure(Stage::Connect, errno)),
    }
    let deadline = Instant::now() + timeout;
    loop {
        let mut descriptors = [PollFd::new(descriptor.as_fd(), PollFlags::POLLOUT)];
        // A millisecond more than is left, so that the wait does not spin through the last one.
        let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        match poll(&mut descriptors, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) if Instant::now() >= deadline => return Err(clock.named(Stage::Connect, Failure::TIMEOUT)),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => {
                let error = nix::sys::socket::getsockopt(descriptor, SocketError)
                    .map_err(|errno| clock.failure(Stage::Connect, errno))?;
                return if error == 0 {
                    Ok(())
                } else {
                    Err(clock.failure(Stage::Connect, Errno::from_raw(error)))
                };
            }
            Err(errno) => return Err(clock.failure(Stage::Connect, errno)),
        }
    }
}

fn time_left(deadline: Instant, clock: &Clock) -> Result<Duration, Failure> {
    let left = deadline.saturating_duration_since(Instant::now());
    // The kernel takes a time-out of zero for none at all.
    if left.is_zero() { Err(clock.named(Stage::Receive, Failure::TIMEOUT)) } else { Ok(left) }
}

/// One line, without its end. The server sends nothing after it before it is asked.
fn read_line(stream: &mut TcpStream, deadline: Instant, clock: &Clock) -> Result<String, Failure> {
    let failed = |error: io::Error| clock.io_failure(Stage::Receive, &error);
    let mut line = Vec::new();
    let mut buffer = [0; ANSWER_MAX_BYTES];
    loop {
        stream.set_read_timeout(Some(time_left(deadline, clock)?)).map_err(failed)?;
        let length = stream.read(&mut buffer).map_err(failed)?;
        if length == 0 {
            return Err(clock.named(Stage::Receive, Failure::CLOSED));
        }
        line.extend_from_slice(buffer.get(..length).unwrap_or_default());
        if line.ends_with(b"\n") {
            line.pop();
            return String::from_utf8(line).map_err(|_| clock.named(Stage::Receive, Failure::GARBLED));
        }
        if line.len() > ANSWER_MAX_BYTES {
            return Err(clock.named(Stage::Receive, Failure::GARBLED));
        }
    }
}

/// The answer to `question`, and who the kernel says sent it. Answers to earlier questions are skipped.
fn read_answer(
    socket: &UdpSocket,
    question: &str,
    deadline: Instant,
    clock: &Clock,
) -> Result<(String, SocketAddr), Failure> {
    let failed = |error: io::Error| clock.io_failure(Stage::Receive, &error);
    let mut buffer = [0; ANSWER_MAX_BYTES];
    loop {
        socket.set_read_timeout(Some(time_left(deadline, clock)?)).map_err(failed)?;
        let (length, source) = socket.recv_from(&mut buffer).map_err(failed)?;
        let answer = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
        match answer.split_once('\n') {
            Some((name, echo)) if echo == question => return Ok((name.to_owned(), source)),
            Some((_, echo)) if echo.starts_with('q') => {}
            Some(_) | None => return Err(clock.named(Stage::Receive, Failure::GARBLED)),
        }
    }
}

/// The time since an attempt began.
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn elapsed_ns(&self) -> u64 {
        nanoseconds(self.0.elapsed())
    }

    fn named(&self, stage: Stage, error: &str) -> Failure {
        Failure { stage, error: error.to_owned(), elapsed_ns: self.elapsed_ns() }
    }

    fn failure(&self, stage: Stage, errno: Errno) -> Failure {
        self.named(stage, &format!("{errno:?}"))
    }

    fn io_failure(&self, stage: Stage, error: &io::Error) -> Failure {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EAGAIN) => self.named(stage, Failure::TIMEOUT),
            Some(errno) => self.failure(stage, errno),
            None => self.named(stage, &error.to_string()),
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A loop that runs.
struct Loop {
    stop: Arc<AtomicBool>,
    tallies: Vec<Arc<Mutex<Tally>>>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Tally {
    attempts: u64,
    answers: BTreeMap<String, u64>,
    failures: BTreeMap<String, u64>,
    first_failures: Vec<Failure>,
    connect_ns: Vec<u64>,
    records: Vec<Record>,
}

impl Loop {
    fn start(spec: &LoopSpec) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let tallies: Vec<_> = (0..spec.threads).map(|_| Arc::new(Mutex::new(Tally::default()))).collect();
        let threads = tallies
            .iter()
            .map(|tally| {
                let (spec, stop, tally) = (*spec, Arc::clone(&stop), Arc::clone(tally));
                thread::spawn(move || run_loop(&spec, &stop, &tally))
            })
            .collect();
        Self { stop, tallies, threads }
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }

    fn report(&self) -> LoopReport {
        let mut report = LoopReport::default();
        let mut connect_ns = Vec::new();
        for tally in &self.tallies {
            let tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            report.attempts += tally.attempts;
            for (name, count) in &tally.answers {
                *report.answers.entry(name.clone()).or_default() += count;
            }
            for (error, count) in &tally.failures {
                *report.failures.entry(error.clone()).or_default() += count;
            }
            report.first_failures.extend_from_slice(&tally.first_failures);
            report.records.extend_from_slice(&tally.records);
            connect_ns.extend_from_slice(&tally.connect_ns);
        }
        report.first_failures.truncate(FIRST_FAILURES);
        report.records.sort_by_key(|record| record.start_ns);
        report.connect = summary(connect_ns);
        report
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn run_loop(spec: &LoopSpec, stop: &AtomicBool, tally: &Mutex<Tally>) {
    let mut left = spec.count;
    while !stop.load(Ordering::Relaxed) {
        if let Some(left) = &mut left {
            if *left == 0 {
                return;
            }
            *left -= 1;
        }
        let start_ns = monotonic_ns();
        let outcome = Open::connect(spec.transport, &spec.dial);
        let end_ns = monotonic_ns();
        let outcome = outcome.map(|(open, exchange)| {
            open.abort();
            exchange
        });
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.attempts += 1;
        let result = match outcome {
            Ok(exchange) => {
                if tally.connect_ns.len() < SAMPLES_MAX {
                    tally.connect_ns.push(exchange.connect_ns);
                }
                let answer = exchange.answer.unwrap_or_default();
                count(&mut tally.answers, &answer);
                Ok(answer)
            }
            Err(failure) => {
                count(&mut tally.failures, &failure.error);
                let error = failure.error.clone();
                if tally.first_failures.len() < FIRST_FAILURES {
                    tally.first_failures.push(failure);
                }
                Err(error)
            }
        };
        if spec.record {
            tally.records.push(Record { start_ns, end_ns, result });
        }
        drop(tally);
        if !spec.pause.is_zero() {
            thread::sleep(spec.pause);
        }
    }
}

/// One more of a kind; allocates only for the first.
fn count(counts: &mut BTreeMap<String, u64>, key: &str) {
    match counts.get_mut(key) {
        Some(count) => *count += 1,
        None => {
            counts.insert(key.to_owned(), 1);
        }
    }
}

fn summary(mut samples: Vec<u64>) -> Summary {
    samples.sort_unstable();
    let at = |percent: usize| {
        let index = (samples.len() * percent / 100).min(samples.len().saturating_sub(1));
        samples.get(index).copied().unwrap_or_default()
    };
    Summary {
        count: samples.len().try_into().unwrap_or(u64::MAX),
        min_ns: at(0),
        p50_ns: at(50),
        p90_ns: at(90),
        p99_ns: at(99),
        max_ns: at(100),
    }
}

/// TCP connections kept open.
struct Held {
    timeout: Duration,
    connections: Vec<Open>,
}

impl Held {
    fn open(dial: &Dial, count: u32) -> (Self, HeldReport) {
        let mut held = Self { timeout: dial.timeout, connections: Vec::new() };
        let mut report = HeldReport::default();
        let dial = Dial { exchange: true, ..*dial };
        for _ in 0..count {
            match Open::connect(Transport::Tcp, &dial) {
                Ok((open, exchange)) => {
                    held.connections.push(open);
                    note(&mut report, Ok(exchange));
                }
                Err(failure) => note(&mut report, Err(failure)),
            }
        }
        (held, report)
    }

    fn check(&mut self) -> HeldReport {
        let mut report = HeldReport::default();
        for connection in &mut self.connections {
            note(&mut report, connection.ask_again(None, self.timeout));
        }
        report
    }
}

fn note(report: &mut HeldReport, outcome: Result<Exchange, Failure>) {
    match outcome {
        Ok(exchange) => {
            report.alive += 1;
            count(&mut report.answers, &exchange.answer.unwrap_or_default());
        }
        Err(failure) => count(&mut report.failures, &failure.error),
    }
}
