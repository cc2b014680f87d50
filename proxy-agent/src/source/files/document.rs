//! From the bytes of one manifest file to its objects. Each document, and each item of a `List`, stands or falls alone.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use tracing::debug;

use super::trimmed::{Trimmed, typed};
use crate::object::{
    self, Mismatch, ObjectKey, Problem, Readable, Reading, Slice, Step, Unreadable, format_path,
};
use crate::source::derive::{self, Pod, Selection};

/// Deep enough for any object, shallow enough that no document exhausts the stack.
const MAX_DEPTH: usize = 64;

/// The kinds that are read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum Kind {
    Node,
    Service,
    Slice,
    Pod,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Node, Self::Service, Self::Slice, Self::Pod];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::Service => "Service",
            Self::Slice => "EndpointSlice",
            Self::Pod => "Pod",
        }
    }

    const fn group(self) -> &'static str {
        match self {
            Self::Node | Self::Service | Self::Pod => "",
            Self::Slice => "discovery.k8s.io",
        }
    }
}

/// Which object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Id {
    pub(super) kind: Kind,
    pub(super) key: ObjectKey,
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.name(), self.key)
    }
}

/// An object as read; a clone is the same one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Object {
    Service(Arc<object::Service>, Option<Arc<Selection>>),
    Slice(Arc<Slice>),
    Node(Arc<object::Node>),
    Pod(Arc<Pod>),
    /// S3: there, but not for this proxy. Looks like a delete.
    Excluded,
}

/// A good object and the line where its document starts.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: Id,
    pub(super) object: Object,
    pub(super) line: usize,
}

/// A document, or an item of a list, that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Broken {
    pub(super) id: Option<Id>,
    file: String,
    line: usize,
    field: String,
    message: String,
}

impl Broken {
    /// A whole file that cannot be read.
    pub(super) fn file(file: &str, message: impl fmt::Display) -> Self {
        Self { id: None, file: file.into(), line: 0, field: String::new(), message: message.to_string() }
    }

    pub(super) fn unreadable(&self) -> Unreadable {
        let place = if self.line == 0 { self.file.clone() } else { format!("{}:{}", self.file, self.line) };
        Unreadable {
            key: self.id.as_ref().map(|id| id.key.clone()),
            problem: Problem {
                object: self.id.as_ref().map_or_else(|| format!("file {}", self.file), Id::to_string),
                field: self.field.clone(),
                message: format!("{place}: {}; the last good state stays in force", self.message),
            },
        }
    }
}

/// `services.yaml:14: Service default/web: spec.ports[0].port: invalid type: string "http", expected i32`
impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line != 0 {
            write!(f, ":{}", self.line)?;
        }
        if let Some(id) = &self.id {
            write!(f, ": {id}")?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// All that a file holds, in its order.
#[derive(Default, Debug)]
pub(super) struct Parsed {
    pub(super) entries: Vec<Entry>,
    pub(super) broken: Vec<Broken>,
}

impl Parsed {
    /// What it holds, readable or not.
    pub(super) fn ids(&self) -> impl Iterator<Item = &Id> {
        let broken = self.broken.iter().filter_map(|broken| broken.id.as_ref());
        self.entries.iter().map(|entry| &entry.id).chain(broken)
    }
}

/// Reads a file. Never fails: what cannot be read is in `broken`.
pub(super) fn parse(file: &str, bytes: &[u8]) -> Parsed {
    let mut out = Parsed::default();
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let before = bytes.get(..error.valid_up_to()).unwrap_or_default();
            let line = 1 + before.iter().filter(|&&b| b == b'\n').count();
            out.broken.push(Broken { line, ..Broken::file(file, "not UTF-8 text") });
            return out;
        }
    };
    if file.ends_with(".json") {
        json(file, text, &mut out)
    } else {
        yaml(file, text, &mut out)
    }
    out
}

