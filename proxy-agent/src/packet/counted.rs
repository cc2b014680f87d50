//! Which keys are wanted by at least one Service. A change costs what the changed Service's own keys cost.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;

use crate::object::ObjectKey;

/// See the module. Keys are taken before a Service's frontends are written and given back after they are removed.
#[derive(Debug)]
pub(super) struct Counted<K> {
    by_service: HashMap<ObjectKey, Keys<K>>,
    counts: HashMap<K, u32>,
}

/// All of them are counted. Lists: of most Services that is one key, and there are many Services.
#[derive(Debug)]
struct Keys<K> {
    /// Those that will stay, sorted.
    wanted: Box<[K]>,
    /// Those that will go.
    leaving: Vec<K>,
}

impl<K> Default for Counted<K> {
    fn default() -> Self {
        Self { by_service: HashMap::new(), counts: HashMap::new() }
    }
}

impl<K: Ord + Hash + Copy> Counted<K> {
    /// A Service wants these; what it had before stays until [`Self::give_back`]. Returns keys that nobody wanted before.
    pub(super) fn take(&mut self, service: &ObjectKey, wanted: BTreeSet<K>) -> Vec<K> {
        let mut new = Vec::new();
        if wanted.is_empty() && !self.by_service.contains_key(service) {
            return new;
        }
        let keys = self
            .by_service
            .entry(service.clone())
            .or_insert_with(|| Keys { wanted: Box::default(), leaving: Vec::new() });
        let held: BTreeSet<K> = keys.wanted.iter().chain(&keys.leaving).copied().collect();
        for key in wanted.difference(&held) {
            let count = self.counts.entry(*key).or_default();
            *count += 1;
            if *count == 1 {
                new.push(*key);
            }
        }
        keys.leaving = held.difference(&wanted).copied().collect();
        keys.wanted = wanted.into_iter().collect();
        new
    }

    /// A Service is programmed: what it wants no more is its no more. Returns keys that nobody wants now.
    pub(super) fn give_back(&mut self, service: &ObjectKey) -> Vec<K> {
        let Some(keys) = self.by_service.get_mut(service) else { return Vec::new() };
        let mut free = Vec::new();
        for key in std::mem::take(&mut keys.leaving) {
            if let Some(count) = self.counts.get_mut(&key) {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(&key);
                    free.push(key);
                }
            }
        }
        if keys.wanted.is_empty() {
            self.by_service.remove(service);
        }
        free
    }

    pub(super) fn has(&self, key: &K) -> bool {
        self.counts.contains_key(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("ns", name)
    }

    #[test]
    fn a_key_is_wanted_from_the_first_to_the_last() {
        let mut counted = Counted::default();
        let (a, b) = (key("a"), key("b"));
        assert_eq!(counted.take(&a, BTreeSet::from([1, 2])), [1, 2]);
        assert_eq!(counted.take(&b, BTreeSet::from([2, 3])), [3]);
        assert_eq!(counted.take(&a, BTreeSet::from([1, 2])), [0; 0]);
        // Old and new together until the frontends are written.
        assert_eq!(counted.take(&a, BTreeSet::from([4])), [4]);
        assert!(counted.has(&1) && counted.has(&2) && counted.has(&4));
        assert_eq!(counted.give_back(&a), [1]);
        assert_eq!(counted.give_back(&a), [0; 0]);
        assert_eq!(counted.take(&b, BTreeSet::new()), [0; 0]);
        assert_eq!(counted.give_back(&b), [2, 3]);
        assert!(counted.has(&4) && !counted.has(&2));
        assert_eq!(counted.by_service.len(), 1);
    }

    /// A Service that could not be programmed is not given back, and changes its mind meanwhile.
    #[test]
    fn what_failed_holds_old_and_new() {
        let mut counted = Counted::default();
        let a = key("a");
        counted.take(&a, BTreeSet::from([1]));
        counted.take(&a, BTreeSet::from([2]));
        assert_eq!(counted.take(&a, BTreeSet::from([3])), [3]);
        assert!(counted.has(&1) && counted.has(&2));
        assert_eq!(counted.give_back(&a), [1, 2]);
        assert_eq!(counted.take(&a, BTreeSet::new()), [0; 0]);
        assert_eq!(counted.give_back(&a), [3]);
        assert!(counted.by_service.is_empty() && counted.counts.is_empty());
    }
}
