//! Kubernetes itself: the API server, the controllers that make EndpointSlices, and etcd, in a lab's own namespace.
//!
//! [`cluster::Cluster`] is a lab with such a control plane and an agent on every node. There is no kubelet: a test makes
//! the Pod objects of the lab's pods and says how they are.

pub mod account;
pub mod api;
pub mod cluster;
pub mod control_plane;
pub mod kube_proxy;
pub mod programs;