/// JSON has an exact reader of its own. Several values may follow each other, as `kubectl get -o json` pasted twice.
fn json(file: &str, text: &str, out: &mut Parsed) {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Trimmed>();
    let lines = |text: &str| text.bytes().filter(|&byte| byte == b'\n').count();
    // Counted along: from the start each time, a file of many values would be read as many times.
    let (mut start, mut line) = (0, 1);
    while let Some(value) = values.next() {
        let end = values.byte_offset();
        let text = text.get(start..end).unwrap_or_default();
        let (blank, content) = text.split_at(text.len() - text.trim_start().len());
        line += lines(blank);
        match value {
            Ok(Trimmed(value)) => Document::new(file, content, line).read(value, &[], None, out),
            Err(error) => {
                // The position is in the message already, and lines count from the start of the file.
                out.broken.push(Broken { line: error.line(), ..Broken::file(file, error) });
                // What follows cannot be told apart from the broken value.
                return;
            }
        }
        line += lines(content);
        start = end;
    }
}

fn yaml(file: &str, text: &str, out: &mut Parsed) {
    for (line, text) in split(text) {
        let document = Document::new(file, text, line);
        match serde_saphyr::from_str_with_options::<Trimmed>(text, options()) {
            Ok(Trimmed(Value::Null)) => {}
            Ok(Trimmed(value)) => document.read(value, &[], None, out),
            Err(_) => out.broken.push(document.syntax_error()),
        }
    }
}

/// Documents with the number of their first line. A line that starts with `---` always starts one, within block
/// scalars too, so this is exact; and one document that is broken cannot swallow the next.
fn split(text: &str) -> Vec<(usize, &str)> {
    let mut out = Vec::new();
    let mut start = (1, 0);
    let mut offset = 0;
    // A chunk with nothing but comments and directives (`%YAML`) is no document.
    let mut has_content = false;
    let mut end = |start: (usize, usize), end: usize, has_content: bool| {
        if has_content && let Some(chunk) = text.get(start.1..end) {
            out.push((start.0, chunk));
        }
    };
    for (i, line) in text.split_inclusive('\n').enumerate() {
        let marker =
            line.strip_prefix("---").filter(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if marker.is_some() {
            end(start, offset, has_content);
            start = (i + 1, offset);
            has_content = false;
        }
        let content = marker.unwrap_or(line).trim_start_matches('\u{feff}').trim();
        has_content |= !(content.is_empty() || content == "..." || content.starts_with(['#', '%']));
        offset += line.len();
    }
    end(start, offset, has_content);
    out
}

/// Limits that pass a 10,000-endpoint slice and the largest file, and stop documents that unfold to much more than
/// their text. Scalars keep the type that they look like in Kubernetes' own reader, but `yes` is no boolean.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 100_000_000,
            max_nodes: 100_000_000,
            max_total_scalar_bytes: 1 << 30,
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 100_000,
        },
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        strict_booleans: true,
        with_snippet: false,
    }
}

struct Document<'a> {
    file: &'a str,
    text: &'a str,
    line: usize,
    /// How many more fields may be looked for: each one reads the document again.
    lookups: Cell<u32>,
}

impl<'a> Document<'a> {
    fn new(file: &'a str, text: &'a str, line: usize) -> Self {
        Self { file, text, line, lookups: Cell::new(20) }
    }
}

