//! `PACKET_SETTINGS`: what the programs of the packet path must know of node and policy. Pure.

use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;
use proxy_common::abi::packet::PREFIXES;
use proxy_common::abi::{Address, PacketSettings, Prefix};

use crate::reconcile::bits;
use crate::resolve::{NodeFacts, Policy};

/// Ports that replaced sources are taken from, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SnatPorts {
    first: u16,
    last: u16,
}

impl Default for SnatPorts {
    /// Below the NodePorts (30000 and up) and the ports that Linux gives to sockets (32768 and up).
    fn default() -> Self {
        Self { first: 10_000, last: 29_999 }
    }
}

/// Why a text is no [`SnatPorts`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is not FIRST-LAST, as in 10000-29999, with 1 <= FIRST <= LAST")]
pub struct SnatPortsError(String);

impl FromStr for SnatPorts {
    type Err = SnatPortsError;

    fn from_str(text: &str) -> Result<Self, SnatPortsError> {
        let parsed = text.split_once('-').and_then(|(first, last)| {
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            // The number of ports has 16 bits, and 0 is none.
            (1 <= first && first <= last).then_some(Self { first, last })
        });
        parsed.ok_or_else(|| SnatPortsError(text.to_owned()))
    }
}

impl fmt::Display for SnatPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl SnatPorts {
    /// Whether a range of ports, both ends included, has one of these.
    pub const fn overlaps(&self, first: u16, last: u16) -> bool {
        self.first <= last && first <= self.last
    }
}

/// Of a node and a policy. What has no place (more than [`PREFIXES`] ranges of a kind) is left out.
pub fn settings(facts: &NodeFacts, policy: &Policy, ports: SnatPorts) -> PacketSettings {
    let (local_pods, local_pods_count) = prefixes(&facts.local_pod_cidrs);
    let (service_ranges, service_ranges_count) = prefixes(&policy.service_cidrs);
    let mut flags = 0;
    for (is, flag) in [
        (facts.detects_local_pods.v4, PacketSettings::DETECTS_V4),
        (facts.detects_local_pods.v6, PacketSettings::DETECTS_V6),
        (policy.masquerade_all, PacketSettings::MASQUERADE_ALL),
    ] {
        if is {
            flags |= flag;
        }
    }
    PacketSettings {
        local_pods,
        service_ranges,
        local_pods_count,
        service_ranges_count,
        snat_first: ports.first,
        snat_count: ports.last - ports.first + 1,
        flags,
    }
}

fn prefixes(ranges: &[IpNet]) -> ([Prefix; PREFIXES], u32) {
    let mut prefixes = [Prefix::default(); PREFIXES];
    let mut count = 0;
    for (prefix, range) in prefixes.iter_mut().zip(ranges) {
        *prefix = Prefix::new(Address::from(range.addr()), bits(range));
        count += 1;
    }
    (prefixes, count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::PerFamily;
    use std::net::IpAddr;

    #[test]
    fn ports_are_parsed() {
        assert_eq!("10000-29999".parse(), Ok(SnatPorts::default()));
        assert_eq!(SnatPorts::default().to_string(), "10000-29999");
        assert!("7-7".parse::<SnatPorts>().is_ok() && "1-65535".parse::<SnatPorts>().is_ok());
        for wrong in ["", "7", "0-5", "9-8", "1-65536", "a-b", "1-2-3"] {
            assert!(wrong.parse::<SnatPorts>().is_err(), "{wrong}");
        }
        let ports = SnatPorts::default();
        assert!(!ports.overlaps(30_000, 60_999) && !ports.overlaps(1, 9_999));
        assert!(
            ports.overlaps(29_999, 60_999) && ports.overlaps(1, 10_000) && ports.overlaps(11_000, 12_000)
        );
    }

    #[test]
    fn settings_say_what_facts_and_policy_say() {
        let cidr = |text: &str| text.parse::<IpNet>().unwrap();
        let facts = NodeFacts {
            detects_local_pods: PerFamily { v4: false, v6: true },
            local_pod_cidrs: vec![cidr("fd00:10:244:1::/64")],
            ..NodeFacts::default()
        };
        let policy = Policy {
            service_cidrs: vec![cidr("10.96.0.0/12"), cidr("fd00:10:96::/112")],
            masquerade_all: true,
            ..Policy::default()
        };
        let settings = settings(&facts, &policy, "100-199".parse().unwrap());
        assert_eq!((settings.snat_first, settings.snat_count), (100, 100));
        assert_eq!(settings.flags, PacketSettings::DETECTS_V6 | PacketSettings::MASQUERADE_ALL);
        assert_eq!((settings.local_pods_count, settings.service_ranges_count), (1, 2));
        let has = |prefix: &Prefix, text: &str| prefix.contains(&text.parse::<IpAddr>().unwrap().into());
        assert!(has(&settings.local_pods[0], "fd00:10:244:1::9"));
        assert!(
            has(&settings.service_ranges[0], "10.111.0.1") && !has(&settings.service_ranges[0], "10.112.0.1")
        );
        assert!(has(&settings.service_ranges[1], "fd00:10:96::7"));
        // Five ranges: the fifth has no place.
        let many = Policy { service_cidrs: vec![cidr("10.0.0.0/8"); 5], ..Policy::default() };
        assert_eq!(super::settings(&facts, &many, SnatPorts::default()).service_ranges_count, 4);
    }
}
