//! An object of the API that may be unreadable, without harm to the others of its list.

use std::borrow::Cow;
use std::fmt::Debug;
use std::sync::Arc;

use ::kube::Resource;
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::object::{self, Node, ObjectKey, Problem, Read, Service, Slice, Trimmed, Unreadable, typed};

/// A slim type and what it is made of.
pub(super) trait Slim: Clone + Debug + Send + Sync + 'static {
    /// The API's type.
    type Api: Resource<DynamicType = ()> + DeserializeOwned;
    /// Its name, for people.
    const KIND: &'static str;
    /// What follows if it may not be read.
    const LOSS: &'static str;
    /// Its resource, as roles name it.
    fn plural() -> String {
        Self::Api::plural(&()).into_owned()
    }
    fn slim(object: &Self::Api) -> Self;
}

impl Slim for Service {
    type Api = core::Service;
    const KIND: &'static str = "Service";
    const LOSS: &'static str =
        "without Services nothing is programmed at the start, and later nothing changes";
    fn slim(object: &core::Service) -> Self {
        object::service(object)
    }
}

impl Slim for Slice {
    type Api = discovery::EndpointSlice;
    const KIND: &'static str = "EndpointSlice";
    const LOSS: &'static str = "without EndpointSlices nothing is programmed at the start, and later connections go to \
                                endpoints that may be gone";
    fn slim(object: &discovery::EndpointSlice) -> Self {
        object::slice(object)
    }
}

impl Slim for Node {
    type Api = core::Node;
    const KIND: &'static str = "Node";
    const LOSS: &'static str = "without the own Node nothing is programmed at the start, and later its zone (hints), its \
                                addresses (NodePorts) and its pod ranges (externalTrafficPolicy) stay as they were";
    fn slim(object: &core::Node) -> Self {
        object::node(object)
    }
}

/// What the watcher sees of an object: a name and a version; and what the agent sees: the slim type, or why not.
#[derive(Clone, Debug)]
pub(super) struct Checked<T> {
    metadata: ObjectMeta,
    read: Read<T>,
}

impl<T> Checked<T> {
    pub(super) fn key(&self) -> ObjectKey {
        object::key(&self.metadata)
    }

    pub(super) fn read(self) -> Read<T> {
        self.read
    }
}

/// One object that does not decode would fail the whole list, for ever. So it is first read as what it certainly is, a
/// JSON value, and then as its type.
impl<'de, T: Slim> Deserialize<'de> for Checked<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Trimmed(value) = Trimmed::deserialize(deserializer)?;
        let text = |field| value.pointer(field).and_then(Value::as_str).map(str::to_owned);
        // Only this of it is the watcher's.
        let metadata = ObjectMeta {
            name: text("/metadata/name"),
            namespace: text("/metadata/namespace"),
            resource_version: text("/metadata/resourceVersion"),
            ..ObjectMeta::default()
        };
        let read = typed(&value).map(|object| Arc::new(T::slim(&object))).map_err(|error| {
            let key = object::key(&metadata);
            Unreadable {
                problem: Problem {
                    object: format!("{} {key}", T::KIND),
                    field: error.path().to_string(),
                    message: format!("{}; the last good state stays in force", error.inner()),
                },
                key: Some(key).filter(|key| !key.name.is_empty()),
            }
        });
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
