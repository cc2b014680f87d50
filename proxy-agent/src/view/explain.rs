//! `sheave explain`: what becomes of one client that dials one destination, by the rules, and why.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use proxy_common::abi::{Origin, Protocol, WhenEmpty, WhichSet};
use proxy_common::decide::snat::Snat;
use serde::Serialize;

use super::{FrontendView, is_cluster_ip, origin_name, set_name, table::table, texts};
use crate::claims::FrontendId;
use crate::model::Model;
use crate::object::Family;
use crate::resolve::{DetectLocal, Frontend, Resolved, frontend_value};
use crate::wanted::Wanted;

/// What is dialled: `ADDRESS:PORT/PROTOCOL`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Destination {
    /// Address and port, canonical.
    pub at: SocketAddr,
    /// Protocol.
    pub protocol: Protocol,
}

/// Why a text is no [`Destination`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DestinationError {
    /// Neither form, or a port that is no number from 1 to 65535.
    #[error("{0:?} is not ADDRESS:PORT/PROTOCOL, as in 10.96.0.7:80/TCP or [fd00::7]:80/TCP")]
    Form(String),
    /// Another protocol.
    #[error("{0:?} is not a protocol of Services: TCP, UDP or SCTP")]
    Protocol(String),
}

impl FromStr for Destination {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || DestinationError::Form(text.to_owned());
        let (at, name) = text.rsplit_once('/').ok_or_else(form)?;
        let at: SocketAddr = at.parse().map_err(|_| form())?;
        if at.port() == 0 {
            return Err(form());
        }
        let known = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        let protocol = known
            .into_iter()
            .find(|protocol| protocol.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| DestinationError::Protocol(name.to_owned()))?;
        Ok(Self { at: SocketAddr::new(at.ip().to_canonical(), at.port()), protocol })
    }
}

/// Why there is no answer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExplainError {
    /// No packet has an address of each family.
    #[error("{from} and {to} are of different families: there is no such packet")]
    Families {
        /// The client.
        from: IpAddr,
        /// What it dials.
        to: IpAddr,
    },
}

/// What the rules say for a client.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Goes to an endpoint.
    Forward,
    /// Refused at once (Z4).
    Reject,
    /// Not answered (Z5).
    Drop,
    /// Not the proxy's.
    Untouched,
}

impl Verdict {
    const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Reject => "reject",
            Self::Drop => "drop",
            Self::Untouched => "untouched",
        }
    }
}

/// What serves this client on this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum Path {
    /// The socket hooks.
    #[serde(rename = "socket")]
    Socket,
    /// Programs on devices.
    #[serde(rename = "packet")]
    Packet,
    /// Nothing: the path that would is switched off.
    #[serde(rename = "none yet")]
    NoneYet,
}

impl Path {
    const fn name(self) -> &'static str {
        match self {
            Self::Socket => "socket",
            Self::Packet => "packet",
            Self::NoneYet => "none yet",
        }
    }
}

/// The document. JSON by `Serialize`, text for people by `Display`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Explanation {
    /// What the rules say.
    pub verdict: Verdict,
    /// `namespace/name:port/protocol`.
    pub service: Option<String>,
    /// What is dialled, if it is a Service's.
    pub frontend: Option<FrontendView>,
    /// Which set rules this client; none if it does not come to that.
    pub set: Option<&'static str>,
    /// That set.
    pub endpoints: Vec<String>,
    /// Whether any endpoint would be sent a replaced source (M), for a packet that no socket hook saw.
    pub snat: bool,
    /// Those endpoints.
    pub snat_endpoints: Vec<String>,
    /// `node`, `pod` or `external`.
    pub origin: &'static str,
    /// What serves this client.
    pub path: Path,
    /// In words, with the rules.
    pub reason: String,
}

/// Explains by a model alone.
///
/// # Errors
/// [`ExplainError`] if the question has no answer.
pub fn explain(model: &Model, from: IpAddr, to: Destination) -> Result<Explanation, ExplainError> {
    explain_of(model, &Wanted::of(model), from, to)
}

