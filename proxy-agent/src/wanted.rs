//! What all Services want and get, kept up to date Service by Service.

use std::collections::{BTreeMap, BTreeSet};

use crate::claims::{Claims, FrontendId};
use crate::model::Model;
use crate::object::{ObjectKey, Problem};
use crate::resolve::{Resolved, ServicePortKey};

/// Every Service resolved, and who owns each frontend.
#[derive(Debug, Default)]
pub struct Wanted {
    services: BTreeMap<ObjectKey, Vec<Resolved>>,
    problems: BTreeMap<ObjectKey, Vec<Problem>>,
    claims: Claims,
}

impl Wanted {
    /// All of a model.
    pub fn of(model: &Model) -> Self {
        let mut wanted = Self::default();
        wanted.update(model, model.services());
        wanted
    }

    /// Resolves the named Services anew, gone ones too. Returns those to program again: the ones whose answer changed,
    /// and others that won or lost a frontend (S12).
    pub fn update<'a>(
        &mut self,
        model: &Model,
        services: impl IntoIterator<Item = &'a ObjectKey>,
    ) -> BTreeSet<ObjectKey> {
        let mut changed = BTreeSet::new();
        for key in services {
            let (resolved, problems) = model.resolve(key).unwrap_or_default();
            changed.extend(self.claims.update(key, &resolved));
            if self.service(key) != resolved {
                changed.insert(key.clone());
            }
            if resolved.is_empty() {
                self.services.remove(key);
            } else {
                self.services.insert(key.clone(), resolved);
            }
            if problems.is_empty() {
                self.problems.remove(key);
            } else {
                self.problems.insert(key.clone(), problems);
            }
        }
        changed
    }

    /// The service ports of one Service; empty if it is not there or not proxied.
    pub fn service(&self, key: &ObjectKey) -> &[Resolved] {
        self.services.get(key).map_or(&[], Vec::as_slice)
    }

    /// All service ports, sorted by key.
    pub fn all(&self) -> impl Iterator<Item = &Resolved> {
        self.services.values().flatten()
    }

    /// One service port.
    pub fn port(&self, key: &ServicePortKey) -> Option<&Resolved> {
        self.service(&key.service).iter().find(|resolved| resolved.key == *key)
    }

    /// The service port that a VIP:port/protocol belongs to.
    pub fn owner(&self, id: &FrontendId) -> Option<&Resolved> {
        self.port(self.claims.winner(id)?)
    }

    /// Who owns which frontend.
    pub const fn claims(&self) -> &Claims {
        &self.claims
    }

    /// The same of one Service.
    pub fn problems_of(&self, key: &ObjectKey) -> Vec<Problem> {
        let found = self.problems.get(key).into_iter().flatten().cloned();
        found.chain(self.service(key).iter().flat_map(|resolved| self.claims.losses(resolved))).collect()
    }

    /// What resolving found, and frontends that somebody else has (S12). Sorted.
    pub fn problems(&self) -> Vec<Problem> {
        let found = self.problems.values().flatten().cloned();
        let lost = self.all().flat_map(|resolved| self.claims.losses(resolved));
        let sorted: BTreeSet<Problem> = found.chain(lost).collect();
        sorted.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::{Change, Delta, Service};
    use crate::resolve::Policy;
    use crate::resolve::tests::build::*;

    /// The incremental way and the full way give the same, whatever the order, and only what changed is named.
    #[test]
    fn an_update_equals_a_full_resolve() {
        let claiming = |name: &str, cluster_ip: &str| {
            let mut service = Service { external_ips: ips(&["203.0.113.1"]), ..service(name) };
            service.cluster_ip.v4 = Some(ip(cluster_ip));
            service
        };
        let (a, b, c) = (claiming("a", "10.96.0.1"), claiming("b", "10.96.0.2"), claiming("c", "10.96.0.3"));
        let b_ready = slice("b-1", "b", vec![endpoint("10.244.2.1")]);
        let steps: Vec<(Change, &[&str])> = vec![
            (Change::Service(Delta::Apply(Ok(a.clone()))), &["a"]),
            (Change::Service(Delta::Apply(Ok(b))), &["b"]),
            (Change::Service(Delta::Apply(Ok(c))), &["c"]),
            // S12: b gets an endpoint and with it the external IP.
            (Change::Slice(Delta::Apply(Ok(b_ready))), &["a", "b"]),
            (Change::Service(Delta::Apply(Ok(a.clone()))), &[]),
            (Change::Service(Delta::Delete(ObjectKey::new("ns", "b"))), &["a", "b"]),
            (Change::Service(Delta::Delete(ObjectKey::new("ns", "a"))), &["a", "c"]),
        ];
        let mut model = model_with(Policy::default(), Vec::new(), Vec::new());
        let mut wanted = Wanted::default();
        for (step, (change, expected)) in steps.into_iter().enumerate() {
            model.apply(change);
            let dirty = model.take_dirty();
            let changed = wanted.update(&model, &dirty);
            let names: Vec<&str> = changed.iter().map(|key| key.name.as_str()).collect();
            assert_eq!(names, expected, "step {step}");
            let full = Wanted::of(&model);
            assert_eq!(
                (&wanted.services, wanted.problems()),
                (&full.services, full.problems()),
                "step {step}"
            );
            for resolved in full.all() {
                assert!(wanted.claims.won(resolved).eq(full.claims.won(resolved)), "step {step}");
            }
        }
    }
}
