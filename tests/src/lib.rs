//! The lab: namespaces, cgroups, clients and servers for the demo and the suites.