/// The same where it is known who owns each frontend.
///
/// # Errors
/// [`ExplainError`] if the question has no answer.
pub fn explain_of(
    model: &Model,
    wanted: &Wanted,
    from: IpAddr,
    to: Destination,
) -> Result<Explanation, ExplainError> {
    let from = from.to_canonical();
    if Family::of(&from) != Family::of(&to.at.ip()) {
        return Err(ExplainError::Families { from, to: to.at.ip() });
    }
    let question = Question { model, wanted, from, to, origin: origin(model, from) };
    let found = question.found();
    let decision = match &found {
        Some((resolved, frontend)) => question.frontend(resolved, frontend),
        None => question.no_frontend(),
    };
    let guarded = found.as_ref().is_some_and(|(resolved, frontend)| question.guarded(resolved, frontend));
    let (path, path_reason) = question.path(&decision, found.is_some(), guarded);
    Ok(Explanation {
        verdict: decision.verdict,
        service: found.as_ref().map(|(resolved, _)| resolved.key.to_string()),
        frontend: found.as_ref().map(|(_, frontend)| FrontendView {
            address: frontend.address.to_string(),
            port: frontend.port,
            protocol: Some(to.protocol.name()),
            kind: frontend.kind.name(),
        }),
        set: decision.set.map(set_name),
        endpoints: decision.endpoints,
        snat: !decision.snat.is_empty(),
        snat_endpoints: decision.snat,
        origin: origin_name(question.origin),
        path,
        reason: format!("{}; {path_reason}", decision.reason),
    })
}

/// Where a client is, by its address. Loopback is the node talking to itself.
fn origin(model: &Model, from: IpAddr) -> Origin {
    if from.is_loopback() || model.context().own_addresses.contains(&from) {
        Origin::Node
    } else if model.facts().is_local_pod(from) {
        Origin::Pod
    } else {
        Origin::Elsewhere
    }
}

struct Question<'a> {
    model: &'a Model,
    wanted: &'a Wanted,
    from: IpAddr,
    to: Destination,
    origin: Origin,
}

struct Decision {
    verdict: Verdict,
    set: Option<WhichSet>,
    endpoints: Vec<String>,
    snat: Vec<String>,
    reason: String,
}

impl Decision {
    const fn plain(verdict: Verdict, set: Option<WhichSet>, reason: String) -> Self {
        Self { verdict, set, endpoints: Vec::new(), snat: Vec::new(), reason }
    }
}