impl Document<'_> {
    /// Reads one object, or the items of a list. `path` leads to it; `list_kind` is what a typed list says of its items.
    fn read(&self, mut value: Value, path: &[Step], list_kind: Option<Kind>, out: &mut Parsed) {
        let broken = |id: Option<Id>, steps: &[Step], message: String| {
            let full = [path, steps].concat();
            Broken {
                file: self.file.to_owned(),
                line: self.locate(&full),
                // Of a list's item only the object's own part, if it is known which object it is.
                field: format_path(if id.is_some() { steps } else { &full }),
                id,
                message,
            }
        };
        if !value.is_object() {
            out.broken.push(broken(None, &[], "not a mapping, so not a Kubernetes object".into()));
            return;
        }
        let api_version = value.get("apiVersion").and_then(Value::as_str).unwrap_or_default().to_owned();
        let kind_name = match (value.get("kind"), list_kind) {
            (Some(Value::String(kind)), _) => kind.clone(),
            (None | Some(Value::Null), Some(kind)) => kind.name().to_owned(),
            (None | Some(_), _) => {
                out.broken.push(broken(None, &[Step::Key("kind".into())], "missing or not a string".into()));
                return;
            }
        };

        let element = kind_name.strip_suffix("List");
        let element_kind = element.and_then(|name| Kind::ALL.into_iter().find(|kind| kind.name() == name));
        if element == Some("") || element_kind.is_some() {
            let items = match value.get_mut("items").map(Value::take) {
                None | Some(Value::Null) => Vec::new(),
                Some(Value::Array(items)) => items,
                Some(_) => {
                    out.broken.push(broken(None, &[Step::Key("items".into())], "not a list".into()));
                    return;
                }
            };
            for (i, item) in items.into_iter().enumerate() {
                let path = [path, &[Step::Key("items".into()), Step::Index(i)]].concat();
                self.read(item, &path, element_kind, out);
            }
            return;
        }

        let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
        let Some(kind) = Kind::ALL
            .into_iter()
            .find(|kind| kind.name() == kind_name && (api_version.is_empty() || kind.group() == group))
        else {
            debug!(file = self.file, kind = kind_name, api_version, "kind not read");
            return;
        };

        let key = match key(&value, kind) {
            Ok(key) => key,
            Err((field, message)) => {
                out.broken.push(broken(
                    None,
                    &[Step::Key("metadata".into()), Step::Key(field.into())],
                    message,
                ));
                return;
            }
        };
        let id = Id { kind, key };
        if !api_version.is_empty() && version != "v1" {
            let message = format!("{api_version:?} is not read, only v1");
            out.broken.push(broken(Some(id), &[Step::Key("apiVersion".into())], message));
            return;
        }
        normalise(&mut value, &id);
        match object(&value, kind) {
            Ok(object) => {
                out.entries.push(Entry { id, object, line: self.line });
            }
            Err(error) => {
                let message = error.message().to_owned();
                out.broken.push(broken(Some(id), &error.into_steps(), message));
            }
        }
    }

    /// The line of a field, or of the deepest part of its path that is there. Reads the document again: errors are rare.
    fn locate(&self, path: &[Step]) -> usize {
        for length in (1..=path.len()).rev() {
            let Some(lookups) = self.lookups.get().checked_sub(1) else {
                break;
            };
            self.lookups.set(lookups);
            let found = Cell::new(None);
            let seed = Locate { path: path.get(..length).unwrap_or_default(), found: &found };
            let result = serde_saphyr::with_deserializer_from_str_with_options(self.text, options(), |de| {
                seed.deserialize(de)
            });
            if let (Ok(()), Some(line)) = (result, found.get()) {
                return self.line + usize::try_from(line).unwrap_or(1).saturating_sub(1);
            }
        }
        self.line
    }

    /// Reads a broken document again with as many empty lines before it as it has in its file, so that the line in
    /// the reader's message is the one that an editor shows.
    fn syntax_error(&self) -> Broken {
        let padded = format!("{}{}", "\n".repeat(self.line.saturating_sub(1)), self.text);
        let error = serde_saphyr::from_str_with_options::<Trimmed>(&padded, options()).err();
        let line = error
            .as_ref()
            .and_then(serde_saphyr::Error::location)
            .and_then(|l| usize::try_from(l.line()).ok());
        let message = error.map_or_else(|| "cannot be read".into(), |error| error.to_string());
        Broken {
            line: line.filter(|&line| line > 0).unwrap_or(self.line),
            ..Broken::file(self.file, message)
        }
    }
}

