//! An object of the API as a JSON value, without what nobody here reads: half of what a slice says of an endpoint is which
//! pod it is, and who manages its fields is told at length.

use std::fmt;

use serde::de::{Deserialize, DeserializeOwned, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Mappings and lists of these names are left out, wherever they are. A text of such a name stays: a label may have it.
const LEFT_OUT: [&str; 4] = ["managedFields", "ownerReferences", "annotations", "targetRef"];

/// See the module.
#[derive(Debug)]
pub(crate) struct Trimmed(pub(crate) Value);

impl<'de> Deserialize<'de> for Trimmed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Whole).map(Self)
    }
}

/// Reads it as the API's type. Where in it an error is, is asked when there is one: to keep count of that takes time.
///
/// # Errors
/// With the field.
pub(crate) fn typed<T: DeserializeOwned>(
    value: &Value,
) -> Result<T, serde_path_to_error::Error<serde_json::Error>> {
    T::deserialize(value).or_else(|_| serde_path_to_error::deserialize(value))
}

/// Makes a value of whatever comes.
struct Whole;

/// Makes a value of what is neither mapping nor list, and nothing of those.
struct Scalar;

/// What both do alike.
macro_rules! scalars {
    ($value:ty, $some:expr) => {
        type Value = $value;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("any JSON value")
        }

        fn visit_bool<E>(self, value: bool) -> Result<$value, E> {
            Ok($some(Value::Bool(value)))
        }

        fn visit_i64<E>(self, value: i64) -> Result<$value, E> {
            Ok($some(Value::Number(value.into())))
        }

        fn visit_u64<E>(self, value: u64) -> Result<$value, E> {
            Ok($some(Value::Number(value.into())))
        }

        fn visit_f64<E>(self, value: f64) -> Result<$value, E> {
            Ok($some(Number::from_f64(value).map_or(Value::Null, Value::Number)))
        }

        fn visit_str<E>(self, value: &str) -> Result<$value, E> {
            Ok($some(Value::String(value.to_owned())))
        }

        fn visit_string<E>(self, value: String) -> Result<$value, E> {
            Ok($some(Value::String(value)))
        }

        fn visit_none<E>(self) -> Result<$value, E> {
            Ok($some(Value::Null))
        }

        fn visit_unit<E>(self) -> Result<$value, E> {
            Ok($some(Value::Null))
        }

        fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<$value, D::Error> {
            deserializer.deserialize_any(self)
        }
    };
}

impl<'de> Visitor<'de> for Whole {
    scalars!(Value, std::convert::identity);

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Trimmed(value)) = seq.next_element()? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = if LEFT_OUT.contains(&key.as_str()) {
                entries.next_value::<Untold>()?.0
            } else {
                entries.next_value::<Trimmed>().map(|Trimmed(value)| Some(value))?
            };
            if let Some(value) = value {
                map.insert(key, value);
            }
        }
        Ok(Value::Object(map))
    }
}

struct Untold(Option<Value>);

impl<'de> Deserialize<'de> for Untold {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Scalar).map(Self)
    }
}

impl<'de> Visitor<'de> for Scalar {
    scalars!(Option<Value>, Some);

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Option<Value>, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Option<Value>, A::Error> {
        while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
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
