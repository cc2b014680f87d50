//! The maps, and the kernel's side of [`Tables`].
//!
//! Sizes are defaults; the agent overrides them at load time.

use aya_ebpf::{
    Global,
    bindings::{BPF_ANY, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::SkStorage,
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns},
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray},
};
use proxy_common::{
    abi::{
        Address, AffinityEntry, AffinityKey, Backend, DatagramFlow, DatagramKey, DatagramOrigin, Device,
        Flow, FlowKey, FragmentKey, FragmentPorts, Frontend, FrontendKey, FrontendLine, FrontendValue,
        Glance, Lane, LaneKey, Outcome, PacketSettings, Port, ServiceId, ServiceRecord, SetWord, Slot,
        SnatKey, SocketOrigin, SocketPlace, SourceRange,
        line::Header,
        packet::{FLOW_PLACES, PROGRAMS, SNAT_PLACES, VIP_BYTES},
        socket,
    },
    decide::{Tables, packet::Headers},
    opaque,
};

/// 1 if the kernel has `bpf_ktime_get_coarse_ns` (5.11). The verifier prunes the branch otherwise.
#[unsafe(no_mangle)]
static COARSE_CLOCK: Global<u32> = Global::new(0);

/// Writer: the agent, through memory.
#[map]
static FRONTENDS: Array<FrontendLine> = Array::with_max_entries((1 << 15) + 1, BPF_F_MMAPABLE);

/// Writer: the agent, through memory.
#[map]
static SERVICES: Array<ServiceRecord> = Array::with_max_entries(1 << 14, BPF_F_MMAPABLE);

/// Writer: the agent, through memory.
#[map]
static SLOTS: Array<Slot> = Array::with_max_entries(1 << 16, BPF_F_MMAPABLE);

/// Writer: the agent, through memory.
#[map]
static BACKENDS: Array<Backend> = Array::with_max_entries(1 << 16, BPF_F_MMAPABLE);

/// Writer: the programs.
#[map]
static AFFINITY: LruHashMap<AffinityKey, AffinityEntry> = LruHashMap::with_max_entries(1 << 16, 0);

/// How many pairs of an unconnected socket and a VIP are remembered. LRU tables have all of their memory from the start,
/// 256 bytes a pair in these two. With 10,000 new ones a second (a resolver that does not connect takes one for a
/// question) a pair lasts three seconds. Not fewer: before 6.17 every CPU may keep 128 free entries to itself, and where
/// no others are left, a CPU that comes later loses at once what it writes.
const DATAGRAM_SOCKETS: u32 = 1 << 15;

/// Writer: the programs.
#[map]
static DATAGRAM_FLOWS: LruHashMap<DatagramKey, DatagramFlow> =
    LruHashMap::with_max_entries(DATAGRAM_SOCKETS, 0);

/// Writer: the programs.
#[map]
static DATAGRAM_ORIGIN: LruHashMap<DatagramKey, DatagramOrigin> =
    LruHashMap::with_max_entries(DATAGRAM_SOCKETS, 0);

/// Writer: the programs. The agent reads it as memory.
#[map]
pub(crate) static SOCKET_PLACES: Array<SocketPlace> =
    Array::with_max_entries(socket::SOCKET_PLACES, BPF_F_MMAPABLE);

/// Writer: the programs.
#[btf_map]
pub(crate) static SOCKET_ORIGIN: SkStorage<SocketOrigin> = SkStorage::new();

/// Writer: the programs.
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Outcome::ALL.len() as u32, 0);

/// Writer: the agent. The programs that do the work of the packet path, for those that the hooks start with. Pinned: an
/// array of programs that nobody holds loses them.
#[map]
pub(crate) static PACKET_PROGRAMS: ProgramArray = ProgramArray::with_max_entries(PROGRAMS, 0);

/// What one step of the packet path tells the next. Writer: the programs.
#[map]
pub(crate) static HEADERS: PerCpuArray<Headers> = PerCpuArray::with_max_entries(1, 0);

/// As [`HEADERS`]: the flow of a new connection.
#[map]
pub(crate) static FLOW: PerCpuArray<Flow> = PerCpuArray::with_max_entries(1, 0);

/// As [`HEADERS`]: for whom a port is wanted.
#[map]
pub(crate) static CLAIM: PerCpuArray<(SnatKey, FlowKey)> = PerCpuArray::with_max_entries(1, 0);

/// As [`HEADERS`]: the interface that a packet leaves or comes in by.
#[map]
pub(crate) static REDIRECT_TO: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);

/// State of the random numbers of each CPU. Writer: the programs.
#[map]
static RANDOM: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Which port of replaced sources is given away next where they are given in turn. Writer: the programs.
#[map]
pub(crate) static PORT_TURN: Array<u32> = Array::with_max_entries(1, 0);

