//! JSON with one name and one value for each field that matters (pure).
//!
//! runc reads JSON with Go's decoder (`encoding/json`), which is more lenient than others: it ignores the case of field
//! names, accepts repeated fields and invalid Unicode, treats null as "not set", and ignores everything after the value.
//! [`canonical`] rewrites such text, so that this program, runc and crun read the same values from it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::marker::PhantomData;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The Go type of a value.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// A number, a flag, or a value that is not inspected here.
    Value,
    /// A signed integer. Go reads `-0` as 0.
    Integer,
    /// A string.
    Text,
    /// A struct. If it has several values, each adds to the ones before.
    Struct(&'static [(&'static str, Shape)]),
    /// A map. If it has several values, each adds to the ones before. Its keys are unchanged.
    Map(&'static Shape),
    /// A slice. If it has several values, the last one counts.
    List(&'static Shape),
}

/// What happens to the fields that the shape of a struct does not name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// The fields are kept unchanged, in their order.
    Kept,
    /// The fields are left out.
    LeftOut,
}

/// Writes JSON with the names of the shape, each field once, and without null. The values of fields that the shape does not
/// name are kept byte for byte. So is a value with another type than its field: the reader refuses it.
///
/// # Errors
/// The text is not JSON.
pub fn canonical(text: &[u8], shape: &Shape, others: Others) -> Result<String, serde_json::Error> {
    let text = unicode(text);
    let mut first = serde_json::Deserializer::from_str(&text);
    written(&[<&RawValue>::deserialize(&mut first)?], shape, others)
}

/// The value that Go has after decoding all these values into the same variable.
fn written(values: &[&RawValue], shape: &Shape, others: Others) -> Result<String, serde_json::Error> {
    let is_null = |value: &&RawValue| value.get() == "null";
    let mut last = values.iter().rfind(|value| !is_null(value));
    // Null empties structs (which are behind pointers), maps and lists. It does not change other variables.
    let after_null = values.iter().rposition(is_null).map_or(0, |at| at + 1);
    let rest = values.get(after_null..).unwrap_or_default();
    if !is_scalar(shape) {
        last = rest.last();
    }
    // A value of another type is returned as it is.
    let members = || -> Result<Vec<_>, &RawValue> {
        let mut all = Vec::new();
        for value in rest {
            all.extend(serde_json::from_str::<Members<&RawValue>>(value.get()).map_err(|_| *value)?.0);
        }
        Ok(all)
    };
    let mut text = String::new();
    match shape {
        Shape::Value => text.push_str(last.map_or("null", |value| value.get())),
        Shape::Integer => text.push_str(last.map_or("null", |value| integer(value.get()))),
        Shape::Text => text.push_str(last.map_or("\"\"", |value| value.get())),
        Shape::Struct(fields) => {
            let members = match members() {
                Ok(members) => members,
                Err(wrong) => return Ok(wrong.get().to_owned()),
            };
            let mut seen = vec![false; fields.len()];
            let mut object = Object::new(&mut text);
            for (name, value) in &members {
                let known = fields.iter().enumerate().find(|(_, (field, _))| names(name, field));
                let Some((at, (field, shape))) = known else {
                    if others == Others::Kept {
                        object.member(name, value.get())?;
                    }
                    continue;
                };
                if seen.get_mut(at).is_some_and(|seen| std::mem::replace(seen, true)) {
                    continue;
                }
                let of_field = members.iter().filter(|(name, _)| names(name, field));
                let values: Vec<_> = of_field.map(|(_, value)| *value).collect();
                if !(is_null(values.last().unwrap_or(value)) && is_unset(&values, shape)) {
                    object.member(field, &written(&values, shape, others)?)?;
                }
            }
            object.end();
        }
        Shape::Map(shape) => {
            let members = match members() {
                // Each value is a new variable.
                Ok(members) => members.into_iter().collect::<BTreeMap<_, _>>(),
                Err(wrong) => return Ok(wrong.get().to_owned()),
            };
            let mut object = Object::new(&mut text);
            for (key, value) in members {
                object.member(&key, &written(&[value], shape, others)?)?;
            }
            object.end();
        }
        Shape::List(shape) => {
            let last = last.map_or("[]", |value| value.get());
            let Ok(elements) = serde_json::from_str::<Vec<&RawValue>>(last) else {
                return Ok(last.to_owned());
            };
            text.push('[');
            for (at, element) in elements.into_iter().enumerate() {
                text.push_str(if at == 0 { "" } else { "," });
                text.push_str(&written(&[element], shape, others)?);
            }
            text.push(']');
        }
    }
    Ok(text)
}

