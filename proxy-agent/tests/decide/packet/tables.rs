//! The packet path's maps in memory, as the kernel's behave.

use std::cell::{Cell, RefCell, UnsafeCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proxy_common::abi::{
    Address, AffinityEntry, AffinityKey, Backend, DatagramFlow, DatagramKey, DatagramOrigin, Device, Flow,
    FlowKey, FragmentKey, FragmentPorts, Frontend, FrontendKey, Lane, LaneKey, Outcome, PacketSettings, Port,
    Prefix, ServiceId, Slot, SnatKey,
};
use proxy_common::decide::Tables;
use proxy_common::decide::packet::{self, FlowEntry, LaneEntry, PacketTables, Route};

use super::Lab;

/// Interface index of the only device.
pub(crate) const DEVICE: u32 = 7;

/// Tables that a test fills by hand.
pub(crate) struct Maps {
    pub(crate) lab: Lab,
    pub(crate) settings: Option<PacketSettings>,
    pub(crate) vips: BTreeSet<Address>,
    pub(crate) cluster_ips: BTreeSet<Address>,
    pub(crate) source_ranges: Vec<(ServiceId, Prefix)>,
    pub(crate) device: Option<Device>,
    /// The packet is one of this node.
    pub(crate) own: Cell<bool>,
    /// Where every packet of this node goes.
    pub(crate) route: Route,
    /// The filters know nothing: everything may be.
    pub(crate) vague: bool,
    pub(crate) several_vips: Cell<bool>,
    pub(crate) turn: Cell<u32>,
    pub(crate) young: Flows,
    pub(crate) grown: Flows,
    pub(crate) young_snat: RefCell<BTreeMap<SnatKey, FlowKey>>,
    pub(crate) grown_snat: RefCell<BTreeMap<SnatKey, FlowKey>>,
    /// Whether packets may skip the stack.
    pub(crate) fast: bool,
    pub(crate) epoch: Cell<u32>,
    /// By which device the next packet that leaves came in.
    pub(crate) arrived_by: Cell<u32>,
    pub(crate) lanes: RefCell<BTreeMap<LaneKey, LanePlace>>,
    pub(crate) fragments: RefCell<BTreeMap<FragmentKey, FragmentPorts>>,
    flow_filter: RefCell<BTreeSet<(Address, Port)>>,
    snat_filter: RefCell<BTreeSet<Port>>,
    counts: RefCell<BTreeMap<&'static str, u32>>,
}

impl Maps {
    pub(crate) fn new(lab: Lab) -> Self {
        Self {
            lab,
            settings: None,
            vips: BTreeSet::new(),
            cluster_ips: BTreeSet::new(),
            source_ranges: Vec::new(),
            device: None,
            own: Cell::new(false),
            route: Route::Device(DEVICE),
            vague: false,
            several_vips: Cell::new(false),
            turn: Cell::new(0),
            young: Flows::default(),
            grown: Flows::default(),
            young_snat: RefCell::default(),
            grown_snat: RefCell::default(),
            fast: false,
            epoch: Cell::new(1),
            arrived_by: Cell::new(DEVICE),
            lanes: RefCell::default(),
            fragments: RefCell::default(),
            flow_filter: RefCell::default(),
            snat_filter: RefCell::default(),
            counts: RefCell::default(),
        }
    }

    fn mark(&self, key: &SnatKey) {
        if key.is_inside() {
            self.several_vips.set(true);
            self.flow_filter.borrow_mut().insert((key.snat, key.snat_port));
        } else {
            self.snat_filter.borrow_mut().insert(key.snat_port);
        }
    }

    /// What was counted since the last time.
    pub(crate) fn counted(&self) -> Vec<(&'static str, u32)> {
        self.counts.take().into_iter().collect()
    }
}

/// A hash of flows.
pub(crate) struct Flows {
    entries: RefCell<BTreeMap<FlowKey, Entry>>,
    /// As many as it holds.
    pub(crate) room: Cell<usize>,
}

impl Default for Flows {
    fn default() -> Self {
        Self { entries: RefCell::default(), room: Cell::new(usize::MAX) }
    }
}

impl Flows {
    pub(crate) fn all(&self) -> Vec<(FlowKey, Flow)> {
        self.entries.borrow().iter().map(|(key, entry)| (*key, *entry.flow())).collect()
    }

    pub(crate) fn get(&self, key: &FlowKey) -> Option<Entry> {
        self.entries.borrow().get(key).copied()
    }

    fn insert(&self, key: &FlowKey, flow: &Flow) -> bool {
        let mut entries = self.entries.borrow_mut();
        if let Some(entry) = entries.get(key) {
            entry.replace(flow);
        } else if entries.len() < self.room.get() {
            entries.insert(*key, Entry(Box::leak(Box::new(UnsafeCell::new(*flow)))));
        } else {
            return false;
        }
        true
    }

    /// The place goes to somebody else at once.
    pub(crate) fn remove(&self, key: &FlowKey) -> bool {
        let entry = self.entries.borrow_mut().remove(key);
        let somebody = Address::from(IpAddr::from([203, 0, 113, 66]));
        let other = Flow { vip: somebody, backend: somebody, snat: somebody, ..Flow::default() };
        entry.map(|entry| entry.replace(&other)).is_some()
    }
}

/// A flow where it lies.
#[derive(Clone, Copy)]
pub(crate) struct Entry(&'static UnsafeCell<Flow>);

impl Entry {
    fn write(&self, change: impl FnOnce(&mut Flow)) {
        // SAFETY: one thread, and `change` has no other way to the flow.
        change(unsafe { &mut *self.0.get() });
    }
}

// As in the kernel, where an entry is changed under who looks at it.
impl FlowEntry for Entry {
    fn flow(&self) -> &Flow {
        // SAFETY: never freed; the code under test must not use it after it has changed the flow.
        unsafe { &*self.0.get() }
    }

    fn set_flags(&self, flags: u32) {
        self.write(|flow| flow.flags |= flags);
    }

    fn touch(&self, now_ns: u64) {
        self.write(|flow| flow.used_ns = now_ns);
    }

    fn set_snat(&self, snat: Address, port: Port) {
        self.write(|flow| (flow.snat, flow.snat_port) = (snat, port));
    }

    fn set_device(&self, index: u32) {
        self.write(|flow| flow.device = index);
    }

    fn replace(&self, other: &Flow) {
        let other = *other;
        self.write(|flow| *flow = other);
    }
}

/// A lane where it lies.
#[derive(Clone, Copy)]
pub(crate) struct LanePlace(&'static Cell<Lane>);

impl LaneEntry for LanePlace {
    fn read(&self) -> Lane {
        self.0.get()
    }

    fn seal(&self) -> u32 {
        self.0.get().seal
    }

    fn write(&self, lane: &Lane) {
        self.0.set(*lane);
    }

    fn open(&self) {
        self.0.set(Lane { flags: Lane::OPEN, ..self.0.get() });
    }
}

impl PacketTables for Maps {
    type Entry = Entry;
    type Lane = LanePlace;

    fn settings(&self) -> Option<&PacketSettings> {
        self.settings.as_ref()
    }

    fn may_be_vip(&self, address: &Address) -> bool {
        self.vague || self.vips.contains(address)
    }

    fn is_cluster_ip(&self, address: &Address) -> bool {
        self.cluster_ips.contains(address)
    }

    fn lets_in(&self, service: ServiceId, client: &Address) -> bool {
        self.source_ranges.iter().any(|(of, range)| *of == service && range.contains(client))
    }

    fn device(&self) -> Option<Device> {
        self.device
    }

    fn device_index(&self) -> u32 {
        DEVICE
    }

    fn is_own(&self) -> bool {
        self.own.get()
    }

    fn route(&self, _to: &Address, _v6: bool) -> Route {
        self.route
    }

    fn other_device(&self, index: u32) -> Option<Device> {
        if index == DEVICE { self.device } else { None }
    }

    fn may_be_flow(&self, client: &Address, port: Port) -> bool {
        self.vague || self.flow_filter.borrow().contains(&(*client, port))
    }

    fn several_vips(&self) -> bool {
        self.vague || self.several_vips.get()
    }

    fn flow(&self, key: &FlowKey) -> Option<Entry> {
        self.grown.get(key).or_else(|| self.young.get(key))
    }

    fn remember_flow(&self, key: &FlowKey, flow: &Flow) -> bool {
        self.flow_filter.borrow_mut().insert((key.client, key.port));
        if key.slot != 0 {
            self.several_vips.set(true);
        }
        self.young.insert(key, flow)
    }

    fn grow_up(&self, key: &FlowKey, entry: &Entry, change: impl Fn(&mut Flow)) -> bool {
        let mut flow = *entry.flow();
        change(&mut flow);
        let flow = &flow;
        let snat = (flow.snat_port != Port::new(0)).then(|| flow.way_back(key.protocol));
        let inside = (flow.inner_port != Port::new(0)).then(|| flow.inside(key));
        for way in snat.into_iter().chain(inside) {
            self.grown_snat.borrow_mut().insert(way, *key);
            self.young_snat.borrow_mut().remove(&way);
        }
        if !self.grown.insert(key, flow) {
            return false;
        }
        if self.young.remove(key) {
            self.count(Outcome::PacketFlowGrown);
        }
        true
    }

    fn may_be_snat(&self, port: Port) -> bool {
        self.vague || self.snat_filter.borrow().contains(&port)
    }

    fn snat(&self, key: &SnatKey) -> Option<FlowKey> {
        let grown = self.grown_snat.borrow().get(key).copied();
        grown.or_else(|| self.young_snat.borrow().get(key).copied())
    }

    fn claim_snat(&self, key: &SnatKey, client: &FlowKey) -> bool {
        if self.snat(key).is_some() {
            return false;
        }
        self.mark(key);
        self.young_snat.borrow_mut().insert(*key, *client);
        true
    }

    fn claim_port(&self, key: &SnatKey, client: &FlowKey) -> Option<Port> {
        packet::claim_port(self, &mut { *key }, client)
    }

    fn turn(&self) -> u32 {
        self.turn.set(self.turn.get() + 1);
        self.turn.get()
    }

    fn take_snat(&self, key: &SnatKey, client: &FlowKey) -> bool {
        self.mark(key);
        self.grown_snat.borrow_mut().remove(key);
        self.young_snat.borrow_mut().insert(*key, *client);
        true
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        self.fragments.borrow().get(key).copied()
    }

    fn remember_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) {
        self.fragments.borrow_mut().insert(*key, *ports);
    }

    fn fast_path(&self) -> bool {
        self.fast
    }

    fn epoch(&self) -> u32 {
        self.epoch.get()
    }

    fn arrived_by(&self) -> u32 {
        self.arrived_by.get()
    }

    fn lane(&self, key: &LaneKey) -> Option<LanePlace> {
        self.lanes.borrow().get(key).copied()
    }

    fn put_lane(&self, key: &LaneKey, lane: &Lane) {
        self.lanes.borrow_mut().insert(*key, LanePlace(Box::leak(Box::new(Cell::new(*lane)))));
    }

    fn close_lane(&self, key: &LaneKey) {
        self.lanes.borrow_mut().remove(key);
    }

    fn count(&self, outcome: Outcome) {
        *self.counts.borrow_mut().entry(outcome.name()).or_default() += 1;
    }
}

/// The tables that both paths share.
impl Tables for Maps {
    fn frontend(&self, key: &FrontendKey) -> Frontend {
        self.lab.tables.frontend(key)
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        Tables::slot(&self.lab.tables, index)
    }

    fn backend(&self, index: u32) -> Option<Backend> {
        Tables::backend(&self.lab.tables, index)
    }

    fn affinity_entry(&self, key: &AffinityKey) -> Option<AffinityEntry> {
        self.lab.tables.affinity_entry(key)
    }

    fn remember_affinity(&self, key: &AffinityKey, entry: &AffinityEntry) {
        self.lab.tables.remember_affinity(key, entry);
    }

    fn datagram_flow(&self, key: &DatagramKey) -> Option<DatagramFlow> {
        self.lab.tables.datagram_flow(key)
    }

    fn remember_datagram_flow(&self, key: &DatagramKey, flow: &DatagramFlow) {
        self.lab.tables.remember_datagram_flow(key, flow);
    }

    fn datagram_origin(&self, key: &DatagramKey) -> Option<DatagramOrigin> {
        self.lab.tables.datagram_origin(key)
    }

    fn remember_datagram_origin(&self, key: &DatagramKey, origin: &DatagramOrigin) {
        self.lab.tables.remember_datagram_origin(key, origin);
    }

    fn random(&self) -> u32 {
        self.lab.tables.random()
    }

    fn now_ns(&self) -> u64 {
        self.lab.tables.now_ns()
    }
}
