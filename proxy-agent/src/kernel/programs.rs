//! Loading the programs on the pinned maps, and attaching them without a gap.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::maps::{Map, MapData, MapError, ProgramArray};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{CgroupAttachMode, CgroupSockAddr, Program, SchedClassifier};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfLoader};
use proxy_common::abi::packet::{ACCEPT, EGRESS, FAST, FLOW_PLACES, INGRESS, SNAT_PLACES, VIP_BYTES};
use proxy_common::abi::{
    Address, AffinityEntry, AffinityKey, Backend, DatagramFlow, DatagramKey, DatagramOrigin, Device, Flow,
    FlowKey, FragmentKey, FragmentPorts, FrontendLine, Outcome, PacketSettings, ServiceRecord, Slot, SnatKey,
    SocketOrigin, SocketPlace, SourceRange,
};

use super::{Error, Pins, sys};
use crate::dataplane::{Limits, frontends};
use crate::parallel;

/// The kernel programs and their maps, as built: ELF.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sheave-bpf"));

/// Programs, in the order of attachment: the way back first, so that nobody is translated one way only. By name; the name
/// is also that of the link's pin.
pub const PROGRAMS: [&str; 9] = [
    "sock_release",
    "sock_recvmsg4",
    "sock_recvmsg6",
    "sock_getpeer4",
    "sock_getpeer6",
    "sock_sendmsg4",
    "sock_sendmsg6",
    "sock_connect4",
    "sock_connect6",
];

/// Programs of the packet path that devices are hooked with: those whose frames have a link header, and the others.
pub const CLASSIFIERS: [&str; 4] = ["tc_ingress", "tc_egress", "tc_ingress_bare", "tc_egress_bare"];

/// Programs that go on where those find something of ours, and their places in [`PACKET_PROGRAMS`].
pub const CONTINUATIONS: [(&str, u32); 2] = [("packet_ingress", INGRESS), ("packet_egress", EGRESS)];

/// Those that come before them where packets may skip the stack.
pub const FAST_PATH: [(&str, u32); 2] = [("packet_first", FAST), ("packet_learn", ACCEPT)];

/// The map by which they are found.
const PACKET_PROGRAMS: &str = "PACKET_PROGRAMS";

/// `bpf_set_retval` came with it.
const SET_RETVAL_SINCE: (u8, u8, u16) = (5, 18, 0);

/// `bpf_ktime_get_coarse_ns` came with it.
const COARSE_CLOCK_SINCE: (u8, u8, u16) = (5, 11, 0);

/// A map as the object declares it, for the check of a pin: aya takes any pin, of whatever shape.
struct Shape {
    name: &'static str,
    key_bytes: usize,
    value_bytes: usize,
}

macro_rules! shape {
    ($name:expr, $key:ty, $value:ty) => {
        Shape { name: $name, key_bytes: size_of::<$key>(), value_bytes: size_of::<$value>() }
    };
}

/// Maps that the agent writes and that grow; one set for each generation.
const TABLES: [Shape; 4] = [
    shape!("FRONTENDS", u32, FrontendLine),
    shape!("SERVICES", u32, ServiceRecord),
    shape!("SLOTS", u32, Slot),
    shape!("BACKENDS", u32, Backend),
];

