//! The fast path: what is learned from the stack, of what, and for how long.

use super::*;
use crate::packet::tables::DEVICE;

/// Link addresses of frames that the stack lets leave.
const LEAVING: [u8; 12] = [0xa2, 1, 2, 3, 4, 5, 0xb2, 6, 7, 8, 9, 10];

fn fast_node(v6: bool) -> Node {
    let mut node = Node::new(v6);
    node.maps.fast = true;
    node
}

/// What became of a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Way {
    /// It left so without the stack.
    Fast(Frame),
    /// It left so, by the stack.
    Stack(Frame),
}

impl Node {
    /// As the kernel's programs do, with a stack in between that lets everything pass.
    fn goes(&self, sent: &Frame) -> Way {
        let mut frame = sent.clone();
        if let Some(device) = packet::fast(&mut frame, &self.maps, self.v6()) {
            assert_eq!(device, DEVICE);
            return Way::Fast(frame.finished());
        }
        assert_eq!(frame, *sent, "changed, and yet left to the stack");
        let is_asked = packet::ask(&frame, &self.maps, self.v6());
        assert_eq!(self.comes_in(&mut frame), After::Next);
        frame.bytes[..12].copy_from_slice(&LEAVING);
        if is_asked {
            packet::accept(&frame, &self.maps, self.v6());
        }
        assert_eq!(self.goes_out(&mut frame), After::Next);
        Way::Stack(frame.finished())
    }

    fn is_fast(&self, sent: &Build) -> bool {
        matches!(self.goes(&sent.frame()), Way::Fast(_))
    }

    fn asks(&self, client: SocketAddr) -> Talk {
        Talk { client, vip: self.vip(1), carries: tcp(ACK) }
    }
}

/// A client, a VIP, and what they send each other once they know each other.
#[derive(Clone)]
struct Talk {
    client: SocketAddr,
    vip: SocketAddr,
    carries: Carries,
}

impl Talk {
    fn request(&self) -> Build {
        build(self.carries.clone(), self.client, self.vip)
    }

    /// First packets, until both ways are open. Returns the source that the backend sees.
    fn opens(&self, node: &Node, backend: SocketAddr) -> SocketAddr {
        let first = if self.carries == tcp(ACK) { tcp(SYN) } else { self.carries.clone() };
        let seen = ends(&node.passes(&build(first.clone(), self.client, self.vip).frame()).1).0;
        let answer = build(self.carries.clone(), backend, seen);
        assert!(!node.is_fast(&build(reply(&first), backend, seen)), "the first answer");
        assert!(!node.is_fast(&self.request()), "the client has not gone on yet");
        assert!(!node.is_fast(&self.request()), "nothing of a flow that goes on has been seen to pass");
        assert!(!node.is_fast(&answer), "the other direction has not been seen");
        seen
    }
}

fn as_it_leaves(sent: &Build) -> Frame {
    let mut frame = sent.clone().with(|build| build.ttl -= 1).frame();
    frame.bytes[..12].copy_from_slice(&LEAVING);
    frame
}

#[test]
fn both_directions_skip_the_stack_once_it_has_let_both_pass() {
    both(|v6| {
        // A client of the cluster keeps its source, one from outside does not.
        for from in [Node::pod, Node::client] {
            for carries in [tcp(ACK), Carries::Udp, Carries::UdpWithout] {
                let node = fast_node(v6);
                let backend = node.backend(1);
                let talk = Talk { carries, ..node.asks(from(&node, 40_000)) };
                let seen = talk.opens(&node, backend);
                assert_eq!(seen == talk.client, from(&node, 1) == node.pod(1));
                let answer = build(talk.carries.clone(), backend, seen);
                node.maps.counted();
                for (sent, leaves) in [
                    (talk.request(), talk.request().between(seen, backend)),
                    (answer.clone(), answer.between(talk.vip, talk.client)),
                ] {
                    for frame in sent.frames() {
                        assert_eq!(node.goes(&frame), Way::Fast(as_it_leaves(&leaves)), "{sent:?}");
                    }
                }
                assert!(node.maps.counted().iter().all(|(name, _)| *name == "packet_fast"));
            }
        }
    });
}

