//! Upkeep of the connections of the packet path: what is over or idle goes, and datagrams leave a VIP's former owner.
//!
//! It has a thread of its own: a walk of a full table takes tens of milliseconds, which no change shall wait for.
//! The filters before them age with each walk, so that bystanders are spared whatever was: see [`super::ageing`].

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use proxy_common::abi::packet::{VIP_PLACES, vip_place};
use proxy_common::abi::{Address, Flow, FlowKey, Outcome, Port, Protocol, ServiceId, SnatKey};
use serde::Serialize;
use tokio::sync::mpsc::UnboundedSender;

use super::ageing::{Filters, InUse, Places};
use super::turnover::{Turnover, Walk};
use crate::kernel::programs::{FlowLimits, counters};
use crate::kernel::table::Table;
use crate::kernel::{self, Pins};
use crate::takeover::hand_back;

const SECOND_NS: u64 = 1_000_000_000;

/// How long a connection without packets is kept, in seconds.
pub mod idle_s {
    /// TCP and SCTP that are open: a day, so that what netfilter keeps for five days is not kept for ever.
    pub const OPEN: u64 = 24 * 3600;
    /// TCP of which one side has ended.
    pub const HALF_CLOSED: u64 = 3600;
    /// What is over: late packets still find their way.
    pub const OVER: u64 = 30;
    /// UDP, as netfilter keeps what was answered.
    pub const DATAGRAM: u64 = 120;
    /// TCP that was not answered: as long as netfilter waits, and clients with it.
    pub const ASKED: u64 = 120;
    /// TCP and SCTP that were answered and whose client has not gone on.
    pub const HALF_OPEN: u64 = 60;
    /// UDP that was not answered, as netfilter keeps it.
    pub const DATAGRAM_ASKED: u64 = 30;
}

/// How far a connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Not answered yet.
    Young,
    /// Open.
    Answered,
    /// At least one side has ended it.
    Closing,
    /// Netfilter's NAT owns it, from another proxy.
    Foreign,
}

impl State {
    /// Its name in `sheave get flows`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Young => "young",
            Self::Answered => "answered",
            Self::Closing => "closing",
            Self::Foreign => "foreign",
        }
    }

    /// Of an entry of either table.
    pub const fn of(flow: &Flow) -> Self {
        if flow.is_foreign() {
            Self::Foreign
        } else if flow.flags & (Flow::RESET | Flow::CLIENT_FIN | Flow::BACKEND_FIN) != 0 {
            Self::Closing
        } else if flow.is_answered() {
            Self::Answered
        } else {
            Self::Young
        }
    }
}

/// Seconds without a packet after which a connection goes.
pub fn idle_limit_s(key: &FlowKey, flow: &Flow) -> u64 {
    let is_young = flow.flags & (Flow::ANSWERED | Flow::CROWDED_OUT) == 0;
    match Protocol::from_number(key.protocol) {
        Some(Protocol::Tcp) if flow.is_over() => idle_s::OVER,
        Some(Protocol::Tcp) if flow.flags & (Flow::CLIENT_FIN | Flow::BACKEND_FIN) != 0 => {
            idle_s::HALF_CLOSED
        }
        Some(Protocol::Tcp | Protocol::Sctp) if is_young => {
            if flow.is_answered() {
                idle_s::HALF_OPEN
            } else {
                idle_s::ASKED
            }
        }
        Some(Protocol::Tcp | Protocol::Sctp) => idle_s::OPEN,
        Some(Protocol::Udp) if !flow.is_answered() && !flow.is_foreign() => idle_s::DATAGRAM_ASKED,
        Some(Protocol::Udp) | None => idle_s::DATAGRAM,
    }
}

/// A clock that stands still before the last packet was seen makes nothing old.
fn is_dead(key: &FlowKey, flow: &Flow, now_ns: u64) -> bool {
    now_ns.saturating_sub(flow.used_ns) / SECOND_NS >= idle_limit_s(key, flow)
}

/// By what else the connection is found: by its replaced source, and by its port inside the node, if it has them (yet).
fn companions(key: &FlowKey, flow: &Flow) -> impl Iterator<Item = SnatKey> {
    let back = (flow.snat_port != Port::default()).then(|| flow.way_back(key.protocol));
    let inside = (flow.inner_port != Port::default()).then(|| flow.inside(key));
    back.into_iter().chain(inside)
}

/// The clock of [`Flow::used_ns`].
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from);
    // This clock always exists; 0 makes nothing old.
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

