//! A process of a pod: reads requests from stdin, one JSON document a line, and writes a reply for each. Whoever starts it
//! puts it into the pod's cgroup and network namespace before it runs (`Place::command`).

use std::io::{stdin, stdout};

fn main() -> anyhow::Result<()> {
    sheave_tests::engine::serve(stdin().lock(), stdout().lock())
}
