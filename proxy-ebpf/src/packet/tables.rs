//! The maps as the packet path sees them, at one device's hook.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_ANY, BPF_NOEXIST},
    maps::lpm_trie::Key,
    programs::TcContext,
};
use proxy_common::{
    abi::{
        Address, AffinityEntry, AffinityKey, Backend, DatagramFlow, DatagramKey, DatagramOrigin,
        Device as DeviceEntry, Flow, FlowKey, FragmentKey, FragmentPorts, Frontend, FrontendKey, Lane,
        LaneKey, Outcome, PacketSettings, Port, ServiceId, Slot, SnatKey, SourceRange,
        packet::{FRESH, flow_place, snat_place, vip_bit, vip_place},
    },
    decide::{
        Tables,
        packet::{FlowEntry, LaneEntry, PacketTables, Route},
    },
};

use super::{route, skb::Skb};
use crate::maps::{
    CLAIM, CLUSTER_IPS, DEVICES, EPOCH, FLOW, FLOW_FILTER, FLOWS, FRAGMENTS, LANES, Maps, PACKET_SETTINGS,
    PORT_TURN, SEVERAL_VIPS, SNAT, SNAT_PORTS, SOURCE_RANGES, VIPS, YOUNG_FLOWS, YOUNG_SNAT, count, remember,
};

/// The maps, and the device whose hook this is.
pub(super) struct Device {
    skb: *mut __sk_buff,
    index: u32,
    arrived_by: u32,
    is_own: bool,
}

impl Device {
    /// At ingress.
    #[inline(always)]
    pub(super) fn of(ctx: &TcContext) -> Self {
        Self { skb: ctx.skb.skb, index: Skb::new(ctx).device(), arrived_by: 0, is_own: false }
    }

    /// At egress, where the packet may be one of this node.
    #[inline(always)]
    pub(super) fn leaving(ctx: &TcContext) -> Self {
        let skb = Skb::new(ctx);
        let arrived_by = skb.arrived_by();
        Self { skb: ctx.skb.skb, index: skb.device(), arrived_by, is_own: arrived_by == 0 }
    }
}

/// Whether a device may be a port of a bridge.
#[inline(always)]
pub(super) fn has_bridge_ports() -> bool {
    PACKET_SETTINGS.get(0).is_none_or(|settings| settings.flags & PacketSettings::NO_BRIDGE_PORTS == 0)
}

/// A flow where it lies in its map.
#[derive(Clone, Copy)]
pub(super) struct Entry(*mut Flow);

// All of these write to memory of a map that stays readable and writable until the program ends. Two packets of one
// flow on two CPUs may overwrite each other's time, which is as well, or the same flags.
impl FlowEntry for Entry {
    #[inline(always)]
    fn flow(&self) -> &Flow {
        // SAFETY: see above.
        unsafe { &*self.0 }
    }

    #[inline(always)]
    fn set_flags(&self, flags: u32) {
        // SAFETY: see above.
        unsafe { (*self.0).flags |= flags };
    }

    #[inline(always)]
    fn touch(&self, now_ns: u64) {
        // SAFETY: see above.
        unsafe { (*self.0).used_ns = now_ns };
    }

    #[inline(always)]
    fn set_snat(&self, snat: Address, port: Port) {
        // SAFETY: see above. The address first: a port says that both are there.
        unsafe {
            (*self.0).snat = snat;
            (&raw mut (*self.0).snat_port).write_volatile(port);
        }
    }

    #[inline(always)]
    fn set_device(&self, index: u32) {
        // SAFETY: see above.
        unsafe { (*self.0).device = index };
    }

    #[inline(always)]
    fn replace(&self, flow: &Flow) {
        // SAFETY: see above.
        unsafe { *self.0 = *flow };
    }
}

/// A lane where it lies in its map.
#[derive(Clone, Copy)]
pub(super) struct LanePlace(*mut Lane);

// As above; and the element may be another key's by now, which its seal tells. Half of a lane and half of another one of
// the same key send a packet astray at worst, at a moment when its way changes anyhow.
impl LaneEntry for LanePlace {
    #[inline(always)]
    fn read(&self) -> Lane {
        // SAFETY: memory of a map that stays readable until the program ends.
        unsafe { self.0.read_volatile() }
    }

    #[inline(always)]
    fn seal(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).seal).read_volatile() }
    }

    #[inline(always)]
    fn write(&self, lane: &Lane) {
        // SAFETY: as above, and writable.
        unsafe { self.0.write_volatile(*lane) };
    }

    #[inline(always)]
    fn open(&self) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.0).flags).write_volatile(Lane::OPEN) };
    }
}

/// One byte of a table of bytes.
macro_rules! byte {
    ($map:ident, $place:expr) => {{
        let place: usize = $place;
        // SAFETY: the places are as many as the table has, by the types of both.
        $map.get_ptr_mut(0).map(|table| unsafe { table.cast::<u8>().add(place) })
    }};
}