/// Present owners of frontends that changed hands (C2): VIP and port of UDP.
pub type Owners = BTreeMap<(Address, Port), ServiceId>;

/// What a walk found.
#[derive(Debug, Default)]
pub struct Report {
    /// Which places of `VIPS` connections have, a bit each.
    vip_places: Places<VIP_PLACES>,
    /// Those of the filters.
    in_use: InUse,
    /// Whether there are connections that netfilter's NAT is to have at once.
    pub to_hand_over: bool,
    /// How many young connections gave way to newer ones since the start.
    pub given_way: u64,
}

impl Report {
    fn note(&mut self, key: &FlowKey, flow: &Flow) {
        self.to_hand_over |= hand_back::goes_at_once(key, flow);
        self.vip_places.insert(vip_place(&flow.vip));
        self.in_use.flow(key);
    }

    /// Whether a connection to a VIP of this place was there.
    pub fn is_in_use(&self, place: usize) -> bool {
        self.vip_places.contains(place)
    }
}

/// How full the tables are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Counts {
    /// Connections whose client has gone on after the first answer.
    pub flows: usize,
    /// How many there can be.
    pub flows_limit: u32,
    /// Other connections.
    pub young_flows: usize,
    /// How many there can be; beyond, the oldest go.
    pub young_flows_limit: u32,
    /// Of the first kind: those with a replaced source.
    pub snat: usize,
    /// How many there can be.
    pub snat_limit: u32,
}

/// The tables.
pub struct Flows {
    pub(crate) young: Table<FlowKey, Flow>,
    pub(crate) flows: Table<FlowKey, Flow>,
    pub(crate) young_snat: Table<SnatKey, FlowKey>,
    pub(crate) snat: Table<SnatKey, FlowKey>,
    /// Replaced sources without a connection in the last walk. They go if the next one finds the same: a program may
    /// just have been between its two writes.
    suspects: HashSet<SnatKey>,
    told_full: [bool; 4],
    /// Packets that found no port, ever, as of the last walk.
    without_port: Option<u64>,
    pins: Pins,
    turnover: Turnover,
}

impl Flows {
    /// Opens the pinned tables.
    ///
    /// # Errors
    /// If nothing is pinned.
    pub fn open(pins: &Pins) -> Result<Self, kernel::Error> {
        let young: Table<FlowKey, Flow> = Table::open(&pins.state(), "YOUNG_FLOWS")?;
        // Where their number is not to be had, one is as good a guess as any.
        let turnover = Turnover::new(young.limit(), aya::util::nr_cpus().unwrap_or(1));
        Ok(Self {
            young,
            flows: Table::open(&pins.state(), "FLOWS")?,
            young_snat: Table::open(&pins.state(), "YOUNG_SNAT")?,
            snat: Table::open(&pins.state(), "SNAT")?,
            suspects: HashSet::new(),
            told_full: [false; 4],
            without_port: None,
            pins: pins.clone(),
            turnover,
        })
    }

    /// What is pinned keeps its size: connections are in it. Says so where another one was asked for.
    pub fn tell_sizes(&self, asked: FlowLimits) {
        for (flag, is, asked) in [
            ("--flow-table-size", self.flows.limit(), asked.grown),
            ("--young-flow-table-size", self.young.limit(), asked.young),
        ] {
            if is != asked {
                tracing::warn!(
                    flag,
                    asked,
                    is,
                    "the table is there already: it keeps its size until `sheave cleanup`"
                );
            }
        }
    }

