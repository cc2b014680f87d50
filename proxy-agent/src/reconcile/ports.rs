//! What is written for each service port, by Service.

use std::collections::HashMap;

use super::port::PortState;
use crate::object::ObjectKey;
use crate::resolve::ServicePortKey;

/// See the module. Lists: most Services have one port, in one family.
#[derive(Debug, Default)]
pub(super) struct Ports(HashMap<ObjectKey, Vec<(ServicePortKey, Box<PortState>)>>);

impl Ports {
    pub(super) fn get(&self, key: &ServicePortKey) -> Option<&PortState> {
        self.of(&key.service).iter().find(|(other, _)| other == key).map(|(_, state)| state.as_ref())
    }

    /// In place of what there was.
    pub(super) fn insert(&mut self, key: ServicePortKey, state: Box<PortState>) {
        let ports = self.0.entry(key.service.clone()).or_insert_with(|| Vec::with_capacity(1));
        match ports.iter_mut().find(|(other, _)| *other == key) {
            Some((_, old)) => *old = state,
            None => ports.push((key, state)),
        }
    }

    pub(super) fn remove(&mut self, key: &ServicePortKey) -> Option<Box<PortState>> {
        let ports = self.0.get_mut(&key.service)?;
        let place = ports.iter().position(|(other, _)| other == key)?;
        let (_, state) = ports.swap_remove(place);
        if ports.is_empty() {
            self.0.remove(&key.service);
        }
        Some(state)
    }

    /// Those of a Service, in no order.
    pub(super) fn of(&self, service: &ObjectKey) -> &[(ServicePortKey, Box<PortState>)] {
        self.0.get(service).map(Vec::as_slice).unwrap_or_default()
    }

    /// All, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&ServicePortKey, &PortState)> {
        self.0.values().flatten().map(|(key, state)| (key, state.as_ref()))
    }
}
