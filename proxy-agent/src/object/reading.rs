//! An object as it comes from a source: who it is, and what is read of it or why it cannot be.

use k8s_openapi::jiff::Timestamp;
use serde::de::{Deserialize, Deserializer};

use super::ObjectKey;
use super::fields::{self, Field, Mismatch, Step, Wrong, mapping_of};

/// See the module.
#[derive(Debug)]
pub struct Reading<T> {
    pub(crate) metadata: Metadata,
    /// S3: it is not for this proxy.
    pub(crate) excluded: bool,
    /// The slim object.
    pub content: Result<T, Mismatch>,
}

impl<T> Reading<T> {
    /// Of an object that is what it should be if nothing is `wrong`.
    pub(super) fn new(
        metadata: Metadata,
        excluded: bool,
        wrong: Option<Mismatch>,
        content: impl FnOnce(ObjectKey) -> T,
    ) -> Self {
        let content = match wrong {
            // Nobody could say which one it is.
            None if metadata.name.is_none() => {
                let path = ["metadata", "name"].map(|key| Step::Key(key.to_owned()));
                Err(Mismatch::at(path.into(), "missing".to_owned()))
            }
            None => Ok(content(metadata.key())),
            Some(mismatch) => Err(mismatch),
        };
        Self { metadata, excluded, content }
    }
}

/// A slim type, and what it is made of.
pub trait Readable: Sized {
    /// The object, field by field.
    type Given: Field;

    /// `wrong`: a field that is not what it should be.
    fn reading(given: Self::Given, wrong: Option<Mismatch>) -> Reading<Self>;
}

impl<'de, T: Readable> Deserialize<'de> for Reading<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        fields::read(deserializer).map(|(given, wrong)| T::reading(given, wrong))
    }
}

/// What every object says of itself.
#[derive(Default, Debug)]
pub(crate) struct Metadata {
    pub(crate) name: Option<String>,
    pub(crate) namespace: Option<String>,
    pub(crate) resource_version: Option<String>,
}

impl Metadata {
    pub(crate) fn key(&self) -> ObjectKey {
        ObjectKey::given(self.namespace.as_deref(), self.name.as_deref())
    }
}

/// `metadata`, with what is read of the labels.
#[derive(Default)]
pub(super) struct Labelled<L> {
    pub(super) metadata: Metadata,
    pub(super) labels: L,
    pub(super) created: Time,
}

mapping_of!(Labelled<L>, "ObjectMeta", {
    "name" => metadata.name,
    "namespace" => metadata.namespace,
    "resourceVersion" => metadata.resource_version,
    "creationTimestamp" => created,
    "labels" => labels,
});

/// A time, if one is given.
#[derive(Default)]
pub(super) struct Time {
    /// Seconds since 1970.
    pub(super) s: Option<i64>,
}

impl Field for Time {
    const EXPECTED: &'static str = "a time as RFC 3339 has it";

