//! Taking over from a kube-proxy, and handing back to one, without breaking a connection.
//!
//! A connection that kube-proxy set up lives in netfilter's connection tracking, whose NAT goes on with it as long as NAT
//! is in work at all ([`rules::keep_nat`]). TCP needs nothing more: packets without SYN and without a flow of ours pass.
//! Datagrams could begin a flow each, so those that netfilter owns are written down as foreign flows, and sources that it
//! gave away as nobody's.
//!
//! ```text
//! LEAVE_NEW is set ─▶ hooks ─▶ what netfilter has is seeded ─▶ LEAVE_NEW is cleared ─▶ seeded again
//!    new flows are left to kube-proxy; datagrams are noted                              what was new meanwhile
//! ```
//! From then on a thread looks after them: foreign flows go with their entries in connection tracking, kube-proxy's rules
//! on request, and the NAT that is kept when nobody needs it any more. The way back is [`hand_back`].

pub mod conntrack;
pub mod hand_back;
pub mod rules;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use proxy_common::abi::packet::{FLOW_PLACES, FRESH, VIP_BYTES, flow_place, vip_place};
use proxy_common::abi::{BackendId, Flow, FlowKey, FrontendKey, Port, Protocol, ServiceId, SnatKey};
use proxy_common::decide::Peer;

use self::conntrack::{Conntrack, Translated, Tuple};
use self::rules::Rules;
use crate::kernel::mapping::Mapping;
use crate::kernel::programs::open_pinned;
use crate::kernel::table::io_error;
use crate::kernel::{self, Pins};
use crate::packet::flows::{Flows, now_ns};
use crate::packet::settings::SnatPorts;
use crate::served::Served;

/// A datagram flow that was left to kube-proxy a moment ago gets its entry in connection tracking within that time.
const SETTLED: Duration = Duration::from_millis(100);

/// Every how many turns it is looked for rules: it takes commands.
const LOOK_EVERY: u32 = 6;

/// Who has a VIP, and which of its backends has this address.
pub trait Known: Fn(&FrontendKey, Peer) -> Option<(ServiceId, BackendId)> {}

impl<F: Fn(&FrontendKey, Peer) -> Option<(ServiceId, BackendId)>> Known for F {}

/// The tables' side of connections that netfilter's NAT owns.
pub struct Foreign {
    conntrack: Conntrack,
    flows: Flows,
    several_vips: Array<MapData, u32>,
    vips: Mapping<[u8; VIP_BYTES]>,
    flow_filter: Mapping<[u8; FLOW_PLACES]>,
    snat_ports: SnatPorts,
    /// Foreign flows without an entry in connection tracking the last time: their first packet may just be on its way
    /// there. They go if it is so again.
    suspects: HashSet<FlowKey>,
}

fn peer(at: SocketAddr) -> Peer {
    (at.ip().into(), Port::new(at.port()))
}

/// What a client dialled.
type Dialled = (FlowKey, Peer);

fn dialled(connection: &Translated) -> Dialled {
    let client = peer(connection.original.source);
    (FlowKey::new(client.0, client.1, connection.original.protocol), peer(connection.original.destination))
}