/// True if the values, of which the last is null, leave the variable unset.
fn is_unset(values: &[&RawValue], shape: &Shape) -> bool {
    !is_scalar(shape) || values.iter().all(|value| value.get() == "null")
}

/// True for a variable that null does not change.
pub fn is_scalar(shape: &Shape) -> bool {
    matches!(shape, Shape::Value | Shape::Integer | Shape::Text)
}

/// A signed integer as every decoder reads it.
pub fn integer(text: &str) -> &str {
    if text == "-0" { "0" } else { text }
}

/// An object that is being written.
struct Object<'t> {
    text: &'t mut String,
    is_empty: bool,
}

impl<'t> Object<'t> {
    fn new(text: &'t mut String) -> Self {
        text.push('{');
        Self { text, is_empty: true }
    }

    fn member(&mut self, name: &str, value: &str) -> Result<(), serde_json::Error> {
        let comma = if std::mem::take(&mut self.is_empty) { "" } else { "," };
        let name = serde_json::to_string(name)?;
        write!(self.text, "{comma}{name}:{value}").map_err(serde::ser::Error::custom)
    }

    fn end(self) {
        self.text.push('}');
    }
}

/// The members of an object in their order, including repeated ones.
#[derive(Debug)]
pub struct Members<V>(Vec<(String, V)>);

impl<V> Default for Members<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<V> Members<V> {
    /// The first member with a name.
    pub fn get(&self, name: &str) -> Option<&V> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }

    /// Replaces the value of the first member with a name, or adds a member.
    pub fn insert(&mut self, name: &str, value: V) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name.to_owned(), value)),
        }
    }
}

impl<V> IntoIterator for Members<V> {
    type Item = (String, V);
    type IntoIter = std::vec::IntoIter<(String, V)>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<V: Serialize> Serialize for Members<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

impl<'t, V: Deserialize<'t>> Deserialize<'t> for Members<V> {
    fn deserialize<D: Deserializer<'t>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect<V>(PhantomData<V>);
        impl<'t, V: Deserialize<'t>> Visitor<'t> for Collect<V> {
            type Value = Members<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'t>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect(PhantomData))
    }
}

/// True if Go treats a member's name as that of a field, which consists of ASCII letters.
fn names(member: &str, field: &str) -> bool {
    // Unicode knows two more cases of these letters: the Kelvin sign and the long s.
    let fold = |c: char| match c {
        '\u{212a}' => 'k',
        '\u{17f}' => 's',
        c => c.to_ascii_lowercase(),
    };
    member.chars().map(fold).eq(field.chars().map(fold))
}

/// The text with everything that is not valid Unicode replaced by U+FFFD.
fn unicode(text: &[u8]) -> Cow<'_, str> {
    const REPLACEMENT: &str = "\\ufffd";
    let text = String::from_utf8_lossy(text);
    let mut whole = String::new();
    let mut copied = 0;
    let mut at = 0;
    while let Some(found) = text.get(at..).and_then(|rest| rest.find('\\')) {
        let escape = at + found;
        at = match unit(&text, escape) {
            // Both halves of one character.
            Some(0xd800..=0xdbff) if matches!(unit(&text, escape + 6), Some(0xdc00..=0xdfff)) => escape + 12,
            Some(0xd800..=0xdfff) => {
                whole.push_str(text.get(copied..escape).unwrap_or_default());
                whole.push_str(REPLACEMENT);
                copied = escape + 6;
                copied
            }
            // The escaped character may be a backslash.
            _ => {
                escape
                    + 1
                    + text.get(escape + 1..).and_then(|rest| rest.chars().next()).map_or(0, char::len_utf8)
            }
        };
    }
    if copied == 0 {
        return text;
    }
    whole.push_str(text.get(copied..).unwrap_or_default());
    Cow::Owned(whole)
}