impl Question<'_> {
    /// The frontend that is dialled, with its owner (S12).
    fn found(&self) -> Option<(Resolved, Frontend)> {
        let (address, port) = (self.to.at.ip(), self.to.at.port());
        let resolved =
            self.wanted.owner(self.model, &FrontendId { address, port, protocol: self.to.protocol })?;
        let frontend = *resolved.frontends.iter().find(|f| f.address == address && f.port == port)?;
        Some((resolved, frontend))
    }

    /// F1, by the flag that the kernel sees.
    fn guarded(&self, resolved: &Resolved, frontend: &Frontend) -> bool {
        frontend_value(resolved, frontend, self.model.facts(), 0).has_source_ranges()
    }

    fn frontend(&self, resolved: &Resolved, frontend: &Frontend) -> Decision {
        // F2 comes before everything else, also before Z1.
        if self.guarded(resolved, frontend) && !self.let_in(resolved) {
            let reason = format!("{} is in none of the Service's loadBalancerSourceRanges (F2)", self.from);
            return Decision::plain(Verdict::Drop, None, reason);
        }
        let which = frontend_value(resolved, frontend, self.model.facts(), 0).set_for(self.origin);
        let set = match which {
            WhichSet::Cluster => resolved.cluster_set.as_deref(),
            WhichSet::Local => resolved.local_set.as_deref(),
        };
        // A set that a frontend names is in use (P2), so "absent" does not come up here.
        let set = set.unwrap_or_default();
        if set.is_empty() {
            return self.empty(resolved, frontend, which);
        }
        let snat =
            set.iter().copied().filter(|endpoint| self.snat(resolved, frontend, endpoint.ip()).applies());
        let snat: Vec<SocketAddr> = snat.collect();
        let reason = format!(
            "{} of {}: {} {}; {}",
            frontend.kind.name(),
            resolved.key,
            self.who(),
            self.why_set(resolved, frontend, which),
            self.why_snat(resolved, frontend, set, &snat)
        );
        Decision {
            verdict: Verdict::Forward,
            set: Some(which),
            endpoints: texts(set),
            snat: texts(&snat),
            reason,
        }
    }

    /// F2, F4.
    fn let_in(&self, resolved: &Resolved) -> bool {
        resolved.source_ranges.iter().any(|range| range.contains(&self.from))
            || resolved.source_exceptions.contains(&self.from)
    }

    /// Z1–Z3.
    fn empty(&self, resolved: &Resolved, frontend: &Frontend, which: WhichSet) -> Decision {
        let when_empty = if resolved.has_any_endpoints { WhenEmpty::Drop } else { WhenEmpty::Reject };
        let (verdict, mut reason) = match when_empty {
            WhenEmpty::Reject => {
                (Verdict::Reject, format!("no endpoint of {} can serve anywhere (Z1)", resolved.key))
            }
            WhenEmpty::Drop => {
                let (policy, rule) = if is_cluster_ip(frontend.kind) {
                    ("internalTrafficPolicy", "Z2")
                } else {
                    ("externalTrafficPolicy", "Z3")
                };
                let reason = format!(
                    "{} has endpoints elsewhere, but {policy} is Local and none of this node can serve ({rule})",
                    resolved.key
                );
                (Verdict::Drop, reason)
            }
        };
        reason.push_str(&sample(resolved));
        Decision::plain(verdict, Some(which), reason)
    }

    const fn who(&self) -> &'static str {
        match self.origin {
            Origin::Node => "this node itself",
            Origin::Pod => "a pod of this node",
            Origin::Elsewhere => match self.model.context().policy.detect_local {
                DetectLocal::ClusterCidr | DetectLocal::NodeCidr => "a client elsewhere",
                DetectLocal::BridgeInterface(_) | DetectLocal::InterfaceNamePrefix(_) => {
                    "a client elsewhere (a pod of this node is told by its interface, not by its address)"
                }
            },
        }
    }

    fn why_set(&self, resolved: &Resolved, frontend: &Frontend, which: WhichSet) -> String {
        let set = set_name(which);
        if is_cluster_ip(frontend.kind) {
            let policy = if resolved.internal_local { "Local" } else { "Cluster" };
            return format!("is served from the {set} set, as internalTrafficPolicy is {policy} (P10)");
        }
        match (resolved.external_local, which) {
            (true, WhichSet::Cluster) => format!(
                "is served from the {set} set, although externalTrafficPolicy is Local, as it is on this node (P11)"
            ),
            (true, WhichSet::Local) => {
                format!("is served from the {set} set, as externalTrafficPolicy is Local (P10)")
            }
            (false, WhichSet::Cluster | WhichSet::Local) => {
                format!(
                    "is served from the {set} set, as externalTrafficPolicy is Cluster or does not count (P1)"
                )
            }
        }
    }

    fn snat(&self, resolved: &Resolved, frontend: &Frontend, endpoint: IpAddr) -> Snat {
        Snat {
            kind: frontend.kind,
            origin: self.origin,
            detects_local_pods: *self.model.facts().detects_local_pods.get(resolved.key.family),
            masquerade_all: self.model.context().policy.masquerade_all,
            external_local: resolved.external_local,
            hairpin: endpoint == self.from,
            endpoint_is_own_node: self.model.context().own_addresses.contains(&endpoint),
        }
    }

    fn why_snat(
        &self,
        resolved: &Resolved,
        frontend: &Frontend,
        set: &[SocketAddr],
        replaced: &[SocketAddr],
    ) -> String {
        let general = if is_cluster_ip(frontend.kind) {
            "M2"
        } else if resolved.external_local {
            "M4"
        } else {
            "M3"
        };
        let mut rules = vec![general];
        if set.iter().any(|endpoint| endpoint.ip() == self.from) {
            rules.push("M5");
        }
        let is_own = |endpoint: &SocketAddr| self.model.context().own_addresses.contains(&endpoint.ip());
        if self.origin != Origin::Node && set.iter().any(is_own) {
            rules.push("M10");
        }
        let rules = rules.join(", ");
        if replaced.is_empty() {
            format!("a packet keeps its source ({rules})")
        } else if replaced.len() == set.len() {
            format!("a packet's source is replaced ({rules})")
        } else {
            format!(
                "a packet's source is replaced for {} of {} endpoints ({rules})",
                replaced.len(),
                set.len()
            )
        }
    }

    fn no_frontend(&self) -> Decision {
        let (address, port) = (self.to.at.ip(), self.to.at.port());
        let context = self.model.context();
        let untouched = |reason: String| Decision::plain(Verdict::Untouched, None, reason);
        if context.policy.excludes(address, port, self.to.protocol) {
            return untouched(format!("{} is on the list of frontends to leave alone (P14)", self.to.at));
        }
        let cluster_ip_of = self.cluster_ip_of(address);
        let in_service_cidr = context.policy.service_cidrs.iter().any(|cidr| cidr.contains(&address));
        let is_own = context.own_addresses.contains(&address);
        // Z6 holds at forward and output only: what comes in for an address bound on the node is delivered.
        if is_own && self.origin != Origin::Node && (cluster_ip_of.is_some() || in_service_cidr) {
            return untouched(format!("{address} is bound on this node, so its own processes answer (Z6)"));
        }
        if let Some(service) = cluster_ip_of {
            let reason = format!(
                "{address} is the cluster IP of {service}, which has no port {port}/{} (Z6)",
                self.to.protocol.name()
            );
            return Decision::plain(Verdict::Reject, None, reason);
        }
        if in_service_cidr {
            let reason = format!("{address} is in the Service range, but no Service has it (Z6)");
            return Decision::plain(Verdict::Drop, None, reason);
        }
        if is_own && let Some(service) = self.node_port_of(port) {
            return untouched(format!(
                "{port} is a NodePort of {service}, but {address} is not among the addresses that serve NodePorts (N1)"
            ));
        }
        untouched(format!("{}/{} is no Service's address and port", self.to.at, self.to.protocol.name()))
    }

    /// Walks all Services: a question of a person, not of a packet.
    fn cluster_ip_of(&self, address: IpAddr) -> Option<String> {
        let family = Family::of(&address);
        let services = self.model.services().filter_map(|key| self.model.service(key));
        let proxied = services.filter(|service| service.proxied);
        let found = proxied.filter(|service| *service.cluster_ip.get(family) == Some(address));
        Some(found.map(|service| &service.key).min()?.to_string())
    }

    fn node_port_of(&self, number: u16) -> Option<String> {
        let services = self.model.services().filter_map(|key| self.model.service(key));
        let proxied = services.filter(|service| service.proxied);
        let found = proxied.filter(|service| {
            service
                .ports
                .iter()
                .any(|port| port.node_port == Some(number) && port.protocol == self.to.protocol)
        });
        Some(found.map(|service| &service.key).min()?.to_string())
    }

    /// Which path gives the verdict on this node, and why.
    fn path(&self, decision: &Decision, found: bool, guarded: bool) -> (Path, String) {
        let because = |why: &str| {
            if self.model.context().policy.no_packet_path {
                (Path::NoneYet, format!("left to the packet path, which is switched off, because {why}"))
            } else {
                (Path::Packet, format!("left to the packet path, because {why}"))
            }
        };
        match self.origin {
            Origin::Node | Origin::Pod => {}
            Origin::Elsewhere => return because("no socket of this node makes the packets (B6)"),
        }
        match self.to.protocol {
            Protocol::Tcp | Protocol::Udp => {}
            Protocol::Sctp => return because("the socket hooks do not see SCTP (T2)"),
        }
        if guarded {
            return because("source ranges need the client's address (F3)");
        }
        match decision.verdict {
            Verdict::Forward => {
                (Path::Socket, "translated once, when the socket connects or sends".to_owned())
            }
            Verdict::Untouched => (Path::Socket, "the socket hooks let it pass".to_owned()),
            Verdict::Drop => {
                because("a drop must time out (Z5), and a socket hook can only refuse at once (B2)")
            }
            Verdict::Reject if !found => because("only exact frontends are known to the socket hooks (Z6)"),
            Verdict::Reject => match self.to.protocol {
                Protocol::Tcp => (Path::Socket, "connect() fails with ECONNREFUSED (Z4)".to_owned()),
                Protocol::Udp | Protocol::Sctp => {
                    because("connect() of a UDP socket sends nothing and always succeeds (B13)")
                }
            },
        }
    }
}

