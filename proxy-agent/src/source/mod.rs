//! Where objects come from. Sources report [`Change`](crate::object::Change)s and know nothing of maps.

pub mod addresses;
pub mod derive;
pub mod files;
pub mod kube;
pub mod links;
pub(crate) mod notices;
