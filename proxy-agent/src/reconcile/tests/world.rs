//! Random worlds of wanted service ports, and what a client may meet while the kernel goes from one to the next.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;
use proxy_common::abi::{
    BackendState, ClientKey, FrontendKey, FrontendKind, FrontendValue, Origin, Port, SetWord, WhenEmpty,
    WhichSet,
};
use proxy_common::decide::{self, Client, Connect, Tables};

use crate::dataplane::Dataplane;
use crate::dataplane::memory::Memory;
use crate::object::{Family, ObjectKey, Protocol};
use crate::reconcile::ranges::Range;
use crate::reconcile::{WantedPort, WantedService};
use crate::resolve::ServicePortKey;

/// All that is wanted at one moment.
#[derive(Clone, PartialEq, Eq, Default)]
pub(super) struct World(pub(super) BTreeMap<ServicePortKey, WantedPort>);

/// One line for each service port: what proptest prints of a failure must fit into a head.
impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for port in self.0.values() {
            write!(f, "\n  {} ", port.key)?;
            for (key, value) in &port.frontends {
                let local = Origin::ALL.map(|origin| u8::from(value.set_for(origin) == WhichSet::Local));
                write!(f, "{:?}{local:?} ", key.address())?;
            }
            write!(f, "->")?;
            for (address, state) in &port.endpoints {
                let flag = |set, name| if set { name } else { "" };
                let (cluster, local) = (flag(state.cluster, "C"), flag(state.local, "L"));
                write!(f, " {}{cluster}{local}{}", address.ip(), flag(state.serving, "S"))?;
            }
            let sets = (port.uses_cluster_set, port.uses_local_set);
            write!(f, " sets {sets:?} {:?} {:?}", port.when_empty, port.affinity_timeout_s)?;
        }
        Ok(())
    }
}

const SERVICES: [&str; 3] = ["a", "b", "c"];
const PORTS: [&str; 2] = ["", "web"];
/// VIPs that may belong to anybody: the first four are cluster IPs.
const VIPS: u8 = 7;

pub(super) fn port_key(service: &str, port: &str) -> ServicePortKey {
    ServicePortKey {
        service: ObjectKey::new("ns", service),
        port_name: port.into(),
        protocol: Protocol::Tcp,
        family: Family::V4,
    }
}

pub(super) fn frontend(vip: u8) -> FrontendKey {
    FrontendKey::new(IpAddr::from([10, 96, 0, vip]).into(), Port::new(80), Protocol::Tcp.number())
}

pub(super) fn endpoint(host: u8) -> SocketAddr {
    SocketAddr::from(([10, 244, 1, host], 8080))
}

pub(super) const READY: BackendState = BackendState { cluster: true, local: false, serving: true };

/// A plain service port: frontends by VIP, all served from the cluster set.
pub(super) fn plain(key: &ServicePortKey, vips: &[u8], hosts: &[u8]) -> WantedPort {
    let value = FrontendValue::new(0, FrontendKind::ClusterIp);
    WantedPort {
        key: key.clone(),
        frontends: vips.iter().map(|vip| (frontend(*vip), value)).collect(),
        endpoints: hosts.iter().map(|host| (endpoint(*host), READY)).collect(),
        uses_cluster_set: true,
        uses_local_set: false,
        when_empty: if hosts.is_empty() { WhenEmpty::Reject } else { WhenEmpty::Drop },
        affinity_timeout_s: None,
        source_ranges: BTreeSet::new(),
    }
}

impl World {
    pub(super) fn of(ports: impl IntoIterator<Item = WantedPort>) -> Self {
        Self(ports.into_iter().map(|port| (port.key.clone(), port)).collect())
    }

    pub(super) fn services(&self) -> BTreeSet<ObjectKey> {
        self.0.keys().map(|key| key.service.clone()).collect()
    }

    pub(super) fn service(&self, key: &ObjectKey) -> WantedService {
        let ports = self.0.values().filter(|port| port.key.service == *key);
        WantedService { key: key.clone(), ports: ports.cloned().collect() }
    }