/// Writer: the agent. Addresses that are cluster IPs of proxied Services: what no Service has there is refused (Z6); at
/// those for which there is no room, it is not. An entry takes its memory when it is made, but the buckets, as many as
/// entries, are there from the start.
#[map]
pub(crate) static CLUSTER_IPS: HashMap<Address, u32> = HashMap::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);

/// Writer: the agent. By interface index.
#[map]
pub(crate) static DEVICES: HashMap<u32, Device> = HashMap::with_max_entries(1 << 14, BPF_F_NO_PREALLOC);

/// Writer: the agent.
#[map]
pub(crate) static PACKET_SETTINGS: Array<PacketSettings> = Array::with_max_entries(1, 0);

/// Writer: the agent.
#[map]
pub(crate) static SOURCE_RANGES: LpmTrie<SourceRange, u32> =
    LpmTrie::with_max_entries(1 << 18, BPF_F_NO_PREALLOC);

/// Writer: the agent, through memory.
#[map]
pub(crate) static VIPS: Array<[u8; VIP_BYTES]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Writers: the programs, and the agent, which ages it and writes flows of another proxy.
#[map]
pub(crate) static FLOW_FILTER: Array<[u8; FLOW_PLACES]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// As [`FLOW_FILTER`].
#[map]
pub(crate) static SNAT_PORTS: Array<[u8; SNAT_PLACES]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Writer: the programs; the agent removes what is old. All memory is there from the start, 11 MB: to ask the kernel for
/// that of an entry costs a new connection an eighth more time in the programs.
#[map]
pub(crate) static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(1 << 16, 0);

/// Writer: the programs.
#[map]
pub(crate) static YOUNG_FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(1 << 14, 0);

/// Writer: the programs; the agent removes what is old.
#[map]
pub(crate) static SNAT: HashMap<SnatKey, FlowKey> = HashMap::with_max_entries(1 << 16, 0);

/// Writer: the programs.
#[map]
pub(crate) static YOUNG_SNAT: LruHashMap<SnatKey, FlowKey> = LruHashMap::with_max_entries(1 << 14, 0);

/// Not 0 once a client port has talked to several VIPs, or had another port inside the node. Writer: the programs.
#[map]
pub(crate) static SEVERAL_VIPS: Array<u32> = Array::with_max_entries(1, 0);

/// Writer: the programs.
#[map]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts> =
    LruHashMap::with_max_entries(1 << 12, 0);

/// As many lanes as the agent says. Not pinned: whatever is lost is learned again. Writer: the programs.
#[map]
pub(crate) static LANES: LruHashMap<LaneKey, Lane> = LruHashMap::with_max_entries(1, 0);

/// Writer: the agent.
#[map]
pub(crate) static EPOCH: Array<u32> = Array::with_max_entries(1, 0);

/// Stores in an LRU table, as if looked for at once. A full table throws out first what nobody has looked for since it was
/// stored; where all others have been, that is the newest, which is about to be looked for.
#[inline(always)]
pub(crate) fn remember<K, V>(table: &LruHashMap<K, V>, key: &K, value: &V, flags: u32) -> bool {
    table.insert(key, value, flags as u64).is_ok() && table.get_ptr(key).is_some()
}

/// Counts one way out.
#[inline(always)]
pub(crate) fn count(outcome: Outcome) {
    if let Some(counter) = COUNTERS.get_ptr_mut(outcome as u32) {
        // SAFETY: a per-CPU slot; no other program runs on this CPU in between.
        unsafe { *counter = (*counter).wrapping_add(1) };
    }
}

/// The header of [`FRONTENDS`].
#[inline(always)]
fn header() -> Option<Header> {
    let first = FRONTENDS.get_ptr(0)?;
    // SAFETY: in bounds; the agent writes the header before the first frontend, and never again.
    Some(unsafe { *first.cast::<Header>() })
}

/// The search in [`FRONTENDS`] at a key's home. What is called has to return, which is dear where the kernel guards returns.
#[inline(always)]
fn frontend_at_home(key: &FrontendKey) -> (Frontend, bool) {
    let Some(header) = header() else { return (Frontend::NONE, false) };
    // SAFETY: in bounds, for ever.
    unsafe { FrontendLine::at_home(key, &header, |place| FRONTENDS.get_ptr(place), record) }
}

/// The rest of the search, a function that the verifier walks once instead of once for each way out of the loop. It
/// takes numbers: before 5.12 such a function takes no pointers.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn frontend_place(upper: u64, lower: u64, port: u32, protocol: u32) -> u32 {
    let address = Address::from_halves([upper, lower]);
    let key = FrontendKey::new(address, Port::from_raw(port as u16), protocol as u8);
    let Some(header) = header() else { return 0 };
    // SAFETY: in bounds, for ever.
    unsafe { FrontendLine::find(&key, &header, |place| FRONTENDS.get_ptr(place)) }
}

