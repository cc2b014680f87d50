//! Who uses a Service while something happens to those who serve it.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sheave_tests::{
    client::Client,
    manifests,
    protocol::{Dial, Failure, LoopSpec, Transport},
    server::Server,
};

use super::{Rival, tell};
use crate::bench::{
    go_on,
    report::Report,
    row::Row,
    scale::{NAMESPACE, TARGET_PORT},
};

/// The Service: its address, its endpoint, which stays, and what is answered there.
const VIP: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 3);
const VIP_PORT: u16 = 80;
const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 208, 0, 8);
const BACKEND_PORT: u16 = TARGET_PORT + 2;
const SERVER: &str = "used";

/// The Service leads there soon after its rival has begun to serve.
const THERE_WITHIN: Duration = Duration::from_secs(30);

/// How long an answer is waited for: not so long that a packet of a handshake is sent again, which would hide the loss.
const PATIENCE: Duration = Duration::from_millis(900);

/// Connections that are held, threads that connect, and how long each of them rests: CPU is left for who is measured, and
/// one that waits for its answer in vain keeps no other from trying.
const HELD: u32 = 100;
const THREADS: [(Transport, u32); 2] = [(Transport::Tcp, 8), (Transport::UdpConnected, 4)];
const PAUSE: Duration = Duration::from_millis(8);

/// The Service and its slice, and what the store has them under.
pub(super) fn objects() -> [(String, Value); 2] {
    let service = manifests::service(SERVER, &[&VIP.to_string()])
        .port("tcp", "TCP", VIP_PORT, BACKEND_PORT)
        .port("udp", "UDP", VIP_PORT, BACKEND_PORT);
    let slice = manifests::slice(SERVER, SERVER, "IPv4")
        .slice_port("tcp", "TCP", BACKEND_PORT)
        .slice_port("udp", "UDP", BACKEND_PORT)
        .endpoint(&BACKEND.to_string(), "node-1");
    [("services/specs", service), ("endpointslices", slice)].map(|(kind, object)| {
        (format!("{kind}/{NAMESPACE}/{SERVER}"), object.namespace(NAMESPACE).json().clone())
    })
}

/// Clients at work.
pub(super) struct Traffic {
    client: Client,
    held: u64,
    loops: Vec<u64>,
    // Behind the client, who would miss it.
    _server: Server,
}

impl Traffic {
    /// Starts a server and clients in a rival's world, whose connection tracking has forgotten what was.
    pub(super) fn start(rival: &Rival) -> Result<Self> {
        rival.forget()?;
        let (lab, backend) = (rival.world.lab(), SocketAddr::new(BACKEND.into(), BACKEND_PORT));
        let server = Server::start(lab.pod(1)?.netns(), SERVER, &[backend])?;
        let client = lab.pod(0)?.client()?;
        let dial = Dial::new(SocketAddr::new(VIP.into(), VIP_PORT)).timeout(PATIENCE);
        let begun = Instant::now();
        while let Err(failure) = client.tcp(dial)? {
            go_on()?;
            ensure!(begun.elapsed() < THERE_WITHIN, "{}: {VIP} is led nowhere: {failure}", rival.name);
        }
        let held = client.hold(dial, HELD)?;
        ensure!(held.alive == u64::from(HELD), "{}: {held:?}", rival.name);
        let start = |(transport, threads)| {
            client.start_loop(LoopSpec::new(transport, dial).threads(threads).pause(PAUSE))
        };
        let loops = THREADS.into_iter().map(start).collect::<Result<_>>()?;
        thread::sleep(PATIENCE);
        Ok(Self { client, held: held.id, loops, _server: server })
    }

    /// Ends it, and says what became of it.
    pub(super) fn end(self) -> Result<Seen> {
        let mut seen = Seen::default();
        for running in &self.loops {
            let report = self.client.stop_loop(*running)?;
            seen.tries += report.attempts;
            for (error, count) in &report.failures {
                *seen.failures.entry(error.clone()).or_default() += count;
            }
            let others = report.answers.iter().filter(|(name, _)| *name != SERVER);
            seen.elsewhere += others.map(|(_, count)| count).sum::<u64>();
        }
        let held = self.client.check_held(self.held)?;
        seen.broken = u64::from(HELD).checked_sub(held.alive).context("more held than there are")?;
        Ok(seen)
    }
}

/// What became of connections.
#[derive(Default)]
pub(super) struct Seen {
    tries: u64,
    failures: BTreeMap<String, u64>,
    elsewhere: u64,
    broken: u64,
}

/// The same of each rival.
pub(super) struct Tally {
    rows: [Row; 5],
}

impl Tally {
    /// Of nobody yet; `what` happens meanwhile.
    pub(super) fn new(id: &str, what: &str, services: u32) -> Self {
        let row = |name: &str, unit| Row::new(id, format!("{what}: {name}"), unit, services, None);
        Self {
            rows: [
                row("connections and questions", "tries"),
                row("failed", "tries"),
                row("failed, of these by a reset", "tries"),
                row("led elsewhere", "tries"),
                row(&format!("of {HELD} held, broken"), "connections"),
            ],
        }
    }

    /// Adds what a rival's clients saw.
    pub(super) fn add(&mut self, rival: &str, seen: &Seen) {
        if !seen.failures.is_empty() {
            println!("── {rival}: failures by kind: {:?}", seen.failures);
        }
        let is_reset = |error: &str| ["ECONNRESET", "EPIPE", Failure::CLOSED].contains(&error);
        let failed = seen.failures.values().sum();
        let reset = seen.failures.iter().filter(|(error, _)| is_reset(error)).map(|(_, count)| count).sum();
        for (row, count) in self.rows.iter_mut().zip([seen.tries, failed, reset, seen.elsewhere, seen.broken])
        {
            row.add(rival, vec![count as f64], None);
        }
    }

    /// Into the report.
    pub(super) fn tell(self, report: &mut Report) {
        // How much was tried is nothing to compare.
        let [tries, found @ ..] = self.rows;
        report.add(tries);
        found.into_iter().for_each(|row| tell(row, report));
    }
}
