//! The state that sources report: Services, slices, the own node. Pure; what changed is marked and taken in one go.

mod store;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use self::store::Store;
use crate::object::{Change, Delta, Node, ObjectKey, Problem, Service, Slice};
use crate::resolve::{Context, NodeFacts, Policy, Resolved, resolve};

/// Services whose data, slices or node facts changed. A Service named here may be gone.
pub type Dirty = BTreeSet<ObjectKey>;

/// Where the addresses on this node's interfaces come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OwnAddresses {
    /// From [`Change::OwnAddresses`]; nothing is ready before the first one.
    Reported,
    /// Offline: the own Node's `status.addresses` are taken to be on an interface.
    FromNode,
}

/// Everything that was reported.
#[derive(Debug)]
pub struct Model {
    services: Store<Service>,
    slices: Store<Slice>,
    /// Slices of each Service, also of Services that are not there yet or no more (E3).
    slices_of: HashMap<ObjectKey, Vec<ObjectKey>>,
    nodes: NodeState,
    /// Resources of the API server that are not followed now, and why.
    not_followed: BTreeMap<String, String>,
    own_addresses: OwnAddresses,
    own_addresses_known: bool,
    context: Context,
    facts: NodeFacts,
    /// How often context and facts were renewed.
    renewed: u64,
    dirty: Dirty,
}

/// What is known of the own Node besides its last good state, which the context holds.
#[derive(Debug, Default)]
struct NodeState {
    complete: bool,
    unreadable: BTreeSet<Problem>,
}

impl Model {
    /// Empty. `node_name` may be empty: then nothing is local (E8).
    pub fn new(node_name: impl Into<String>, policy: Policy, own_addresses: OwnAddresses) -> Self {
        let context =
            Context { node_name: node_name.into(), node: None, own_addresses: BTreeSet::new(), policy };
        Self {
            services: Store::default(),
            slices: Store::default(),
            slices_of: HashMap::new(),
            nodes: NodeState::default(),
            not_followed: BTreeMap::new(),
            own_addresses,
            own_addresses_known: own_addresses == OwnAddresses::FromNode,
            facts: NodeFacts::new(&context),
            renewed: 0,
            context,
            dirty: Dirty::new(),
        }
    }

