//! What a program costs by itself (`BPF_PROG_TEST_RUN`): one frame, again and again.

use std::{
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd},
    path::Path as FilePath,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use etherparse::PacketBuilder;

use super::{
    NEXT,
    assembler::{Operation, Program, R1, R2, R10, Width},
    index_of,
    kernel::{Run, SCHED_CLS, hash_of, load, test_run},
};
use crate::{bpf::program_of_link, measure::cpu::pin, netns::Netns};

/// `bpf_map_lookup_elem`.
const LOOK_UP: i32 = 1;

/// Of the table that is looked up in by the program that does nothing else: as many as connections are remembered.
const ENTRIES: u32 = 1 << 16;

/// A program at a hook, with the frame that it is given.
#[derive(Debug)]
pub struct Path {
    netns: Netns,
    program: OwnedFd,
    frame: Vec<u8>,
    context: Vec<u8>,
    verdict: u32,
}

/// Where a frame is.
#[derive(Clone, Copy, Debug)]
pub struct Hook<'a> {
    /// The namespace.
    pub netns: &'a Netns,
    /// The device.
    pub device: &'a str,
    /// The device that it came in by, if it leaves.
    pub arrived_by: Option<&'a str>,
}

impl Hook<'_> {
    /// `struct __sk_buff`, as far as it tells both devices.
    fn context(&self) -> Result<Vec<u8>> {
        let device = index_of(self.netns, self.device)?;
        let arrived_by = self.arrived_by.map_or(Ok(device), |name| index_of(self.netns, name))?;
        let words = [0, 0, 0, 0, 0, 0, 0, 0, 0, arrived_by, device, 0];
        Ok(words.into_iter().flat_map(u32::to_ne_bytes).collect())
    }
}

impl Path {
    fn new(program: OwnedFd, hook: Hook<'_>, frame: Vec<u8>, verdict: u32) -> Result<Self> {
        let (netns, context) = (hook.netns.clone(), hook.context()?);
        Ok(Self { netns, program, frame, context, verdict })
    }

    /// The program of a pinned link. It must say the same each time, and leave the frame as it is: the next time begins
    /// with what the last one left.
    pub fn pinned(link: &FilePath, hook: Hook<'_>, frame: Vec<u8>, verdict: u32) -> Result<Self> {
        Self::new(program_of_link(link)?, hook, frame, verdict)
    }

    /// A program that does nothing.
    pub fn empty(hook: Hook<'_>, frame: Vec<u8>) -> Result<Self> {
        let program = load(SCHED_CLS, &Program::default().last(NEXT.cast_signed()))?;
        Self::new(program, hook, frame, NEXT)
    }

    /// A program that looks a key of 24 bytes up, which is there, in a table of the size that connections have.
    pub fn look_up(hook: Hook<'_>, frame: Vec<u8>) -> Result<Self> {
        // A program holds its maps.
        let map = hash_of(&[0_u8; 24], ENTRIES)?;
        let mut code = Program::default();
        code.with(Operation::Move, R1, 0);
        for offset in [-24, -16, -8] {
            code.store(Width::Double, R10, offset, R1);
        }
        code.map(R1, map.as_raw_fd()).by(Operation::Move, R2, R10).with(Operation::Add, R2, -24);
        let program = load(SCHED_CLS, &code.call(LOOK_UP).last(NEXT.cast_signed()))?;
        Self::new(program, hook, frame, NEXT)
    }

    /// Nanoseconds that a run takes, of so many on a CPU.
    pub fn ns(&self, repeat: u32, cpu: usize) -> Result<f64> {
        self.netns.run(|| {
            pin(Some(cpu))?;
            let run = Run { frame: &self.frame, context: &self.context, repeat, live_batch: 0 };
            // The kernel says whole nanoseconds.
            let begun = Instant::now();
            let ran = test_run(&self.program, run)?;
            let took = begun.elapsed();
            ensure!(ran.verdict == self.verdict, "the program says {}, not {}", ran.verdict, self.verdict);
            ensure!(ran.frame == self.frame, "the frame is another one afterwards: {:02x?}", ran.frame);
            Ok(took.as_nanos() as f64 / f64::from(repeat))
        })?
    }
}

/// What a segment of TCP says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// SYN.
    Open,
    /// SYN and ACK.
    Accept,
    /// ACK, with data.
    Go,
}

/// A frame of TCP.
pub fn segment(from: SocketAddr, to: SocketAddr, says: Says) -> Result<Vec<u8>> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => ethernet.ipv4(from.ip().octets(), to.ip().octets(), 64),
        (SocketAddr::V6(from), SocketAddr::V6(to)) => ethernet.ipv6(from.ip().octets(), to.ip().octets(), 64),
        (SocketAddr::V4(_) | SocketAddr::V6(_), _) => bail!("{from} and {to} are of two families"),
    };
    let tcp = ip.tcp(from.port(), to.port(), 1, 65_000);
    let (tcp, data) = match says {
        Says::Open => (tcp.syn(), &[][..]),
        Says::Accept => (tcp.syn().ack(1), &[][..]),
        Says::Go => (tcp.ack(1), &[0; 8][..]),
    };
    let mut frame = Vec::new();
    tcp.write(&mut frame, data).context("writing a frame")?;
    Ok(frame)
}