impl Foreign {
    /// Opens what is pinned.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn open(pins: &Pins, snat_ports: SnatPorts) -> Result<Self, kernel::Error> {
        let state = pins.state();
        let error = |source| kernel::Error::Map { map: "SEVERAL_VIPS", source };
        let several_vips = open_pinned(&state, "SEVERAL_VIPS")?;
        let (vips, flow_filter) = (open_pinned(&state, "VIPS")?, open_pinned(&state, "FLOW_FILTER")?);
        Ok(Self {
            conntrack: Conntrack::open()
                .map_err(kernel::Error::path("open", "connection tracking (ctnetlink)"))?,
            flows: Flows::open(pins)?,
            several_vips: Map::from_map_data(several_vips).and_then(TryInto::try_into).map_err(error)?,
            vips: Mapping::new(vips.fd(), 1, false)
                .map_err(kernel::Error::path("map into memory", state.join("VIPS")))?,
            flow_filter: Mapping::new(flow_filter.fd(), 1, true)
                .map_err(kernel::Error::path("map into memory", state.join("FLOW_FILTER")))?,
            snat_ports,
            suspects: HashSet::new(),
        })
    }

    /// Writes down what netfilter's NAT owns of the connections to our VIPs; returns how many datagram flows.
    ///
    /// # Errors
    /// If connection tracking or a table cannot be read.
    pub fn seed(&mut self, known: &impl Known) -> io::Result<usize> {
        let translated = self.conntrack.translated()?;
        self.reserve(&translated)?;
        let mut present = self.flows.entries()?;
        let now_ns = now_ns();
        let mut seeded = 0;
        for connection in &translated {
            let (key, vip) = dialled(connection);
            let Some((service, backend_id)) =
                known(&FrontendKey::new(vip.0, vip.1, key.protocol), peer(connection.reply.source))
            else {
                continue;
            };
            if key.protocol == Protocol::Tcp.number() {
                continue;
            }
            let flow = Flow {
                vip: vip.0,
                vip_port: vip.1,
                backend_id,
                used_ns: now_ns,
                service,
                flags: Flow::FOREIGN | Flow::ANSWERED,
                ..Flow::default()
            };
            let mut slots = (0..FlowKey::SLOTS).map(|slot| key.in_slot(slot));
            let at = |key: &FlowKey| present.get(key);
            let is_it = |key: &FlowKey| at(key).is_some_and(|flow| (flow.vip, flow.vip_port) == vip);
            let place = slots.clone().find(is_it).or_else(|| slots.find(|key| at(key).is_none()));
            // It may be ours already, or have no place: then it is balanced anew.
            if let Some(place) = place.filter(|place| at(place).is_none_or(Flow::is_foreign)) {
                if place.slot != 0 {
                    self.several_vips.set(0, 1, 0).map_err(io_error)?;
                }
                // For the flow of ours that takes its place one day.
                self.flow_filter.store(flow_place(&place.client, place.port), FRESH)?;
                // Two steps: one of ours that has just begun stays.
                self.flows.flows.add(&place, &flow)?;
                if at(&place).is_some() {
                    self.flows.flows.replace(&place, &flow)?;
                    self.flows.young.remove(&place)?;
                }
                present.insert(place, flow);
                seeded += 1;
            }
        }
        Ok(seeded)
    }

    /// Removes foreign flows that netfilter does not own (any more); returns how many connections to VIPs, of any
    /// protocol, it does.
    ///
    /// # Errors
    /// If connection tracking or a table cannot be read.
    pub fn tend(&mut self) -> io::Result<usize> {
        let translated = self.conntrack.translated()?;
        self.reserve(&translated)?;
        let owned: BTreeSet<Dialled> = translated.iter().map(dialled).collect();
        let mut suspects = HashSet::new();
        for (key, flow) in self.flows.entries()?.into_iter().filter(|(_, flow)| flow.is_foreign()) {
            if owned.contains(&(key.in_slot(0), (flow.vip, flow.vip_port))) {
                continue;
            }
            if self.suspects.contains(&key) {
                // It may be ours by now.
                if self.flows.flow(&key)?.is_some_and(|flow| flow.is_foreign()) {
                    self.flows.remove(&key, &flow)?;
                }
            } else {
                suspects.insert(key);
            }
        }
        self.suspects = suspects;
        Ok(owned.iter().filter(|(_, vip)| self.vips.has_vip(vip_place(&vip.0))).count())
    }

    /// M7: a source that netfilter gave away is not given away again, nor are its answers taken for ours.
    fn reserve(&mut self, translated: &[Translated]) -> io::Result<()> {
        let masqueraded = translated.iter().filter(|connection| {
            let port = connection.reply.destination.port();
            connection.is_masqueraded() && self.snat_ports.overlaps(port, port)
        });
        let key = |connection: &Translated| {
            let reply = &connection.reply;
            SnatKey::new(peer(reply.destination), peer(reply.source), reply.protocol)
        };
        let wanted: BTreeSet<SnatKey> = masqueraded.map(key).collect();
        let present: BTreeMap<SnatKey, FlowKey> = self.flows.snat.entries()?.into_iter().collect();
        for key in wanted.iter().filter(|key| !present.contains_key(key)) {
            if self.flows.young_snat.get(key)?.is_none() {
                self.flows.snat.add(key, &FlowKey::NOBODY)?;
            }
        }
        let over = present.iter().filter(|(key, owner)| owner.is_nobody() && !wanted.contains(key));
        over.map(|(key, _)| key).try_for_each(|key| self.flows.snat.remove(key))
    }

    /// Gives netfilter's NAT the connections that are to go at once.
    fn hand_over_due(&mut self) -> io::Result<()> {
        for (key, flow) in self.flows.entries()? {
            if hand_back::goes_at_once(&key, &flow)
                && let Err(error) = hand_back::hand_over(&mut self.flows, &self.conntrack, &key)
            {
                tracing::debug!(client = ?key, error = &error as &dyn std::error::Error, "not handed over");
            }
        }
        Ok(())
    }

    /// C2: datagram flows to these VIPs whose backend serves no more are forgotten, to be balanced anew.
    fn purge(&self, served: &Served) -> io::Result<()> {
        let is_udp = |original: &Tuple| original.protocol == Protocol::Udp.number();
        for Translated { original, reply } in self.conntrack.translated()? {
            let serving = served.get(&original.destination).filter(|_| is_udp(&original));
            if serving.is_some_and(|serving| !serving.contains(&reply.source)) {
                self.conntrack.forget(&original)?;
            }
        }
        Ok(())
    }
}

