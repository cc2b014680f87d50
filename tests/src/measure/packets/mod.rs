//! What a packet costs on its way through a node: frames that the kernel itself makes (live frames of
//! `BPF_PROG_TEST_RUN`), a device's stack that takes them as received, and a program that counts and drops what arrives.
//!
//! The time of such a run has in it whatever the stack does with the frames, as all of it happens on the same CPU.

mod assembler;
mod kernel;
mod paths;

use std::{
    fs::File,
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
};

use anyhow::{Context, Result, ensure};
use nix::{libc, net::if_::if_nametoindex};
use serde_json::Value;

use self::{
    assembler::{Condition, Operation, Program, R0, R1, R2, R3, R4, R5, R6, Width},
    kernel::{
        AT_CONNECT, AT_TCX_EGRESS, AT_TCX_INGRESS, AT_XDP, Run, SCHED_CLS, SOCK_ADDR, XDP, attach, counters,
        load, load_for, read_counters, table, test_run,
    },
};
use super::cpu::pin;
use crate::netns::Netns;

pub use self::paths::{Hook, Path, Says, segment};

/// What XDP programs say.
const XDP_ABORTED: i32 = 0;
const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;

/// What a program of a device's hook says for "the next one": `TCX_NEXT`.
pub const NEXT: u32 = u32::MAX;
/// For "drop it": `TCX_DROP`.
pub const DROP: u32 = 2;

/// `bpf_get_prandom_u32`.
const PRANDOM_U32: i32 = 7;
/// `bpf_redirect`.
const REDIRECT: i32 = 23;

/// The smallest frame of Ethernet, without its checksum.
const FRAME_BYTES: usize = 60;

/// Where header fields are in a frame of IPv4 and UDP.
const IP: usize = 14;
const IP_CHECKSUM: i16 = 24;
const SOURCE: i16 = 26;
const DESTINATION: i16 = 30;
const SOURCE_PORT: i16 = 34;
const DESTINATION_PORT: i16 = 36;

/// Who sends: the third and the fourth byte of the address and the port tell flows apart.
pub const SENDERS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);

/// Frames made at a time; they stay in the caches as those of a device do.
const BATCH: u32 = 64;

/// Which flows frames belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flows {
    /// A few, again and again.
    Known,
    /// Each a new one.
    New,
}

/// A few flows are so many: a power of two.
pub const KNOWN: u32 = 64;

/// Where frames go: one address, and one of several ports, every second from the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The address.
    pub address: Ipv4Addr,
    /// The first port.
    pub port: u16,
    /// How many ports; a flow's is drawn from them.
    pub ports: u16,
}

/// What frames that arrive look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrivals {
    /// The prefix of their destination.
    pub prefix: Ipv4Addr,
    /// Its length.
    pub prefix_len: u32,
    /// Their destination port.
    pub port: u16,
}

/// How many frames arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// From the senders themselves.
    pub unchanged: u64,
    /// From another address: the node has replaced it.
    pub replaced: u64,
}

/// A device takes frames as received.
#[derive(Debug)]
pub struct Generator {
    netns: Netns,
    device: u32,
    mac: [u8; 6],
    /// How many frames were made, over all programs: new flows stay new.
    state: OwnedFd,
    _rings: OwnedFd,
}

impl Generator {
    /// At a device of a namespace.
    pub fn new(netns: &Netns, device: &str) -> Result<Self> {
        let index = index_of(netns, device)?;
        // A virtual device has no rings for frames of XDP before it has a program of its own; ours lets everything pass.
        let pass = load(XDP, &Program::default().last(XDP_PASS))?;
        let rings = netns.run(|| attach(&pass, index, AT_XDP))??;
        let mac = mac_of(netns, device)?;
        Ok(Self { netns: netns.clone(), device: index, mac, state: counters()?, _rings: rings })
    }

    /// A program that makes frames.
    pub fn frames(&self, flows: Flows, target: Target) -> Result<Frames> {
        Ok(Frames { program: load(XDP, &make(self.state.as_raw_fd(), self.mac, flows, target))? })
    }