    /// For a full sync.
    pub(super) fn all(&self) -> Vec<WantedService> {
        self.services().iter().map(|key| self.service(key)).collect()
    }

    /// For an incremental sync: Services that differ, those that are gone too, and `also`.
    pub(super) fn changed_since(&self, old: &Self, also: &BTreeSet<ObjectKey>) -> Vec<WantedService> {
        let keys: BTreeSet<ObjectKey> = self.services().union(&old.services()).cloned().collect();
        let same = |key: &ObjectKey| {
            let ports = |world: &Self| -> Vec<WantedPort> { world.service(key).ports };
            ports(self) == ports(old)
        };
        keys.iter()
            .filter(|key| also.contains(*key) || !same(key))
            .chain(also.difference(&keys))
            .map(|key| self.service(key))
            .collect()
    }

    fn owner(&self, key: &FrontendKey) -> Option<(FrontendValue, &WantedPort)> {
        let owned =
            |port: &WantedPort| port.frontends.iter().find(|(own, _)| own == key).map(|found| found.1);
        self.0.values().find_map(|port| Some((owned(port)?, port)))
    }
}

/// What one client may meet: any of these backends, or what an empty set means.
#[derive(Default, Debug)]
struct Allowed {
    backends: BTreeSet<SocketAddr>,
    when_empty: Vec<WhenEmpty>,
}

fn set(port: &WantedPort, which: WhichSet) -> Option<BTreeSet<SocketAddr>> {
    let used = match which {
        WhichSet::Cluster => port.uses_cluster_set,
        WhichSet::Local => port.uses_local_set,
    };
    let belongs = |state: &BackendState| match which {
        WhichSet::Cluster => state.cluster,
        WhichSet::Local => state.local,
    };
    let members = port.endpoints.iter().filter(|(_, state)| belongs(state)).map(|(address, _)| *address);
    used.then(|| members.collect())
}

/// Between worlds a frontend points to one of its owners, asks for one of the sets that it asks for there, and the
/// owner's set is as in one of the worlds. `None`: not wanted all the time, so there is no promise.
///
/// `adopting`: records have no names in the kernel, so a VIP's new owner may take over the record of the old one.
fn allowed(worlds: &[&World], adopting: bool, key: &FrontendKey, origin: Origin) -> Option<Allowed> {
    let mut allowed = Allowed::default();
    for world in worlds {
        let (value, owner) = world.owner(key)?;
        let same = worlds.iter().filter_map(|other| other.0.get(&owner.key));
        let others = worlds.iter().filter(|_| adopting).filter_map(|other| Some(other.owner(key)?.1));
        for state in same.chain(others) {
            match set(state, value.set_for(origin)) {
                None => {}
                Some(set) if set.is_empty() => allowed.when_empty.push(state.when_empty),
                Some(mut set) => allowed.backends.append(&mut set),
            }
        }
    }
    Some(allowed)
}

/// Asks the decision core from everywhere, and looks at all that it could have chosen.
pub(super) fn check(tables: &Memory, worlds: &[&World], adopting: bool) -> Result<(), TestCaseError> {
    for key in (0..VIPS).map(frontend) {
        for origin in Origin::ALL {
            let Some(allowed) = allowed(worlds, adopting, &key, origin) else { continue };
            let client = || Client { origin, key: ClientKey::netns(1 + origin as u64) };
            let decision = decide::connect(tables, &client, (key.address(), key.port()), Protocol::Tcp);
            let fine = match decision {
                Connect::Forward { to, .. } => {
                    allowed.backends.contains(&SocketAddr::new(to.0.ip(), to.1.number()))
                }
                Connect::Reject => allowed.when_empty.contains(&WhenEmpty::Reject),
                Connect::Drop => allowed.when_empty.contains(&WhenEmpty::Drop),
                Connect::SourceRanges => worlds
                    .iter()
                    .any(|world| world.owner(&key).is_some_and(|(value, _)| value.has_source_ranges())),
                Connect::Untouched | Connect::Contended => false,
            };
            prop_assert!(fine, "{key:?} from {origin:?}: {decision:?}, allowed {allowed:?}");
            let frontend = tables.frontend(&key);
            if frontend.is_none() {
                continue;
            }
            let value = frontend.value;
            if value.has_source_ranges() && !adopting {
                check_ranges(tables, worlds, &key, value)?;
            }
            let word = frontend.set(value.set_for(origin));
            let (reachable, stale) = reachable(tables, word);
            prop_assert!(
                !stale && reachable.is_subset(&allowed.backends),
                "{key:?} from {origin:?}: could reach {reachable:?}, stale {stale}, allowed {allowed:?}"
            );
        }
    }
    Ok(())
}

