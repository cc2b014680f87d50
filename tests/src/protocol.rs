//! What a test and its lab client say to each other: one JSON document a line, each request with one reply.

use std::{collections::BTreeMap, fmt, net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

/// The family of a client's socket; an IPv4 destination on an IPv6 socket is dialled as `::ffff:a.b.c.d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Family {
    /// `AF_INET`
    V4,
    /// `AF_INET6`
    V6,
}

/// How a client talks to its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Transport {
    /// TCP: `connect`, then the server's greeting is read.
    Tcp,
    /// UDP with `connect`, then `send` and `recv`.
    UdpConnected,
    /// UDP without `connect`: `sendto` and `recvfrom`.
    UdpUnconnected,
}

/// Where to and how patiently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dial {
    /// The destination.
    pub to: SocketAddr,
    /// The family of the socket.
    pub family: Family,
    /// For each of: connecting, waiting for an answer.
    pub timeout: Duration,
    /// Whether to ask the server for its name after connecting.
    pub exchange: bool,
}

impl Dial {
    /// A socket of the destination's family, three seconds of patience.
    #[must_use]
    pub fn new(to: SocketAddr) -> Self {
        let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
        Self { to, family, timeout: Duration::from_secs(3), exchange: true }
    }

    /// Through an IPv6 socket, whatever the destination's family.
    #[must_use]
    pub fn mapped(self) -> Self {
        Self { family: Family::V6, ..self }
    }

    /// With another patience.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Connects and says nothing.
    #[must_use]
    pub fn connect_only(self) -> Self {
        Self { exchange: false, ..self }
    }
}

/// Connecting again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoopSpec {
    /// Where to.
    pub dial: Dial,
    /// How.
    pub transport: Transport,
    /// How many threads do it at the same time.
    pub threads: u32,
    /// How often each thread does it; without, until stopped.
    pub count: Option<u64>,
    /// What each thread waits between two attempts.
    pub pause: Duration,
    /// Whether to report every attempt with its times (see [`Record`]).
    pub record: bool,
}

impl LoopSpec {
    /// One thread, without a pause, until stopped.
    #[must_use]
    pub fn new(transport: Transport, dial: Dial) -> Self {
        Self { dial, transport, threads: 1, count: None, pause: Duration::ZERO, record: false }
    }

    /// On so many threads.
    #[must_use]
    pub fn threads(self, threads: u32) -> Self {
        Self { threads, ..self }
    }

    /// So many attempts on each thread.
    #[must_use]
    pub fn count(self, count: u64) -> Self {
        Self { count: Some(count), ..self }
    }

    /// With a pause after each attempt.
    #[must_use]
    pub fn pause(self, pause: Duration) -> Self {
        Self { pause, ..self }
    }

    /// Reports every attempt.
    #[must_use]
    pub fn record(self) -> Self {
        Self { record: true, ..self }
    }
}

/// One request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Connects once; `keep` leaves the socket open under an id.
    Connect {
        /// How.
        transport: Transport,
        /// Where to.
        dial: Dial,
        /// Whether the socket stays open.
        keep: bool,
    },
    /// Asks again on a kept socket; `to` only for an unconnected one that shall ask someone else.
    Send {
        /// The socket.
        id: u64,
        /// Another destination.
        to: Option<SocketAddr>,
        /// How long to wait for the answer.
        timeout: Duration,
    },
    /// Uses one socket for one destination after the other, whatever came of those before.
    Chain {
        /// How; only the connected ways.
        transport: Transport,
        /// Where to; the first one's family is the socket's.
        dials: Vec<Dial>,
    },
    /// Sends one datagram of any content on a kept unconnected socket, and waits for nothing.
    SendDatagram {
        /// The socket.
        id: u64,
        /// Where to.
        to: SocketAddr,
        /// What.
        bytes: Vec<u8>,
    },
    /// Waits for one datagram of any content on a kept unconnected socket.
    ReceiveDatagram {
        /// The socket.
        id: u64,
        /// How long.
        timeout: Duration,
    },
    /// Closes a kept socket or a held group.
    Close {
        /// The socket or group.
        id: u64,
    },
    /// Starts connecting in the background.
    StartLoop(LoopSpec),
    /// What a loop has seen so far.
    ReadLoop {
        /// The loop.
        id: u64,
        /// Tells it to end first.
        stop: bool,
        /// Waits for its end first; the loop is forgotten then.
        wait: bool,
    },
    /// Opens many TCP connections and keeps them.
    Hold {
        /// Where to.
        dial: Dial,
        /// How many.
        count: u32,
    },
    /// Sends a line over each held connection and counts those that answer.
    CheckHeld {
        /// The group.
        id: u64,
    },
    /// Starts a server in the client's own process, so in its cgroup.
    Serve {
        /// What it answers.
        name: String,
        /// Where it listens.
        addresses: Vec<SocketAddr>,
    },
    /// Something of the benchmark.
    Measure(crate::measure::Order),
}