    /// Makes so many frames on a CPU, before everybody else there; returns the nanoseconds for each.
    pub fn run(&self, frames: &Frames, count: u32, cpu: usize) -> Result<u32> {
        self.netns.run(|| {
            pin(Some(cpu))?;
            go_first()?;
            // `struct xdp_md`: data, its end, metadata, device, queue, no other device.
            let words = [0, u32::try_from(FRAME_BYTES)?, 0, self.device, 0, 0];
            let context: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
            let run = Run { frame: &[0; FRAME_BYTES], context: &context, repeat: count, live_batch: BATCH };
            let ns = test_run(&frames.program, run)?.ns;
            ensure!(ns > 0, "the kernel does not say how long {count} frames took");
            Ok(ns)
        })?
    }
}

/// A program that makes frames.
#[derive(Debug)]
pub struct Frames {
    program: OwnedFd,
}

/// Counts and drops what arrives at a device.
#[derive(Debug)]
pub struct Counter {
    counts: OwnedFd,
    _link: OwnedFd,
}

impl Counter {
    /// At a device of a namespace; what is no such frame passes.
    pub fn new(netns: &Netns, device: &str, arrivals: Arrivals) -> Result<Self> {
        let counts = counters()?;
        let program = load(XDP, &count(counts.as_raw_fd(), arrivals))?;
        let index = index_of(netns, device)?;
        let link = netns.run(|| attach(&program, index, AT_XDP))??;
        Ok(Self { counts, _link: link })
    }

    /// How many there were so far.
    pub fn read(&self) -> Result<Arrived> {
        let [unchanged, replaced] = read_counters(&self.counts)?;
        Ok(Arrived { unchanged, replaced })
    }
}

/// Hands everything that one device receives to another one, and nothing else: the least that a node can do.
#[derive(Debug)]
pub struct Redirect {
    _link: OwnedFd,
}

impl Redirect {
    /// From one device of a namespace to another.
    pub fn new(netns: &Netns, from: &str, to: &str) -> Result<Self> {
        let (from, to) = (index_of(netns, from)?, index_of(netns, to)?);
        let mut code = Program::default();
        code.with(Operation::Move, R1, i32::try_from(to)?).with(Operation::Move, R2, 0).call(REDIRECT);
        let program = load(SCHED_CLS, &code.exit())?;
        Ok(Self { _link: netns.run(|| attach(&program, from, AT_TCX_INGRESS))?? })
    }
}

/// Programs where a proxy's are, at both hooks of devices and at a cgroup's `connect`, that do next to nothing: what nobody
/// who has such hooks can be cheaper than.
#[derive(Debug)]
pub struct BareHooks {
    _links: Vec<OwnedFd>,
}

impl BareHooks {
    /// Of programs that do nothing, at a cgroup, and at devices of a namespace.
    pub fn empty(cgroup: &std::path::Path, netns: &Netns, devices: &[&str]) -> Result<Self> {
        Self::new(&Program::default().last(1), cgroup, netns, devices)
    }

    /// The same, but at `connect` a line of a table is read at random, and one of another table that the first one tells: the
    /// least that one can do who finds a Service and an endpoint of it. A line for each of so many Services, or a few more.
    pub fn reading(services: u32, cgroup: &std::path::Path, netns: &Netns, devices: &[&str]) -> Result<Self> {
        const LINE_BYTES: u32 = 64;
        let lines = services.next_power_of_two();
        let tables = [table(lines * LINE_BYTES)?, table(lines * LINE_BYTES)?];
        let (mask, line_bytes) = ((lines - 1).cast_signed(), LINE_BYTES.cast_signed());
        let mut code = Program::default();
        code.call(PRANDOM_U32).by(Operation::Move, R6, R0);
        for table in &tables {
            code.with(Operation::And, R0, mask).with(Operation::Multiply, R0, line_bytes);
            code.value_of(R1, table.as_raw_fd()).by(Operation::Add, R1, R0).load(Width::Double, R0, R1, 0);
            // Nothing but zeros is there, which only this program's author knows.
            code.by(Operation::Add, R0, R6).with(Operation::ShiftRight, R0, 16);
        }
        code.with(Operation::And, R0, 0).with(Operation::Add, R0, 1);
        Self::new(&code.exit(), cgroup, netns, devices)
    }