    /// All connections. The young ones are read first: one that is answered meanwhile comes twice rather than not at
    /// all.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn entries(&self) -> io::Result<BTreeMap<FlowKey, Flow>> {
        let mut entries: BTreeMap<FlowKey, Flow> = self.young.entries()?.into_iter().collect();
        entries.extend(self.flows.entries()?);
        Ok(entries)
    }

    /// How full the tables are.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn counts(&self) -> io::Result<Counts> {
        Ok(Counts {
            flows: self.flows.entries()?.len(),
            flows_limit: self.flows.limit(),
            young_flows: self.young.entries()?.len(),
            young_flows_limit: self.young.limit(),
            snat: self.snat.entries()?.len(),
            snat_limit: self.snat.limit(),
        })
    }

    /// Removes what is over or idle for too long, and replaced sources that no connection has any more.
    ///
    /// # Errors
    /// If a table cannot be read.
    pub fn sweep(&mut self, now_ns: u64) -> io::Result<Report> {
        let mut report = Report::default();
        let mut live: BTreeMap<FlowKey, Flow> = BTreeMap::new();
        // The table turns over by itself, but only when there are new ones: what is left of old ones would be looked up for
        // bystanders for ever.
        let mut walk = self.began()?;
        let young = self.young.entries()?;
        walk.left = young.len() as u64;
        for (key, flow) in young {
            if is_dead(&key, &flow, now_ns) && self.remove_dead_young(&key, now_ns, &mut walk)? {
                continue;
            }
            report.note(&key, &flow);
            live.insert(key, flow);
        }
        let gave_way = self.turnover.walked(walk);
        report.given_way = self.turnover.total();
        tell_young_full(&mut self.told_full[2], gave_way, walk.left, self.young.limit());
        let flows = self.flows.entries()?;
        tell_full(&mut self.told_full[0], "FLOWS", flows.len(), self.flows.limit());
        for (key, flow) in flows {
            if is_dead(&key, &flow, now_ns) && self.remove_dead(&key, now_ns)? {
                continue;
            }
            report.note(&key, &flow);
            live.insert(key, flow);
        }
        for (key, _) in self.young_snat.entries()? {
            report.in_use.snat(&key);
        }
        let snat = self.snat.entries()?;
        tell_full(&mut self.told_full[1], "SNAT", snat.len(), self.snat.limit());
        let mut suspects = HashSet::new();
        for (key, client) in snat {
            report.in_use.snat(&key);
            // Those of nobody are looked after elsewhere.
            if client.is_nobody() {
                continue;
            }
            let flow = match live.get(&client) {
                Some(flow) => Some(*flow),
                // Made after its table was read?
                None => self.flow(&client)?,
            };
            let has_it = flow.is_some_and(|flow| {
                let may_be_about_to = !key.is_inside() && flow.snat_port == Port::default();
                may_be_about_to || companions(&client, &flow).any(|companion| companion == key)
            });
            if has_it {
                continue;
            }
            if self.suspects.contains(&key) {
                self.snat.remove(&key)?;
            } else {
                suspects.insert(key);
            }
        }
        self.suspects = suspects;
        Ok(report)
    }

    /// What the programs have counted.
    fn began(&mut self) -> io::Result<Walk> {
        let counters = counters(&self.pins).map_err(io::Error::other)?;
        let count = |of: Outcome| counters.iter().find(|(name, _)| *name == of.name()).map_or(0, |(_, n)| *n);
        let (begun, grown) = (count(Outcome::PacketFlowBegun), count(Outcome::PacketFlowGrown));
        let without_port = count(Outcome::PacketNoSourcePort);
        let before = self.without_port.replace(without_port).unwrap_or(without_port);
        tell_no_port(&mut self.told_full[3], without_port.saturating_sub(before));
        Ok(Walk { begun, grown, ..Walk::default() })
    }

    /// C2, C3: removes datagram flows to these VIPs that are another service port's than the owner's.
    ///
    /// # Errors
    /// If a table cannot be read.
    pub fn purge(&mut self, owners: &Owners) -> io::Result<usize> {
        let mut purged = 0;
        for (key, flow) in self.entries()? {
            let is_udp = key.protocol == Protocol::Udp.number();
            let owner = owners.get(&(flow.vip, flow.vip_port)).filter(|_| is_udp);
            if owner.is_some_and(|owner| *owner != flow.service) {
                self.remove(&key, &flow)?;
                purged += 1;
            }
        }
        Ok(purged)
    }

    /// One connection.
    ///
    /// # Errors
    /// If a table cannot be read.
    pub(crate) fn flow(&self, key: &FlowKey) -> io::Result<Option<Flow>> {
        Ok(match self.young.get(key)? {
            Some(flow) => Some(flow),
            None => self.flows.get(key)?,
        })
    }

    /// Looks once more: it may have been used since it was read. False: it was.
    fn remove_dead(&mut self, key: &FlowKey, now_ns: u64) -> io::Result<bool> {
        let Some(flow) = self.flows.get(key)? else { return Ok(true) };
        if !is_dead(key, &flow, now_ns) {
            return Ok(false);
        }
        self.remove(key, &flow)?;
        Ok(true)
    }

    /// The same for a young one. What has grown up since it was read stays, and all that leads to it.
    fn remove_dead_young(&mut self, key: &FlowKey, now_ns: u64, walk: &mut Walk) -> io::Result<bool> {
        let Some(flow) = self.young.get(key)? else { return Ok(true) };
        if !is_dead(key, &flow, now_ns) {
            return Ok(false);
        }
        if self.flows.get(key)?.is_some() {
            return Ok(true);
        }
        self.young.remove(key)?;
        remove_ways_from(&mut self.young_snat, key, &flow)?;
        walk.left -= 1;
        walk.removed += 1;
        Ok(true)
    }

    /// Writes what the connection is now, in the table that has it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn replace(&mut self, key: &FlowKey, flow: &Flow) -> io::Result<()> {
        self.young.replace(key, flow)?;
        self.flows.replace(key, flow)
    }

    /// What leads to it goes last, as long as it is this connection's.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn remove(&mut self, key: &FlowKey, flow: &Flow) -> io::Result<()> {
        self.young.remove(key)?;
        self.flows.remove(key)?;
        self.remove_ways(key, flow)
    }

    /// What leads to it alone.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn remove_ways(&mut self, key: &FlowKey, flow: &Flow) -> io::Result<()> {
        remove_ways_from(&mut self.young_snat, key, flow)?;
        remove_ways_from(&mut self.snat, key, flow)
    }
}