/// Maps that the programs write, and those of the agent that keep their size; shared by all generations.
const STATE: [Shape; 21] = [
    shape!("AFFINITY", AffinityKey, AffinityEntry),
    shape!("DATAGRAM_FLOWS", DatagramKey, DatagramFlow),
    shape!("DATAGRAM_ORIGIN", DatagramKey, DatagramOrigin),
    shape!("SOCKET_PLACES", u32, SocketPlace),
    shape!("SOCKET_ORIGIN", i32, SocketOrigin),
    shape!("COUNTERS", u32, u64),
    shape!("VIPS", u32, [u8; VIP_BYTES]),
    shape!("CLUSTER_IPS", Address, u32),
    shape!("DEVICES", u32, Device),
    shape!("PACKET_SETTINGS", u32, PacketSettings),
    // Before the key of a trie stands the number of bits that count.
    shape!("SOURCE_RANGES", (u32, SourceRange), u32),
    shape!("PACKET_PROGRAMS", u32, u32),
    shape!("FLOW_FILTER", u32, [u8; FLOW_PLACES]),
    shape!("SNAT_PORTS", u32, [u8; SNAT_PLACES]),
    shape!("FLOWS", FlowKey, Flow),
    shape!("YOUNG_FLOWS", FlowKey, Flow),
    shape!("SNAT", SnatKey, FlowKey),
    shape!("YOUNG_SNAT", SnatKey, FlowKey),
    shape!("SEVERAL_VIPS", u32, u32),
    shape!("FRAGMENTS", FragmentKey, FragmentPorts),
    shape!(EPOCH, u32, u32),
];

/// The word that ends what the fast path has learned.
pub const EPOCH: &str = "EPOCH";

/// How many connections the packet path keeps. Their tables do not grow: nothing could be moved while packets write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowLimits {
    /// Whose clients have gone on: `FLOWS`, and `SNAT`.
    pub grown: u32,
    /// Others: `YOUNG_FLOWS`, and `YOUNG_SNAT`.
    pub young: u32,
}

impl FlowLimits {
    /// Two for each connection that is not young; in memory 200 bytes each.
    const fn lanes(self) -> u32 {
        self.grown.saturating_mul(2)
    }
}

/// What the programs are told at load time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Cookie of the network namespace that is "the node" (B3); 0: the initial one.
    pub host_netns: u64,
    /// Whether the kernel lets a hook choose the error (B2).
    pub set_retval: bool,
    /// Whether the kernel has a clock that costs nothing to read.
    pub coarse_clock: bool,
    /// Whether the programs of the packet path are loaded at all.
    pub packet_path: bool,
    /// Whether packets may skip the stack.
    pub fast_path: bool,
    /// Sizes of tables that are not pinned yet.
    pub flow_limits: FlowLimits,
}

impl Settings {
    /// The agent's own network namespace is the node's.
    ///
    /// # Errors
    /// If the kernel's version cannot be read.
    pub fn of_this_host(packet_path: bool, fast_path: bool, flow_limits: FlowLimits) -> Result<Self, Error> {
        let version = KernelVersion::current().map_err(|error| {
            Error::path("read the kernel version from", "/proc")(std::io::Error::other(error))
        })?;
        let since = |(major, minor, patch)| version >= KernelVersion::new(major, minor, patch);
        Ok(Self {
            host_netns: sys::netns_cookie().unwrap_or(0),
            set_retval: since(SET_RETVAL_SINCE),
            coarse_clock: since(COARSE_CLOCK_SINCE),
            packet_path,
            fast_path,
            flow_limits,
        })
    }
}

/// The programs on pinned maps: in the kernel or not yet, attached or not yet.
pub struct Loaded {
    ebpf: Ebpf,
    pins: Pins,
    settings: Settings,
    has_sockets: bool,
    has_packets: bool,
}

