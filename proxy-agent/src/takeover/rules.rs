//! kube-proxy's rules: whether they are there, and how they go. And a table that keeps netfilter's NAT in work without
//! them.
//!
//! Tables of nftables are read and written by netlink. iptables has no interface but its commands; without those its
//! rules can neither be seen nor removed.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::netlink::{self, Attributes, Message, Netlink, attributes};

/// What cannot be done about rules.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// nftables' netlink.
    #[error("cannot {0} (nftables)")]
    Nftables(&'static str, #[source] io::Error),
    /// A command that does not run.
    #[error("cannot run `{0}`")]
    Run(String, #[source] io::Error),
    /// A command that fails.
    #[error("`{command}` failed: {said}")]
    Failed {
        /// Which.
        command: String,
        /// What it says.
        said: String,
    },
    /// Nothing can tell.
    #[error(
        "iptables is in use, but its command of that kind is not on PATH: install `iptables-legacy-save` or \
         `iptables-nft-save` where sheave runs, or run `kube-proxy --cleanup`"
    )]
    NoIptables,
}

/// kube-proxy's table, in each family.
const KUBE_PROXY: &str = "kube-proxy";
/// Ours.
const KEEP_NAT: &str = "sheave-keep-nat";

/// linux/netfilter.h: `NFPROTO_*`.
const INET: u8 = 1;
const IPV4: u8 = 2;
const IPV6: u8 = 10;

/// linux/netfilter/nf_tables.h: `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_*`.
const SUBSYSTEM: u8 = 10;
const NEW_TABLE: u16 = 0xa00;
const GET_TABLE: u16 = 0xa01;
const DEL_TABLE: u16 = 0xa02;
const NEW_CHAIN: u16 = 0xa03;
const GET_CHAIN: u16 = 0xa04;
const NEW_RULE: u16 = 0xa06;
/// `NFNL_MSG_BATCH_*`.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

/// `NFTA_*`.
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const CT_REGISTER: u16 = 1;
const CT_KEY: u16 = 2;

/// `NF_INET_POST_ROUTING`, `NF_IP_PRI_NAT_SRC`, `NFT_REG_1`, `NFT_CT_STATE`.
const POSTROUTING: u32 = 4;
const SOURCE_NAT: u32 = 100;
const REGISTER: u32 = 1;
const CT_STATE: u32 = 0;

/// Chains that iptables has by itself.
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
/// Chains of kube-proxy that it jumps to from those.
const ENTRIES: [&str; 6] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
];
/// What it marks packets with, for [`POSTROUTING_CHAIN`]. Plugins for host ports may use both.
const MARK: &str = "KUBE-MARK-MASQ";
const POSTROUTING_CHAIN: &str = "KUBE-POSTROUTING";
const CANARY: &str = "KUBE-PROXY-CANARY";
/// What the names of its other chains begin with. Others with `KUBE-` are the kubelet's.
const PREFIXES: [&str; 5] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-SEP-", "KUBE-FW-"];

/// The iptables commands of each kind and family, and those of who has one kind only.
const LEGACY: [&str; 2] = ["iptables-legacy", "ip6tables-legacy"];
const NFT: [&str; 2] = ["iptables-nft", "ip6tables-nft"];
const ONE_KIND: [&str; 2] = ["iptables", "ip6tables"];

/// Where a kube-proxy says how it works, unless told otherwise (H11).
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10_249);
const SAYS_WITHIN: Duration = Duration::from_millis(500);

/// kube-proxy's rules on this node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rules {
    nftables: Vec<u8>,
    /// Commands, each with what its `-restore` is given to remove them.
    iptables: Vec<(&'static str, String)>,
    /// Whether iptables is in use without a command that could tell by whom.
    unseen: bool,
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nftables = self.nftables.iter().map(|family| if *family == IPV4 { "nft ip" } else { "nft ip6" });
        let all: Vec<_> = nftables.chain(self.iptables.iter().map(|(kind, _)| *kind)).collect();
        f.write_str(&all.join(", "))
    }
}