/// What the thread is told.
enum Order {
    /// There are connections that netfilter's NAT is to have at once.
    HandOver,
    /// These may serve otherwise than before.
    Served(Served),
}

/// The thread that looks after what netfilter's NAT owns. It ends when this is dropped.
pub struct Watch {
    orders: Sender<Order>,
    owned: Arc<AtomicUsize>,
}

impl Watch {
    /// Starts it. With `take_over` kube-proxy's rules go once it does not run any more.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn start(foreign: Foreign, take_over: bool, every: Duration) -> io::Result<Self> {
        let (orders, ordered) = channel();
        let owned = Arc::new(AtomicUsize::new(0));
        let keeper = Keeper {
            foreign,
            take_over,
            every,
            owned: Arc::clone(&owned),
            rules: Rules::default(),
            look_at: None,
            kept: None,
            told: BTreeSet::new(),
        };
        thread::Builder::new().name("takeover".to_owned()).spawn(move || keeper.run(&ordered))?;
        Ok(Self { orders, owned })
    }

    /// Whether there is any connection to look after.
    pub fn owns_any(&self) -> bool {
        self.owned.load(Ordering::Relaxed) > 0
    }

    /// Netfilter's NAT gets the connections that it is to have at once.
    pub fn hand_over_due(&self) {
        // The thread lives as long as this.
        let _ = self.orders.send(Order::HandOver);
    }

    /// C2: datagrams leave endpoints that are not among these.
    pub fn served(&self, served: Served) {
        if !served.is_empty() {
            let _ = self.orders.send(Order::Served(served));
        }
    }
}

struct Keeper {
    foreign: Foreign,
    take_over: bool,
    /// Between two turns.
    every: Duration,
    /// How many connections to VIPs netfilter's NAT has.
    owned: Arc<AtomicUsize>,
    rules: Rules,
    /// When to look for rules again.
    look_at: Option<Instant>,
    /// Whether NAT is kept, once that is known.
    kept: Option<bool>,
    /// What was said already, until it is well again.
    told: BTreeSet<&'static str>,
}

