//! Small servers for everyday clients: HTTP for `curl`, DNS for `dig`. They run as threads of the test, on sockets made
//! inside a pod's namespace.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::netns::Netns;

/// How often a thread looks whether it shall end.
const LOOK: Duration = Duration::from_millis(20);

/// The longest DNS message over UDP without extensions.
const DNS_MAX_BYTES: usize = 512;

/// Everyday clients ask at once or never.
const PATIENCE: Duration = Duration::from_secs(2);

/// A server; it ends when dropped.
#[derive(Debug)]
pub struct Daemon {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Daemon {
    /// Answers every HTTP request with a text.
    pub fn http(netns: &Netns, addresses: &[SocketAddr], text: &str) -> Result<Self> {
        let mut daemon = Self { stop: Arc::default(), threads: Vec::new() };
        for address in addresses {
            let text = text.to_owned();
            daemon.accept(netns, *address, move |stream| answer_http(stream, &text))?;
        }
        Ok(daemon)
    }

    /// Answers every DNS question, over UDP and TCP, with one IPv4 address.
    pub fn dns(netns: &Netns, addresses: &[SocketAddr], answer: Ipv4Addr) -> Result<Self> {
        let mut daemon = Self { stop: Arc::default(), threads: Vec::new() };
        for address in addresses {
            daemon.accept(netns, *address, move |stream| answer_dns(stream, answer))?;
            let socket = netns.run(|| UdpSocket::bind(address))?;
            let socket = socket.with_context(|| format!("listening on {address}/UDP"))?;
            socket.set_read_timeout(Some(LOOK)).context("setting a time-out")?;
            daemon.spawn(move || {
                let mut question = [0; DNS_MAX_BYTES];
                let Ok((length, from)) = socket.recv_from(&mut question) else { return };
                if let Some(reply) = dns_reply(question.get(..length).unwrap_or_default(), answer) {
                    // Who asked may have gone.
                    let _ = socket.send_to(&reply, from);
                }
            })?;
        }
        Ok(daemon)
    }

    fn accept(
        &mut self,
        netns: &Netns,
        address: SocketAddr,
        answer: impl Fn(TcpStream) -> std::io::Result<()> + Send + 'static,
    ) -> Result<()> {
        let listener = netns.run(|| TcpListener::bind(address))?;
        let listener = listener.with_context(|| format!("listening on {address}/TCP"))?;
        listener.set_nonblocking(true).context("setting a listener non-blocking")?;
        self.spawn(move || match listener.accept() {
            Ok((stream, _)) => {
                // A client that goes away in the middle is its own business.
                let _ = answer(stream);
            }
            Err(_) => thread::sleep(LOOK),
        })
    }

    fn spawn(&mut self, mut turn: impl FnMut() + Send + 'static) -> Result<()> {
        let stop = Arc::clone(&self.stop);
        let thread = thread::Builder::new().name("daemon".to_owned()).spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                turn();
            }
        });
        self.threads.push(thread.context("starting a daemon's thread")?);
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn answer_http(stream: TcpStream, text: &str) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(&stream);
    let mut line = String::new();
    // The request ends with an empty line.
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let length = text.len();
    write!(&stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}")
}

fn answer_dns(mut stream: TcpStream, answer: Ipv4Addr) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // Over TCP each message comes after its length.
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut question)?;
    let reply = dns_reply(&question, answer).unwrap_or_default();
    let length = u16::try_from(reply.len()).unwrap_or_default().to_be_bytes();
    stream.write_all(&[&length, reply.as_slice()].concat())
}

/// A question of one name, type A, class IN, as a resolver would send it.
#[must_use]
pub fn dns_question(id: u16, name: &str) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    // Recursion desired; one question, nothing else.
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

/// The reply to a question: the address, whatever was asked for. Nothing if the bytes are no question.
fn dns_reply(question: &[u8], answer: Ipv4Addr) -> Option<Vec<u8>> {
    let mut end = 12;
    while let length @ 1.. = usize::from(*question.get(end)?) {
        end += length + 1;
    }
    // The root label, type and class.
    end += 5;
    let mut reply = question.get(..2)?.to_vec();
    // A good reply of an authority; one question, one answer.
    reply.extend([0x85, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    reply.extend(question.get(12..end)?);
    // The name is the one at offset 12; type A, class IN, a minute, four bytes.
    reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
    reply.extend(answer.octets());
    Some(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_repeats_the_question() {
        let question = dns_question(0x1234, "a.example");
        let reply = dns_reply(&question, Ipv4Addr::new(192, 0, 2, 7)).unwrap();
        assert_eq!(reply[..2], [0x12, 0x34]);
        assert_eq!(reply[12..question.len()], question[12..]);
        assert_eq!(reply[reply.len() - 4..], [192, 0, 2, 7]);
        assert_eq!(dns_reply(&question[..15], Ipv4Addr::LOCALHOST), None);
    }
}