/// All backends that a set word leads to, and whether it also leads to one that is gone.
pub(super) fn reachable(tables: &Memory, word: SetWord) -> (BTreeSet<SocketAddr>, bool) {
    let mut found = BTreeSet::new();
    let mut stale = false;
    for slot in word.first()..word.first() + word.count() {
        let Some(slot) = Tables::slot(tables, slot) else {
            stale = true;
            continue;
        };
        // Where the slot leads, and whether that is where its backend is.
        let backend = decide::get(tables, slot.id).map(|backend| (backend.address, backend.port));
        stale |= backend.is_none() || backend != slot.peer();
        found.extend(slot.peer().map(|(address, port)| SocketAddr::new(address.ip(), port.number())));
    }
    (found, stale)
}

/// Policies and endpoints of one service port; frontends come on top.
#[derive(Clone, Debug)]
struct Spec {
    internal_local: bool,
    external_local: bool,
    external: bool,
    affinity_timeout_s: Option<u32>,
    /// Clients that external frontends let in; empty: all.
    ranges: BTreeSet<u8>,
    /// Host, whether new connections may reach it, whether it is on this node, whether it serves.
    endpoints: Vec<(u8, bool, bool, bool)>,
}

fn spec() -> impl Strategy<Value = Spec> {
    let flag = prop::bool::weighted(0.3);
    let endpoint = (1..5u8, prop::bool::weighted(0.7), any::<bool>(), prop::bool::weighted(0.8));
    (
        [flag, flag, flag],
        prop::option::weighted(0.3, prop::sample::select(vec![10, 20])),
        prop::option::weighted(0.5, prop::collection::btree_set(0..4u8, 0..3)),
        prop::collection::vec(endpoint, 0..4),
    )
        .prop_map(
            |([internal_local, external_local, external], affinity_timeout_s, ranges, endpoints)| Spec {
                internal_local,
                external_local,
                external,
                affinity_timeout_s,
                ranges: ranges.unwrap_or_default(),
                endpoints,
            },
        )
}

/// Any world: six service ports of three Services, and VIPs dealt out among them.
pub(super) fn world() -> impl Strategy<Value = World> {
    let ports = SERVICES.len() * PORTS.len();
    let owners = prop::collection::vec(prop::option::weighted(0.85, 0..ports), usize::from(VIPS));
    (prop::collection::vec(spec(), ports), owners).prop_map(|(specs, owners)| {
        let port = |(index, spec): (usize, Spec)| {
            let owned = (0..VIPS).zip(&owners).filter(|(_, owner)| **owner == Some(index));
            let (service, name) = (SERVICES[index / PORTS.len()], PORTS[index % PORTS.len()]);
            wanted(&port_key(service, name), spec, owned.map(|(vip, _)| vip).collect())
        };
        World::of(specs.into_iter().enumerate().map(port).filter(|port| !port.frontends.is_empty()))
    })
}

/// A world, and others that mostly differ from the one before in one Service.
pub(super) fn history() -> impl Strategy<Value = Vec<World>> {
    let next = (world(), prop::option::weighted(0.5, prop::sample::select(SERVICES.to_vec())));
    (world(), prop::collection::vec(next, 1..5)).prop_map(|(first, next)| {
        let mut worlds = vec![first];
        for (world, only) in next {
            let previous = worlds.last().cloned().unwrap_or_default();
            worlds.push(match only {
                Some(service) => replace(&previous, &world, service),
                None => world,
            });
        }
        worlds
    })
}

