//! An object as it comes from a source: who it is, and what is read of it or why it cannot be.

use k8s_openapi::jiff::Timestamp;
use serde::de::{Deserialize, Deserializer, MapAccess};

use super::ObjectKey;
use super::fields::{self, Field, Found, Mismatch, Wrong, mapping};

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
            None if metadata.name.is_none() => Err(Mismatch::missing(["metadata", "name"])),
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
        let text = |part: &Option<String>| part.as_deref().unwrap_or_default().into();
        ObjectKey { namespace: text(&self.namespace), name: text(&self.name) }
    }
}

/// `metadata`, with what is read of the labels.
#[derive(Default)]
pub(super) struct Labelled<L> {
    pub(super) metadata: Metadata,
    pub(super) labels: L,
    /// Seconds since 1970.
    pub(super) created_s: Option<i64>,
}

impl<L: Field> Field for Labelled<L> {
    const EXPECTED: &'static str = "ObjectMeta";

    fn mapping<'de, A: MapAccess<'de>>(map: A) -> Result<Found<Self>, A::Error> {
        const FIELDS: [&str; 5] = ["name", "namespace", "resourceVersion", "creationTimestamp", "labels"];
        mapping(map, &FIELDS, |out: &mut Self, key, value| {
            match key {
                "name" => out.metadata.name = value.read()?,
                "namespace" => out.metadata.namespace = value.read()?,
                "resourceVersion" => out.metadata.resource_version = value.read()?,
                "creationTimestamp" => out.created_s = value.read::<Seconds>()?.0,
                _ => out.labels = value.read()?,
            }
            Ok(())
        })
    }
}

/// A time, in seconds since 1970.
#[derive(Default)]
struct Seconds(Option<i64>);

impl Field for Seconds {
    const EXPECTED: &'static str = "a time as RFC 3339 has it";

    fn text(text: &str) -> Result<Self, Wrong> {
        let time: Timestamp = text.parse().map_err(|_| Wrong::Value)?;
        Ok(Self(Some(time.as_second())))
    }
}
