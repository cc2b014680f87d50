//! Who gets a VIP:port/protocol that several service ports want (S12, X4).
//!
//! The API does not stop two Services from claiming one address. The winner is the first in a fixed order, so it does
//! not depend on the order of events, and when it goes the next one is known at once. Updating costs what the changed
//! Service's own frontends cost.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use proxy_common::abi::FrontendKind;

use crate::object::{ObjectKey, Problem, Protocol};
use crate::resolve::{Frontend, Resolved, ServicePortKey};

/// What can have one owner only.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrontendId {
    /// VIP.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its protocol: N7, the same number may belong to one Service in TCP and to another in UDP.
    pub protocol: Protocol,
}

impl FrontendId {
    /// Of a service port's frontend.
    pub const fn new(resolved: &Resolved, frontend: &Frontend) -> Self {
        Self { address: frontend.address, port: frontend.port, protocol: resolved.key.protocol }
    }
}

impl fmt::Display for FrontendId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", SocketAddr::new(self.address, self.port), self.protocol.name())
    }
}

/// One service port's wish for one frontend. The order of the fields is the order of the rule; the least claim wins.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Claim {
    class: Class,
    /// S12: any endpoint (P13) beats none.
    without_endpoints: bool,
    /// Objects without a time stamp count as youngest.
    created_s: i64,
    /// Namespace, name, port name, protocol.
    key: Arc<ServicePortKey>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Class {
    /// The cluster hands these out; nobody may take one away by naming it as an external IP.
    Cluster,
    /// X4: these are more exact than a NodePort.
    External,
    /// Loses to all others.
    NodePort,
}

impl Class {
    const fn of(kind: FrontendKind) -> Self {
        match kind {
            FrontendKind::ClusterIp => Self::Cluster,
            FrontendKind::LoadBalancer | FrontendKind::ExternalIp => Self::External,
            FrontendKind::NodePort => Self::NodePort,
        }
    }
}

/// All claims of all Services.
#[derive(Debug, Default)]
pub struct Claims {
    by_service: HashMap<ObjectKey, Vec<(FrontendId, Claim)>>,
    /// Sorted, never empty; nearly always one.
    by_frontend: HashMap<FrontendId, Vec<Claim>>,
}

impl Claims {
    /// Replaces the claims of one Service; an empty list is a Service that is gone. Returns the *other* Services that
    /// won or lost a frontend by it.
    pub fn update(&mut self, service: &ObjectKey, resolved: &[Resolved]) -> BTreeSet<ObjectKey> {
        let new = claims_of(resolved);
        let old = self.by_service.remove(service).unwrap_or_default();
        if !new.is_empty() {
            self.by_service.insert(service.clone(), new.clone());
        }
        if old == new {
            return BTreeSet::new();
        }
        // Winners before the first change, so that a claim taken away and given back in one update is no change.
        let mut before: BTreeMap<FrontendId, Option<Arc<ServicePortKey>>> = BTreeMap::new();
        for (id, _) in old.iter().chain(&new) {
            before.entry(*id).or_insert_with(|| self.first(id));
        }
        for (id, claim) in &old {
            if let Some(claims) = self.by_frontend.get_mut(id) {
                if let Ok(place) = claims.binary_search(claim) {
                    claims.remove(place);
                }
                if claims.is_empty() {
                    self.by_frontend.remove(id);
                }
            }
        }
        for (id, claim) in new {
            let claims = self.by_frontend.entry(id).or_insert_with(|| Vec::with_capacity(1));
            if let Err(place) = claims.binary_search(&claim) {
                claims.insert(place, claim);
            }
        }
        let mut affected = BTreeSet::new();
        for (id, winner_before) in before {
            let winner = self.first(&id);
            if winner != winner_before {
                let others = [winner, winner_before].into_iter().flatten();
                affected.extend(others.map(|key| key.service.clone()).filter(|other| other != service));
            }
        }
        affected
    }

    fn first(&self, id: &FrontendId) -> Option<Arc<ServicePortKey>> {
        self.by_frontend.get(id)?.first().map(|claim| claim.key.clone())
    }

    /// Who gets a frontend, if anybody wants it.
    pub fn winner(&self, id: &FrontendId) -> Option<&ServicePortKey> {
        self.by_frontend.get(id)?.first().map(|claim| claim.key.as_ref())
    }

    /// Those of a service port's wanted frontends that it gets, in their order.
    pub fn won<'a>(&'a self, resolved: &'a Resolved) -> impl Iterator<Item = &'a Frontend> {
        resolved
            .frontends
            .iter()
            .filter(|frontend| self.winner(&FrontendId::new(resolved, frontend)) == Some(&resolved.key))
    }

    /// Services that want a frontend and do not get it.
    pub fn losers(&self) -> BTreeSet<&ObjectKey> {
        let lost = self.by_frontend.values().flat_map(|claims| claims.iter().skip(1));
        lost.map(|claim| &claim.key.service).collect()
    }

    /// What a service port wants and does not get.
    pub fn losses(&self, resolved: &Resolved) -> Vec<Problem> {
        let lost = resolved.frontends.iter().filter_map(|frontend| {
            let id = FrontendId::new(resolved, frontend);
            let winner = self.winner(&id).filter(|winner| **winner != resolved.key)?;
            let field = match frontend.kind {
                FrontendKind::ClusterIp => "spec.clusterIPs",
                FrontendKind::LoadBalancer => "status.loadBalancer.ingress",
                FrontendKind::ExternalIp => "spec.externalIPs",
                FrontendKind::NodePort => "spec.ports[].nodePort",
            };
            Some(Problem {
                object: format!("Service {}", resolved.key.service),
                field: field.to_owned(),
                message: format!(
                    "{} {id} of port {:?} belongs to Service port {winner} (S12)",
                    frontend.kind.name(),
                    resolved.key.port_name
                ),
            })
        });
        lost.collect()
    }
}

/// Sorted, so that equal wishes compare equal.
fn claims_of(resolved: &[Resolved]) -> Vec<(FrontendId, Claim)> {
    let mut claims = Vec::new();
    for port in resolved {
        let key = Arc::new(port.key.clone());
        claims.extend(port.frontends.iter().map(|frontend| {
            let claim = Claim {
                class: Class::of(frontend.kind),
                without_endpoints: !port.has_any_endpoints,
                created_s: port.created_s.unwrap_or(i64::MAX),
                key: key.clone(),
            };
            (FrontendId::new(port, frontend), claim)
        }));
    }
    claims.sort();
    claims
}

#[cfg(test)]
mod tests;
