//! Dials every case and lays the outcomes beside what was expected.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

use super::{Case, Expected, ORIGINS, Origin, Peer, Settings, Version, WAYS, cases, expected, objects};
use crate::{
    client::{Client, Outcome},
    nodes::{Layout, World},
    protocol::{Dial, Exchange, Transport},
};

/// Long enough for a second SYN of a busy machine.
const PATIENCE: Duration = Duration::from_millis(2500);

/// Who shall not be heard is not waited for as long; an answer takes a millisecond.
const SILENCE: Duration = Duration::from_millis(400);

/// What came of a case over one protocol in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Got {
    /// Whether that was expected.
    pub good: bool,
    /// In words.
    pub text: String,
}

/// A case with its outcomes, in the order of [`WAYS`].
#[derive(Clone, Debug)]
pub struct Row {
    /// Which.
    pub case: Case,
    /// What the rules say.
    pub expected: Expected,
    /// What came of it.
    pub got: Vec<Got>,
}

/// The outcomes of many cases; displays as the table that people read.
#[derive(Clone, Debug)]
pub struct Table(pub Vec<Row>);

impl Table {
    /// How many outcomes were not as expected.
    #[must_use]
    pub fn wrong(&self) -> usize {
        self.0.iter().flat_map(|row| &row.got).filter(|got| !got.good).count()
    }

    /// How many outcomes there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.0.iter().map(|row| row.got.len()).sum()
    }

    /// The rows with an outcome that was not as expected.
    #[must_use]
    pub fn failures(&self) -> Self {
        Self(self.0.iter().filter(|row| row.got.iter().any(|got| !got.good)).cloned().collect())
    }
}

/// Builds nodes, of which some have an agent with these arguments, and dials every case there is.
pub fn hold(layout: Layout, settings: Settings, arguments: &[&str], nodes: &[usize]) -> Result<Table> {
    let mut world = World::new(layout)?;
    world.serve()?;
    world.manifests().write("matrix", &objects(&world)?)?;
    for node in nodes {
        world.start_agent(*node, arguments)?;
    }
    world.settle()?;
    run(&world, &cases(), settings)
}

/// Dials all cases, each origin on its own.
fn run(world: &World, cases: &[Case], settings: Settings) -> Result<Table> {
    let of = |origin| -> Result<Vec<Row>> {
        let mut mine = cases.iter().filter(|case| case.origin == origin).peekable();
        if mine.peek().is_none() {
            return Ok(Vec::new());
        }
        let client = world.unhooked(Origin::place(origin, world)?)?;
        mine.map(|case| row(world, &client, *case, settings)).collect()
    };
    let rows = thread::scope(|scope| -> Result<Vec<Vec<Row>>> {
        let threads = ORIGINS.map(|origin| scope.spawn(move || of(origin)));
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread of the matrix panicked"))?)
            .collect()
    })?;
    Ok(Table(rows.concat()))
}

fn row(world: &World, client: &Client, case: Case, settings: Settings) -> Result<Row> {
    let expected = expected(world, case, settings);
    let mut got = Vec::new();
    for (transport, version) in WAYS {
        got.push(dial(world, client, case, expected, transport, version)?);
    }
    Ok(Row { case, expected, got })
}

fn dial(
    world: &World,
    client: &Client,
    case: Case,
    expected: Expected,
    transport: Transport,
    version: Version,
) -> Result<Got> {
    let timeout = match expected {
        Expected::Dropped | Expected::Unjudged => SILENCE,
        Expected::Answer(_) | Expected::Refused => PATIENCE,
    };
    let dial = Dial::new(case.destination(world, version)?).timeout(timeout);
    let outcome = client.connect(transport, dial)?;
    let good = match (&expected, &outcome) {
        (Expected::Answer(peer), Ok(exchange)) => is_answer(world, case, *peer, exchange)?,
        (Expected::Refused, Err(failure)) => failure.is_refused(),
        (Expected::Dropped, Err(failure)) => failure.is_timeout(),
        (Expected::Unjudged, _) => true,
        (Expected::Answer(_), Err(_)) | (Expected::Refused | Expected::Dropped, Ok(_)) => false,
    };
    Ok(Got { good, text: words(&outcome) })
}

fn is_answer(world: &World, case: Case, peer: Peer, exchange: &Exchange) -> Result<bool> {
    let (server, seen) = answer(exchange)?;
    let backend = case.backend.place(world)?.context("an answer of no backend")?;
    let is_peer = match peer {
        // A proxy may change the port where two VIPs make one tuple of it (M11); that is the client still.
        Peer::Client => seen.ip() == exchange.local.ip(),
        Peer::Node(node) => world.own_addresses(node)?.contains(&seen.ip()),
        Peer::Any => true,
    };
    Ok(server == backend.name() && is_peer)
}

fn answer(exchange: &Exchange) -> Result<(&str, SocketAddr)> {
    let answer = exchange.answer.as_deref().context("an exchange without an answer")?;
    let (server, seen) = answer.split_once(' ').context("a server that tells nothing")?;
    Ok((server, seen.parse().with_context(|| format!("the address in {answer:?}"))?))
}

fn words(outcome: &Outcome) -> String {
    let exchange = match outcome {
        Ok(exchange) => exchange,
        Err(failure) => return failure.error.clone(),
    };
    match answer(exchange) {
        Ok((server, seen)) if seen == exchange.local => format!("{server} sees it"),
        Ok((server, seen)) if seen.ip() == exchange.local.ip() => format!("{server} sees another port"),
        Ok((server, seen)) => format!("{server} sees {}", seen.ip()),
        Err(error) => format!("{error:#}"),
    }
}

impl World {
    /// The addresses that a node's SNAT may take (M7).
    pub fn own_addresses(&self, node: usize) -> Result<Vec<IpAddr>> {
        let host = self.node(node)?.host();
        let number = node + 1;
        let mut addresses = vec![IpAddr::from(host.v4()), host.v6().into()];
        for text in [
            format!("10.244.{number}.1"),
            format!("fd00:10:244:{number}::1"),
            format!("10.244.{number}.254"),
            format!("fd00:10:244:{number}:2::254"),
        ] {
            addresses.push(text.parse().with_context(|| format!("the address {text}"))?);
        }
        Ok(addresses)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            formatter,
            "{:<12} {:<7} {:<11} {:<10} {:<20} TCP/IPv4 TCP/IPv6 UDP/IPv4 UDP/IPv6",
            "frontend", "policy", "from", "to", "expected"
        )?;
        for Row { case: Case { frontend, origin, backend, policy }, expected, got } in &self.0 {
            write!(formatter, "{frontend:<12} {policy:<7} {origin:<11} {backend:<10} {expected:<20}")?;
            for Got { good, text } in got {
                if *good {
                    write!(formatter, " ok      ")?;
                } else {
                    write!(formatter, " WRONG: {text};")?;
                }
            }
            writeln!(formatter)?;
        }
        writeln!(formatter, "{} outcomes, {} wrong", self.total(), self.wrong())
    }
}