/// The reply to a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// What came of an order of the benchmark.
    Measured(crate::measure::Outcome),
    /// Someone answered.
    Exchange(Exchange),
    /// Nobody answered.
    Failure(Failure),
    /// What came of each destination.
    Chain(Vec<Result<Exchange, Failure>>),
    /// A datagram came.
    Datagram(Datagram),
    /// What a loop has seen.
    Loop(LoopReport),
    /// What held connections say.
    Held(HeldReport),
    /// The id of something new.
    Id(u64),
    /// Done.
    Done,
    /// The request itself makes no sense.
    Error(String),
}

/// A connection that worked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// The socket, if it was kept.
    pub id: Option<u64>,
    /// The name of the server that answered, if it was asked.
    pub answer: Option<String>,
    /// What `getpeername` says; nothing for an unconnected socket.
    pub peer: Option<SocketAddr>,
    /// Whom `recvfrom` names as the sender of the answer; only for an unconnected socket.
    pub source: Option<SocketAddr>,
    /// What `getsockname` says.
    pub local: SocketAddr,
    /// What connecting took (zero where nothing connects).
    pub connect_ns: u64,
    /// What everything took.
    pub total_ns: u64,
}

/// A datagram of any content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Whom `recvfrom` names as its sender.
    pub source: SocketAddr,
    /// What is in it.
    pub bytes: Vec<u8>,
}

/// Where a connection failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// Making or connecting the socket.
    Connect,
    /// Sending.
    Send,
    /// Waiting for the answer.
    Receive,
}

/// A connection that did not work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Where.
    pub stage: Stage,
    /// The name of the error number (`ECONNREFUSED`), or [`Failure::TIMEOUT`], [`Failure::CLOSED`], [`Failure::GARBLED`].
    pub error: String,
    /// After how long.
    pub elapsed_ns: u64,
}

impl Failure {
    /// Nothing happened within the client's patience.
    pub const TIMEOUT: &str = "timeout";
    /// The other side closed the connection instead of answering.
    pub const CLOSED: &str = "closed";
    /// The answer was not one of a lab server.
    pub const GARBLED: &str = "garbled";

    /// Whether the connection was refused.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.error == "ECONNREFUSED"
    }

    /// Whether nobody said anything.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        self.error == Self::TIMEOUT
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?} failed after {} ns: {}", self.stage, self.elapsed_ns, self.error)
    }
}

impl std::error::Error for Failure {}

/// Times of many attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// How many were measured; only those that connected are.
    pub count: u64,
    /// The shortest.
    pub min_ns: u64,
    /// Half were faster.
    pub p50_ns: u64,
    /// Nine in ten were faster.
    pub p90_ns: u64,
    /// 99 in a hundred were faster.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// One attempt of a recorded loop; times are of `CLOCK_MONOTONIC` and compare with [`crate::engine::monotonic_ns`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Before `connect`.
    pub start_ns: u64,
    /// After the answer or the failure.
    pub end_ns: u64,
    /// Who answered, or the failure's error.
    pub result: Result<String, String>,
}

/// What a loop has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoopReport {
    /// How often it tried.
    pub attempts: u64,
    /// How often each server answered; the empty name stands for a connection that was not to ask.
    pub answers: BTreeMap<String, u64>,
    /// How often each error came.
    pub failures: BTreeMap<String, u64>,
    /// The first failures in full.
    pub first_failures: Vec<Failure>,
    /// What connecting took.
    pub connect: Summary,
    /// Every attempt, if asked for.
    pub records: Vec<Record>,
}

impl LoopReport {
    /// How many attempts failed.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }
}

/// What held connections say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldReport {
    /// The group.
    pub id: u64,
    /// How many answered with the line that was sent.
    pub alive: u64,
    /// Which servers they are connected to.
    pub answers: BTreeMap<String, u64>,
    /// Why the others did not.
    pub failures: BTreeMap<String, u64>,
}