#[test]
fn nothing_is_fast_without_an_epoch() {
    both(|v6| {
        let node = fast_node(v6);
        node.maps.epoch.set(0);
        let talk = node.asks(node.pod(40_000));
        talk.opens(&node, node.backend(1));
        assert!(!node.is_fast(&talk.request()));
    });
}

/// What changes a connection, or what the stack has to answer itself.
#[test]
fn unusual_packets_go_through_the_stack() {
    both(|v6| {
        let node = fast_node(v6);
        let talk = node.asks(node.pod(40_000));
        talk.opens(&node, node.backend(1));
        let request = talk.request();
        let is_slow = |what: &str, change: &dyn Fn(&mut Build)| {
            assert!(!node.is_fast(&request.clone().with(change)), "{what}");
            assert!(node.is_fast(&request), "after {what}");
        };
        is_slow("an expiring hop limit", &|build| build.ttl = 1);
        if !v6 {
            is_slow("options", &|build| build.options = vec![1, 1, 1, 1]);
        }
        is_slow("a fragment", &|build| build.fragment = Some((0..24, 7)));
        let urgent = build(tcp(ACK | 8 | 32), talk.client, talk.vip);
        assert!(node.is_fast(&urgent));
        let mut tagged = request.frame();
        tagged.tagged = true;
        assert!(matches!(node.goes(&tagged), Way::Stack(_)), "of another network on the same wire");
        let mut flooded = request.frame();
        flooded.bytes[5] ^= 1;
        assert!(matches!(node.goes(&flooded), Way::Stack(_)), "for another link address");
        assert!(node.is_fast(&request));
        for flags in [SYN, FIN | ACK, RST] {
            assert!(!node.is_fast(&build(tcp(flags), talk.client, talk.vip)), "{flags}");
        }
    });
}

/// The stack knows how long a packet may be: nothing longer than what it let pass.
#[test]
fn nothing_longer_than_what_the_stack_let_pass() {
    both(|v6| {
        let node = fast_node(v6);
        let talk = node.asks(node.pod(40_000));
        talk.opens(&node, node.backend(1));
        let long = talk.request().with(|build| build.payload = vec![7; 600]);
        assert!(!node.is_fast(&long));
        assert!(node.is_fast(&long) && node.is_fast(&talk.request()));
        // Many in one frame are as long as each of them.
        let mut many = talk.request().with(|build| build.payload = vec![7; 6000]).frame();
        many.segment_bytes = 600;
        assert!(matches!(node.goes(&many), Way::Fast(_)));
        many.segment_bytes = 601;
        assert!(matches!(node.goes(&many), Way::Stack(_)));
        assert!(matches!(node.goes(&many), Way::Fast(_)));
        // What was learned in another epoch counts no more.
        node.maps.epoch.set(2);
        assert!(!node.is_fast(&talk.request()));
        assert!(!node.is_fast(&long));
    });
}

#[test]
fn what_was_learned_ends_with_the_epoch_and_after_a_while() {
    both(|v6| {
        let node = fast_node(v6);
        let talk = node.asks(node.pod(40_000));
        let seen = talk.opens(&node, node.backend(1));
        let (request, answer) = (talk.request(), build(tcp(ACK), node.backend(1), seen));
        node.maps.epoch.set(2);
        assert!(!node.is_fast(&request) && !node.is_fast(&request), "the other way is not open again yet");
        assert!(!node.is_fast(&answer));
        assert!(node.is_fast(&request) && node.is_fast(&answer));
        node.maps.lab.tables.now_ns.set(node.maps.lab.tables.now_ns.get() + 1_000_000_000);
        // One packet of each direction.
        assert!(!node.is_fast(&request) && node.is_fast(&request));
        assert!(!node.is_fast(&answer) && node.is_fast(&answer));
    });
}

