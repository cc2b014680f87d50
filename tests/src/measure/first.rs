//! The first packet of a connection: when the SYN leaves the client's device and when the SYN-ACK reaches it, by the
//! kernel's own clock at the device. What the client itself does before and after is not in it.

use std::{
    io::IoSliceMut,
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    cmsg_space,
    errno::Errno,
    sys::{
        socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt::ReceiveTimestampns},
        time::TimeSpec,
    },
};

use crate::nodes::tap::Tap;

/// Where clients have their addresses.
const DEVICE: &str = "eth0";

/// How long the frames of a connection that is there may take to be seen.
const SEEN_WITHIN: Duration = Duration::from_secs(1);

/// The kernel begins to look at its clock for frames a moment after it is asked to; a frame without a time would get that of
/// being read.
const CLOCK_WITHIN: Duration = Duration::from_millis(50);

/// What is read of a frame: all headers.
const HEADERS_BYTES: usize = 128;

/// Flags of TCP.
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// A step of a handshake, and the client's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Syn(u16),
    SynAck(u16),
}

/// Sees the handshakes of the namespace's clients.
pub(super) struct Handshakes {
    tap: Tap,
}

impl Handshakes {
    /// From now on, in the calling thread's namespace.
    pub(super) fn watch() -> Result<Self> {
        let tap = Tap::open_here(DEVICE)?;
        setsockopt(tap.socket(), ReceiveTimestampns, &true).context("SO_TIMESTAMPNS")?;
        thread::sleep(CLOCK_WITHIN);
        Ok(Self { tap })
    }

    /// The time between the last SYN from a port and its answer. The connection is there: both have been seen.
    pub(super) fn round_trip(&self, port: u16) -> Result<Duration> {
        let deadline = Instant::now() + SEEN_WITHIN;
        let mut left = None;
        loop {
            match (self.next()?, left) {
                (Some((Some(Step::Syn(from)), at)), _) if from == port => left = Some(at),
                (Some((Some(Step::SynAck(to)), at)), Some(left)) if to == port => {
                    return Ok(Duration::from(at).saturating_sub(Duration::from(left)));
                }
                (None, _) if Instant::now() > deadline => bail!("the handshake of port {port} was not seen"),
                _ => {}
            }
        }
    }

    /// The next frame, if there is one: what it is and when it was at the device.
    fn next(&self) -> Result<Option<(Option<Step>, TimeSpec)>> {
        let mut headers = [0; HEADERS_BYTES];
        let mut space = cmsg_space!(TimeSpec);
        let mut parts = [IoSliceMut::new(&mut headers)];
        let received = recvmsg::<()>(
            self.tap.socket().as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_DONTWAIT,
        );
        let received = match received {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            received => received.context("reading a frame")?,
        };
        let at = received.cmsgs().context("what comes with a frame")?.find_map(|message| {
            if let ControlMessageOwned::ScmTimestampns(at) = message { Some(at) } else { None }
        });
        let at = at.context("a frame without a time")?;
        let length = received.bytes;
        Ok(Some((step(headers.get(..length).unwrap_or_default()), at)))
    }
}

/// What a frame of Ethernet is of a handshake.
fn step(frame: &[u8]) -> Option<Step> {
    let packet = frame.get(14..)?;
    let tcp = match packet.first()? >> 4 {
        4 if packet.get(9) == Some(&6) => packet.get(20..)?,
        6 if packet.get(6) == Some(&6) => packet.get(40..)?,
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    match tcp.get(13)? & (SYN | ACK) {
        SYN => Some(Step::Syn(port(0)?)),
        flags if flags == SYN | ACK => Some(Step::SynAck(port(2)?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_of_a_handshake_are_told_in_both_families() {
        let frame = |header: &[u8], flags: u8| {
            let mut frame = vec![0; 14];
            frame.extend_from_slice(header);
            frame.extend_from_slice(&[0x12, 0x34, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags]);
            frame
        };
        let (mut v4, mut v6) = ([0_u8; 20], [0_u8; 40]);
        (v4[0], v4[9]) = (0x45, 6);
        (v6[0], v6[6]) = (0x60, 6);
        for header in [&v4[..], &v6] {
            assert_eq!(step(&frame(header, SYN)), Some(Step::Syn(0x1234)));
            assert_eq!(step(&frame(header, SYN | ACK)), Some(Step::SynAck(80)));
            assert_eq!(step(&frame(header, ACK)), None);
        }
        v4[9] = 17;
        assert_eq!(step(&frame(&v4, SYN)), None);
        assert_eq!(step(&[0; 20]), None);
    }
}