impl Loaded {
    /// Prepares programs for the tables in a directory, which are made with `limits` if they are not pinned there yet. None
    /// is in the kernel after that.
    ///
    /// # Errors
    /// If the kernel refuses, or a pinned map has another shape.
    pub fn prepare(pins: &Pins, tables: &Path, limits: Limits, settings: Settings) -> Result<Self, Error> {
        std::fs::create_dir_all(tables).map_err(Error::path("create", tables))?;
        let state = pins.state();
        let pinned = || {
            TABLES
                .iter()
                .map(|s| (s, tables.join(s.name)))
                .chain(STATE.iter().map(|s| (s, state.join(s.name))))
        };
        for (shape, path) in pinned() {
            check(shape, &path)?;
        }
        let (set_retval, fast_path) = (u32::from(settings.set_retval), u32::from(settings.fast_path));
        let coarse_clock = u32::from(settings.coarse_clock);
        let mut loader = EbpfLoader::new();
        // None of these programs needs the kernel's BTF: parsing it costs 17 ms and 16 MB.
        loader
            .btf(None)
            .override_global("HOST_NETNS", &settings.host_netns, true)
            .override_global("SET_RETVAL", &set_retval, true)
            .override_global("COARSE_CLOCK", &coarse_clock, true)
            .override_global("FAST_PATH", &fast_path, true)
            .map_max_entries("LANES", if settings.fast_path { settings.flow_limits.lanes() } else { 1 })
            .map_max_entries("FRONTENDS", frontends::places(limits.frontends))
            .map_max_entries("SERVICES", limits.services)
            .map_max_entries("SLOTS", limits.slots)
            .map_max_entries("BACKENDS", limits.backends)
            .map_max_entries("FLOWS", settings.flow_limits.grown)
            .map_max_entries("SNAT", settings.flow_limits.grown)
            .map_max_entries("YOUNG_FLOWS", settings.flow_limits.young)
            .map_max_entries("YOUNG_SNAT", settings.flow_limits.young);
        for (shape, path) in pinned() {
            loader.map_pin_path(shape.name, path);
        }
        let ebpf = loader.load(OBJECT)?;
        Ok(Self { ebpf, pins: pins.clone(), settings, has_sockets: false, has_packets: false })
    }

    /// Whether any of them is in the kernel.
    pub const fn is_loaded(&self) -> bool {
        self.has_sockets || self.has_packets
    }

    /// Loads what is not in the kernel yet.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn load(&mut self) -> Result<(), Error> {
        self.load_these(true, self.settings.packet_path)
    }

    /// Loads only what serves sockets.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_for_sockets(&mut self) -> Result<(), Error> {
        self.load_these(true, false)
    }

    fn load_these(&mut self, sockets: bool, packets: bool) -> Result<(), Error> {
        let (sockets, packets) = (sockets && !self.has_sockets, packets && !self.has_packets);
        let fast: &[_] = if self.settings.fast_path { &FAST_PATH } else { &[] };
        let continuations: Vec<_> = CONTINUATIONS.iter().chain(fast).copied().collect();
        let mut wanted = Vec::new();
        if packets {
            // These take longest.
            wanted.extend(continuations.iter().map(|(name, _)| *name).chain(CLASSIFIERS));
        }
        if sockets {
            wanted.extend(PROGRAMS);
        }
        load_all(&mut self.ebpf, &wanted)?;
        if packets {
            place(&mut self.ebpf, &continuations)?;
        }
        self.has_sockets |= sockets;
        self.has_packets |= packets;
        Ok(())
    }

    /// One of [`CLASSIFIERS`].
    pub(super) fn classifier(&self, name: &'static str) -> Result<&SchedClassifier, Error> {
        let program = self.ebpf.program(name).ok_or(Error::NoProgram(name))?;
        program.try_into().map_err(|source| Error::Program { action: "use", program: name, source })
    }

    /// Where it pins.
    pub(super) const fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Attaches every program to the cgroup, or replaces the program of a link that a former run pinned: at no moment
    /// is a hook without a program. Returns how many links were made and how many were updated.
    ///
    /// # Errors
    /// At the first program that cannot be attached; those before it are.
    pub fn attach(&mut self, cgroup: &Path) -> Result<(usize, usize), Error> {
        let directory = File::open(cgroup).map_err(Error::path("open cgroup", cgroup))?;
        let cgroup_id = directory.metadata().map_err(Error::path("read", cgroup))?.ino();
        let (mut made, mut updated) = (0, 0);
        for name in PROGRAMS {
            let pin = self.pins.links().join(name);
            let program = program(&mut self.ebpf, name)?;
            if pin.exists() && update(&pin, program, cgroup_id, name)? {
                updated += 1;
                continue;
            }
            let link = link(program, name, &directory)?;
            let _pinned: PinnedLink = link.pin(&pin).map_err(|error| Error::Link {
                action: "pin",
                program: name,
                source: std::io::Error::other(error),
            })?;
            made += 1;
        }
        Ok((made, updated))
    }
}

