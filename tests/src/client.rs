//! The test's end of a lab client.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{
    lab::Place,
    protocol::{
        Datagram, Dial, Exchange, Failure, HeldReport, LoopReport, LoopSpec, Reply, Request, Transport,
    },
};

/// What came of one attempt. The `Result` around it says whether the lab itself worked.
pub type Outcome = Result<Exchange, Failure>;

/// A process in a pod (or on a node) that makes connections. It ends when dropped.
#[derive(Debug)]
pub struct Client {
    name: String,
    child: Child,
    pipes: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Client {
    /// Starts a client in a place.
    pub fn start(place: &Place) -> Result<Self> {
        let program = binary("lab-client", "SHEAVE_LAB_CLIENT")?;
        let mut child = place
            .command(&program)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {} in {}", program.display(), place.name()))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("the lab client has no pipes");
        };
        Ok(Self { name: place.name().to_owned(), child, pipes: Mutex::new((stdin, BufReader::new(stdout))) })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects once and closes.
    pub fn connect(&self, transport: Transport, dial: Dial) -> Result<Outcome> {
        self.outcome(&Request::Connect { transport, dial, keep: false })
    }

    /// [`Transport::Tcp`], once.
    pub fn tcp(&self, dial: Dial) -> Result<Outcome> {
        self.connect(Transport::Tcp, dial)
    }

    /// [`Transport::UdpConnected`], once.
    pub fn udp_connected(&self, dial: Dial) -> Result<Outcome> {
        self.connect(Transport::UdpConnected, dial)
    }

    /// [`Transport::UdpUnconnected`], once.
    pub fn udp_unconnected(&self, dial: Dial) -> Result<Outcome> {
        self.connect(Transport::UdpUnconnected, dial)
    }

    /// Connects and keeps the socket under [`Exchange::id`].
    pub fn open(&self, transport: Transport, dial: Dial) -> Result<Outcome> {
        self.outcome(&Request::Connect { transport, dial, keep: true })
    }

    /// Asks again on a kept socket.
    pub fn send(&self, id: u64, timeout: Duration) -> Result<Outcome> {
        self.outcome(&Request::Send { id, to: None, timeout })
    }

    /// Asks someone else on a kept unconnected socket.
    pub fn send_to(&self, id: u64, to: SocketAddr, timeout: Duration) -> Result<Outcome> {
        self.outcome(&Request::Send { id, to: Some(to), timeout })
    }

    /// Uses one socket for one destination after the other, whatever came of those before.
    pub fn chain(&self, transport: Transport, dials: &[Dial]) -> Result<Vec<Outcome>> {
        let request = Request::Chain { transport, dials: dials.to_vec() };
        let Reply::Chain(outcomes) = self.ask(&request)? else { return Err(self.mismatch()) };
        Ok(outcomes)
    }

    /// Sends one datagram of any content on a kept unconnected socket, and waits for nothing.
    pub fn send_datagram(&self, id: u64, to: SocketAddr, bytes: &[u8]) -> Result<Result<(), Failure>> {
        let reply = self.ask(&Request::SendDatagram { id, to, bytes: bytes.to_vec() })?;
        if let Reply::Done = reply {
            return Ok(Ok(()));
        }
        Ok(Err(self.failure(reply)?))
    }

    /// Waits for one datagram of any content on a kept unconnected socket.
    pub fn receive_datagram(&self, id: u64, timeout: Duration) -> Result<Result<Datagram, Failure>> {
        let reply = self.ask(&Request::ReceiveDatagram { id, timeout })?;
        if let Reply::Datagram(datagram) = reply {
            return Ok(Ok(datagram));
        }
        Ok(Err(self.failure(reply)?))
    }

    /// Closes a kept socket or a held group.
    pub fn close(&self, id: u64) -> Result<()> {
        self.done(&Request::Close { id })
    }

    /// Runs a loop that counts, to its end.
    pub fn run_loop(&self, spec: LoopSpec) -> Result<LoopReport> {
        if spec.count.is_none() {
            bail!("a loop without a count never ends: start and stop it");
        }
        let id = self.start_loop(spec)?;
        self.wait_loop(id)
    }

    /// Waits for the end of a loop that counts.
    pub fn wait_loop(&self, id: u64) -> Result<LoopReport> {
        self.report(&Request::ReadLoop { id, stop: false, wait: true })
    }

    /// Starts a loop in the background; it goes on while the client does other things.
    pub fn start_loop(&self, spec: LoopSpec) -> Result<u64> {
        let Reply::Id(id) = self.ask(&Request::StartLoop(spec))? else { return Err(self.mismatch()) };
        Ok(id)
    }

    /// What a loop has seen so far.
    pub fn read_loop(&self, id: u64) -> Result<LoopReport> {
        self.report(&Request::ReadLoop { id, stop: false, wait: false })
    }

    /// Ends a loop.
    pub fn stop_loop(&self, id: u64) -> Result<LoopReport> {
        self.report(&Request::ReadLoop { id, stop: true, wait: true })
    }

    /// Opens `count` TCP connections and keeps them.
    pub fn hold(&self, dial: Dial, count: u32) -> Result<HeldReport> {
        self.held(&Request::Hold { dial, count })
    }

    /// Has each held connection carry a line there and back.
    pub fn check_held(&self, id: u64) -> Result<HeldReport> {
        self.held(&Request::CheckHeld { id })
    }

    /// Starts a server in the client's process: unlike [`crate::server::Server`], in the pod's cgroup too.
    pub fn serve(&self, name: &str, addresses: &[SocketAddr]) -> Result<()> {
        self.done(&Request::Serve { name: name.to_owned(), addresses: addresses.to_vec() })
    }

    /// Has the client do something of the benchmark; [`crate::measure`] has a method for each order.
    pub(crate) fn measure(&self, order: crate::measure::Order) -> Result<crate::measure::Outcome> {
        let Reply::Measured(outcome) = self.ask(&Request::Measure(order))? else {
            return Err(self.mismatch());
        };
        Ok(outcome)
    }

    fn outcome(&self, request: &Request) -> Result<Outcome> {
        let reply = self.ask(request)?;
        if let Reply::Exchange(exchange) = reply {
            return Ok(Ok(exchange));
        }
        Ok(Err(self.failure(reply)?))
    }

    fn failure(&self, reply: Reply) -> Result<Failure> {
        let Reply::Failure(failure) = reply else { return Err(self.mismatch()) };
        Ok(failure)
    }

    fn report(&self, request: &Request) -> Result<LoopReport> {
        let Reply::Loop(report) = self.ask(request)? else { return Err(self.mismatch()) };
        Ok(report)
    }

    fn held(&self, request: &Request) -> Result<HeldReport> {
        let Reply::Held(report) = self.ask(request)? else { return Err(self.mismatch()) };
        Ok(report)
    }

    fn done(&self, request: &Request) -> Result<()> {
        let Reply::Done = self.ask(request)? else { return Err(self.mismatch()) };
        Ok(())
    }

    fn ask(&self, request: &Request) -> Result<Reply> {
        let context = || format!("the lab client in {} (process {})", self.name, self.child.id());
        let mut pipes = self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut line = serde_json::to_string(request).context("encoding a request")?;
        line.push('\n');
        pipes.0.write_all(line.as_bytes()).with_context(context)?;
        let mut reply = String::new();
        let length = pipes.1.read_line(&mut reply).with_context(context)?;
        if length == 0 {
            bail!("{} ended without a reply to {request:?}", context());
        }
        let reply = serde_json::from_str(&reply).with_context(|| format!("{} said {reply}", context()))?;
        if let Reply::Error(error) = &reply {
            bail!("{}: {error}", context());
        }
        Ok(reply)
    }

    fn mismatch(&self) -> anyhow::Error {
        anyhow::anyhow!(
            "the lab client in {} replied to another request: is it of an older build?",
            self.name
        )
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A binary of the workspace: the path in a variable, or one in the target directory that this process was started from.
pub(crate) fn binary(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable).map(PathBuf::from) {
        // Tests change directory to their package.
        return fs::canonicalize(&path).with_context(|| format!("{variable}={}", path.display()));
    }
    let own = std::env::current_exe().context("asking for this program's own path")?;
    // Binaries lie in target/PROFILE, tests and their helpers in target/PROFILE/deps.
    own.ancestors().skip(1).take(2).map(|directory| directory.join(name)).find(|path| path.is_file()).with_context(
        || {
            format!(
                "no `{name}` beside {}: `cargo xtask test` builds it and sets {variable}, or set {variable} to its path",
                own.display()
            )
        },
    )
}
