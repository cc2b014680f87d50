//! Reads the fields that are wanted of an object right off its text, whatever the others are.
//!
//! A field of another type than it should have fails nothing around it: what holds the object is read on, and the object
//! is known by what else it says. serde's derived readers end there, and with them the whole list; a JSON value in between
//! would be all of it read twice.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{
    DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor,
};

/// A step from an object towards one of its fields.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// A field.
    Key(String),
    /// An element of a list.
    Index(usize),
}

/// A path as Kubernetes writes it: `spec.ports[0].port`.
pub(crate) fn format_path<'a>(steps: impl IntoIterator<Item = &'a Step>) -> String {
    let mut out = String::new();
    for step in steps {
        match step {
            Step::Key(key) => {
                if !out.is_empty() {
                    out.push('.');
                }
                out.push_str(key);
            }
            Step::Index(index) => out.push_str(&format!("[{index}]")),
        }
    }
    out
}

/// A field that is not what it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mismatch {
    /// Innermost first.
    steps: Vec<Step>,
    message: String,
}

impl Mismatch {
    fn new(found: Unexpected<'_>, expected: &'static str, wrong: Wrong) -> Self {
        let message = match wrong {
            Wrong::Type => serde::de::value::Error::invalid_type(found, &expected),
            Wrong::Value => serde::de::value::Error::invalid_value(found, &expected),
        };
        Self { steps: Vec::new(), message: message.to_string() }
    }

    /// Of the field at the end of a path from the object.
    pub(crate) fn at(path: Vec<Step>, message: String) -> Self {
        Self { steps: path.into_iter().rev().collect(), message }
    }

    fn within(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// The way to the field, from the object.
    pub(crate) fn into_steps(self) -> Vec<Step> {
        self.steps.into_iter().rev().collect()
    }

    /// The field; empty if the object is meant.
    pub fn field(&self) -> String {
        format_path(self.steps.iter().rev())
    }

    /// What is wrong.
    pub fn message(&self) -> &str {
        &self.message
    }
}

/// What is wrong with a text or a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wrong {
    /// There is another type.
    Type,
    /// It cannot be this one.
    Value,
}

/// What was read, as far as it could be, and the first field that is not what it should be.
pub(super) type Found<T> = (T, Option<Mismatch>);

/// What a field can be. Where it is absent or null it is the default, as Kubernetes' own readers have it.
pub trait Field: Default {
    /// Of what it is made, for people.
    const EXPECTED: &'static str;

    fn text(_: &str) -> Result<Self, Wrong> {
        Err(Wrong::Type)
    }

    fn truth(_: bool) -> Result<Self, Wrong> {
        Err(Wrong::Type)
    }

    fn integer(_: i64) -> Result<Self, Wrong> {
        Err(Wrong::Type)
    }

    /// Reads all of the mapping, whatever is in it.
    fn mapping<'de, A: MapAccess<'de>>(mut map: A) -> Result<Found<Self>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(checked(Unexpected::Map, Self::EXPECTED, Err(Wrong::Type)))
    }

    /// As [`Self::mapping`].
    fn list<'de, A: SeqAccess<'de>>(mut list: A) -> Result<Found<Self>, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(checked(Unexpected::Seq, Self::EXPECTED, Err(Wrong::Type)))
    }
}

fn checked<T: Field>(found: Unexpected<'_>, expected: &'static str, read: Result<T, Wrong>) -> Found<T> {
    match read {
        Ok(value) => (value, None),
        Err(wrong) => (T::default(), Some(Mismatch::new(found, expected, wrong))),
    }
}

/// Reads a field; see the module.
pub(crate) fn read<'de, T: Field, D: Deserializer<'de>>(deserializer: D) -> Result<Found<T>, D::Error> {
    Reader::new(&[]).deserialize(deserializer)
}

/// Of a field within mappings within that which comes.
struct Reader<T> {
    path: &'static [&'static str],
    of: PhantomData<T>,
}

impl<T: Field> Reader<T> {
    fn new(path: &'static [&'static str]) -> Self {
        Self { path, of: PhantomData }
    }

    fn checked(&self, found: Unexpected<'_>, read: impl FnOnce() -> Result<T, Wrong>) -> Found<T> {
        if self.path.is_empty() {
            checked(found, T::EXPECTED, read())
        } else {
            checked(found, "a map", Err(Wrong::Type))
        }
    }
}