/// Before every entry that is made, also one that only moves to another table: whoever sees it is not to be told that
/// there is none, and the agent clears no byte that has been written since it last looked.
#[inline(always)]
fn mark_flow(client: &Address, port: Port) {
    if let Some(byte) = byte!(FLOW_FILTER, flow_place(client, port)) {
        // SAFETY: in bounds.
        unsafe { byte.write_volatile(FRESH) };
    }
}

/// As [`mark_flow`]: somebody has this source, or this port inside the node.
#[inline(always)]
fn mark_snat(key: &SnatKey) {
    if key.is_inside() {
        if let Some(several) = SEVERAL_VIPS.get_ptr_mut(0) {
            // SAFETY: in bounds.
            unsafe { *several = 1 };
        }
        mark_flow(&key.snat, key.snat_port);
    } else if let Some(byte) = byte!(SNAT_PORTS, snat_place(key.snat_port)) {
        // SAFETY: in bounds.
        unsafe { byte.write_volatile(FRESH) };
    }
}

/// Moves a way to a client into the table of those that stay. A function of its own: two keys would not fit on the stack.
#[inline(never)]
fn grow_up(key: &SnatKey, client: &FlowKey) -> bool {
    mark_snat(key);
    if SNAT.insert(key, client, 0).is_err() {
        return false;
    }
    let _ = YOUNG_SNAT.remove(key);
    true
}

impl PacketTables for Device {
    type Entry = Entry;
    type Lane = LanePlace;

    #[inline(always)]
    fn settings(&self) -> Option<&PacketSettings> {
        let settings = PACKET_SETTINGS.get(0)?;
        if settings.snat_count == 0 { None } else { Some(settings) }
    }

    #[inline(always)]
    fn may_be_vip(&self, address: &Address) -> bool {
        let (at, bit) = vip_bit(vip_place(address));
        let Some(byte) = byte!(VIPS, at) else { return true };
        // SAFETY: in bounds.
        unsafe { *byte & bit != 0 }
    }

    #[inline(always)]
    fn is_cluster_ip(&self, address: &Address) -> bool {
        CLUSTER_IPS.get_ptr(address).is_some()
    }

    #[inline(always)]
    fn lets_in(&self, service: ServiceId, client: &Address) -> bool {
        let key = Key::new(SourceRange::SERVICE_BITS + 128, SourceRange { service, client: *client });
        SOURCE_RANGES.get(&key).is_some()
    }

    #[inline(always)]
    fn device(&self) -> Option<DeviceEntry> {
        self.other_device(self.index)
    }

    #[inline(always)]
    fn device_index(&self) -> u32 {
        self.index
    }

    #[inline(always)]
    fn is_own(&self) -> bool {
        self.is_own
    }

    #[inline(always)]
    fn route(&self, to: &Address, v6: bool) -> Route {
        route::lookup(self.skb, self.index, to, v6).0
    }

    #[inline(always)]
    fn other_device(&self, index: u32) -> Option<DeviceEntry> {
        let device = DEVICES.get_ptr(index)?;
        // SAFETY: readable until the program ends.
        Some(unsafe { *device })
    }

    #[inline(always)]
    fn may_be_flow(&self, client: &Address, port: Port) -> bool {
        let Some(byte) = byte!(FLOW_FILTER, flow_place(client, port)) else { return true };
        // SAFETY: in bounds.
        unsafe { *byte != 0 }
    }

