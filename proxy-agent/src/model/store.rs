//! All objects of one kind, each in its last good state.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::object::{Delta, ObjectKey, Problem, Read, Service, Slice};

/// What the store must know of an object.
pub(super) trait Object {
    fn key(&self) -> &ObjectKey;
    /// Whether both program the same (S11); what could not be used may differ.
    fn same_data(&self, other: &Self) -> bool;
    fn problems(&self) -> &[Problem];
}

impl Object for Service {
    fn key(&self) -> &ObjectKey {
        &self.key
    }

    fn same_data(&self, other: &Self) -> bool {
        let Self {
            key,
            created_s,
            proxied,
            cluster_ip,
            ports,
            external_ips,
            load_balancer_ips,
            source_ranges,
            internal_local,
            external_local,
            affinity_timeout_s,
            health_check_node_port,
            problems: _,
        } = self;
        *key == other.key
            && *created_s == other.created_s
            && *proxied == other.proxied
            && *cluster_ip == other.cluster_ip
            && *ports == other.ports
            && *external_ips == other.external_ips
            && *load_balancer_ips == other.load_balancer_ips
            && *source_ranges == other.source_ranges
            && *internal_local == other.internal_local
            && *external_local == other.external_local
            && *affinity_timeout_s == other.affinity_timeout_s
            && *health_check_node_port == other.health_check_node_port
    }

    fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl Object for Slice {
    fn key(&self) -> &ObjectKey {
        &self.key
    }

    fn same_data(&self, other: &Self) -> bool {
        let Self { key, service, family, ports, endpoints, problems: _ } = self;
        *key == other.key
            && *service == other.service
            && *family == other.family
            && *ports == other.ports
            && *endpoints == other.endpoints
    }

    fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

/// Unreadable objects whose name is unknown that are remembered, per kind: where only the next list says that they are
/// gone, a source of junk must not fill the memory. Those beyond are not shown.
pub(super) const MAX_NAMELESS: usize = 100;

/// All objects of one kind.
#[derive(Debug)]
pub(super) struct Store<T> {
    objects: HashMap<ObjectKey, Arc<T>>,
    /// Newest state cannot be read; `objects` has the last good one, if there was one.
    unreadable: BTreeMap<ObjectKey, Problem>,
    nameless: BTreeSet<Problem>,
    /// A list came (Q1).
    pub(super) complete: bool,
}

impl<T> Default for Store<T> {
    fn default() -> Self {
        Self {
            objects: HashMap::new(),
            unreadable: BTreeMap::new(),
            nameless: BTreeSet::new(),
            complete: false,
        }
    }
}

impl<T: Object> Store<T> {
    pub(super) fn get(&self, key: &ObjectKey) -> Option<&T> {
        self.objects.get(key).map(Arc::as_ref)
    }

    /// In no order.
    pub(super) fn keys(&self) -> impl Iterator<Item = &ObjectKey> {
        self.objects.keys()
    }

    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        let objects = self.objects.values().flat_map(|object| object.problems());
        objects.chain(self.unreadable.values()).chain(&self.nameless)
    }

    /// What was said of it is over.
    pub(super) fn forget_nameless(&mut self, object: &str) {
        self.nameless.retain(|problem| problem.object != object);
    }

    /// Returns what really changed, each with the state before.
    pub(super) fn apply(&mut self, delta: Delta<T>) -> Vec<(ObjectKey, Option<Arc<T>>)> {
        let mut changed = Vec::new();
        match delta {
            Delta::List(reads) => {
                self.complete = true;
                self.unreadable.clear();
                self.nameless.clear();
                let mut old = std::mem::take(&mut self.objects);
                for read in reads {
                    self.take_in(read, &mut old, &mut changed);
                }
                // Q7: the only place where absence counts.
                changed.extend(old.into_iter().map(|(key, object)| (key, Some(object))));
            }
            Delta::Apply(read) => self.take_in(read, &mut HashMap::new(), &mut changed),
            Delta::Delete(key) => {
                self.unreadable.remove(&key);
                if let Some(old) = self.objects.remove(&key) {
                    changed.push((key, Some(old)));
                }
            }
        }
        changed
    }

    /// `old` holds what a list has not named yet.
    fn take_in(
        &mut self,
        read: Read<T>,
        old: &mut HashMap<ObjectKey, Arc<T>>,
        changed: &mut Vec<(ObjectKey, Option<Arc<T>>)>,
    ) {
        match read {
            Ok(object) => {
                let key = object.key().clone();
                self.unreadable.remove(&key);
                let before = old.remove(&key).or_else(|| self.objects.remove(&key));
                if !before.as_ref().is_some_and(|before| object.same_data(before)) {
                    changed.push((key.clone(), before));
                }
                self.objects.insert(key, object);
            }
            Err(unreadable) => match unreadable.key {
                Some(key) => {
                    if let Some(last_good) = old.remove(&key) {
                        self.objects.insert(key.clone(), last_good);
                    }
                    self.unreadable.insert(key, unreadable.problem);
                }
                None if self.nameless.len() < MAX_NAMELESS => {
                    self.nameless.insert(unreadable.problem);
                }
                None => {}
            },
        }
    }
}
