//! The lab: a small world of network namespaces and cgroups that behaves like Kubernetes nodes with pods, on one machine.
//!
//! [`lab::Lab`] builds it, [`server::Server`] answers in it, [`client::Client`] connects in it with real sockets,
//! [`agent::Agent`] runs Sheave in it, and [`manifests::Manifests`] writes what the agent reads. [`scene::Scene`] is all of
//! this at once, which is what most suites start from. [`nodes::World`] is two nodes for those that care about packets.
//! Two labs never meet: namespaces have no names, and every other name carries the process id and a counter.

pub mod agent;
pub mod bpf;
pub mod cache;
pub mod cgroup;
pub mod client;
pub mod daemon;
pub mod engine;
pub mod kubernetes;
pub mod lab;
pub mod manifests;
pub mod measure;
pub mod netns;
pub mod nodes;
pub mod protocol;
pub mod random;
pub mod scene;
pub mod server;