impl Rules {
    /// Looks for them.
    ///
    /// # Errors
    /// If that cannot be told.
    pub fn find() -> Result<Self, Error> {
        let mut found = Self::default();
        let tables = tables()?;
        let is_kube_proxys = |family: &u8| tables.contains(&(*family, KUBE_PROXY.to_owned()));
        found.nftables.extend([IPV4, IPV6].into_iter().filter(is_kube_proxys));
        let (legacy, nft) = (saved(&LEGACY)?, saved(&NFT)?);
        let (sees_legacy, sees_nft) = (!legacy.is_empty(), !nft.is_empty());
        let one_kind = if sees_legacy || sees_nft { Vec::new() } else { saved(&ONE_KIND)? };
        // Who has one kind has the one that the node uses.
        if one_kind.is_empty() {
            found.unseen = !sees_legacy && has_legacy_tables() || !sees_nft && has_nft_chains()?;
        }
        for (command, saved) in [legacy, nft, one_kind].concat() {
            found.iptables.extend(removal(&saved).map(|removal| (command, removal)));
        }
        Ok(found)
    }

    /// Whether none were found.
    pub const fn is_empty(&self) -> bool {
        self.nftables.is_empty() && self.iptables.is_empty()
    }

    /// Whether these are all.
    ///
    /// # Errors
    /// If that cannot be told.
    pub const fn are_all(&self) -> Result<(), Error> {
        if self.unseen { Err(Error::NoIptables) } else { Ok(()) }
    }

    /// Whether there may be any: what cannot be told counts.
    pub fn may_exist() -> bool {
        !Self::find().is_ok_and(|found| found.is_empty() && found.are_all().is_ok())
    }

    /// Removes them. Chains that iptables itself has stay, and with them netfilter's NAT; so do those that somebody else
    /// leads packets to.
    ///
    /// # Errors
    /// At the first that cannot be removed.
    pub fn remove(&self) -> Result<(), Error> {
        let delete = |family: &u8| {
            message(DEL_TABLE, *family, 0, Attributes::default().with(TABLE_NAME, &text(KUBE_PROXY)))
        };
        if !self.nftables.is_empty() {
            transaction(self.nftables.iter().map(delete))
                .map_err(|error| Error::Nftables("remove kube-proxy's tables", error))?;
        }
        self.iptables.iter().try_for_each(|(command, removal)| restore(command, removal))
    }
}

/// How the kube-proxy works that runs here, if one does.
pub fn running() -> Option<String> {
    let ask = || -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&METRICS, SAYS_WITHIN)?;
        stream.set_read_timeout(Some(SAYS_WITHIN))?;
        stream.write_all(b"GET /proxyMode HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.take(4096).read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().ok()?;
    let mode = answer.split("\r\n\r\n").nth(1)?.trim();
    ["nftables", "iptables", "ipvs"].contains(&mode).then(|| mode.to_owned())
}

/// Keeps netfilter's NAT in work whoever else uses it, or no longer. With the last chain of type NAT the kernel takes
/// NAT off the packets, of old connections too, and with the last rule about connections their tracking.
///
/// # Errors
/// If the kernel refuses.
pub fn keep_nat(keep: bool) -> Result<(), Error> {
    let is_there = tables()?.iter().any(|(family, name)| (*family, name.as_str()) == (INET, KEEP_NAT));
    let name = text(KEEP_NAT);
    let table = Attributes::default().with(TABLE_NAME, &name);
    if keep && !is_there {
        let hook = Attributes::default()
            .with(HOOK_NUMBER, &POSTROUTING.to_be_bytes())
            .with(HOOK_PRIORITY, &SOURCE_NAT.to_be_bytes());
        let chain = Attributes::default()
            .with(CHAIN_TABLE, &name)
            .with(CHAIN_NAME, &text("keep"))
            .nest(CHAIN_HOOK, hook)
            .with(CHAIN_TYPE, &text("nat"));
        let ct = Attributes::default()
            .with(CT_REGISTER, &REGISTER.to_be_bytes())
            .with(CT_KEY, &CT_STATE.to_be_bytes());
        let expression = Attributes::default().with(EXPRESSION_NAME, &text("ct")).nest(EXPRESSION_DATA, ct);
        let rule = Attributes::default()
            .with(RULE_TABLE, &name)
            .with(RULE_CHAIN, &text("keep"))
            .nest(RULE_EXPRESSIONS, Attributes::default().nest(LIST_ELEMENT, expression));
        transaction([
            message(NEW_TABLE, INET, libc::NLM_F_CREATE, table),
            message(NEW_CHAIN, INET, libc::NLM_F_CREATE, chain),
            message(NEW_RULE, INET, libc::NLM_F_CREATE | libc::NLM_F_APPEND, rule),
        ])
        .map_err(|error| Error::Nftables("keep NAT for connections of kube-proxy", error))?;
    } else if !keep && is_there {
        transaction([message(DEL_TABLE, INET, 0, table)])
            .map_err(|error| Error::Nftables("remove table inet sheave-keep-nat", error))?;
    }
    Ok(())
}