/// A port that is used again for another backend.
#[test]
fn a_new_connection_is_not_taken_for_the_old_one() {
    both(|v6| {
        let mut node = fast_node(v6);
        let talk = node.asks(node.pod(40_000));
        talk.opens(&node, node.backend(1));
        assert!(node.is_fast(&talk.request()));
        node.maps.lab.set(1, WhichSet::Cluster, &[2], WhenEmpty::Reject);
        node.goes(&build(tcp(RST), talk.client, talk.vip).frame());
        node.goes(&build(tcp(SYN), talk.client, talk.vip).frame());
        let Way::Stack(frame) = node.goes(&talk.request().frame()) else { panic!("as the one before") };
        assert_eq!(ends(&frame).1, node.backend(2));
    });
}

/// What is still on its way after the end goes through the stack, which knows of that.
#[test]
fn nothing_is_learned_of_a_connection_that_is_over() {
    both(|v6| {
        let node = fast_node(v6);
        let talk = node.asks(node.pod(40_000));
        let seen = talk.opens(&node, node.backend(1));
        let answer = build(tcp(ACK), node.backend(1), seen);
        node.goes(&build(tcp(FIN | ACK), talk.client, talk.vip).frame());
        node.goes(&build(tcp(FIN | ACK), node.backend(1), seen).frame());
        for _ in 0..3 {
            assert!(!node.is_fast(&talk.request()) && !node.is_fast(&answer));
        }
    });
}

/// Whoever comes in by another device, or leaves by the way of a packet that did, teaches nothing.
#[test]
fn a_lane_is_for_one_device() {
    both(|v6| {
        let node = fast_node(v6);
        let talk = node.asks(node.pod(40_000));
        node.maps.arrived_by.set(DEVICE + 1);
        talk.opens(&node, node.backend(1));
        assert!(!node.is_fast(&talk.request()), "what left had come in elsewhere");
        node.maps.arrived_by.set(DEVICE);
        let node = fast_node(v6);
        talk.opens(&node, node.backend(1));
        assert!(node.is_fast(&talk.request()));
        for lane in node.maps.lanes.borrow().values() {
            packet::LaneEntry::write(lane, &Lane { from: DEVICE + 1, ..packet::LaneEntry::read(lane) });
        }
        assert!(
            !node.is_fast(&talk.request()) && !node.is_fast(&talk.request()),
            "it holds for the other one"
        );
    });
}

/// An element of the table that has become another key's.
#[test]
fn a_lane_of_another_key_is_none() {
    both(|v6| {
        let node = fast_node(v6);
        let talk = node.asks(node.pod(40_000));
        talk.opens(&node, node.backend(1));
        for lane in node.maps.lanes.borrow().values() {
            packet::LaneEntry::write(lane, &Lane { seal: 1, ..packet::LaneEntry::read(lane) });
        }
        assert!(!node.is_fast(&talk.request()));
    });
}

/// A client that has another port inside the node: each packet is to be told from those of somebody else (M11).
#[test]
fn flows_with_a_port_inside_are_not_learned_of() {
    both(|v6| {
        let mut node = fast_node(v6);
        node.maps.lab.plain(2, &[1]);
        let one = node.asks(node.pod(40_000));
        one.opens(&node, node.backend(1));
        let other = Talk { vip: node.vip(2), ..one.clone() };
        let seen = ends(&node.passes(&build(tcp(SYN), other.client, other.vip).frame()).1).0;
        assert_ne!(seen, other.client);
        let answer = build(tcp(ACK), node.backend(1), seen);
        for _ in 0..4 {
            assert!(!node.is_fast(&answer));
            assert!(!node.is_fast(&other.request()));
        }
        assert!(node.is_fast(&one.request()));
    });
}
