//! `sheave plan`: what is programmed for every service port, and why.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use serde::Serialize;

use super::{FrontendView, table::table, texts};
use crate::claims::Claims;
use crate::model::Model;
use crate::object::Problem;
use crate::resolve::{EndpointView, Resolved};
use crate::wanted::Wanted;

/// The document. JSON by `Serialize`, text for people by `Display`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Plan {
    /// One per service port and family, sorted.
    pub services: Vec<PlannedPort>,
    /// What could not be used or was not won, sorted.
    pub problems: Vec<Problem>,
}

/// One service port in one family.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PlannedPort {
    /// The Service's.
    pub namespace: String,
    /// The Service's.
    pub name: String,
    /// May be empty.
    pub port_name: String,
    /// `TCP`, `UDP`, `SCTP`.
    pub protocol: &'static str,
    /// `IPv4`, `IPv6`.
    pub family: &'static str,
    /// Those that the port gets (S12), sorted.
    pub frontends: Vec<FrontendView>,
    /// `None`: not used (P2).
    pub cluster_set: Option<Vec<String>>,
    /// `None`: not used (P2).
    pub local_set: Option<Vec<String>>,
    /// P13.
    pub has_any_endpoints: bool,
    /// A1.
    pub session_affinity_seconds: Option<u32>,
    /// Empty = open.
    pub source_ranges: Vec<String>,
    /// H1.
    pub health_check_node_port: Option<u16>,
    /// H3.
    pub local_ready_endpoints: usize,
    /// Sorted.
    pub endpoints: Vec<EndpointView>,
}

impl PlannedPort {
    /// The order of the document: texts, as in every list of it.
    fn key(&self) -> (&str, &str, &str, &str, &str) {
        (&self.namespace, &self.name, &self.port_name, self.protocol, self.family)
    }
}

/// The plan of a model.
pub fn plan(model: &Model) -> Plan {
    plan_of(model, &Wanted::of(model))
}

/// All that cannot be used, of objects and of the node, sorted.
pub fn problems(model: &Model, wanted: &Wanted) -> Vec<Problem> {
    let problems: BTreeSet<Problem> = model.problems().into_iter().chain(wanted.problems(model)).collect();
    problems.into_iter().collect()
}

/// The same where it is known who owns each frontend.
pub fn plan_of(model: &Model, wanted: &Wanted) -> Plan {
    let mut services: Vec<PlannedPort> =
        wanted.all(model).map(|resolved| planned(resolved, wanted.claims())).collect();
    services.sort_by(|a, b| a.key().cmp(&b.key()));
    Plan { services, problems: problems(model, wanted) }
}

fn planned(resolved: Resolved, claims: &Claims) -> PlannedPort {
    let mut frontends: Vec<FrontendView> = claims
        .won(&resolved)
        .map(|frontend| FrontendView {
            address: frontend.address.to_string(),
            port: frontend.port,
            protocol: None,
            kind: frontend.kind.name(),
        })
        .collect();
    frontends.sort_by(|a, b| (&a.address, a.port).cmp(&(&b.address, b.port)));
    let mut source_ranges: Vec<String> = resolved.source_ranges.iter().map(ToString::to_string).collect();
    source_ranges.sort();
    let mut endpoints = resolved.endpoints;
    endpoints.sort_by_cached_key(|endpoint| (endpoint.address.to_string(), endpoint.port));
    PlannedPort {
        namespace: resolved.key.service.namespace.to_string(),
        name: resolved.key.service.name.to_string(),
        port_name: resolved.key.port_name.to_string(),
        protocol: resolved.key.protocol.name(),
        family: resolved.key.family.name(),
        frontends,
        cluster_set: resolved.cluster_set.as_deref().map(texts),
        local_set: resolved.local_set.as_deref().map(texts),
        has_any_endpoints: resolved.has_any_endpoints,
        session_affinity_seconds: resolved.affinity_timeout_s,
        source_ranges,
        health_check_node_port: resolved.health_check_node_port,
        local_ready_endpoints: resolved.local_ready_endpoints,
        endpoints,
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.services.is_empty() {
            writeln!(f, "No Service is proxied.")?;
        }
        for (index, port) in self.services.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            port.fmt(f)?;
        }
        if !self.problems.is_empty() {
            writeln!(f, "\nProblems:")?;
            let rows = self
                .problems
                .iter()
                .map(|problem| vec![problem.object.clone(), problem.field.clone(), problem.message.clone()]);
            f.write_str(&table(2, &["OBJECT", "FIELD", "MESSAGE"], &rows.collect::<Vec<_>>()))?;
        }
        Ok(())
    }
}

impl fmt::Display for PlannedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}/{}:{}/{} {}", self.namespace, self.name, self.port_name, self.protocol, self.family)?;
        let mut line = |label: &str, value: String| writeln!(f, "  {label:<14}{value}");
        if self.frontends.is_empty() {
            line("frontends", "none".to_owned())?;
        }
        for frontend in &self.frontends {
            line(frontend.kind, place(&frontend.address, frontend.port))?;
        }
        line("cluster set", set(self.cluster_set.as_deref(), self.has_any_endpoints))?;
        line("local set", set(self.local_set.as_deref(), self.has_any_endpoints))?;
        if let Some(seconds) = self.session_affinity_seconds {
            line("affinity", format!("by client, {seconds} s"))?;
        }
        if !self.source_ranges.is_empty() {
            line("let in", self.source_ranges.join(", "))?;
        }
        if let Some(number) = self.health_check_node_port {
            line("health check", format!("port {number}, {} ready here", self.local_ready_endpoints))?;
        }
        if self.endpoints.is_empty() {
            return writeln!(f, "  no endpoints");
        }
        let rows = self.endpoints.iter().map(|endpoint| {
            vec![
                SocketAddr::new(endpoint.address, endpoint.port).to_string(),
                endpoint.node.as_deref().unwrap_or("-").to_owned(),
                endpoint.zone.as_deref().unwrap_or("-").to_owned(),
                endpoint.reason.to_string(),
            ]
        });
        f.write_str(&table(2, &["ENDPOINT", "NODE", "ZONE", "WHY"], &rows.collect::<Vec<_>>()))
    }
}

fn place(address: &str, port: u16) -> String {
    match address.parse() {
        Ok(address) => SocketAddr::new(address, port).to_string(),
        Err(_) => format!("{address}:{port}"),
    }
}

fn set(set: Option<&[String]>, has_any: bool) -> String {
    match set {
        None => "not used".to_owned(),
        Some([]) if has_any => "empty: such clients time out".to_owned(),
        Some([]) => "empty: such clients are refused".to_owned(),
        Some([_]) => "1 endpoint".to_owned(),
        Some(set) => format!("{} endpoints", set.len()),
    }
}