    fn new(at_connect: &[u64], cgroup: &std::path::Path, netns: &Netns, devices: &[&str]) -> Result<Self> {
        let mut links = Vec::new();
        let directory = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
        for at in AT_CONNECT {
            let program = load_for(SOCK_ADDR, at, at_connect)?;
            links.push(attach(&program, directory.as_raw_fd().cast_unsigned(), at)?);
        }
        let empty = load(SCHED_CLS, &Program::default().last(NEXT.cast_signed()))?;
        for device in devices {
            let index = index_of(netns, device)?;
            for at in [AT_TCX_INGRESS, AT_TCX_EGRESS] {
                links.push(netns.run(|| attach(&empty, index, at))??);
            }
        }
        Ok(Self { _links: links })
    }
}

/// The header is written anew each time: frames are used again, with all that was done to them.
fn make(state: i32, mac: [u8; 6], flows: Flows, target: Target) -> Vec<u64> {
    let template = template(mac, target);
    let mut code = Program::default();
    code.load(Width::Word, R2, R1, 0).load(Width::Word, R3, R1, 4);
    code.by(Operation::Move, R4, R2).with(Operation::Add, R4, 60).end_if_by(Condition::Greater, R4, R3);
    for (offset, bytes) in (0_i16..).step_by(8).zip(template[..48].as_chunks::<8>().0) {
        code.constant(R4, u64::from_le_bytes(*bytes)).store(Width::Double, R2, offset, R4);
    }
    // The number of the flow.
    code.value_of(R1, state).load(Width::Double, R6, R1, 0);
    code.with(Operation::Add, R6, 1).store(Width::Double, R1, 0, R6);
    if flows == Flows::Known {
        code.with(Operation::And, R6, KNOWN.cast_signed() - 1);
    }
    // Its source port: the lower 15 bits. Beyond that the address is another one, and with it the header's checksum.
    code.by(Operation::Move, R4, R6).with(Operation::And, R4, 0x7fff).with(Operation::Add, R4, 1024);
    code.reorder(R4, 16).store(Width::Half, R2, SOURCE_PORT, R4);
    code.by(Operation::Move, R4, R6).with(Operation::ShiftRight, R4, 15).with(Operation::And, R4, 0xffff);
    code.by(Operation::Move, R5, R4).with(Operation::Add, R5, sum(&template[IP..IP + 20]));
    code.reorder(R4, 16).store(Width::Half, R2, SOURCE + 2, R4);
    code.by(Operation::Move, R4, R5).with(Operation::ShiftRight, R4, 16);
    code.with(Operation::And, R5, 0xffff).by(Operation::Add, R5, R4).with(Operation::Xor, R5, 0xffff);
    code.reorder(R5, 16).store(Width::Half, R2, IP_CHECKSUM, R5);
    // Its destination port: any of them, but always the same.
    code.by(Operation::Move, R4, R6).with(Operation::Multiply, R4, 0x9e37_79b1_u32.cast_signed());
    code.with(Operation::ShiftRight, R4, 12).with(Operation::And, R4, 0xf_ffff);
    code.with(Operation::Modulo, R4, i32::from(target.ports)).with(Operation::Multiply, R4, 2);
    code.with(Operation::Add, R4, i32::from(target.port));
    code.reorder(R4, 16).store(Width::Half, R2, DESTINATION_PORT, R4);
    code.returns(XDP_PASS).last(XDP_ABORTED)
}

