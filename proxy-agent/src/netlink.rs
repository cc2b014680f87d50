//! Netlink: what the kernel has, in dumps, and requests to change it.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::{NetlinkBuffer, NlasIterator};
use nix::errno::Errno;
pub use nix::sys::socket::SockProtocol as Family;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockType, bind, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

/// A dump that the kernel calls inconsistent is taken again, so many times; then it is used as it is.
const TRIES: usize = 5;

/// More than the kernel puts into one message of a dump (32 KB).
const BUFFER: usize = 1 << 16;

/// Bytes of a message's header.
const HEADER: usize = 16;

/// The kernel answers a request at once; one that it never answers must not hang the agent.
const PATIENCE_S: i64 = 5;

/// A request.
#[derive(Debug)]
pub struct Message {
    /// Its type.
    pub kind: u16,
    /// `NLM_F_*`, besides `NLM_F_REQUEST`.
    pub flags: i32,
    /// What follows the header.
    pub payload: Vec<u8>,
}

/// A socket of one family in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Netlink {
    fd: OwnedFd,
    /// The next message's. What is still said about an earlier one, that was given up, is not taken for an answer.
    sequence: Cell<u32>,
}

impl Netlink {
    /// # Errors
    /// If the kernel has no such family.
    pub fn open(family: Family) -> io::Result<Self> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, family)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(PATIENCE_S, 0))?;
        Ok(Self { fd, sequence: Cell::new(1) })
    }

    /// What `parse` makes of the payloads of a dump's answers.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn dump<T>(
        &self,
        kind: u16,
        payload: &[u8],
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for attempt in 1.. {
            let (found, consistent) = self.dump_once(kind, payload, &parse)?;
            if consistent || attempt == TRIES {
                return Ok(found);
            }
        }
        Ok(Vec::new())
    }

    fn dump_once<T>(
        &self,
        kind: u16,
        payload: &[u8],
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> io::Result<(Vec<T>, bool)> {
        let request = Message { kind, flags: libc::NLM_F_DUMP, payload: payload.to_vec() };
        let sequence = self.send(&[request])?;
        let (mut found, mut consistent, mut done) = (Vec::new(), true, false);
        let mut buffer = vec![0; BUFFER];
        while !done {
            self.receive(&mut buffer, |message| {
                if message.sequence_number() != sequence {
                    return Ok(());
                }
                consistent &= i32::from(message.flags()) & libc::NLM_F_DUMP_INTR == 0;
                match i32::from(message.message_type()) {
                    libc::NLMSG_DONE => done = true,
                    libc::NLMSG_ERROR => return error(message.payload()),
                    _ => found.extend(parse(message.payload())),
                }
                Ok(())
            })?;
        }
        Ok((found, consistent))
    }

    /// Sends messages at once, which the kernel takes one after the other; what it answers to those that ask for an
    /// answer (`NLM_F_ACK`), in their order.
    ///
    /// # Errors
    /// If the kernel refuses them as such, or does not answer.
    pub fn ask(&self, messages: &[Message]) -> io::Result<Vec<io::Result<()>>> {
        let first = self.send(messages)?;
        let asked = |message: &Message| message.flags & libc::NLM_F_ACK != 0;
        let mut answers: Vec<Option<io::Result<()>>> = messages.iter().map(|_| None).collect();
        let mut buffer = vec![0; BUFFER];
        while messages.iter().zip(&answers).any(|(message, answer)| asked(message) && answer.is_none()) {
            self.receive(&mut buffer, |message| {
                let number = message.sequence_number().wrapping_sub(first);
                let number = usize::try_from(number).map_err(io::Error::other)?;
                let (Some(request), Some(place)) = (messages.get(number), answers.get_mut(number)) else {
                    return Ok(());
                };
                if i32::from(message.message_type()) != libc::NLMSG_ERROR {
                    return Ok(());
                }
                let answer = error(message.payload());
                if asked(request) {
                    *place = Some(answer);
                    return Ok(());
                }
                answer
            })?;
        }
        Ok(answers.into_iter().flatten().collect())
    }

    /// Returns the first one's sequence number; the others' follow.
    fn send(&self, messages: &[Message]) -> io::Result<u32> {
        let first = self.sequence.get();
        let mut bytes = Vec::new();
        for message in messages {
            let length = HEADER + message.payload.len();
            let mut one = vec![0; length.next_multiple_of(4)];
            let flags = u16::try_from(libc::NLM_F_REQUEST | message.flags).map_err(io::Error::other)?;
            let mut header = NetlinkBuffer::new(&mut one);
            header.set_length(u32::try_from(length).map_err(io::Error::other)?);
            header.set_message_type(message.kind);
            header.set_flags(flags);
            header.set_sequence_number(self.sequence.get());
            self.sequence.set(self.sequence.get().wrapping_add(1));
            header.payload_mut().copy_from_slice(&message.payload);
            bytes.extend(one);
        }
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(first)
    }

    fn receive<'a>(
        &self,
        buffer: &'a mut [u8],
        mut take: impl FnMut(&NetlinkBuffer<&'a [u8]>) -> io::Result<()>,
    ) -> io::Result<()> {
        let received = loop {
            match recv(self.fd.as_raw_fd(), buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                received => break received?,
            }
        };
        let mut rest = buffer.get(..received).unwrap_or_default();
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            take(&message)?;
            let length = usize::try_from(message.length()).map_err(io::Error::other)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(())
    }
}

/// Of an `NLMSG_ERROR`: zero is an acknowledgement.
fn error(payload: &[u8]) -> io::Result<()> {
    match payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code)) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}

/// Attributes: type and value. One that is cut short ends the list.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(|nla| {
        let nla = nla.ok()?;
        let (kind, length) = (nla.kind(), usize::from(nla.length()));
        Some((kind, nla.into_inner().get(ATTRIBUTE..length)?))
    })
}

/// Bytes of an attribute's header.
const ATTRIBUTE: usize = 4;

/// Attributes to send.
#[derive(Clone, Debug, Default)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// With one more; its bytes are as they go.
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(ATTRIBUTE + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// With one more that consists of attributes.
    #[must_use]
    pub fn nest(self, kind: u16, inner: Self) -> Self {
        self.with(kind | NESTED, &inner.0)
    }

    /// A payload: what stands before them, and they.
    pub fn after(self, header: &[u8]) -> Vec<u8> {
        [header, &self.0].concat()
    }
}

/// linux/netlink.h: NLA_F_NESTED.
const NESTED: u16 = 1 << 15;

/// For tests of what a network namespace has.
#[cfg(test)]
pub(crate) fn in_own_namespace(work: impl FnOnce() + Send + 'static) {
    use nix::sched::{CloneFlags, unshare};
    // A thread of its own, because a network namespace is a thread's.
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own, which needs root");
        work();
    });
    thread.join().unwrap();
}