/// What leads to a connection in one of the tables, as long as it is this connection's.
fn remove_ways_from(table: &mut Table<SnatKey, FlowKey>, key: &FlowKey, flow: &Flow) -> io::Result<()> {
    for companion in companions(key, flow) {
        if table.get(&companion)? == Some(*key) {
            table.remove(&companion)?;
        }
    }
    Ok(())
}

/// Connections for which there is no room are not safe from a flood: said once, until there is room again.
fn tell_full(told: &mut bool, table: &str, entries: usize, limit: u32) {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    if entries >= limit && !*told {
        *told = true;
        tracing::error!(
            table,
            limit,
            "a table of the packet path is full: more connections stay among the young ones, where the oldest give way"
        );
    } else if entries < limit - limit / 10 {
        *told = false;
    }
}

/// Said once, until a walk finds none.
fn tell_no_port(told: &mut bool, packets: u64) {
    if packets > 0 && !*told {
        tracing::error!(
            packets,
            counter = Outcome::PacketNoSourcePort.name(),
            "packets found no source port: a backend has nearly as many clients as --snat-port-range has ports, or the \
             device that they leave by has no address"
        );
    }
    *told = packets > 0;
}

/// Nothing is refused then, but what is thrown out has to begin again: said once, until there is room for as many.
fn tell_young_full(told: &mut bool, gave_way: u64, left: u64, limit: u32) {
    // A few may be those that the walk missed.
    if gave_way > u64::from(limit / 100) && !*told {
        *told = true;
        tracing::warn!(
            table = "YOUNG_FLOWS",
            limit,
            gave_way,
            "connections come faster than their clients go on with them: a flood? The oldest give way to new ones; those \
             that have gone on stay"
        );
    } else if left < u64::from(limit / 2) {
        *told = false;
    }
}

/// A connection as `sheave get flows` shows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct FlowView {
    /// Who dialled.
    pub client: SocketAddr,
    /// `TCP`, `UDP`, `SCTP`, or a number.
    pub protocol: String,
    /// What was dialled.
    pub vip: SocketAddr,
    /// Where it goes, unless that is another proxy's choice.
    pub backend: Option<SocketAddr>,
    /// The source that the backend sees, if it is replaced.
    pub snat: Option<SocketAddr>,
    /// The client's port inside the node, if its own would clash with another connection there (M11).
    pub inner_port: Option<u16>,
    /// How far it is.
    pub state: State,
    /// Since the last packet.
    pub idle_seconds: u64,
    /// Place in `SERVICES` of whoever had the VIP.
    pub service_id: ServiceId,
}

impl FlowView {
    /// Of an entry.
    pub fn new(key: &FlowKey, flow: &Flow, now_ns: u64) -> Self {
        let at = |address: Address, port: Port| SocketAddr::new(address.ip(), port.number());
        Self {
            client: at(key.client, key.port),
            protocol: Protocol::from_number(key.protocol)
                .map_or_else(|| key.protocol.to_string(), |protocol| protocol.name().to_owned()),
            vip: at(flow.vip, flow.vip_port),
            backend: (!flow.is_foreign()).then(|| at(flow.backend, flow.backend_port)),
            snat: (flow.snat_port != Port::default()).then(|| at(flow.snat, flow.snat_port)),
            inner_port: (flow.inner_port != Port::default()).then(|| flow.inner_port.number()),
            state: State::of(flow),
            idle_seconds: now_ns.saturating_sub(flow.used_ns) / SECOND_NS,
            service_id: flow.service,
        }
    }
}