    /// Takes in what a source reports and marks the Services that it changes (S11).
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Mended(object) => self.services.forget_nameless(&object),
            Change::Following { resource, trouble } => match trouble {
                Some(trouble) => drop(self.not_followed.insert(resource, trouble)),
                None => drop(self.not_followed.remove(&resource)),
            },
            Change::Service(delta) => {
                for (key, _) in self.services.apply(delta) {
                    self.dirty.insert(key);
                }
            }
            Change::Slice(delta) => self.apply_slices(delta),
            Change::Node(delta) => self.apply_node(delta),
            Change::OwnAddresses(addresses) => {
                self.own_addresses_known = true;
                if self.own_addresses == OwnAddresses::Reported {
                    self.context.own_addresses = canonical(&addresses);
                    self.renew_facts(false);
                }
            }
        }
    }

    fn apply_slices(&mut self, delta: Delta<Slice>) {
        for (key, old) in self.slices.apply(delta) {
            // E2: a slice whose label changed leaves its old Service and joins the new one.
            if let Some(owner) = old.as_deref().and_then(owner) {
                if let Some(keys) = self.slices_of.get_mut(&owner) {
                    keys.retain(|other| *other != key);
                    if keys.is_empty() {
                        self.slices_of.remove(&owner);
                    }
                }
                self.mark(owner);
            }
            if let Some(owner) = self.slices.get(&key).and_then(owner) {
                self.slices_of.entry(owner.clone()).or_insert_with(|| Vec::with_capacity(1)).push(key);
                self.mark(owner);
            }
        }
    }

    /// A Service that is not there needs no work (E3); it is marked when it comes.
    fn mark(&mut self, service: ObjectKey) {
        if self.services.get(&service).is_some() {
            self.dirty.insert(service);
        }
    }

    fn apply_node(&mut self, delta: Delta<Node>) {
        let reads = match delta {
            Delta::List(reads) => {
                self.nodes.complete = true;
                self.nodes.unreadable.clear();
                reads
            }
            Delta::Apply(read) => vec![read],
            // P9: a Node that is gone, from here or from a list, keeps its last state in force.
            Delta::Delete(_) => return,
        };
        for read in reads {
            match read {
                Ok(node) if node.name == self.context.node_name => {
                    self.nodes.unreadable.clear();
                    self.set_node(Arc::unwrap_or_clone(node));
                }
                Ok(_) => {}
                Err(unreadable) => {
                    if unreadable.key.is_none_or(|key| *key.name == *self.context.node_name)
                        && self.nodes.unreadable.len() < store::MAX_NAMELESS
                    {
                        self.nodes.unreadable.insert(unreadable.problem);
                    }
                }
            }
        }
    }

    fn set_node(&mut self, node: Node) {
        if self.own_addresses == OwnAddresses::FromNode {
            self.context.own_addresses = canonical(&node.addresses);
        }
        // P9: of the labels only the zone counts.
        let zone_changed = self.context.node.as_ref().and_then(|old| old.zone.as_ref()) != node.zone.as_ref();
        self.context.node = Some(node);
        self.renew_facts(zone_changed);
    }

    fn renew_facts(&mut self, changed: bool) {
        let facts = NodeFacts::new(&self.context);
        if changed || !facts.same_effect(&self.facts) {
            self.dirty.extend(self.services.keys().cloned());
        }
        self.facts = facts;
        self.renewed += 1;
    }

    /// Changes whenever [`Self::context`] or [`Self::facts`] may have.
    pub const fn renewed(&self) -> u64 {
        self.renewed
    }

    /// Whether every list is complete, so that absence means something (Q1). Nothing may be written before.
    pub fn ready(&self) -> bool {
        self.services.complete && self.slices.complete && self.nodes.complete && self.own_addresses_known
    }

    /// The Services that changed since the last call.
    pub fn take_dirty(&mut self) -> Dirty {
        std::mem::take(&mut self.dirty)
    }

    /// All Services, also those that are not proxied, in no order.
    pub fn services(&self) -> impl Iterator<Item = &ObjectKey> {
        self.services.keys()
    }

    /// One Service, if it is there.
    pub fn service(&self, key: &ObjectKey) -> Option<&Service> {
        self.services.get(key)
    }

    /// What one Service wants now; `None` if it is not there. Empty if it is there and not proxied (S1, S2).
    pub fn resolve(&self, key: &ObjectKey) -> Option<(Vec<Resolved>, Vec<Problem>)> {
        let service = self.services.get(key)?;
        let keys = self.slices_of.get(key).into_iter().flatten();
        let slices = keys.filter_map(|key| self.slices.get(key));
        Some(resolve(service, slices, &self.context, &self.facts))
    }

    /// Node name, own Node, own addresses, options.
    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// What follows from the context for every Service.
    pub const fn facts(&self) -> &NodeFacts {
        &self.facts
    }

    /// What cannot be used in the objects themselves, sorted; what resolving finds is not among it.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems: BTreeSet<Problem> = BTreeSet::new();
        problems.extend(self.services.problems().cloned());
        problems.extend(self.slices.problems().cloned());
        problems.extend(self.nodes.unreadable.iter().cloned());
        problems.extend(self.context.node.iter().flat_map(|node| node.problems.iter().cloned()));
        problems.extend(self.node_problems());
        problems.extend(self.not_followed.iter().map(|(resource, trouble)| Problem {
            object: "API server".to_owned(),
            field: resource.clone(),
            message: format!("not followed: {trouble}"),
        }));
        problems.into_iter().collect()
    }

    /// What is odd about this node as a whole, sorted: what follows from the Node's state and the options (N2, M1), or
    /// that there is no such Node.
    pub fn node_problems(&self) -> Vec<Problem> {
        if !self.nodes.complete {
            return Vec::new();
        }
        let mut problems = self.facts.problems.clone();
        // O4: a wrong name makes every endpoint remote, and nothing else would say so.
        if self.context.node.is_none() {
            problems.push(Problem {
                object: format!("Node {}", self.context.node_name),
                field: String::new(),
                message: "not found: its zone, addresses and pod ranges are not known (P9); if this is not the name of \
                          this node's Node (--node-name), every endpoint counts as remote (O4)"
                    .to_owned(),
            });
            problems.sort();
        }
        problems
    }
}

/// E2.
fn owner(slice: &Slice) -> Option<ObjectKey> {
    let name = slice.service.as_deref().filter(|name| !name.is_empty())?;
    Some(ObjectKey::new(slice.key.namespace.clone(), name))
}

fn canonical(addresses: &[IpAddr]) -> BTreeSet<IpAddr> {
    addresses.iter().map(IpAddr::to_canonical).filter(|address| !address.is_loopback()).collect()
}