    fn text(text: &str) -> Result<Self, Wrong> {
        let time: Timestamp = text.parse().map_err(|_| Wrong::Value)?;
        Ok(Self { s: Some(time.as_second()) })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::object::{Node, Service, Slice};

    /// What is wrong with an object, however it comes.
    fn wrong<T: Readable>(object: &Value) -> String {
        #[derive(serde::Deserialize)]
        #[serde(bound = "T: Readable", tag = "type", content = "object")]
        enum Event<T> {
            Added(Reading<T>),
        }

        fn told<T>(reading: Reading<T>) -> String {
            let told = |mismatch: Mismatch| format!("{}: {}", mismatch.field(), mismatch.message());
            reading.content.map_or_else(told, |_| "-".to_owned())
        }

        let text = object.to_string();
        let said = told(serde_json::from_str::<Reading<T>>(&text).unwrap());
        assert_eq!(told(Reading::<T>::deserialize(object).unwrap()), said, "as a value: {object}");
        // What its type comes after is kept as a whole before it is read.
        let Event::Added(reading) =
            serde_json::from_str::<Event<T>>(&format!(r#"{{"object": {text}, "type": "Added"}}"#)).unwrap();
        assert_eq!(told(reading), said, "before its type: {object}");
        // What comes after is read all the same.
        let list = format!(r#"[{text}, {{"metadata": {{"name": "next"}}}}]"#);
        let list: Vec<Reading<T>> = serde_json::from_str(&list).unwrap();
        assert_eq!(list[1].metadata.name.as_deref(), Some("next"), "{object}");
        assert_eq!(list.len(), 2);
        said
    }

    #[test]
    fn a_wrong_field_is_told_by_its_path() {
        let slice = |fields: Value| {
            let mut object = json!({"metadata": {"name": "a"}, "addressType": "IPv4"});
            object.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            wrong::<Slice>(&object)
        };
        for (fields, want) in [
            (json!({}), "-"),
            (json!({"ports": null, "endpoints": null, "metadata": {"name": "a", "labels": null}}), "-"),
            // Nobody reads these.
            (json!({"kind": 7, "endpoints": [{"targetRef": 1, "deprecatedTopology": []}]}), "-"),
            (json!({"metadata": {"name": "a", "generation": "x", "managedFields": 1.5}}), "-"),
            (json!({"ports": {}}), "ports: invalid type: map, expected a sequence"),
            (json!({"addressType": 4}), "addressType: invalid type: integer `4`, expected a string"),
            (
                json!({"endpoints": [{}, 1.5]}),
                "endpoints[1]: invalid type: floating point `1.5`, expected Endpoint",
            ),
            (
                json!({"endpoints": [{}, {"addresses": ["10.0.0.1", 5]}]}),
                "endpoints[1].addresses[1]: invalid type: integer `5`, expected a string",
            ),
            (
                json!({"endpoints": [{"conditions": {"ready": "yes"}}]}),
                "endpoints[0].conditions.ready: invalid type: string \"yes\", expected a boolean",
            ),
            (
                json!({"endpoints": [{"hints": {"forZones": [{"name": ["z"]}]}}]}),
                "endpoints[0].hints.forZones[0].name: invalid type: sequence, expected a string",
            ),
            (
                json!({"ports": [{"port": 4_294_967_296_u64}]}),
                "ports[0].port: invalid value: integer `4294967296`, expected i32",
            ),
            (
                json!({"ports": [{"port": u64::MAX}]}),
                "ports[0].port: invalid value: integer `18446744073709551615`, expected i32",
            ),
            (
                json!({"metadata": {"name": true}}),
                "metadata.name: invalid type: boolean `true`, expected a string",
            ),
            (json!({"metadata": {}}), "metadata.name: missing"),
            (json!({"metadata": []}), "metadata: invalid type: sequence, expected ObjectMeta"),
        ] {
            assert_eq!(slice(fields.clone()), want, "{fields}");
        }
        for (object, want) in [
            (json!(null), "metadata.name: missing"),
            (json!("a"), ": invalid type: string \"a\", expected EndpointSlice"),
            (json!([]), ": invalid type: sequence, expected EndpointSlice"),
        ] {
            assert_eq!(wrong::<Slice>(&object), want);
        }
    }

    #[test]
    fn a_wrong_field_far_inside_is_told_too() {
        for (spec, want) in [
            (
                json!({"sessionAffinityConfig": {"clientIP": 5}}),
                "spec.sessionAffinityConfig.clientIP: invalid type: integer `5`, expected a map",
            ),
            (
                json!({"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": "5"}}}),
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds: invalid type: string \"5\", expected i32",
            ),
            (
                json!({"sessionAffinityConfig": [1]}),
                "spec.sessionAffinityConfig: invalid type: sequence, expected a map",
            ),
            (json!({"sessionAffinityConfig": {"clientIP": null, "more": [{}]}}), "-"),
        ] {
            assert_eq!(wrong::<Service>(&json!({"metadata": {"name": "a"}, "spec": spec})), want);
        }
        let created = json!({"metadata": {"name": "a", "creationTimestamp": "yesterday"}});
        assert_eq!(
            wrong::<Service>(&created),
            "metadata.creationTimestamp: invalid value: string \"yesterday\", expected a time as RFC 3339 has it"
        );
        let addresses =
            json!({"metadata": {"name": "n"}, "status": {"images": 1, "addresses": [{"type": 1}]}});
        assert_eq!(
            wrong::<Node>(&addresses),
            "status.addresses[0].type: invalid type: integer `1`, expected a string"
        );
    }

    /// Who it is, is known, whatever else is wrong: its last good state stays in force.
    #[test]
    fn an_object_with_wrong_fields_is_known() {
        let text = r#"{
            "endpoints": 1, "ports": 2,
            "metadata": {"labels": 3, "name": "b", "name": "a", "namespace": "ns", "resourceVersion": "4"}
        }"#;
        let reading: Reading<Slice> = serde_json::from_str(text).unwrap();
        assert_eq!(reading.metadata.key(), ObjectKey::new("ns", "a"));
        assert_eq!(reading.metadata.resource_version.as_deref(), Some("4"));
        // The first one is told.
        assert_eq!(reading.content.unwrap_err().field(), "endpoints");
    }

    /// S3.
    #[test]
    fn s3_what_is_not_for_this_proxy_is_told() {
        let labelled = |label: &str| json!({"metadata": {"name": "a", "labels": {label: ""}}});
        let headless = labelled("service.kubernetes.io/headless");
        let other = labelled("service.kubernetes.io/service-proxy-name");
        let slice = |object| Reading::<Slice>::deserialize(object).unwrap().excluded;
        let service = |object| Reading::<Service>::deserialize(object).unwrap().excluded;
        assert_eq!([slice(&headless), slice(&other)], [true, false]);
        assert_eq!([service(&headless), service(&other)], [false, true]);
    }
}
