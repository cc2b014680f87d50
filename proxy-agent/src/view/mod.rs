//! What the read commands show: `plan` and `explain` as documents (`cli-json.md` fixes their fields) and as text.

pub mod explain;
pub mod plan;
pub(crate) mod table;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;

use proxy_common::abi::{FrontendKind, Origin, WhichSet};
use serde::Serialize;

pub use explain::{Destination, Explanation, explain};
pub use plan::{Plan, plan};

/// `ip:port` or `[v6]:port`, sorted as the texts that they are: what a program that reads JSON can check.
fn texts(set: &[SocketAddr]) -> Vec<String> {
    let mut texts: Vec<String> = set.iter().map(SocketAddr::to_string).collect();
    texts.sort();
    texts
}

/// A frontend with its protocol.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct FrontendView {
    /// VIP.
    pub address: String,
    /// Its port.
    pub port: u16,
    /// Its protocol; absent in a plan, where the service port has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<&'static str>,
    /// [`FrontendKind::name`].
    pub kind: &'static str,
}

const fn origin_name(origin: Origin) -> &'static str {
    match origin {
        Origin::Node => "node",
        Origin::Pod => "pod",
        Origin::Elsewhere => "external",
    }
}

/// What [`origin_name`] says, back.
pub(crate) fn origin_named(name: &str) -> Option<Origin> {
    Origin::ALL.into_iter().find(|origin| origin_name(*origin) == name)
}

/// What [`set_name`] says, back.
pub(crate) fn set_named(name: &str) -> Option<WhichSet> {
    [WhichSet::Cluster, WhichSet::Local].into_iter().find(|which| set_name(*which) == name)
}

const fn set_name(which: WhichSet) -> &'static str {
    match which {
        WhichSet::Cluster => "cluster",
        WhichSet::Local => "local",
    }
}

const fn is_cluster_ip(kind: FrontendKind) -> bool {
    match kind {
        FrontendKind::ClusterIp => true,
        FrontendKind::LoadBalancer | FrontendKind::ExternalIp | FrontendKind::NodePort => false,
    }
}
