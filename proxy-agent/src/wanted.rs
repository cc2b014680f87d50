//! What all Services want and get, kept up to date Service by Service. What a Service's objects say of it is resolved
//! when somebody asks: kept, it would be most of the agent's memory.

use std::collections::{BTreeMap, BTreeSet};

use crate::claims::{Claims, FrontendId};
use crate::model::Model;
use crate::object::{ObjectKey, Problem};
use crate::resolve::Resolved;

/// Who owns each frontend. Methods that take a model are given the one of the last update.
#[derive(Debug, Default)]
pub struct Wanted {
    problems: BTreeMap<ObjectKey, Vec<Problem>>,
    claims: Claims,
    /// Before the first update nothing is wanted, whatever the model has already.
    updated: bool,
}

impl Wanted {
    /// All of a model.
    pub fn of(model: &Model) -> Self {
        let mut wanted = Self::default();
        wanted.update(model, model.services());
        wanted
    }

    /// Resolves the named Services anew, gone ones too. Returns all that are to be programmed again: the named ones, and
    /// others that won or lost a frontend (S12).
    pub fn update<'a>(
        &mut self,
        model: &Model,
        services: impl IntoIterator<Item = &'a ObjectKey>,
    ) -> BTreeMap<ObjectKey, Vec<Resolved>> {
        self.updated = true;
        let mut changed = BTreeMap::new();
        let mut affected = BTreeSet::new();
        for key in services {
            let (resolved, problems) = model.resolve(key).unwrap_or_default();
            affected.extend(self.claims.update(key, &resolved));
            if problems.is_empty() {
                self.problems.remove(key);
            } else {
                self.problems.insert(key.clone(), problems);
            }
            changed.insert(key.clone(), resolved);
        }
        for key in affected {
            changed.entry(key).or_insert_with_key(|key| self.service(model, key));
        }
        changed
    }

    /// The service ports of one Service; empty if it is not there or not proxied.
    pub fn service(&self, model: &Model, key: &ObjectKey) -> Vec<Resolved> {
        if self.updated { model.resolve(key).unwrap_or_default().0 } else { Vec::new() }
    }

    /// All service ports, sorted by key.
    pub fn all<'a>(&'a self, model: &'a Model) -> impl Iterator<Item = Resolved> + 'a {
        let services: BTreeSet<&ObjectKey> = model.services().collect();
        services.into_iter().flat_map(|key| self.service(model, key))
    }

    /// The service port that a VIP:port/protocol belongs to.
    pub fn owner(&self, model: &Model, id: &FrontendId) -> Option<Resolved> {
        let winner = self.claims.winner(id)?;
        self.service(model, &winner.service).into_iter().find(|resolved| resolved.key == *winner)
    }

    /// Who owns which frontend.
    pub const fn claims(&self) -> &Claims {
        &self.claims
    }

    /// What resolving one Service found, and frontends that somebody else has (S12).
    pub fn problems_of(&self, key: &ObjectKey, resolved: &[Resolved]) -> Vec<Problem> {
        let found = self.problems.get(key).into_iter().flatten().cloned();
        found.chain(resolved.iter().flat_map(|resolved| self.claims.losses(resolved))).collect()
    }

    /// The same of all. Sorted.
    pub fn problems(&self, model: &Model) -> Vec<Problem> {
        let mut problems: BTreeSet<Problem> = self.problems.values().flatten().cloned().collect();
        for key in self.claims.losers() {
            let resolved = self.service(model, key);
            problems.extend(resolved.iter().flat_map(|resolved| self.claims.losses(resolved)));
        }
        problems.into_iter().collect()
    }
}

#[cfg(test)]
mod tests;