/// Families and names of all tables.
fn tables() -> Result<Vec<(u8, String)>, Error> {
    dump(GET_TABLE, |message| Some((*message.first()?, named(message, TABLE_NAME)?)))
}

/// Whether kube-proxy has chains of iptables of the kind that keeps its rules in nftables.
fn has_nft_chains() -> Result<bool, Error> {
    let chains =
        dump(GET_CHAIN, |message| Some((named(message, CHAIN_TABLE)?, named(message, CHAIN_NAME)?)))?;
    Ok(chains.iter().any(|(table, chain)| table != KUBE_PROXY && is_kube_proxys(chain)))
}

/// Whether the kernel's own tables of iptables are in use, by whomever.
fn has_legacy_tables() -> bool {
    ["ip_tables_names", "ip6_tables_names"].iter().any(|names| {
        std::fs::read(Path::new("/proc/thread-self/net").join(names)).is_ok_and(|names| !names.is_empty())
    })
}

fn dump<T>(kind: u16, parse: impl Fn(&[u8]) -> Option<T>) -> Result<Vec<T>, Error> {
    let dump = || Netlink::open(netlink::Family::NetlinkNetFilter)?.dump(kind, &[0; 4], parse);
    match dump() {
        // A kernel without nftables, or without netfilter.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT)
            ) =>
        {
            Ok(Vec::new())
        }
        result => result.map_err(|error| Error::Nftables("list tables", error)),
    }
}

