//! What all Services want and get, kept up to date Service by Service.

use std::collections::{BTreeMap, BTreeSet};

use crate::claims::{Claims, FrontendId};
use crate::model::Model;
use crate::object::{ObjectKey, PerFamily, Problem};
use crate::resolve::{Resolved, ServicePortKey};

/// Every Service resolved, and who owns each frontend.
#[derive(Debug, Default)]
pub struct Wanted {
    services: BTreeMap<ObjectKey, Vec<Resolved>>,
    problems: BTreeMap<ObjectKey, Vec<Problem>>,
    claims: Claims,
    /// P11 depends on it, and no [`Resolved`] shows it.
    detects_local_pods: PerFamily<bool>,
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
        // The model marks every Service when this changes, so all that needs it is among `services`.
        let detection_changed = self.detects_local_pods != model.facts().detects_local_pods;
        self.detects_local_pods = model.facts().detects_local_pods;
        for key in services {
            let (resolved, problems) = model.resolve(key).unwrap_or_default();
            changed.extend(self.claims.update(key, &resolved));
            if detection_changed || self.service(key) != resolved {
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
mod tests;
