//! Measuring inside a lab client: short, tight loops whose samples are kept, on a chosen CPU.
//!
//! Who was reached is told without a packet: a lab may give a client pod routes whose preferred source address differs by
//! backend, and then `getsockname` after `connect` of a UDP socket names the backend group that the kernel really routes to
//! (`getpeername` names the VIP, by design).

mod cpu;
mod first;
mod loops;
pub mod packets;
mod server;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use self::{
    loops::{await_all, await_answers, await_change, await_server, run},
    server::serve,
};
use crate::client::Client;

pub use self::cpu::{Spinners, cpu_ns, pin};

/// What a stream writes at once.
const STREAM_BLOCK_BYTES: usize = 64 * 1024;

/// First byte of a connection that is echoed, and of one that is swallowed.
const ECHO: u8 = b'e';
const SWALLOW: u8 = b's';

/// A datagram of this byte is answered with the server's tag, any other with itself; a connection that begins with it is
/// told the tag and the address that it comes from.
const WHO: u8 = b'?';

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
        /// What a datagram is answered with that asks who answers.
        tag: u8,
    },
    /// Looks until the destination leads to someone else.
    AwaitChange {
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
    /// Asks over UDP who answers, until it is the one with this tag, and then some times more.
    AwaitServer {
        /// Where.
        to: SocketAddr,
        /// Who.
        tag: u8,
        /// How many times more.
        looks: u32,
        /// When to give up.
        timeout: Duration,
    },
    /// Asks over UDP until the last destination answers, and then a sample of the others, each of which must at once.
    AwaitAnswers {
        /// The destinations.
        targets: u64,
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
    /// The same, from the SYN that leaves the client's device to the SYN-ACK that reaches it.
    FirstPacket,
    /// Connect, one byte there, one back, close.
    TcpCrr,
    /// One byte there and one back, on one connection.
    TcpRr,
    /// `sendto` and `recvfrom` on one UDP socket that is not connected.
    UdpExchange,
    /// Bytes over one connection, one way.
    Stream,
}

/// How it is told, before a slice, that destinations are led to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Check {
    /// By the source address that the kernel gives a socket.
    Socket(IpAddr),
    /// By the server, over TCP.
    Server {
        /// Who answers.
        tag: u8,
        /// The client's own address.
        source: IpAddr,
        /// Whether that is what the server sees, or anything else.
        is_kept: bool,
    },
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
    /// What is checked first.
    pub check: Check,
    /// The network namespace in which the client measures, and stays; its own if absent.
    pub netns: Option<PathBuf>,
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
    /// Looks that saw the old one (who asks for a server: any other) again after the new one.
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
    pub fn serve_measured(&self, port: u16, cpu: Option<usize>, tag: u8) -> Result<()> {
        let Outcome::Done = self.order(Order::Serve { port, cpu, tag })? else {
            bail!("the server did not start")
        };
        Ok(())
    }

    /// Waits until a destination leads to someone else.
    pub fn await_change(
        &self,
        to: SocketAddr,
        from: &str,
        cpu: Option<usize>,
        timeout: Duration,
    ) -> Result<Change> {
        let order = Order::AwaitChange { to, from: from.to_owned(), cpu, timeout };
        let Outcome::Change(change) = self.order(order)? else { bail!("no change came back") };
        Ok(change)
    }

    /// Waits until all destinations lead to a backend.
    pub fn await_all(&self, targets: u64, source: IpAddr, timeout: Duration) -> Result<All> {
        let order = Order::AwaitAll { targets, source, timeout };
        let Outcome::All(all) = self.order(order)? else { bail!("no times came back") };
        Ok(all)
    }

    /// Waits until the last destination answers over UDP; a sample of the others must have begun to before.
    pub fn await_answers(&self, targets: u64, timeout: Duration) -> Result<All> {
        let Outcome::All(all) = self.order(Order::AwaitAnswers { targets, timeout })? else {
            bail!("no times came back")
        };
        Ok(all)
    }

    /// Waits until a destination is answered by the server with this tag, and looks so many times more.
    pub fn await_server(&self, to: SocketAddr, tag: u8, looks: u32, timeout: Duration) -> Result<Change> {
        let Outcome::Change(change) = self.order(Order::AwaitServer { to, tag, looks, timeout })? else {
            bail!("no change came back")
        };
        Ok(change)
    }

    fn order(&self, order: Order) -> Result<Outcome> {
        let outcome = self.measure(order)?;
        if let Outcome::Failed(error) = &outcome {
            bail!("the lab client: {error}");
        }
        Ok(outcome)
    }
}

/// Takes the calling thread into a network namespace.
fn enter(path: &Path) -> Result<()> {
    let file = fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET).context("entering a network namespace")
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
                if let Some(path) = &slice.netns {
                    enter(path)?;
                }
                run(&slice, self.get(slice.targets)?).map(Outcome::Samples)
            }
            Order::Serve { port, cpu, tag } => {
                for address in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
                    serve(SocketAddr::new(address, port), cpu, tag)?;
                }
                Ok(Outcome::Done)
            }
            Order::AwaitChange { to, from, cpu, timeout } => {
                pin(cpu)?;
                await_change(to, from, timeout).map(Outcome::Change)
            }
            Order::AwaitAll { targets, source, timeout } => {
                await_all(self.get(targets)?, source, timeout).map(Outcome::All)
            }
            Order::AwaitServer { to, tag, looks, timeout } => {
                await_server(to, tag, looks, timeout).map(Outcome::Change)
            }
            Order::AwaitAnswers { targets, timeout } => {
                await_answers(self.get(targets)?, timeout).map(Outcome::All)
            }
        }
    }

    fn get(&self, id: u64) -> Result<&[SocketAddr]> {
        let targets = usize::try_from(id).ok().and_then(|id| self.targets.get(id));
        targets.map(Vec::as_slice).context("no destinations under this id")
    }
}
