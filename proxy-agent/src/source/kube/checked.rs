//! An object of the API that may be unreadable, without harm to the others of its list.

use std::borrow::Cow;
use std::fmt::Debug;
use std::sync::Arc;

use ::kube::Resource;
use k8s_openapi::api::{core::v1 as core, discovery::v1::EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Deserializer};

use crate::object::{Node, ObjectKey, Problem, Read, Readable, Reading, Service, Slice, Unreadable};

/// A slim type and what it is made of.
pub(super) trait Slim: Readable + Clone + Debug + Send + Sync + 'static {
    /// The API's type.
    type Api: Resource<DynamicType = ()>;
    /// Its name, for people.
    const KIND: &'static str;
    /// What follows if it may not be read.
    const LOSS: &'static str;
    /// Its resource, as roles name it.
    fn plural() -> String {
        Self::Api::plural(&()).into_owned()
    }
}

impl Slim for Service {
    type Api = core::Service;
    const KIND: &'static str = "Service";
    const LOSS: &'static str =
        "without Services nothing is programmed at the start, and later nothing changes";
}

impl Slim for Slice {
    type Api = EndpointSlice;
    const KIND: &'static str = "EndpointSlice";
    const LOSS: &'static str = "without EndpointSlices nothing is programmed at the start, and later connections go to \
                                endpoints that may be gone";
}

impl Slim for Node {
    type Api = core::Node;
    const KIND: &'static str = "Node";
    const LOSS: &'static str = "without the own Node nothing is programmed at the start, and later its zone (hints), its \
                                addresses (NodePorts) and its pod ranges (externalTrafficPolicy) stay as they were";
}

/// What the watcher sees of an object: a name and a version; and what the agent sees: the slim type, or why not.
#[derive(Clone, Debug)]
pub(super) struct Checked<T> {
    metadata: ObjectMeta,
    read: Read<T>,
}

impl<T> Checked<T> {
    pub(super) fn key(&self) -> ObjectKey {
        ObjectKey::given(self.metadata.namespace.as_deref(), self.metadata.name.as_deref())
    }

    pub(super) fn read(self) -> Read<T> {
        self.read
    }
}

/// One object that does not decode would fail the whole list, for ever; so it is read whatever it is.
impl<'de, T: Slim> Deserialize<'de> for Checked<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Reading { metadata, content, .. } = Reading::<T>::deserialize(deserializer)?;
        let read = content.map(Arc::new).map_err(|mismatch| {
            let key = metadata.key();
            Unreadable {
                problem: Problem {
                    object: format!("{} {key}", T::KIND),
                    field: mismatch.field(),
                    message: format!("{}; the last good state stays in force", mismatch.message()),
                },
                key: Some(key).filter(|key| !key.name.is_empty()),
            }
        });
        // Only this of it is the watcher's.
        let metadata = ObjectMeta {
            name: metadata.name,
            namespace: metadata.namespace,
            resource_version: metadata.resource_version,
            ..ObjectMeta::default()
        };
        Ok(Self { metadata, read })
    }
}

impl<T: Slim> Resource for Checked<T> {
    type DynamicType = ();
    type Scope = <T::Api as Resource>::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        T::Api::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        T::Api::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        T::Api::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        T::Api::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
