//! Addresses and ranges as Kubernetes reads them: more leniently than the standard library (S6).
//!
//! Old objects hold spellings that newer API servers refuse, and kube-proxy goes on to serve them. Reading them in any
//! other way than kube-proxy does would send traffic elsewhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Reads an address (S6): leading zeros are decimal, an IPv4-mapped IPv6 literal is IPv4. No white space, no zone.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    parse_ip_as_written(text).map(|ip| ip.to_canonical())
}

/// Reads a CIDR (S6): as [`parse_ip`], white space around it is trimmed, host bits are masked off.
pub fn parse_cidr(text: &str) -> Option<IpNet> {
    let (address, length) = text.trim().split_once('/')?;
    let length = decimal(length, 128)?;
    let length = u8::try_from(length).ok()?;
    match parse_ip_as_written(address)? {
        IpAddr::V4(ip) => Ipv4Net::new(ip, length).ok().map(|net| IpNet::V4(net.trunc())),
        IpAddr::V6(ip) => match (ip.to_ipv4_mapped(), length.checked_sub(96)) {
            (Some(mapped), Some(length)) => {
                Ipv4Net::new(mapped, length).ok().map(|net| IpNet::V4(net.trunc()))
            }
            (Some(_) | None, Some(_) | None) => {
                Ipv6Net::new(ip, length).ok().map(|net| IpNet::V6(net.trunc()))
            }
        },
    }
}

/// As [`parse_ip`], but an IPv4-mapped address stays IPv6.
fn parse_ip_as_written(text: &str) -> Option<IpAddr> {
    if text.contains(':') { parse_v6(text).map(IpAddr::V6) } else { parse_v4(text).map(IpAddr::V4) }
}

fn parse_v4(text: &str) -> Option<Ipv4Addr> {
    let mut parts = text.split('.');
    let mut octets = [0; 4];
    for octet in &mut octets {
        *octet = u8::try_from(decimal(parts.next()?, 255)?).ok()?;
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets))
}

/// The standard library reads IPv6 but for leading zeros beyond four digits and within a dotted tail: these are
/// brought into the form that it takes.
fn parse_v6(text: &str) -> Option<Ipv6Addr> {
    let mut plain = String::with_capacity(text.len());
    for (i, group) in text.split(':').enumerate() {
        if i > 0 {
            plain.push(':');
        }
        if group.contains('.') {
            let [a, b, c, d] = parse_v4(group)?.octets();
            // As hexadecimal groups a tail would be taken in the middle of the address, too: keep it dotted.
            plain.push_str(&format!("{a}.{b}.{c}.{d}"));
        } else {
            let digits = group.trim_start_matches('0');
            plain.push_str(if digits.is_empty() && !group.is_empty() { "0" } else { digits });
        }
    }
    plain.parse().ok()
}

/// A decimal number of digits only, at most `max`.
fn decimal(text: &str, max: u32) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // Leading zeros may be many more than a number type holds.
    let digits = text.trim_start_matches('0');
    let number = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    (number <= max).then_some(number)
}

/// Why an address that the API took (or takes in old objects) cannot be a frontend (X7).
pub fn unusable_as_vip(ip: &IpAddr) -> Option<&'static str> {
    if ip.is_unspecified() {
        Some("the unspecified address would match everything")
    } else if ip.is_loopback() {
        Some("a loopback address belongs to each host itself")
    } else if ip.is_multicast() {
        Some("a multicast address cannot be balanced")
    } else {
        None
    }
}