/// A service record, for whoever finds no copy of it in a frontend's line.
#[inline(always)]
fn record(service: ServiceId) -> ServiceRecord {
    let Some(record) = SERVICES.get_ptr(service) else { return ServiceRecord::default() };
    // SAFETY: in bounds; the agent stores whole words while we read, so each load must be one load.
    unsafe {
        ServiceRecord {
            cluster: (&raw const (*record).cluster).read_volatile(),
            local: (&raw const (*record).local).read_volatile(),
            draining: SetWord::ABSENT,
            affinity: (&raw const (*record).affinity).read_volatile(),
        }
    }
}

/// The maps as the decision core sees them.
pub(crate) struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Frontend {
        let (mut found, farther) = frontend_at_home(key);
        if farther {
            let [upper, lower] = key.address().halves();
            let place = frontend_place(upper, lower, key.port().raw() as u32, key.protocol() as u32);
            if place != 0
                && let Some(at) = FRONTENDS.get_ptr(place)
            {
                // SAFETY: in bounds, for ever.
                found = unsafe { FrontendLine::read(at, key, record) };
            }
        }
        // What the compiler knows to be none, it gives no sets: the verifier refuses to read those.
        found.value = FrontendValue::from_bits(opaque(found.value.bits()));
        found
    }

    #[inline(always)]
    fn glance(&self, key: &FrontendKey) -> Glance {
        let Some(header) = header() else { return Glance::Nothing };
        // SAFETY: in bounds, for ever.
        unsafe { FrontendLine::glance(key, &header, |place| FRONTENDS.get_ptr(place)) }
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<Slot> {
        let slot = SLOTS.get_ptr(index)?;
        // SAFETY: in bounds. The agent writes only where no set has pointed for a while; a slot's seal tells a reader that
        // comes so late.
        Some(unsafe { Slot::read(slot) })
    }

    #[inline(always)]
    fn backend(&self, index: u32) -> Option<Backend> {
        let backend = BACKENDS.get_ptr(index)?;
        // SAFETY: in bounds. The agent writes a new one only where no set has pointed for a while; a reader with a stale
        // id may meet the writing.
        unsafe { Backend::read(backend) }
    }

    #[inline(always)]
    fn affinity_entry(&self, key: &AffinityKey) -> Option<AffinityEntry> {
        let entry = AFFINITY.get_ptr(key)?;
        // SAFETY: always readable memory. An LRU element may be given to another key while it is read; what is read then
        // does not bear this key's seal.
        Some(unsafe { *entry })
    }

    #[inline(always)]
    fn remember_affinity(&self, key: &AffinityKey, entry: &AffinityEntry) {
        remember(&AFFINITY, key, entry, BPF_ANY);
    }

    #[inline(always)]
    fn datagram_flow(&self, key: &DatagramKey) -> Option<DatagramFlow> {
        let flow = DATAGRAM_FLOWS.get_ptr(key)?;
        // SAFETY: always readable memory; as above, the element may just be changing hands.
        Some(unsafe { *flow })
    }

    #[inline(always)]
    fn remember_datagram_flow(&self, key: &DatagramKey, flow: &DatagramFlow) {
        // Writing through the pointer costs a fifth of an update of an existing key (25 against 137 ns).
        if let Some(stored) = DATAGRAM_FLOWS.get_ptr_mut(key) {
            // SAFETY: always writable memory of the map. If the element changes hands at this moment, or two threads send
            // on one socket, a flow may be mixed up; its seal then tells unless it is one of the same Service.
            unsafe { *stored = *flow };
        } else {
            remember(&DATAGRAM_FLOWS, key, flow, BPF_ANY);
        }
    }

    #[inline(always)]
    fn datagram_origin(&self, key: &DatagramKey) -> Option<DatagramOrigin> {
        let origin = DATAGRAM_ORIGIN.get_ptr(key)?;
        // SAFETY: always readable memory; as above.
        Some(unsafe { *origin })
    }

    #[inline(always)]
    fn remember_datagram_origin(&self, key: &DatagramKey, origin: &DatagramOrigin) {
        remember(&DATAGRAM_ORIGIN, key, origin, BPF_ANY);
    }

    /// The upper half of a 64-bit linear congruential generator (the constants are those of MMIX), seeded by the kernel.
    #[inline(always)]
    fn random(&self) -> u32 {
        let Some(state) = RANDOM.get_ptr_mut(0) else { return 0 };
        // SAFETY: a per-CPU slot. Preempted in between, two connections may draw the same number, no more.
        let mut x = unsafe { *state };
        if x == 0 {
            // SAFETY: no arguments.
            x = unsafe { bpf_get_prandom_u32() } as u64 | 1 << 32;
        }
        x = x.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        // SAFETY: as above.
        unsafe { *state = x };
        (x >> 32) as u32
    }

    /// The clock of the last tick where the kernel has it: reading the other one costs 20 ns.
    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: no arguments.
        if COARSE_CLOCK.load() != 0 {
            unsafe { bpf_ktime_get_coarse_ns() }
        } else {
            unsafe { bpf_ktime_get_ns() }
        }
    }
}