impl Keeper {
    fn run(mut self, orders: &Receiver<Order>) {
        // Twice at once: flows that are noted, but not owned, go the second time.
        let mut next = Instant::now();
        loop {
            match orders.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(order) => {
                    // One walk for all that wait (C6).
                    let (mut served, mut hand_over) = (Served::new(), false);
                    for order in [order].into_iter().chain(orders.try_iter()) {
                        match order {
                            Order::HandOver => hand_over = true,
                            Order::Served(more) => served.extend(more),
                        }
                    }
                    if hand_over {
                        self.hand_over_due();
                    }
                    if !served.is_empty() {
                        let purged = self.foreign.purge(&served);
                        self.tell(
                            "purge",
                            "datagrams to endpoints that serve no more may go on there",
                            purged,
                        );
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.turn();
                    let settled = self.foreign.suspects.is_empty();
                    next = Instant::now() + if settled { self.every } else { self.every.min(SETTLED) };
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn turn(&mut self) {
        let looks = self.look_at.is_none_or(|at| at <= Instant::now());
        if looks || self.owned.load(Ordering::Relaxed) > 0 || !self.foreign.suspects.is_empty() {
            self.tend();
        }
        if looks {
            self.look_at = Some(Instant::now() + self.every * LOOK_EVERY);
            let rules = Rules::find();
            if let Some(rules) = self.tell("rules", "kube-proxy's rules cannot be looked for", rules) {
                self.rules = rules;
            }
        }
        self.keep(self.owned.load(Ordering::Relaxed) > 0 || !self.rules.is_empty());
        if self.take_over {
            let all = self.rules.are_all();
            self.tell("unseen", "--take-over: if kube-proxy has rules in iptables, they stay", all);
            if !self.rules.is_empty() && self.kept == Some(true) {
                self.remove_rules();
            }
        }
    }

    fn tend(&mut self) {
        let owned = self.foreign.tend();
        if let Some(owned) =
            self.tell("connections", "the connections of another proxy cannot be looked after", owned)
        {
            self.owned.store(owned, Ordering::Relaxed);
        }
    }

    fn keep(&mut self, keep: bool) {
        // A firewall that is loaded anew takes the table with it.
        if keep || self.kept != Some(false) {
            let kept = rules::keep_nat(keep);
            let what = "NAT is not kept in work: with kube-proxy's rules its connections would go";
            self.kept = self.tell("nat", what, kept).map(|()| keep);
        }
    }

    fn hand_over_due(&mut self) {
        self.keep(true);
        if self.kept == Some(true) {
            let handed = self.foreign.hand_over_due();
            self.tell("own", "connections of the node's own processes stay with the packet path", handed);
            self.tend();
        }
    }

    fn remove_rules(&mut self) {
        if let Some(mode) = rules::running() {
            if self.told.insert("running") {
                tracing::warn!(
                    mode,
                    "--take-over: a kube-proxy runs and would write its rules again; they go when it has ended"
                );
            }
            return;
        }
        self.told.remove("running");
        // As it left them.
        let removed = Rules::find().and_then(|rules| {
            self.rules = rules;
            self.rules.remove()
        });
        if self.tell("remove", "--take-over: kube-proxy's rules stay", removed).is_some() {
            tracing::info!(
                rules = %self.rules,
                connections = self.owned.load(Ordering::Relaxed),
                "--take-over: kube-proxy's rules are removed; its connections go on"
            );
            self.rules = Rules::default();
        }
    }

    /// Says a failure once.
    fn tell<T, E: std::error::Error + 'static>(
        &mut self,
        about: &'static str,
        what: &str,
        result: Result<T, E>,
    ) -> Option<T> {
        match result {
            Ok(value) => {
                self.told.remove(about);
                Some(value)
            }
            Err(error) => {
                if self.told.insert(about) {
                    tracing::warn!(error = &error as &dyn std::error::Error, "{what}");
                }
                None
            }
        }
    }
}
