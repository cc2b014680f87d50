//! Names, each in memory once: that of a Service is in a dozen places, that of a node on all of its endpoints.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::HashSet;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Serialize, Serializer};

/// A name, or another text that comes up again and again. One pointer: there are many more of these than texts.
///
/// Equal ones are the same one, and hashed as such: who looks for one among many need not read any.
#[derive(Clone)]
pub struct Name(Arc<Box<str>>);

/// All names.
#[derive(Default)]
struct Known {
    names: HashSet<ByText>,
    /// When so many are known, those that nobody uses any more are forgotten.
    look_at: usize,
}

/// Fewer are never looked through.
const FEW: usize = 1024;

static KNOWN: Mutex<Option<Known>> = Mutex::new(None);

impl Name {
    /// The text.
    pub fn as_str(&self) -> &str {
        self
    }
}

impl Known {
    fn get(&mut self, text: &str) -> Name {
        if let Some(ByText(name)) = self.names.get(text) {
            return name.clone();
        }
        if self.names.len() >= self.look_at {
            self.names.retain(|ByText(name)| Arc::strong_count(&name.0) > 1);
            // Not before as many are new: so a name costs the same, however many there are.
            self.look_at = FEW.max(self.names.len() * 2);
        }
        let name = Name(Arc::new(text.into()));
        self.names.insert(ByText(name.clone()));
        name
    }
}

/// A name where it is looked for by its text.
struct ByText(Name);

impl PartialEq for ByText {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for ByText {}

impl Hash for ByText {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.as_str().hash(state);
    }
}

impl Borrow<str> for ByText {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Name {}

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Name {
    fn cmp(&self, other: &Self) -> Ordering {
        if self == other { Ordering::Equal } else { self.as_str().cmp(other) }
    }
}

impl From<&str> for Name {
    fn from(text: &str) -> Self {
        // What a thread that panicked left is a set all the same.
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_or_insert_default().get(text)
    }
}

impl From<String> for Name {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl From<&String> for Name {
    fn from(text: &String) -> Self {
        text.as_str().into()
    }
}

impl From<&Self> for Name {
    fn from(name: &Self) -> Self {
        name.clone()
    }
}

impl Default for Name {
    fn default() -> Self {
        "".into()
    }
}

impl Deref for Name {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl PartialEq<str> for Name {
    fn eq(&self, text: &str) -> bool {
        **self == *text
    }
}

impl PartialEq<&str> for Name {
    fn eq(&self, text: &&str) -> bool {
        **self == **text
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_in_memory_once_and_only_while_it_is_used() {
        let mut known = Known::default();
        let (a, b) = (known.get("a"), known.get(&String::from("a")));
        assert_eq!(a, b);
        assert_ne!(a, known.get("b"));
        for number in 0..10 * FEW {
            known.get(&number.to_string());
        }
        assert!(known.names.len() <= FEW, "{}", known.names.len());
        assert_eq!(a, known.get("a"));
    }
}