/// A string after a `struct nfgenmsg`.
fn named(message: &[u8], wanted: u16) -> Option<String> {
    let name = attributes(message.get(4..)?).find(|(kind, _)| *kind == wanted)?.1;
    Some(String::from_utf8_lossy(name).trim_end_matches('\0').to_owned())
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn message(kind: u16, family: u8, flags: i32, attributes: Attributes) -> Message {
    Message { kind, flags: flags | libc::NLM_F_ACK, payload: attributes.after(&[family, 0, 0, 0]) }
}

/// All or nothing.
fn transaction(messages: impl IntoIterator<Item = Message>) -> io::Result<()> {
    let frame = |kind| Message { kind, flags: 0, payload: vec![0, 0, 0, SUBSYSTEM] };
    let all: Vec<_> = [frame(BATCH_BEGIN)].into_iter().chain(messages).chain([frame(BATCH_END)]).collect();
    Netlink::open(netlink::Family::NetlinkNetFilter)?.ask(&all)?.into_iter().collect()
}

/// What each of these commands saves; nothing of those that are not installed.
fn saved(commands: &[&'static str]) -> Result<Vec<(&'static str, String)>, Error> {
    let mut all = Vec::new();
    for command in commands {
        let save = format!("{command}-save");
        let output = match Command::new(&save).stdin(Stdio::null()).output() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            result => result.map_err(|error| Error::Run(save.clone(), error))?,
        };
        if !output.status.success() {
            return Err(failed(save, &output.stderr));
        }
        all.push((*command, String::from_utf8_lossy(&output.stdout).into_owned()));
    }
    Ok(all)
}

fn restore(command: &str, input: &str) -> Result<(), Error> {
    let restore = format!("{command}-restore");
    let run = || {
        let mut child = Command::new(&restore)
            .args(["--noflush", "--wait", "5"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    };
    let output = run().map_err(|error| Error::Run(restore.clone(), error))?;
    if output.status.success() { Ok(()) } else { Err(failed(restore, &output.stderr)) }
}

fn failed(command: String, said: &[u8]) -> Error {
    Error::Failed { command, said: String::from_utf8_lossy(said).trim().to_owned() }
}

fn is_kube_proxys(chain: &str) -> bool {
    ENTRIES.contains(&chain)
        || [MARK, CANARY].contains(&chain)
        || PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

/// Of what `iptables-save` says: what to give to `iptables-restore --noflush` so that kube-proxy's chains go. `None`:
/// there are none.
fn removal(saved: &str) -> Option<String> {
    let (mut removal, mut table) = (String::new(), Table::default());
    for line in saved.lines() {
        if line.starts_with('*') {
            table = Table { name: line, ..Table::default() };
        } else if let Some(chain) = line.strip_prefix(':') {
            table.chains.extend(chain.split(' ').next());
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let from = rule.split(' ').next().unwrap_or_default();
            let to = [" -j ", " -g "].iter().find_map(|jump| rule.rsplit_once(jump));
            let to = to.and_then(|(_, target)| target.split(' ').next()).unwrap_or_default();
            table.rules.push((rule, from, to));
        } else if line == "COMMIT" {
            removal.push_str(&table.removal());
        }
    }
    (!removal.is_empty()).then_some(removal)
}

/// A table of iptables.
#[derive(Default)]
struct Table<'a> {
    name: &'a str,
    chains: Vec<&'a str>,
    /// Rules, each with the chain that it is in and where it leads.
    rules: Vec<(&'a str, &'a str, &'a str)>,
}

impl<'a> Table<'a> {
    fn removal(&self) -> String {
        let kept = self.kept();
        let goes = |chain: &&str| is_kube_proxys(chain) && !kept.contains(chain);
        let gone: Vec<&str> = self.chains.iter().copied().filter(goes).collect();
        if gone.is_empty() {
            return String::new();
        }
        let jumps = self.rules.iter().filter(|(_, from, to)| !is_kube_proxys(from) && gone.contains(to));
        // Declared, a chain is emptied: then they can be deleted in any order.
        let lines = std::iter::once(self.name.to_owned())
            .chain(gone.iter().map(|chain| format!(":{chain} - [0:0]")))
            .chain(jumps.map(|(rule, ..)| format!("-D {rule}")))
            .chain(gone.iter().map(|chain| format!("-X {chain}")))
            .chain(["COMMIT".to_owned()]);
        lines.flat_map(|line| [line, "\n".to_owned()]).collect()
    }

    /// Chains of kube-proxy that others lead packets to, and what those need.
    fn kept(&self) -> BTreeSet<&'a str> {
        let is_kube_proxys_jump = |from, to| BUILT_IN.contains(&from) && ENTRIES.contains(&to);
        let others = self.rules.iter().filter(|(_, from, to)| {
            is_kube_proxys(to) && !is_kube_proxys(from) && !is_kube_proxys_jump(*from, *to)
        });
        let mut kept: BTreeSet<&str> = others.map(|(_, _, to)| *to).collect();
        if kept.contains(MARK) {
            kept.insert(POSTROUTING_CHAIN);
        }
        loop {
            let led = self.rules.iter().filter(|(_, from, to)| kept.contains(from) && is_kube_proxys(to));
            let more: Vec<&str> = led.map(|(_, _, to)| *to).filter(|to| !kept.contains(to)).collect();
            if more.is_empty() {
                return kept;
            }
            kept.extend(more);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::in_own_namespace;

    /// By the kernel's own nftables.
    #[test]
    fn nat_is_kept_and_given_up_and_kube_proxys_tables_go() {
        in_own_namespace(|| {
            assert!(Rules::find().unwrap().is_empty());
            keep_nat(false).unwrap();
            keep_nat(true).unwrap();
            keep_nat(true).unwrap();
            let ours = (INET, KEEP_NAT.to_owned());
            assert_eq!(tables().unwrap(), std::slice::from_ref(&ours));
            let table = |family| {
                message(
                    NEW_TABLE,
                    family,
                    libc::NLM_F_CREATE,
                    Attributes::default().with(TABLE_NAME, &text(KUBE_PROXY)),
                )
            };
            transaction([table(IPV4), table(IPV6)]).unwrap();
            let rules = Rules::find().unwrap();
            assert_eq!(rules.to_string(), "nft ip, nft ip6");
            rules.remove().unwrap();
            assert_eq!(tables().unwrap(), [ours]);
            assert!(rules.remove().is_err(), "they are gone");
            keep_nat(false).unwrap();
            assert_eq!(tables().unwrap(), []);
        });
    }

    /// By the commands of both kinds. What the others have is as it was, and nothing is left to remove.
    #[test]
    fn iptables_rules_go_and_others_stay() {
        let others = |kind: &str| {
            let all = saved(&[if kind.ends_with("legacy") { LEGACY[0] } else { NFT[0] }]).unwrap();
            let rules = all[0].1.lines().filter(|line| line.starts_with("-A ")).map(str::to_owned);
            rules.collect::<Vec<_>>()
        };
        for (kind, other_kind) in [(LEGACY[0], NFT[0]), (NFT[0], LEGACY[0])] {
            in_own_namespace(move || {
                let plugins = "*nat\n:CNI-HOSTPORT - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n\
                    -A POSTROUTING -j KUBE-POSTROUTING\n-A PREROUTING -j CNI-HOSTPORT\n\
                    -A CNI-HOSTPORT -p tcp --dport 80 -j KUBE-MARK-MASQ\n\
                    -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\nCOMMIT\n";
                restore(kind, plugins).unwrap();
                let before = others(kind);
                assert!(!before.is_empty() && Rules::find().unwrap().is_empty());
                let kube_proxys = "*filter\n:KUBE-FORWARD - [0:0]\n\
                    -A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD\n\
                    -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\nCOMMIT\n\
                    *nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\n\
                    -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
                    -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
                    -A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-X\n-A KUBE-SVC-X -j KUBE-MARK-MASQ\nCOMMIT\n";
                restore(kind, kube_proxys).unwrap();
                let rules = Rules::find().unwrap();
                assert_eq!(rules.to_string(), kind);
                rules.are_all().unwrap();
                // In the tables that the commands show; without them nobody could tell.
                assert_eq!(
                    (has_legacy_tables(), has_nft_chains().unwrap()),
                    (kind == LEGACY[0], kind == NFT[0])
                );
                rules.remove().unwrap();
                assert_eq!(others(kind), before);
                assert!(others(other_kind).is_empty());
                assert!(Rules::find().unwrap().is_empty());
            });
        }
    }

    #[test]
    fn only_kube_proxys_chains_and_its_jumps_to_them_go() {
        let saved = "# Generated\n\
            *mangle\n:PREROUTING ACCEPT [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n\
            *nat\n:PREROUTING ACCEPT [1:60]\n:KUBE-SERVICES - [0:0]\n:KUBE-SEP-X - [0:0]\n:CNI-A - [0:0]\n\
            -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
            -A PREROUTING -j CNI-A\n\
            -A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-SEP-X\n\
            -A KUBE-SEP-X -p tcp -j DNAT --to-destination 10.0.0.1:6443\nCOMMIT\n\
            *filter\n:INPUT ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\n-A INPUT -j KUBE-FIREWALL\nCOMMIT\n";
        let wanted = "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SEP-X - [0:0]\n\
            -D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
            -X KUBE-SERVICES\n-X KUBE-SEP-X\nCOMMIT\n";
        assert_eq!(removal(saved).as_deref(), Some(wanted));
        assert_eq!(removal("*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n"), None);
        assert_eq!(removal(""), None);
    }

    /// A plugin for host ports may have kube-proxy's chains mark what is to be masqueraded.
    #[test]
    fn chains_that_others_lead_to_stay() {
        let saved = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\n\
            :KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-PROXY-CANARY - [0:0]\n:CNI-HOSTPORT - [0:0]\n\
            -A PREROUTING -j KUBE-SERVICES\n\
            -A POSTROUTING -j KUBE-POSTROUTING\n\
            -A CNI-HOSTPORT -s 10.244.0.0/16 -m comment --comment \"-j KUBE-SVC-X\" -j KUBE-MARK-MASQ\n\
            -A KUBE-SERVICES -j KUBE-SVC-X\n-A KUBE-SVC-X -j KUBE-MARK-MASQ\n\
            -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
            -A KUBE-POSTROUTING -j MASQUERADE --random-fully\nCOMMIT\n";
        let wanted = "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\n:KUBE-PROXY-CANARY - [0:0]\n\
            -D PREROUTING -j KUBE-SERVICES\n\
            -X KUBE-SERVICES\n-X KUBE-SVC-X\n-X KUBE-PROXY-CANARY\nCOMMIT\n";
        assert_eq!(removal(saved).as_deref(), Some(wanted));
        // What is left afterwards is nothing to remove.
        let left = "*nat\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:CNI-HOSTPORT - [0:0]\n\
            -A POSTROUTING -j KUBE-POSTROUTING\n-A CNI-HOSTPORT -j KUBE-MARK-MASQ\nCOMMIT\n";
        assert_eq!(removal(left), None);
        let whole = "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\n-A PREROUTING -j KUBE-SERVICES\n\
            -A MINE -g KUBE-SERVICES\n-A KUBE-SERVICES -j KUBE-SVC-X\nCOMMIT\n";
        assert_eq!(removal(whole), None);
    }
}