/// Why an address cannot be an endpoint or an external IP: what the API forbids today (E12, X7).
pub fn unusable_as_endpoint(ip: &IpAddr) -> Option<&'static str> {
    let (link_local, link_local_multicast) = match ip {
        IpAddr::V4(ip) => (ip.is_link_local(), ip.octets().starts_with(&[224, 0, 0])),
        IpAddr::V6(ip) => {
            (ip.is_unicast_link_local(), ip.segments().first().is_some_and(|s| s & 0xff0f == 0xff02))
        }
    };
    if ip.is_unspecified() {
        Some("the unspecified address names no host")
    } else if ip.is_loopback() {
        Some("a loopback address belongs to each host itself")
    } else if link_local {
        Some("a link-local address means another host on each link")
    } else if link_local_multicast {
        Some("a link-local multicast address names no host")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> String {
        parse_ip(text).map_or_else(|| "-".into(), |ip| ip.to_string())
    }

    fn cidr(text: &str) -> String {
        parse_cidr(text).map_or_else(|| "-".into(), |net| net.to_string())
    }

    /// S6: leading zeros are decimal, mapped addresses are IPv4, the form is canonical.
    #[test]
    fn s6_addresses_are_read_leniently() {
        for (text, want) in [
            ("10.1.2.3", "10.1.2.3"),
            ("010.001.002.003", "10.1.2.3"),
            ("0000000000000000000010.1.2.3", "10.1.2.3"),
            ("::ffff:10.1.2.3", "10.1.2.3"),
            ("::ffff:010.001.002.003", "10.1.2.3"),
            ("::FFFF:0a01:0203", "10.1.2.3"),
            ("2001:DB8:0:0::0001", "2001:db8::1"),
            ("2001:db8::000001", "2001:db8::1"),
            ("0::0", "::"),
            ("::", "::"),
            ("", "-"),
            (" 10.1.2.3", "-"),
            ("10.1.2", "-"),
            ("10.1.2.3.4", "-"),
            ("10.1.2.256", "-"),
            ("10.1.2.+3", "-"),
            ("10.1..3", "-"),
            ("0x0a.1.2.3", "-"),
            ("fe80::1%eth0", "-"),
            ("1:2:3", "-"),
            (":::", "-"),
            ("1.2.3.4::", "-"),
            ("12345::", "-"),
            ("10.1.2.3/32", "-"),
            ("99999999999999999999.1.1.1", "-"),
        ] {
            assert_eq!(ip(text), want, "{text}");
        }
    }

    /// S6: ranges are trimmed, host bits masked off, leading zeros decimal.
    #[test]
    fn s6_ranges_are_read_leniently() {
        for (text, want) in [
            ("203.0.113.000/025", "203.0.113.0/25"),
            ("  10.1.2.3/8\t\n", "10.0.0.0/8"),
            ("10.1.2.3/32", "10.1.2.3/32"),
            ("10.1.2.3/0", "0.0.0.0/0"),
            ("2001:db8::1/32", "2001:db8::/32"),
            ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
            ("::ffff:10.1.2.3/64", "::/64"),
            ("10.1.2.3", "-"),
            ("10.1.2.3/33", "-"),
            ("2001:db8::/129", "-"),
            ("10.1.2.3/", "-"),
            ("/8", "-"),
            ("10.1.2.3/-1", "-"),
            ("10.1.2.3/8/8", "-"),
            ("", "-"),
        ] {
            assert_eq!(cidr(text), want, "{text}");
        }
    }

    /// E12, X7: what may be a VIP, what may be an endpoint.
    #[test]
    fn e12_x7_addresses_that_name_no_host() {
        for (text, vip, endpoint) in [
            ("10.0.0.1", true, true),
            ("0.0.0.0", false, false),
            ("::", false, false),
            ("127.0.0.1", false, false),
            ("::1", false, false),
            ("169.254.1.1", true, false),
            ("fe80::1", true, false),
            ("224.0.0.5", false, false),
            ("ff02::1", false, false),
            ("ff12::1", false, false),
            ("239.1.1.1", false, true),
            ("fd00::1", true, true),
        ] {
            let ip = parse_ip(text).unwrap();
            assert_eq!(unusable_as_vip(&ip).is_none(), vip, "{text} as VIP");
            assert_eq!(unusable_as_endpoint(&ip).is_none(), endpoint, "{text} as endpoint");
        }
    }
}
