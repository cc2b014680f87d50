//! `COUNTERS`: per-CPU array, one count for each way out of a program. Written by the kernel programs only.

macro_rules! outcomes {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal),+ $(,)?) => {
        /// Every way out of a program, so that no pass, refusal or miss goes uncounted.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u32)]
        pub enum Outcome { $($(#[doc = $doc])+ $name),+ }

        impl Outcome {
            /// All outcomes in the order of the map.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The name in `sheave status` and in metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }
        }
    };
}

outcomes! {
    /// A connect that is for no Service.
    ConnectUntouched = "connect_untouched",
    /// A connect that was sent to a backend.
    ConnectForwarded = "connect_forwarded",
    /// A connect that was refused (Z1).
    ConnectRejected = "connect_rejected",
    /// A connect left to the packet path to be refused: UDP (B13), or a kernel that cannot set the error (B2).
    ConnectRejectLeft = "connect_reject_left",
    /// A connect left to the packet path to be dropped (Z2, Z3).
    ConnectDropLeft = "connect_drop_left",
    /// A connect left to the packet path since the client's address must be checked (F3).
    ConnectSourceRangesLeft = "connect_source_ranges_left",
    /// A datagram that is for no Service.
    SendUntouched = "send_untouched",
    /// A datagram that was sent to a backend chosen just now.
    SendForwarded = "send_forwarded",
    /// A datagram that followed the flow of an earlier one.
    SendFollowed = "send_followed",
    /// A datagram left to the packet path to be refused or dropped (B13).
    SendLeft = "send_left",
    /// A datagram left to the packet path since the client's address must be checked (F3).
    SendSourceRangesLeft = "send_source_ranges_left",
    /// A received datagram whose source was shown as the VIP.
    RecvTranslated = "recv_translated",
    /// A received datagram of no flow of ours.
    RecvUntouched = "recv_untouched",
    /// A peer name shown as the VIP.
    PeerTranslated = "peer_translated",
    /// A peer name left as it is.
    PeerUntouched = "peer_untouched",
    /// A packet to a VIP that belongs to a connection made without us, or begins one while flows change hands.
    PacketUntouched = "packet_untouched",
    /// A first packet that was sent to a backend.
    PacketForwarded = "packet_forwarded",
    /// A packet that followed the flow of an earlier one.
    PacketFollowed = "packet_followed",
    /// A packet that skipped the stack, translated or not.
    PacketFast = "packet_fast",
    /// A reply that was given the VIP as its source.
    PacketReplied = "packet_replied",
    /// A packet that left with a replaced source (M).
    PacketSourceReplaced = "packet_source_replaced",
    /// A reply to a replaced source that was sent on to its client.
    PacketSourceRestored = "packet_source_restored",
    /// An ICMP error whose quoted packet was translated.
    PacketIcmpTranslated = "packet_icmp_translated",
    /// A packet that was refused (Z1, Z6).
    PacketRejected = "packet_rejected",
    /// A packet that was dropped (Z2, Z3), or an ICMP redirect about a flow.
    PacketDropped = "packet_dropped",
    /// A packet that was dropped since its client is in none of the source ranges (F2).
    PacketSourceRefused = "packet_source_refused",
    /// A packet to an unassigned address of the Service ranges, dropped (Z6).
    PacketUnassigned = "packet_unassigned",
    /// A first packet dropped since no flow could be stored.
    PacketNoRoom = "packet_no_room",
    /// A packet with which a young flow was to grow up: the table is full.
    PacketFlowsFull = "packet_flows_full",
    /// A packet dropped since no source port, or no source address, was to be had.
    PacketNoSourcePort = "packet_no_source_port",
    /// A packet of this node dropped since no route leads to its backend.
    PacketNoRoute = "packet_no_route",
    /// A set kept changing under the reader until it gave up; the connection was left alone.
    Contended = "contended",
    /// A flow that was put among the young ones.
    PacketFlowBegun = "packet_flow_begun",
    /// A flow that moved from there to where nothing is thrown out.
    PacketFlowGrown = "packet_flow_grown",
}
