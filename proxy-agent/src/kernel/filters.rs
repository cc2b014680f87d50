//! Classic filters of a device: the hooks of kernels without tcx (before 6.6), and of whoever asks for them.
//!
//! A filter stays when the agent goes, and goes with its device. It has no pin: it is known by its handle, its priority
//! and its program's name. At ingress ours comes first, so that everybody else's sees real addresses; at egress last.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::netlink::{self, Attributes, Message, Netlink, attributes};

/// linux/rtnetlink.h: `RTM_*`.
const NEW_QDISC: u16 = 36;
const NEW_FILTER: u16 = 44;
const DELETE_FILTER: u16 = 45;
const GET_FILTER: u16 = 46;

/// linux/pkt_sched.h: `TC_H_CLSACT`, and what filters there hang on.
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;

/// `TCA_*`, and in its options `TCA_BPF_*`.
const KIND: u16 = 1;
const OPTIONS: u16 = 2;
const PROGRAM: u16 = 6;
const NAME: u16 = 7;
const FLAGS: u16 = 8;
/// `TCA_BPF_FLAG_ACT_DIRECT`: what the program returns is what becomes of the packet.
const DIRECT: u32 = 1;

/// `ETH_P_ALL`.
const ALL_PROTOCOLS: u16 = 3;

/// Nobody's else: a filter of the same priority and handle would be replaced.
const HANDLE: u32 = 0x5ea_0001;

/// Bytes of a `struct tcmsg`.
const TCMSG: usize = 20;

/// Where filters are asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// What comes in.
    Ingress,
    /// What leaves.
    Egress,
}

impl Direction {
    /// `TC_H_MIN_INGRESS` or `TC_H_MIN_EGRESS` of the qdisc.
    const fn parent(self) -> u32 {
        match self {
            Self::Ingress => 0xffff_fff2,
            Self::Egress => 0xffff_fff3,
        }
    }

    /// Lower ones are asked first.
    const fn priority(self) -> u16 {
        match self {
            Self::Ingress => 1,
            Self::Egress => u16::MAX,
        }
    }

    const fn info(self) -> u32 {
        (self.priority() as u32) << 16 | ALL_PROTOCOLS.to_be() as u32
    }

    fn header(self, device: u32, handle: u32) -> Vec<u8> {
        tcmsg(device, handle, self.parent(), self.info())
    }
}

fn tcmsg(device: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    [0, device, handle, parent, info].map(u32::to_ne_bytes).concat()
}

/// The filters of a network namespace.
pub struct Filters(Netlink);

impl Filters {
    /// Of this thread's.
    ///
    /// # Errors
    /// If the kernel has no such netlink.
    pub fn open() -> io::Result<Self> {
        Netlink::open(netlink::Family::NetlinkRoute).map(Self)
    }

    /// Puts a program on a device, or in the place of the one that is there. The qdisc that filters hang on is made, and
    /// stays: somebody else may have come to use it.
    ///
    /// # Errors
    /// If the kernel refuses; ENODEV if there is no such device.
    pub fn put(
        &self,
        device: u32,
        direction: Direction,
        name: &str,
        program: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let qdisc = Attributes::default().with(KIND, b"clsact\0");
        let qdisc = Message {
            kind: NEW_QDISC,
            flags: libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL,
            payload: qdisc.after(&tcmsg(device, CLSACT_HANDLE, CLSACT, 0)),
        };
        let options = Attributes::default()
            .with(PROGRAM, &program.as_raw_fd().to_ne_bytes())
            .with(NAME, &[name.as_bytes(), &[0]].concat())
            .with(FLAGS, &DIRECT.to_ne_bytes());
        let filter = Attributes::default().with(KIND, b"bpf\0").nest(OPTIONS, options);
        let filter = Message {
            kind: NEW_FILTER,
            flags: libc::NLM_F_ACK | libc::NLM_F_CREATE,
            payload: filter.after(&direction.header(device, HANDLE)),
        };
        let mut answers = self.0.ask(&[qdisc, filter])?.into_iter();
        match answers.next() {
            Some(Err(error)) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            Some(_) | None => {}
        }
        answers.next().unwrap_or(Ok(()))
    }

    /// Takes ours off a device; one that has none is as good as that.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove(&self, device: u32, direction: Direction) -> io::Result<()> {
        let delete = Message {
            kind: DELETE_FILTER,
            flags: libc::NLM_F_ACK,
            payload: Attributes::default().with(KIND, b"bpf\0").after(&direction.header(device, HANDLE)),
        };
        match self.0.ask(&[delete])?.pop() {
            // No device, no qdisc, no filter.
            Some(Err(error))
                if ![libc::ENODEV, libc::EINVAL, libc::ENOENT]
                    .contains(&error.raw_os_error().unwrap_or(0)) =>
            {
                Err(error)
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Whether a device has ours, with a program of this name.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn has(&self, device: u32, direction: Direction, name: &str) -> io::Result<bool> {
        let asked = tcmsg(device, 0, direction.parent(), 0);
        let found = self.0.dump(GET_FILTER, &asked, |message| {
            let word = |at: usize| message.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word));
            let is_ours = word(8)? == HANDLE && word(16)? == direction.info();
            let options = attributes(message.get(TCMSG..)?).find(|(kind, _)| *kind == OPTIONS)?.1;
            let its = attributes(options).find(|(kind, _)| *kind == NAME)?.1;
            (is_ours && its.strip_suffix(&[0]) == Some(name.as_bytes())).then_some(())
        });
        match found {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
            found => Ok(!found?.is_empty()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_at_ingress_and_last_at_egress() {
        assert_eq!(Direction::Ingress.info(), 0x0001_0300);
        assert_eq!(Direction::Egress.info(), 0xffff_0300);
        assert_eq!(tcmsg(7, 1, 2, 3).len(), TCMSG);
    }
}