/// A frame without source port and checksum. UDP of IPv4 may do without a checksum of its own.
fn template(mac: [u8; 6], target: Target) -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| frame[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &mac);
    put(6, &[2, 0, 0, 0, 0, 1]);
    put(12, &[0x08, 0x00]);
    put(IP, &[0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 17]);
    put(26, &SENDERS.octets());
    put(30, &target.address.octets());
    put(38, &26_u16.to_be_bytes());
    frame
}

/// The sum of a header's words, folded.
fn sum(header: &[u8]) -> i32 {
    let mut sum: u32 =
        header.as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum.cast_signed()
}

fn count(counts: i32, arrivals: Arrivals) -> Vec<u64> {
    let mask = u32::MAX << (32 - arrivals.prefix_len);
    // Of the senders two bytes are always the same.
    let senders = i32::from(u16::from_le_bytes([SENDERS.octets()[0], SENDERS.octets()[1]]));
    let port = i32::from(u16::from_ne_bytes(arrivals.port.to_be_bytes()));
    let mut code = Program::default();
    code.load(Width::Word, R2, R1, 0).load(Width::Word, R3, R1, 4);
    code.by(Operation::Move, R4, R2).with(Operation::Add, R4, 42).end_if_by(Condition::Greater, R4, R3);
    code.load(Width::Half, R4, R2, 12).end_if(Condition::NotEqual, R4, 0x0008);
    code.load(Width::Byte, R4, R2, 23).end_if(Condition::NotEqual, R4, 17);
    code.load(Width::Half, R4, R2, DESTINATION_PORT).end_if(Condition::NotEqual, R4, port);
    code.load(Width::Word, R4, R2, DESTINATION).reorder(R4, 32);
    code.with(Operation::ShiftRight, R4, 32 - arrivals.prefix_len.cast_signed());
    code.end_if(
        Condition::NotEqual,
        R4,
        ((arrivals.prefix.to_bits() & mask) >> (32 - arrivals.prefix_len)).cast_signed(),
    );
    // The second counter lies behind the first; which one it is needs no jump: one if the two differ.
    code.load(Width::Half, R4, R2, SOURCE).with(Operation::Xor, R4, senders);
    code.with(Operation::Add, R4, 0xffff).with(Operation::ShiftRight, R4, 16).with(
        Operation::Multiply,
        R4,
        8,
    );
    code.with(Operation::And, R4, 8);
    code.value_of(R1, counts).by(Operation::Add, R1, R4);
    code.with(Operation::Move, R5, 1).add_to_memory(R1, 0, R5);
    code.returns(XDP_DROP).last(XDP_PASS)
}

fn index_of(netns: &Netns, device: &str) -> Result<u32> {
    netns.run(|| if_nametoindex(device))?.with_context(|| format!("the device {device}"))
}

/// A device's hardware address.
pub fn mac_of(netns: &Netns, device: &str) -> Result<[u8; 6]> {
    let output = netns.command("ip").args(["-json", "link", "show", "dev", device]).output();
    let links: Value =
        serde_json::from_slice(&output.context("running `ip`")?.stdout).context("`ip -json`")?;
    let text = links
        .pointer("/0/address")
        .and_then(Value::as_str)
        .with_context(|| format!("{device} in {links}"))?;
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).with_context(|| format!("the hardware address {text}"))
}

/// Puts the calling thread before all ordinary ones.
fn go_first() -> Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the structure lives across the call, which changes nothing but how this thread is scheduled.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
    ensure!(result == 0, "SCHED_FIFO: {}", io::Error::last_os_error());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header whose sum anybody can look up: UDP from 192.168.0.1 to 192.168.0.199.
    #[test]
    fn a_header_has_its_sum() {
        let mut header = *b"\x45\0\0\x73\0\0\x40\0\x40\x11\0\0\xc0\xa8\0\x01\xc0\xa8\0\xc7";
        assert_eq!(sum(&header), 0xffff ^ 0xb861);
        header[10..12].copy_from_slice(&[0xb8, 0x61]);
        assert_eq!(sum(&header), 0xffff);
    }
}
