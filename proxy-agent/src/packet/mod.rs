//! The agent's side of the packet path: hooks on devices, and the tables that only packets need.
//!
//! * [`roles`], [`settings`], `counted`: what is wanted. Pure.
//! * `vips`: the addresses that packets are looked at for.
//! * [`flows`]: upkeep of connections, on a thread of its own.
//! * [`fast`]: when what the fast path has learned is to be learned again.
//! * here: wanted minus written, in an order that is safe at every moment: what a hook needs to know is there before
//!   the hook.
//!
//! Only what succeeded is remembered, so what failed is found again by the next comparison. None of it holds up the
//! programming of Services.

mod ageing;
mod counted;
pub mod fast;
pub mod flows;
pub mod roles;
pub mod settings;
mod turnover;
mod vips;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use proxy_common::abi::packet::PREFIXES;
use proxy_common::abi::{Address, Device, FrontendKey, PacketSettings, Protocol, ServiceId};
use serde::Serialize;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use self::flows::{Flows, Owners, Report, Upkeep};
use self::roles::{Place, Role};
use self::settings::SnatPorts;
use self::vips::Vips;
use crate::kernel::devices::{self, Hooks, LinkHeader};
use crate::kernel::programs::{FlowLimits, open_pinned};
use crate::kernel::table::{Table, io_error};
use crate::kernel::{self, Loaded, Pins};
use crate::model::Model;
use crate::object::{Family, ObjectKey};
use crate::served::Served;
use crate::source::links::Link;
use crate::takeover::{Foreign, Known, Watch, rules::Rules};

/// How long what failed waits before it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What the operator says about the packet path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Ports of replaced sources.
    pub snat_ports: SnatPorts,
    /// Sizes of the tables of connections, unless they are pinned already.
    pub flow_limits: FlowLimits,
    /// How often the tables of connections are looked through.
    pub sweep_every: Duration,
    /// Whether kube-proxy's rules go.
    pub take_over: bool,
    /// How programs are put on devices.
    pub hooks: Hooks,
    /// Whether packets may skip the stack.
    pub fast_path: bool,
}

/// See the module.
pub struct PacketPath {
    pins: Pins,
    options: Options,
    vips: Vips,
    settings: Array<MapData, PacketSettings>,
    settings_written: PacketSettings,
    devices: Table<u32, Device>,
    devices_written: BTreeMap<u32, Device>,
    /// [`Model::renewed`] when settings and devices were last compared.
    renewed: Option<u64>,
    links: Option<Vec<Link>>,
    /// Whether hooks may not be where they belong.
    hooks_due: bool,
    places: BTreeMap<u32, Place>,
    /// Devices that the programs in use are on.
    hooked: BTreeSet<u32>,
    /// Devices that may have a pin: those, and where hooking failed or came too late.
    pinned: BTreeSet<u32>,
    /// Whether the hooks that a former run left were looked through.
    adopted: bool,
    /// What could not be done, and why. It is tried again.
    failed: BTreeMap<String, String>,
    retry: Option<Instant>,
    /// C2: frontends that changed hands and whose new owner has no serving endpoint yet (C3).
    waiting: BTreeMap<ServiceId, BTreeSet<FrontendKey>>,
    told: BTreeSet<String>,
    upkeep: Upkeep,
    reports: UnboundedReceiver<Report>,
    /// Whether what begins is left to the kube-proxy that is there, until what it has is seeded.
    leave_new: bool,
    /// Whether no hooks were there before.
    fresh: bool,
    /// Whether [`Self::take_over`] is still to come.
    takeover_due: bool,
    /// Looks after the connections of a kube-proxy.
    watch: Option<Watch>,
    /// See [`Self::given_way`].
    given_way: u64,
}

/// A device in `sheave status`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DeviceView {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// What it is to the packet path.
    pub role: &'static str,
    /// Whether both programs are on it.
    pub hooked: bool,
    /// The sources that packets leaving by it get when theirs is replaced (M7).
    pub sources: Vec<IpAddr>,
}