/// One Service as in the new world; frontends that others own stay theirs.
fn replace(old: &World, new: &World, service: &str) -> World {
    let mut world = old.clone();
    world.0.retain(|key, _| key.service.name != service);
    for port in new.0.values().filter(|port| port.key.service.name == service) {
        let mut port = port.clone();
        port.frontends.retain(|(key, _)| world.owner(key).is_none());
        if !port.frontends.is_empty() {
            world.0.insert(port.key.clone(), port);
        }
    }
    world
}

fn range(client: u8) -> Range {
    (IpAddr::from([192, 0, 2, client]).into(), 128)
}

/// F: a guarded frontend lets in what one of its owners lets in: all that it lets in in all worlds, and nothing that it
/// lets in in none of them.
fn check_ranges(
    tables: &Memory,
    worlds: &[&World],
    key: &FrontendKey,
    value: FrontendValue,
) -> Result<(), TestCaseError> {
    let ranges = tables.source_ranges().unwrap();
    let ranges = ranges.iter().filter(|(range, _)| range.service == value.service());
    let let_in: BTreeSet<Range> = ranges.map(|(range, bits)| (range.client, *bits)).collect();
    let mut owners = worlds.iter().filter_map(|world| world.owner(key));
    let fits = |owner: &WantedPort| {
        let states: Vec<_> = worlds
            .iter()
            .map(|world| world.0.get(&owner.key).map_or(BTreeSet::new(), |port| port.source_ranges.clone()))
            .collect();
        let always = states.iter().cloned().reduce(|all, one| &all & &one).unwrap_or_default();
        let ever = states.iter().flatten().copied().collect();
        let_in.is_superset(&always) && let_in.is_subset(&ever)
    };
    let fine = owners.any(|(_, owner)| fits(owner));
    prop_assert!(fine, "{key:?} lets in {let_in:?}");
    Ok(())
}

fn wanted(key: &ServicePortKey, spec: Spec, vips: Vec<u8>) -> WantedPort {
    let is_external = |vip: u8| vip >= 4;
    let external = spec.external || vips.iter().any(|vip| is_external(*vip));
    // P2.
    let uses_cluster_set = !spec.internal_local || external;
    let uses_local_set = spec.internal_local || (spec.external_local && external);
    let value = |vip: u8| {
        let (kind, local): (_, &[Origin]) = match (is_external(vip), spec.internal_local, spec.external_local)
        {
            (false, true, _) => (FrontendKind::ClusterIp, &Origin::ALL),
            (false, false, _) => (FrontendKind::ClusterIp, &[]),
            (true, _, true) => (FrontendKind::ExternalIp, &[Origin::Elsewhere]),
            (true, _, false) => (FrontendKind::ExternalIp, &[]),
        };
        let guarded = is_external(vip) && !spec.ranges.is_empty();
        let value = FrontendValue::new(0, kind);
        let value = if guarded { value.with_source_ranges() } else { value };
        local.iter().fold(value, |value, origin| value.with_local_set_for(*origin))
    };
    let guarded = vips.iter().any(|vip| is_external(*vip));
    let ranges = spec.ranges.iter().filter(|_| guarded).map(|client| range(*client));
    let source_ranges = ranges.collect();
    let endpoints = spec.endpoints.iter().map(|(host, usable, here, serving)| {
        let state = BackendState {
            cluster: *usable && uses_cluster_set,
            local: *usable && uses_local_set && *here,
            serving: *serving,
        };
        (endpoint(*host), state)
    });
    let any = spec.endpoints.iter().any(|(_, usable, _, _)| *usable);
    WantedPort {
        key: key.clone(),
        frontends: vips.into_iter().map(|vip| (frontend(vip), value(vip))).collect(),
        endpoints: endpoints.filter(|(_, state)| state.in_a_set() || state.serving).collect(),
        uses_cluster_set,
        uses_local_set,
        when_empty: if any { WhenEmpty::Drop } else { WhenEmpty::Reject },
        affinity_timeout_s: spec.affinity_timeout_s,
        source_ranges,
    }
}