/// How many endpoints are named where none can serve.
const SAMPLE: usize = 3;

/// Why the first endpoints are not used.
fn sample(resolved: &Resolved) -> String {
    let Some(last) = resolved.endpoints.len().checked_sub(1) else {
        return "; it has no endpoints".to_owned();
    };
    let mut text = String::new();
    for (index, endpoint) in resolved.endpoints.iter().enumerate().take(SAMPLE) {
        let at = SocketAddr::new(endpoint.address, endpoint.port);
        text.push_str(&format!("; {at} {}", endpoint.reason));
        if index + 1 == SAMPLE && last > index {
            text.push_str(&format!("; and {} more", last - index));
        }
    }
    text
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |label: &str, value: &str| writeln!(f, "{label:<10}{value}");
        line("verdict", self.verdict.name())?;
        line("service", self.service.as_deref().unwrap_or("-"))?;
        if let Some(frontend) = &self.frontend {
            line("kind", frontend.kind)?;
        }
        line("origin", self.origin)?;
        line("set", self.set.unwrap_or("-"))?;
        line("path", self.path.name())?;
        line("why", &self.reason.replace("; ", "\n          "))?;
        if self.endpoints.is_empty() {
            return Ok(());
        }
        let rows = self.endpoints.iter().map(|endpoint| {
            let source = if self.snat_endpoints.contains(endpoint) { "replaced" } else { "kept" };
            vec![endpoint.clone(), source.to_owned()]
        });
        writeln!(f)?;
        f.write_str(&table(0, &["ENDPOINT", "SOURCE OF PACKETS"], &rows.collect::<Vec<_>>()))
    }
}
