//! An object of the API as a JSON value, without what nobody here reads: half of what a slice says of an endpoint is which
//! pod it is, and who manages its fields is told at length.

use std::fmt;

use serde::de::{
    Deserialize, DeserializeOwned, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Value};
use serde_path_to_error::Segment;

use crate::object::{Mismatch, Step};

/// Mappings and lists of these names are left out, wherever they are. A text of such a name stays: a label may have it.
const LEFT_OUT: [&str; 4] = ["managedFields", "ownerReferences", "annotations", "targetRef"];

/// See the module.
#[derive(Debug)]
pub(super) struct Trimmed(pub(super) Value);

impl<'de> Deserialize<'de> for Trimmed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // What is kept is a value.
        Reader { kept: true }.deserialize(deserializer).map(|value| Self(value.unwrap_or_default()))
    }
}

/// Reads it as the API's type. Where in it an error is, is asked when there is one: to keep count of that takes time.
///
/// # Errors
/// With the field.
pub(super) fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, Mismatch> {
    T::deserialize(value).or_else(|_| serde_path_to_error::deserialize(value).map_err(mismatch))
}

fn mismatch(error: serde_path_to_error::Error<serde_json::Error>) -> Mismatch {
    let step = |segment: &Segment| match segment {
        Segment::Seq { index } => Some(Step::Index(*index)),
        Segment::Map { key } => Some(Step::Key(key.clone())),
        Segment::Enum { variant } => Some(Step::Key(variant.clone())),
        Segment::Unknown => None,
    };
    Mismatch::at(error.path().iter().filter_map(step).collect(), error.inner().to_string())
}

/// Makes a value of what comes; of mappings and lists only if they are kept.
#[derive(Clone, Copy)]
struct Reader {
    kept: bool,
}

impl<'de> DeserializeSeed<'de> for Reader {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<Value>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Option<Value>, E> {
        Ok(Some(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Option<Value>, E> {
        Ok(Some(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Option<Value>, E> {
        Ok(Some(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Option<Value>, E> {
        Ok(Some(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Option<Value>, E> {
        Ok(Some(value.into()))
    }

    fn visit_string<E>(self, value: String) -> Result<Option<Value>, E> {
        Ok(Some(value.into()))
    }

    fn visit_none<E>(self) -> Result<Option<Value>, E> {
        Ok(Some(Value::Null))
    }

    fn visit_unit<E>(self) -> Result<Option<Value>, E> {
        Ok(Some(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<Value>, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Option<Value>, A::Error> {
        if !self.kept {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(None);
        }
        let mut list = Vec::new();
        while let Some(value) = seq.next_element_seed(self)? {
            list.extend(value);
        }
        Ok(Some(Value::Array(list)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Option<Value>, A::Error> {
        if !self.kept {
            while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(None);
        }
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let kept = !LEFT_OUT.contains(&key.as_str());
            if let Some(value) = entries.next_value_seed(Self { kept })? {
                map.insert(key, value);
            }
        }
        Ok(Some(Value::Object(map)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_but_what_nobody_reads_is_as_it_was() {
        let text = r#"{
            "metadata": {
                "labels": {"targetRef": "a", "b": "c"},
                "annotations": {"d": "e"},
                "ownerReferences": [{"uid": 1}],
                "managedFields": [{"f:metadata": {"f:labels": {}}}]
            },
            "endpoints": [{"addresses": ["10.0.0.1"], "targetRef": {"name": "pod"}, "conditions": {"ready": true}}],
            "numbers": [0, -1, 18446744073709551615, 1.5, -0.0],
            "nothing": null, "annotations": 7, "empty": [{}, [], "", "\u0000\n"]
        }"#;
        let mut whole: Value = serde_json::from_str(text).unwrap();
        let Trimmed(trimmed) = serde_json::from_str(text).unwrap();
        assert_ne!(trimmed, whole);
        let metadata = whole["metadata"].as_object_mut().unwrap();
        for name in ["annotations", "ownerReferences", "managedFields"] {
            metadata.remove(name).unwrap();
        }
        whole["endpoints"][0].as_object_mut().unwrap().remove("targetRef").unwrap();
        assert_eq!(trimmed, whole);
        // As YAML says it, too.
        let Trimmed(yaml) = serde_saphyr::from_str(&serde_json::to_string(&whole).unwrap()).unwrap();
        assert_eq!(yaml, whole);
    }

    /// What is left out must be JSON all the same.
    #[test]
    fn what_is_left_out_is_read() {
        for text in [r#"{"managedFields": [}"#, r#"{"targetRef": {"a" 1}}"#, r#"{"annotations": "#] {
            assert!(serde_json::from_str::<Trimmed>(text).is_err(), "{text}");
        }
    }
}