/// Opens a map that is pinned in the directory of some tables, or of the state.
///
/// # Errors
/// If it is not pinned there.
pub fn open_pinned(directory: &Path, name: &'static str) -> Result<MapData, Error> {
    MapData::from_pin(directory.join(name)).map_err(|source| Error::Map { map: name, source })
}

/// Sums of the per-CPU counters, in the order of [`Outcome::ALL`].
///
/// # Errors
/// If the map is not pinned or cannot be read.
pub fn counters(pins: &Pins) -> Result<Vec<(&'static str, u64)>, Error> {
    const NAME: &str = "COUNTERS";
    let error = |source| Error::Map { map: NAME, source };
    let map = Map::from_map_data(open_pinned(&pins.state(), NAME)?).map_err(error)?;
    let counters: aya::maps::PerCpuArray<_, u64> = map.try_into().map_err(error)?;
    let sum = |(index, outcome): (u32, &Outcome)| -> Result<_, Error> {
        // Pinned by an older agent, which did not know it.
        if index >= counters.len() {
            return Ok((outcome.name(), 0));
        }
        let values = counters.get(&index, 0).map_err(error)?;
        Ok((outcome.name(), values.iter().sum()))
    };
    (0..).zip(Outcome::ALL).map(sum).collect()
}

/// Links that are pinned, with the cgroup each is attached to: `None` if that cgroup is gone, and the link attached to
/// nothing.
pub fn links(pins: &Pins) -> Vec<(&'static str, Option<u64>)> {
    let read = |name: &'static str| {
        let link = sys::object_get(&pins.links().join(name)).ok()?;
        Some((name, sys::link_cgroup(link.as_fd()).ok().filter(|id| *id != 0)))
    };
    PROGRAMS.into_iter().filter_map(read).collect()
}

/// Loads a program of any type that ours have.
///
/// # Errors
/// If the verifier says no.
pub fn load(program: &mut Program, name: &'static str) -> Result<(), Error> {
    let load = |source| Error::Program { action: "load", program: name, source };
    if let Program::CgroupSock(program) = program {
        return program.load().map_err(load);
    }
    if let Program::SchedClassifier(program) = program {
        return program.load().map_err(load);
    }
    hook(program, name)?.load().map_err(load)
}

/// The verifier takes memory for each program that it walks: on a node of many CPUs not for all at once.
const LOADED_AT_ONCE_MAX: usize = 4;

