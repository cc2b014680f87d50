//! What only a kernel with its modules has: SCTP sockets, and tunnels of its own without link headers. Not among the suites
//! of `cargo test`, since the machine may have neither: `cargo xtask vm -- modules`.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "the helpers of tests fail as tests do; the table is printed"
)]

mod sctp;

use sheave_tests::nodes::{
    Layout,
    matrix::{self, Settings},
};

/// As Calico's; the matrix of `tests/suites/matrix.rs` runs through a tun device instead.
#[test]
fn matrix_over_ip6tnl() {
    holds(Layout::ip6_overlay());
}

/// As Calico, Cilium and flannel encrypt what passes between nodes.
#[test]
fn matrix_over_wireguard() {
    holds(Layout::wireguard_overlay());
}

fn holds(layout: Layout) {
    let layout = Layout { rp_filter: 2, ..layout };
    let table = matrix::hold(layout, Settings::default(), &[], &[0, 1]).unwrap();
    println!("{table}");
    assert_eq!(table.wrong(), 0, "of {}:\n{}", table.total(), table.failures());
}