/// The thread. It ends when this is dropped.
pub(super) struct Upkeep {
    orders: Sender<Owners>,
}

impl Upkeep {
    pub(super) fn start(
        flows: Flows,
        filters: Filters,
        every: Duration,
        to: UnboundedSender<Report>,
    ) -> io::Result<Self> {
        let (orders, ordered) = channel();
        let thread = thread::Builder::new().name("flows".to_owned());
        thread.spawn(move || run(flows, filters, every, &ordered, &to))?;
        Ok(Self { orders })
    }

    pub(super) fn purge(&self, owners: Owners) {
        // The thread lives as long as this.
        let _ = self.orders.send(owners);
    }
}

fn run(
    mut flows: Flows,
    mut filters: Filters,
    every: Duration,
    orders: &Receiver<Owners>,
    to: &UnboundedSender<Report>,
) {
    let mut last = Instant::now();
    loop {
        match orders.recv_timeout(every.saturating_sub(last.elapsed())) {
            Ok(mut owners) => {
                // One walk for all that wait.
                while let Ok(more) = orders.try_recv() {
                    owners.extend(more);
                }
                match flows.purge(&owners) {
                    Ok(0) => {}
                    Ok(purged) => tracing::info!(purged, "datagram flows left a VIP's former owner (C2)"),
                    Err(error) => tracing::warn!(%error, "datagram flows of a VIP's former owner may stay"),
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                last = Instant::now();
                match flows.sweep(now_ns()) {
                    Ok(report) => {
                        filters.age(&report.in_use);
                        if to.send(report).is_err() {
                            return;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the tables of connections cannot be looked through")
                    }
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_or_idle_is_dead() {
        let key = |protocol: Protocol| FlowKey::new(Address::default(), Port::new(1), protocol.number());
        let flow = |flags| Flow { flags: flags | Flow::ANSWERED, used_ns: 5 * SECOND_NS, ..Flow::default() };
        let dies_after = |protocol, flags| {
            let (key, flow) = (key(protocol), flow(flags));
            let limit = idle_limit_s(&key, &flow);
            assert!(!is_dead(&key, &flow, 0), "the clock may be behind");
            assert!(!is_dead(&key, &flow, (5 + limit) * SECOND_NS - 1));
            assert!(is_dead(&key, &flow, (5 + limit) * SECOND_NS));
            limit
        };
        let both = Flow::CLIENT_FIN | Flow::BACKEND_FIN;
        assert_eq!(dies_after(Protocol::Tcp, 0), 86_400);
        assert_eq!(dies_after(Protocol::Tcp, Flow::CLIENT_FIN), 3600);
        assert_eq!(dies_after(Protocol::Tcp, Flow::BACKEND_FIN), 3600);
        assert_eq!(dies_after(Protocol::Tcp, both), 30);
        assert_eq!(dies_after(Protocol::Tcp, Flow::RESET), 30);
        assert_eq!(dies_after(Protocol::Udp, 0), 120);
        assert_eq!(dies_after(Protocol::Sctp, 0), 86_400);
    }

    #[test]
    fn young_ones_die_sooner() {
        let limit = |protocol: Protocol, flags| {
            let key = FlowKey::new(Address::default(), Port::new(1), protocol.number());
            idle_limit_s(&key, &Flow { flags, ..Flow::default() })
        };
        for protocol in [Protocol::Tcp, Protocol::Sctp] {
            assert_eq!((limit(protocol, 0), limit(protocol, Flow::HEARD)), (120, 60));
            // A connection for which there was no room is one all the same.
            assert_eq!(limit(protocol, Flow::HEARD | Flow::CROWDED_OUT), 86_400);
        }
        assert_eq!(limit(Protocol::Tcp, Flow::HEARD | Flow::RESET), 30);
        assert_eq!((limit(Protocol::Udp, 0), limit(Protocol::Udp, Flow::HEARD)), (30, 120));
        assert_eq!(limit(Protocol::Udp, Flow::FOREIGN), 120);
    }

    #[test]
    fn a_report_knows_the_places_of_vips() {
        let address = |n: u32| Address::from(std::net::IpAddr::from((0x0a60_0000 + n).to_be_bytes()));
        let mut report = Report::default();
        assert!(!report.is_in_use(vip_place(&address(1))));
        report.note(&FlowKey::default(), &Flow { vip: address(1), ..Flow::default() });
        assert!(report.is_in_use(vip_place(&address(1))));
        assert!(!report.is_in_use(vip_place(&address(2))) && !report.is_in_use(VIP_PLACES));
    }
}