/// The key of an object, so that it is known even if the rest of it cannot be read.
fn key(value: &Value, kind: Kind) -> Result<ObjectKey, (&'static str, String)> {
    let metadata = value.get("metadata");
    let text = |field| match metadata.and_then(|m| m.get(field)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err((field, format!("{other} is not a string"))),
    };
    let name = text("name")?.ok_or_else(|| ("name", "missing".to_owned()))?;
    let namespace = match kind {
        Kind::Node => String::new(),
        Kind::Service | Kind::Slice | Kind::Pod => text("namespace")?.unwrap_or_else(|| "default".into()),
    };
    Ok(ObjectKey::new(namespace, name))
}

/// What an API server would have done to a file: the default namespace, labels without a value, and the empty name of
/// a slice's port.
fn normalise(value: &mut Value, id: &Id) {
    if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
        if let Some(Value::Object(labels)) = metadata.get_mut("labels") {
            for label in labels.values_mut().filter(|label| label.is_null()) {
                *label = Value::String(String::new());
            }
        }
        metadata.insert("namespace".into(), Value::String(id.key.namespace.to_string()));
    }
    if id.kind == Kind::Slice
        && let Some(Value::Array(ports)) = value.get_mut("ports")
    {
        for port in ports.iter_mut().filter_map(Value::as_object_mut) {
            let name = port.entry("name").or_insert(Value::Null);
            if name.is_null() {
                *name = Value::String(String::new());
            }
        }
    }
}

fn object(value: &Value, kind: Kind) -> Result<Object, Mismatch> {
    Ok(match kind {
        Kind::Node => Object::Node(Arc::new(reading(value)?.content?)),
        Kind::Pod => Object::Pod(Arc::new(derive::pod(&typed::<core::Pod>(value)?))),
        Kind::Service => {
            let Reading { excluded, content, .. } = reading(value)?;
            let service = content?;
            if excluded {
                return Ok(Object::Excluded);
            }
            let selects = value.pointer("/spec/selector").is_some_and(|selector| !selector.is_null());
            let selection = if selects { derive::selection(&typed(value)?, &service) } else { None };
            Object::Service(Arc::new(service), selection.map(Arc::new))
        }
        Kind::Slice => {
            let Reading { excluded, content, .. } = reading(value)?;
            let slice = content?;
            if excluded { Object::Excluded } else { Object::Slice(Arc::new(slice)) }
        }
    })
}

fn reading<T: Readable>(value: &Value) -> Result<Reading<T>, Mismatch> {
    Reading::deserialize(value).map_err(|error| Mismatch::at(Vec::new(), error.to_string()))
}

/// Walks a document down a path and notes the line of what is at its end.
#[derive(Clone, Copy)]
struct Locate<'a> {
    path: &'a [Step],
    found: &'a Cell<Option<u64>>,
}

impl<'de> DeserializeSeed<'de> for Locate<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.path.is_empty() {
            let spanned: serde_saphyr::Spanned<IgnoredAny> = Deserialize::deserialize(deserializer)?;
            self.found.set(Some(spanned.referenced.line()));
            Ok(())
        } else {
            deserializer.deserialize_any(self)
        }
    }
}

impl<'de> Visitor<'de> for Locate<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping or a list")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let next = self.path.split_first();
        while let Some(key) = map.next_key::<String>()? {
            match next {
                Some((Step::Key(wanted), path)) if *wanted == key => {
                    map.next_value_seed(Locate { path, found: self.found })?;
                }
                Some(_) | None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let next = self.path.split_first();
        let mut at = 0;
        loop {
            let more = match next {
                Some((Step::Index(wanted), path)) if *wanted == at => {
                    seq.next_element_seed(Locate { path, found: self.found })?.is_some()
                }
                Some(_) | None => seq.next_element::<IgnoredAny>()?.is_some(),
            };
            if !more {
                return Ok(());
            }
            at += 1;
        }
    }
}