/// Loads programs, several at a time and in this order: the verifier takes a second for all, and walks each by itself.
fn load_all(ebpf: &mut Ebpf, wanted: &[&'static str]) -> Result<(), Error> {
    if let Some(name) = wanted.iter().find(|name| ebpf.program(name).is_none()) {
        return Err(Error::NoProgram(name));
    }
    let place = |name: &str| wanted.iter().position(|wanted| *wanted == name);
    let mut programs: Vec<_> =
        ebpf.programs_mut().filter_map(|(name, program)| Some((place(name)?, program))).collect();
    programs.sort_by_key(|(place, _)| *place);
    let programs = wanted.iter().zip(programs).collect();
    let load = |(name, (_, program)): (&&'static str, (usize, &mut Program))| load(program, name);
    parallel::map(programs, LOADED_AT_ONCE_MAX, load).into_iter().collect()
}

/// Gives [`CONTINUATIONS`] and, if they are among these, [`FAST_PATH`] their places. From here on the hooks of a former run
/// go on with them; both versions find the same packets in the same tables.
fn place(ebpf: &mut Ebpf, continuations: &[(&'static str, u32)]) -> Result<(), Error> {
    let map_error = |source| Error::Map { map: PACKET_PROGRAMS, source };
    let mut programs = Vec::new();
    for (name, place) in continuations {
        let used = |source| Error::Program { action: "use", program: name, source };
        let fd = program(ebpf, name)?.fd().map_err(used)?;
        programs.push((*place, fd.try_clone().map_err(|error| used(error.into()))?));
    }
    let map = ebpf.map_mut(PACKET_PROGRAMS).ok_or(Error::NoProgram(PACKET_PROGRAMS))?;
    let mut places = ProgramArray::try_from(map).map_err(map_error)?;
    for (place, program) in &programs {
        places.set(*place, program, 0).map_err(map_error)?;
    }
    // The hooks of a former run go on without what is not wanted any more.
    for (_, place) in FAST_PATH.into_iter().filter(|unwanted| !continuations.contains(unwanted)) {
        match places.clear_index(&place) {
            Err(MapError::SyscallError(error)) if error.io_error.kind() == ErrorKind::NotFound => {}
            result => result.map_err(map_error)?,
        }
    }
    Ok(())
}

/// Attaches one of [`PROGRAMS`].
fn link(program: &mut Program, name: &'static str, cgroup: &File) -> Result<FdLink, Error> {
    let attach = |source| Error::Program { action: "attach", program: name, source };
    let convert =
        |error| Error::Link { action: "convert", program: name, source: std::io::Error::other(error) };
    // Links always are of the "multi" kind; asking for it by flag is refused (EINVAL).
    let mode = CgroupAttachMode::Single;
    if let Program::CgroupSock(program) = program {
        let id = program.attach(cgroup, mode).map_err(attach)?;
        return program.take_link(id).map_err(attach)?.try_into().map_err(convert);
    }
    let program = hook(program, name)?;
    let id = program.attach(cgroup, mode).map_err(attach)?;
    program.take_link(id).map_err(attach)?.try_into().map_err(convert)
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Program, Error> {
    ebpf.program_mut(name).ok_or(Error::NoProgram(name))
}

/// All but one of [`PROGRAMS`] are of this type.
fn hook<'a>(program: &'a mut Program, name: &'static str) -> Result<&'a mut CgroupSockAddr, Error> {
    program.try_into().map_err(|source| Error::Program { action: "use", program: name, source })
}

/// Puts the program into a pinned link. `false`: the link is of another cgroup, or of one that is gone; it was removed.
fn update(pin: &Path, program: &Program, cgroup_id: u64, name: &'static str) -> Result<bool, Error> {
    let error = |action| move |source| Error::Link { action, program: name, source };
    let link = sys::object_get(pin).map_err(error("open"))?;
    if sys::link_cgroup(link.as_fd()).map_err(error("inspect"))? != cgroup_id {
        tracing::warn!(
            program = name,
            "its link is attached to another cgroup, or to one that is gone; replacing it"
        );
        // Removing the pin detaches it too, only later; before 5.9 that is the only way.
        let _ = sys::link_detach(link.as_fd());
        std::fs::remove_file(pin).map_err(error("remove"))?;
        return Ok(false);
    }
    let fd = program.fd().map_err(|source| Error::Program { action: "use", program: name, source })?;
    sys::link_update(link.as_fd(), fd.as_fd()).map_err(error("update"))?;
    Ok(true)
}

fn check(shape: &Shape, path: &PathBuf) -> Result<(), Error> {
    if !path.exists() {
        return Ok(());
    }
    let error = |source| Error::Map { map: shape.name, source };
    let info = MapData::from_pin(path).map_err(error)?.info().map_err(error)?;
    for (what, found, needed) in [
        ("a key size of", info.key_size(), shape.key_bytes),
        ("a value size of", info.value_size(), shape.value_bytes),
    ] {
        let found = found as usize;
        if found != needed {
            return Err(Error::Shape { path: path.clone(), what, found, needed });
        }
    }
    Ok(())
}