impl PacketPath {
    /// Opens what [`Loaded::prepare`] pinned, and reads what is written. Changes nothing.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn open(pins: &Pins, options: Options) -> Result<Self, kernel::Error> {
        let error = |map| move |source| kernel::Error::Map { map, source };
        let settings = open_pinned(&pins.state(), "PACKET_SETTINGS")?;
        let settings: Array<MapData, PacketSettings> =
            Map::from_map_data(settings).and_then(TryInto::try_into).map_err(error("PACKET_SETTINGS"))?;
        let settings_written = settings.get(&0, 0).map_err(error("PACKET_SETTINGS"))?;
        let devices: Table<u32, Device> = Table::open(&pins.state(), "DEVICES")?;
        let read = |what| kernel::Error::path("read", pins.state().join(what));
        let devices_written = devices.entries().map_err(read("DEVICES"))?.into_iter().collect();
        let (to, reports) = unbounded_channel();
        let flows = Flows::open(pins)?;
        flows.tell_sizes(options.flow_limits);
        let upkeep = Upkeep::start(flows, ageing::Filters::open(pins)?, options.sweep_every, to);
        // A run that ended halfway begins anew.
        let halfway = settings_written.flags & PacketSettings::LEAVE_NEW != 0;
        let fresh = halfway || !devices::hooked(pins)?.values().any(|hooked| *hooked);
        Ok(Self {
            pins: pins.clone(),
            options,
            vips: Vips::open(pins)?,
            settings,
            settings_written,
            devices,
            devices_written,
            renewed: None,
            links: None,
            hooks_due: true,
            places: BTreeMap::new(),
            hooked: BTreeSet::new(),
            pinned: BTreeSet::new(),
            adopted: false,
            failed: BTreeMap::new(),
            retry: None,
            waiting: BTreeMap::new(),
            told: BTreeSet::new(),
            upkeep: upkeep
                .map_err(kernel::Error::path("start the thread for", pins.state().join("FLOWS")))?,
            reports,
            leave_new: fresh && Rules::may_exist(),
            fresh,
            takeover_due: true,
            watch: None,
            given_way: 0,
        })
    }

    /// Whether the devices are known. Before that the first sync must not be called done.
    pub const fn ready(&self) -> bool {
        self.links.is_some()
    }

    /// Takes in the list of devices.
    pub fn set_links(&mut self, links: Vec<Link>) {
        // A device that was replaced by another of the same index needs new hooks.
        let known: BTreeMap<u32, &Link> =
            self.links.iter().flatten().map(|link| (link.index, link)).collect();
        let replaced =
            links.iter().filter(|link| known.get(&link.index).is_none_or(|old| !old.is_same(link)));
        for link in replaced {
            self.hooked.remove(&link.index);
        }
        self.links = Some(links);
        self.renewed = None;
    }

    /// The next walk's report; pending for ever if there is none.
    pub async fn report(&mut self) -> Report {
        match self.reports.recv().await {
            Some(report) => report,
            None => std::future::pending().await,
        }
    }

    /// Takes in a walk's report. Hooks that somebody took off are put on again by the next [`Self::hook`].
    pub fn take_report(&mut self, report: &Report) -> usize {
        match devices::hooked(&self.pins) {
            Ok(pinned) => {
                let before = self.hooked.len();
                self.hooked.retain(|index| pinned.get(index) == Some(&true));
                self.hooks_due |= self.hooked.len() != before;
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "hooks cannot be looked after")
            }
        }
        self.given_way = report.given_way;
        if report.to_hand_over
            && let Some(watch) = &self.watch
        {
            watch.hand_over_due();
        }
        self.vips.clear_unused(report)
    }

    /// C2: what netfilter's NAT has of these VIPs follows who serves them. Not to nobody (C3).
    pub fn served(&self, served: &Served) {
        if let Some(watch) = self.watch.as_ref().filter(|watch| watch.owns_any()) {
            watch.served(served.clone());
        }
    }

    /// When something that failed is to be tried again.
    pub const fn retry(&self) -> Option<Instant> {
        self.retry
    }

    /// Writes settings and what hooks need to know of their devices, if they changed; before anything else of a sync.
    /// Returns the number of writes.
    pub fn prepare(&mut self, model: &Model) -> usize {
        if self.retry.is_some_and(|at| at <= Instant::now()) {
            self.retry = None;
            self.renewed = None;
        }
        let mut writes = self.vips.write_cluster_ips();
        self.note("CLUSTER_IPS", self.vips.failure.clone());
        if self.renewed == Some(model.renewed()) {
            return writes;
        }
        self.renewed = Some(model.renewed());
        self.vips.set_node(model);
        writes += self.vips.write_cluster_ips();
        if let Some(links) = &self.links {
            self.places = roles::places(links, &model.facts().primary, &model.context().policy.detect_local);
        }
        writes += self.write_settings(model);
        let Some(links) = &self.links else { return writes };
        self.hooks_due = true;
        let up: BTreeSet<u32> = links.iter().filter(|link| link.up).map(|link| link.index).collect();
        for (index, place) in &self.places {
            if place.role == Role::Unread && up.contains(index) && self.told.insert(place.name.clone()) {
                tracing::warn!(
                    device = place.name,
                    "its frames have a link header that is not read: packets to Services that come in or leave by it are not served"
                );
            }
        }
        let wanted: Vec<(u32, Device)> = self
            .places
            .iter()
            .filter(|(_, place)| place.role.is_known())
            .map(|(index, place)| (*index, place.device))
            .filter(|(index, device)| self.devices_written.get(index) != Some(device))
            .collect();
        let failures: BTreeMap<usize, _> = self.devices.put_all(&wanted).into_iter().collect();
        for (at, (index, device)) in wanted.iter().enumerate() {
            let failure = failures.get(&at);
            if failure.is_none() {
                self.devices_written.insert(*index, *device);
                writes += 1;
            }
            self.note(&format!("DEVICES {index}"), failure.map(ToString::to_string));
        }
        writes
    }

    fn write_settings(&mut self, model: &Model) -> usize {
        let mut wanted = settings::settings(model.facts(), &model.context().policy, self.options.snat_ports);
        if self.leave_new {
            wanted.flags |= PacketSettings::LEAVE_NEW;
        }
        if self.links.is_some() && self.places.values().all(|place| place.device.bridge == 0) {
            wanted.flags |= PacketSettings::NO_BRIDGE_PORTS;
        }
        for (what, ranges) in
            [("pod", &model.facts().local_pod_cidrs), ("service", &model.context().policy.service_cidrs)]
        {
            if ranges.len() > PREFIXES && self.told.insert(format!("{what} ranges")) {
                tracing::warn!(
                    used = PREFIXES,
                    given = ranges.len(),
                    "too many {what} ranges: the last ones are ignored"
                );
            }
        }
        if wanted == self.settings_written {
            return 0;
        }
        let result = self.settings.set(0, wanted, 0).map_err(io_error);
        self.note("PACKET_SETTINGS", result.as_ref().err().map(ToString::to_string));
        if result.is_err() {
            return 0;
        }
        self.settings_written = wanted;
        1
    }

    /// Brings the hooks to where they belong. What their programs need is written. Returns the number of writes.
    pub fn hook(&mut self, loaded: &Loaded) -> usize {
        if !std::mem::take(&mut self.hooks_due) {
            return 0;
        }
        let mut writes = 0;
        let wanted: BTreeMap<u32, (String, LinkHeader)> = self
            .places
            .iter()
            .filter(|(index, place)| place.role.is_hooked() && self.devices_written.contains_key(index))
            .map(|(index, place)| (*index, (place.name.clone(), place.role.link_header())))
            .collect();
        for index in self.misplaced(&wanted) {
            match devices::unhook(&self.pins, index) {
                Ok(()) => {
                    writes += 1;
                    self.hooked.remove(&index);
                    self.pinned.remove(&index);
                    self.note(&format!("device {index}"), None);
                }
                Err(error) => self.note(&format!("device {index}"), Some(with_causes(&error))),
            }
        }
        // What failed for a device that is gone has come to its end.
        let known = |index: &u32| wanted.contains_key(index) || self.devices_written.contains_key(index);
        self.failed.retain(|what, _| of_device(what).is_none_or(|index| known(&index)));
        for (index, (name, header)) in &wanted {
            if self.hooked.contains(index) {
                continue;
            }
            self.pinned.insert(*index);
            let failure = match loaded.hook(*index, *header, self.options.hooks) {
                Ok(Some(made)) => {
                    if self.places.get(index).is_some_and(|place| place.role == Role::Loopback) {
                        accept_own_source();
                    }
                    if made > 0 {
                        tracing::info!(device = name, index, "hooked");
                    }
                    writes += made;
                    self.hooked.insert(*index);
                    None
                }
                // It has gone; the next list says so.
                Ok(None) => None,
                Err(error) => Some(with_causes(&error)),
            };
            self.note(&format!("device {index}"), failure);
        }
        let is_known = |index: &&u32| self.places.get(index).is_some_and(|place| place.role.is_known());
        let gone: Vec<u32> = self.devices_written.keys().filter(|index| !is_known(index)).copied().collect();
        for index in gone {
            let result = self.devices.remove(&index);
            self.note(&format!("DEVICES {index}"), result.as_ref().err().map(ToString::to_string));
            if result.is_ok() {
                self.devices_written.remove(&index);
                writes += 1;
            }
        }
        writes
    }

    /// After the first hooks: leaves to a kube-proxy what it has, and nothing else. Returns the number of writes.
    pub fn take_over(&mut self, model: &Model, known: &impl Known) -> usize {
        if !std::mem::take(&mut self.takeover_due) {
            return 0;
        }
        let warn = |error: &(dyn std::error::Error + 'static)| {
            tracing::warn!(error, "connections that another proxy made, if any, are not looked after");
        };
        let mut foreign =
            Foreign::open(&self.pins, self.options.snat_ports).inspect_err(|error| warn(error)).ok();
        let mut seed = || match foreign.as_mut().map(|foreign| foreign.seed(known)) {
            Some(Ok(seeded)) if seeded > 0 => {
                tracing::info!(datagram_flows = seeded, "another proxy's connections are left alone");
            }
            Some(Err(error)) => warn(&error),
            Some(Ok(_)) | None => {}
        };
        if self.leave_new {
            seed();
        }
        // Whatever came of it: what begins is nobody's before.
        self.leave_new = false;
        let writes = self.write_settings(model);
        if self.fresh {
            // What began meanwhile; and what was there, if nobody is left to make more.
            seed();
        }
        if let Some(foreign) = foreign {
            let watch = Watch::start(foreign, self.options.take_over, self.options.sweep_every);
            self.watch = watch.inspect_err(|error| warn(error)).ok();
        }
        writes
    }

    /// Hooks on devices that should have none, or that are gone. The first time, those that a former run left too.
    fn misplaced<T>(&mut self, wanted: &BTreeMap<u32, T>) -> Vec<u32> {
        if !self.adopted {
            match devices::hooked(&self.pins) {
                Ok(pinned) => {
                    self.pinned.extend(pinned.keys());
                    self.adopted = true;
                }
                Err(error) => self.note("links", Some(with_causes(&error))),
            }
        }
        self.pinned.iter().filter(|index| !wanted.contains_key(index)).copied().collect()
    }

    /// Puts the programs of another generation on every hooked device.
    ///
    /// # Errors
    /// The first device that could not be switched.
    pub fn switch(&mut self, loaded: &Loaded) -> Result<(), kernel::Error> {
        for index in self.hooked.clone() {
            let header =
                self.places.get(&index).map_or(LinkHeader::Ethernet, |place| place.role.link_header());
            if loaded.hook(index, header, self.options.hooks)?.is_none() {
                self.hooked.remove(&index);
            }
        }
        Ok(())
    }

    /// A Service is about to be programmed. Returns the number of writes.
    pub fn announce(&mut self, key: &ObjectKey, vips: BTreeSet<IpAddr>, model: &Model) -> usize {
        let service = model.service(key).filter(|service| service.proxied);
        let cluster_ips = service.map(|service| {
            Family::ALL.into_iter().filter_map(|family| *service.cluster_ip.get(family)).collect()
        });
        self.vips.announce(key, vips, cluster_ips.unwrap_or_default())
    }

    /// Services are programmed. With `full`, they are all that there are. Returns the number of writes.
    pub fn settle<'a>(&mut self, services: impl IntoIterator<Item = &'a ObjectKey>, full: bool) -> usize {
        let writes = self.vips.settle(services, full);
        self.note("CLUSTER_IPS", self.vips.failure.clone());
        writes
    }

    /// C2: these datagram frontends belong to another service port than before.
    pub fn moved(&mut self, frontends: impl IntoIterator<Item = (FrontendKey, ServiceId)>) {
        for (key, service) in frontends {
            if key.protocol() == Protocol::Udp.number() {
                self.waiting.entry(service).or_default().insert(key);
            }
        }
    }

    /// C3: flows of former owners go once the present one has a serving endpoint. `services` are those that were just
    /// programmed; `owner` says who has a frontend now.
    pub fn purge(
        &mut self,
        services: impl IntoIterator<Item = ServiceId>,
        serves: impl Fn(ServiceId) -> bool,
        owner: impl Fn(&FrontendKey) -> Option<ServiceId>,
    ) {
        if self.waiting.is_empty() {
            return;
        }
        let mut owners = Owners::new();
        for service in services {
            if self.waiting.contains_key(&service) && serves(service) {
                let frontends = self.waiting.remove(&service).unwrap_or_default();
                // It may have changed hands again, and then it waits under another id.
                let still_its = frontends.into_iter().filter(|key| owner(key) == Some(service));
                owners.extend(still_its.map(|key| ((key.address(), key.port()), service)));
            }
        }
        if !owners.is_empty() {
            self.upkeep.purge(owners);
        }
    }

    /// What could not be done, by what it is about.
    pub const fn failed(&self) -> &BTreeMap<String, String> {
        &self.failed
    }

    /// How many young connections gave way to newer ones since the agent started, as of the last walk.
    pub const fn given_way(&self) -> u64 {
        self.given_way
    }

    /// How programs are put on devices.
    pub const fn hooks(&self) -> Hooks {
        self.options.hooks
    }

    /// Every device with its role.
    pub fn device_views(&self) -> Vec<DeviceView> {
        let view = |(index, place): (&u32, &Place)| DeviceView {
            index: *index,
            name: place.name.clone(),
            role: place.role.name(),
            hooked: self.hooked.contains(index),
            sources: [place.device.v4, place.device.v6]
                .into_iter()
                .filter(|source| place.role.is_hooked() && *source != Address::default())
                .map(|source| source.ip())
                .collect(),
        };
        self.places.iter().map(view).collect()
    }

    /// Remembers a failure and says it once; `None`: it is well.
    fn note(&mut self, what: &str, failure: Option<String>) {
        match failure {
            Some(error) => {
                if self.failed.get(what) != Some(&error) {
                    tracing::error!(what, error, "the packet path is not as wanted; trying again");
                }
                self.failed.insert(what.to_owned(), error);
                self.retry.get_or_insert(Instant::now() + RETRY);
            }
            None => {
                if self.failed.remove(what).is_some() {
                    tracing::info!(what, "done at last");
                }
            }
        }
    }
}

/// The index, if it is a device that something is about.
fn of_device(what: &str) -> Option<u32> {
    what.strip_prefix("device ").or_else(|| what.strip_prefix("DEVICES "))?.parse().ok()
}

fn with_causes(error: &kernel::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Lets the loopback device take in what has one of the node's own addresses as its source: the replies that the node's
/// clients of its own NodePorts get. Without it those few clients get none, so failing is worth a line, not more.
fn accept_own_source() {
    const PATH: &str = "/proc/sys/net/ipv4/conf/lo/accept_local";
    if std::fs::read_to_string(PATH).is_ok_and(|value| value.trim() == "1") {
        return;
    }
    if let Err(error) = std::fs::write(PATH, "1") {
        tracing::warn!(path = PATH, %error, "cannot be set to 1");
    }
}
