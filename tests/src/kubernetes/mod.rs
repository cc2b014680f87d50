//! Kubernetes itself: the API server, the controllers that make EndpointSlices, and etcd, in a lab's own namespace.

pub mod programs;