/// The number in an escape `\uXXXX`.
fn unit(text: &str, at: usize) -> Option<u16> {
    let digits = text.get(at..)?.strip_prefix("\\u")?.get(..4)?;
    digits
        .bytes()
        .all(|digit| digit.is_ascii_hexdigit())
        .then(|| u16::from_str_radix(digits, 16).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAF: Shape = Shape::Struct(&[("size", Shape::Value), ("kind", Shape::Text)]);
    const SHAPE: Shape = Shape::Struct(&[
        ("hostname", Shape::Text),
        ("annotations", Shape::Map(&Shape::Text)),
        ("linux", LEAF),
        ("list", Shape::List(&LEAF)),
        ("words", Shape::List(&Shape::Text)),
    ]);

    /// What Go's decoder makes of the text; facts: Go 1.24, `encoding/json`.
    fn assert_read(text: &str, expected: &str) {
        assert_eq!(canonical(text.as_bytes(), &SHAPE, Others::Kept).unwrap(), expected, "{text}");
    }

    #[test]
    fn the_case_of_a_fields_name_does_not_matter() {
        assert_read(r#"{"HostName":"a"}"#, r#"{"hostname":"a"}"#);
        assert_read(
            r#"{"LINUX":{"SIZE":1},"Li\u006eux":{"Kind":"b"}}"#,
            r#"{"linux":{"size":1,"kind":"b"}}"#,
        );
        assert_read(
            "{\"Ho\u{17f}tname\":\"a\",\"lin\u{16b}x\":{}}",
            "{\"hostname\":\"a\",\"lin\u{16b}x\":{}}",
        );
        assert_read("{\"linux\":{\"\u{212a}ind\":\"a\"}}", r#"{"linux":{"kind":"a"}}"#);
    }

    #[test]
    fn the_last_of_several_fields_of_one_name_counts() {
        assert_read(r#"{"hostname":"a","x":1,"Hostname":"b","x":2}"#, r#"{"hostname":"b","x":1,"x":2}"#);
        assert_read(
            r#"{"linux":{"size":1,"kind":"a"},"Linux":{"size":2}}"#,
            r#"{"linux":{"size":2,"kind":"a"}}"#,
        );
        assert_read(
            r#"{"annotations":{"a":"1","A":"2"},"Annotations":{"a":"3"}}"#,
            r#"{"annotations":{"A":"2","a":"3"}}"#,
        );
        assert_read(r#"{"list":[{"size":1}],"List":[]}"#, r#"{"list":[]}"#);
    }

    #[test]
    fn a_null_field_counts_as_not_set() {
        assert_read("null", "{}");
        assert_read(
            r#"{"hostname":null,"linux":null,"list":null,"annotations":null,"x":null}"#,
            r#"{"x":null}"#,
        );
        assert_read(r#"{"hostname":"a","hostname":null}"#, r#"{"hostname":"a"}"#);
        assert_read(r#"{"linux":{"size":1},"linux":null}"#, "{}");
        assert_read(r#"{"linux":{"size":1},"linux":null,"linux":{"kind":"a"}}"#, r#"{"linux":{"kind":"a"}}"#);
        assert_read(
            r#"{"list":[null],"words":[null,"a"],"annotations":{"a":null}}"#,
            r#"{"list":[{}],"words":["","a"],"annotations":{"a":""}}"#,
        );
    }

    #[test]
    fn invalid_unicode_is_replaced() {
        assert_read(r#"{"hostname":"a\ud800b\\ud800"}"#, r#"{"hostname":"a\ufffdb\\ud800"}"#);
        assert_read(
            r#"{"hostname":"\ud83d\udc33 \udc33\ud83d"}"#,
            r#"{"hostname":"\ud83d\udc33 \ufffd\ufffd"}"#,
        );
        let text = canonical(b"{\"hostname\":\"\xff\"}", &SHAPE, Others::Kept).unwrap();
        assert_eq!(text, "{\"hostname\":\"\u{fffd}\"}");
    }

    #[test]
    fn text_after_the_value_is_ignored() {
        assert_read("{} garbage", "{}");
    }

    #[test]
    fn a_value_of_another_type_stays_for_its_reader_to_refuse() {
        for text in
            ["[]", "1", r#"{"linux":"x"}"#, r#"{"list":{}}"#, r#"{"list":[1]}"#, r#"{"annotations":7}"#]
        {
            assert_read(text, text);
        }
        assert_read(r#"{"linux":[],"linux":{}}"#, r#"{"linux":[]}"#);
        for text in ["", "{", r#"{"linux":}"#, "{\"hostname\":\"a\nb\"}"] {
            assert!(canonical(text.as_bytes(), &SHAPE, Others::Kept).is_err(), "{text}");
        }
    }

    #[test]
    fn other_fields_stay_or_are_left_out() {
        let deep = format!("{{\"x\":{}{},\"hostname\":\"a\"}}", "[".repeat(1000), "]".repeat(1000));
        assert_read(&deep, &deep);
        let known = canonical(deep.as_bytes(), &SHAPE, Others::LeftOut).unwrap();
        assert_eq!(known, r#"{"hostname":"a"}"#);
    }
}