impl<'de, T: Field> DeserializeSeed<'de> for Reader<T> {
    type Value = Found<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found<T>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Field> Visitor<'de> for Reader<T> {
    type Value = Found<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Found<T>, E> {
        Ok(self.checked(Unexpected::Bool(value), || T::truth(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Found<T>, E> {
        Ok(self.checked(Unexpected::Signed(value), || T::integer(value)))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Found<T>, E> {
        // No field of the API is as large.
        Ok(self.checked(Unexpected::Unsigned(value), || T::integer(i64::try_from(value).unwrap_or(i64::MAX))))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Found<T>, E> {
        Ok(self.checked(Unexpected::Float(value), || Err(Wrong::Type)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Found<T>, E> {
        Ok(self.checked(Unexpected::Str(value), || T::text(value)))
    }

    fn visit_none<E>(self) -> Result<Found<T>, E> {
        Ok((T::default(), None))
    }

    fn visit_unit<E>(self) -> Result<Found<T>, E> {
        Ok((T::default(), None))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found<T>, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Found<T>, A::Error> {
        match self.path {
            [] => T::mapping(map),
            [_, path @ ..] => {
                let wanted = self.path.get(..1).unwrap_or_default();
                mapping(map, wanted, |out, _, value| {
                    *out = value.read_within(path)?;
                    Ok(())
                })
            }
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Found<T>, A::Error> {
        if self.path.is_empty() {
            return T::list(list);
        }
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(self.checked(Unexpected::Seq, || Err(Wrong::Type)))
    }
}

/// Reads a mapping: `take` is called for each of the wanted fields, and reads its value. Of a field that is there twice
/// the last counts.
pub(crate) fn mapping<'de, T: Default, A: MapAccess<'de>>(
    map: A,
    wanted: &'static [&'static str],
    take: impl Fn(&mut T, &'static str, &mut Value<'_, A>) -> Result<(), A::Error>,
) -> Result<Found<T>, A::Error> {
    let (mut map, mut out, mut wrong) = (map, T::default(), None);
    while let Some(key) = map.next_key_seed(OneOf(wanted))? {
        match key {
            Some(key) => take(&mut out, key, &mut Value { map: &mut map, key, wrong: &mut wrong })?,
            None => drop(map.next_value::<IgnoredAny>()?),
        }
    }
    Ok((out, wrong))
}

/// What a mapping is made of: for each key the field that its value is read into, where the path says so from within
/// mappings in it.
macro_rules! mapping_of {
    ($type:ident $(<$of:ident>)?, $expected:literal, {
        $($key:expr => $($field:ident).+ $(within [$($path:literal),+])?),+ $(,)?
    }) => {
        impl$(<$of: $crate::object::fields::Field>)? $crate::object::fields::Field for $type$(<$of>)? {
            const EXPECTED: &'static str = $expected;

            fn mapping<'de, A: serde::de::MapAccess<'de>>(
                map: A,
            ) -> Result<$crate::object::fields::Found<Self>, A::Error> {
                $crate::object::fields::mapping(map, &[$($key),+], |out: &mut Self, key, value| {
                    $(if key == $key {
                        out.$($field).+ = value.read_within(&[$($($path),+)?])?;
                        return Ok(());
                    })+
                    Ok(())
                })
            }
        }
    };
}
pub(super) use mapping_of;

/// The value of a field, not read yet.
pub(crate) struct Value<'a, A> {
    map: &'a mut A,
    key: &'static str,
    wrong: &'a mut Option<Mismatch>,
}

impl<'de, A: MapAccess<'de>> Value<'_, A> {
    /// Of what it holds, the field at the end of this path of mappings.
    pub(crate) fn read_within<T: Field>(&mut self, path: &'static [&'static str]) -> Result<T, A::Error> {
        let (value, mismatch) = self.map.next_value_seed(Reader::new(path))?;
        if let Some(mismatch) = mismatch {
            self.wrong.get_or_insert_with(|| mismatch.within(Step::Key(self.key.to_owned())));
        }
        Ok(value)
    }
}

/// A key, if it is one of these.
struct OneOf(&'static [&'static str]);

impl<'de> DeserializeSeed<'de> for OneOf {
    type Value = Option<&'static str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl Visitor<'_> for OneOf {
    type Value = Option<&'static str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().copied().find(|wanted| *wanted == key))
    }
}

impl<T: Field> Field for Vec<T> {
    const EXPECTED: &'static str = "a sequence";

    fn list<'de, A: SeqAccess<'de>>(mut list: A) -> Result<Found<Self>, A::Error> {
        let (mut read, mut wrong) = (Self::new(), None);
        while let Some((element, mismatch)) = list.next_element_seed(Reader::new(&[]))? {
            if let Some(mismatch) = mismatch {
                wrong.get_or_insert_with(|| mismatch.within(Step::Index(read.len())));
            }
            read.push(element);
        }
        Ok((read, wrong))
    }
}

impl Field for Option<String> {
    const EXPECTED: &'static str = "a string";

    fn text(text: &str) -> Result<Self, Wrong> {
        Ok(Some(text.to_owned()))
    }
}

impl Field for String {
    const EXPECTED: &'static str = "a string";

    fn text(text: &str) -> Result<Self, Wrong> {
        Ok(text.to_owned())
    }
}

impl Field for Option<super::Name> {
    const EXPECTED: &'static str = "a string";

    fn text(text: &str) -> Result<Self, Wrong> {
        Ok(Some(text.into()))
    }
}

impl Field for Option<i32> {
    const EXPECTED: &'static str = "i32";

    fn integer(number: i64) -> Result<Self, Wrong> {
        i32::try_from(number).map(Some).map_err(|_| Wrong::Value)
    }
}

impl Field for Option<bool> {
    const EXPECTED: &'static str = "a boolean";

    fn truth(value: bool) -> Result<Self, Wrong> {
        Ok(Some(value))
    }
}