    #[inline(always)]
    fn several_vips(&self) -> bool {
        SEVERAL_VIPS.get(0).is_none_or(|several| *several != 0)
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<Entry> {
        if let Some(flow) = FLOWS.get_ptr_mut(key) {
            return Some(Entry(flow));
        }
        let flow = YOUNG_FLOWS.get_ptr_mut(key)?;
        Some(Entry(flow))
    }

    #[inline(always)]
    fn remember_flow(&self, key: &FlowKey, flow: &Flow) -> bool {
        mark_flow(&key.client, key.port);
        if key.slot != 0
            && let Some(several) = SEVERAL_VIPS.get_ptr_mut(0)
        {
            // SAFETY: in bounds.
            unsafe { *several = 1 };
        }
        remember(&YOUNG_FLOWS, key, flow, BPF_ANY)
    }

    #[inline(always)]
    fn grow_up(&self, key: &FlowKey, entry: &Entry, change: impl Fn(&mut Flow)) -> bool {
        let Some(grown) = FLOW.get_ptr_mut(0) else { return false };
        // SAFETY: a per-CPU slot, used by the packet that is on this CPU; a flow would not fit on the stack.
        let flow = unsafe { &mut *grown };
        *flow = *entry.flow();
        change(flow);
        if flow.snat_port != Port::new(0) && !grow_up(&flow.way_back(key.protocol), key) {
            return false;
        }
        if flow.inner_port != Port::new(0) && !grow_up(&flow.inside(key), key) {
            return false;
        }
        mark_flow(&key.client, key.port);
        if FLOWS.insert(key, flow, 0).is_err() {
            return false;
        }
        if YOUNG_FLOWS.remove(key).is_ok() {
            count(Outcome::PacketFlowGrown);
        }
        true
    }

    #[inline(always)]
    fn may_be_snat(&self, port: Port) -> bool {
        let Some(byte) = byte!(SNAT_PORTS, snat_place(port)) else { return true };
        // SAFETY: in bounds.
        unsafe { *byte != 0 }
    }

    #[inline(always)]
    fn snat(&self, key: &SnatKey) -> Option<FlowKey> {
        if let Some(client) = SNAT.get_ptr(key) {
            // SAFETY: readable until the program ends.
            return Some(unsafe { *client });
        }
        let client = YOUNG_SNAT.get_ptr(key)?;
        // SAFETY: as above.
        Some(unsafe { *client })
    }

    #[inline(always)]
    fn claim_snat(&self, key: &SnatKey, client: &FlowKey) -> bool {
        mark_snat(key);
        remember(&YOUNG_SNAT, key, client, BPF_NOEXIST)
    }

    #[inline(always)]
    fn claim_port(&self, key: &SnatKey, client: &FlowKey) -> Option<Port> {
        let stored = CLAIM.get_ptr_mut(0)?;
        // SAFETY: a per-CPU slot, used by the packet that is on this CPU.
        unsafe { *stored = (*key, *client) };
        let port = super::packet_claim(self.skb);
        if port == 0 { None } else { Some(Port::from_raw(port as u16)) }
    }

    #[inline(always)]
    fn turn(&self) -> u32 {
        let Some(turn) = PORT_TURN.get_ptr_mut(0) else { return 0 };
        // SAFETY: in bounds. Two CPUs that read the same number try the same port, of which one has it then.
        let now = unsafe { turn.read_volatile() }.wrapping_add(1);
        // SAFETY: as above.
        unsafe { turn.write_volatile(now) };
        now
    }

    #[inline(always)]
    fn take_snat(&self, key: &SnatKey, client: &FlowKey) -> bool {
        mark_snat(key);
        let _ = SNAT.remove(key);
        remember(&YOUNG_SNAT, key, client, BPF_ANY)
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        let ports = FRAGMENTS.get_ptr(key)?;
        // SAFETY: readable until the program ends.
        Some(unsafe { *ports })
    }

    #[inline(always)]
    fn remember_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) {
        remember(&FRAGMENTS, key, ports, BPF_ANY);
    }

    #[inline(always)]
    fn fast_path(&self) -> bool {
        super::is_fast()
    }

    #[inline(always)]
    fn epoch(&self) -> u32 {
        let Some(epoch) = EPOCH.get_ptr(0) else { return 0 };
        // SAFETY: in bounds; one load.
        unsafe { epoch.read_volatile() }
    }

    #[inline(always)]
    fn arrived_by(&self) -> u32 {
        self.arrived_by
    }

    #[inline(always)]
    fn lane(&self, key: &LaneKey) -> Option<LanePlace> {
        let lane = LANES.get_ptr_mut(key)?;
        Some(LanePlace(lane))
    }

    #[inline(always)]
    fn put_lane(&self, key: &LaneKey, lane: &Lane) {
        remember(&LANES, key, lane, BPF_ANY);
    }

    #[inline(always)]
    fn close_lane(&self, key: &LaneKey) {
        let _ = LANES.remove(key);
    }

    #[inline(always)]
    fn count(&self, outcome: Outcome) {
        count(outcome);
    }
}

/// The tables that both paths share.
impl Tables for Device {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Frontend {
        Maps.frontend(key)
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<Slot> {
        Maps.slot(index)
    }

    #[inline(always)]
    fn backend(&self, index: u32) -> Option<Backend> {
        Maps.backend(index)
    }

    #[inline(always)]
    fn affinity_entry(&self, key: &AffinityKey) -> Option<AffinityEntry> {
        Maps.affinity_entry(key)
    }

    #[inline(always)]
    fn remember_affinity(&self, key: &AffinityKey, entry: &AffinityEntry) {
        Maps.remember_affinity(key, entry);
    }

    #[inline(always)]
    fn datagram_flow(&self, key: &DatagramKey) -> Option<DatagramFlow> {
        Maps.datagram_flow(key)
    }

    #[inline(always)]
    fn remember_datagram_flow(&self, key: &DatagramKey, flow: &DatagramFlow) {
        Maps.remember_datagram_flow(key, flow);
    }

    #[inline(always)]
    fn datagram_origin(&self, key: &DatagramKey) -> Option<DatagramOrigin> {
        Maps.datagram_origin(key)
    }

    #[inline(always)]
    fn remember_datagram_origin(&self, key: &DatagramKey, origin: &DatagramOrigin) {
        Maps.remember_datagram_origin(key, origin);
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        Maps.random()
    }

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        Maps.now_ns()
    }
}
