//! The `sheave` binary.
fn main() {}
