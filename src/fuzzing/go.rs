//! A model of how Go's `encoding/json` decodes JSON into variables (facts: Go 1.24), to compare
//! [`oci::canonical`](crate::oci::canonical) with.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::oci::canonical::{Members, Others, Shape, canonical, integer, is_scalar};

/// Compares what Go's decoder reads from the text with what a reader that knows only exact names reads from the canonical
/// text. `None` if the text is not JSON.
pub(super) fn check(data: &[u8], shape: &Shape) -> Option<()> {
    let text = String::from_utf8_lossy(data);
    let mut values = serde_json::Deserializer::from_str(&text);
    let value = <&RawValue as serde::Deserialize>::deserialize(&mut values).ok()?;
    let mut variable = Variable::Unset;
    let is_typed = decode(&mut variable, value, shape, Names::Go).is_some();
    for others in [Others::Kept, Others::LeftOut] {
        let written = canonical(data, shape, others).unwrap_or_else(|error| panic!("{text}: {error}"));
        let again = canonical(written.as_bytes(), shape, others);
        assert_eq!(again.ok().as_ref(), Some(&written), "it is canonical");
        if is_typed {
            let raw = serde_json::from_str(&written).unwrap_or_else(|error| panic!("{written}: {error}"));
            let mut found = Variable::Unset;
            let is_read = decode(&mut found, raw, shape, Names::Exact).is_some();
            assert!(is_read, "{written}");
            assert_eq!(settled(found), settled(variable.clone()), "{written}");
        }
    }
    Some(())
}

/// Which members belong to a field.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    Go,
    Exact,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Variable {
    Unset,
    Value(String),
    Struct(BTreeMap<&'static str, Variable>),
    Map(BTreeMap<String, Variable>),
    List(Vec<Variable>),
}

/// A variable that was never set has the zero value.
fn settled(variable: Variable) -> Variable {
    match variable {
        Variable::Struct(fields) => {
            let fields = fields.into_iter().map(|(name, field)| (name, settled(field)));
            let set: BTreeMap<_, _> = fields.filter(|(_, field)| *field != Variable::Unset).collect();
            if set.is_empty() { Variable::Unset } else { Variable::Struct(set) }
        }
        Variable::Map(values) if values.is_empty() => Variable::Unset,
        Variable::Map(values) => {
            Variable::Map(values.into_iter().map(|(key, value)| (key, settled(value))).collect())
        }
        Variable::List(values) if values.is_empty() => Variable::Unset,
        Variable::List(values) => Variable::List(values.into_iter().map(settled).collect()),
        Variable::Value(value) if value == "\"\"" || value == "null" => Variable::Unset,
        // Halves of surrogate pairs are replaced. Unit tests check how.
        Variable::Value(value) if value.contains("\\u") => Variable::Value("escapes".to_owned()),
        other => other,
    }
}

/// Decodes into a variable, which may have a value already. `None` if the value has another type.
fn decode(variable: &mut Variable, value: &RawValue, shape: &Shape, names: Names) -> Option<()> {
    let text = value.get();
    if text == "null" {
        if !is_scalar(shape) {
            *variable = Variable::Unset;
        }
        return Some(());
    }
    match shape {
        Shape::Value | Shape::Text => *variable = Variable::Value(text.to_owned()),
        Shape::Integer => *variable = Variable::Value(integer(text).to_owned()),
        Shape::Struct(shapes) => {
            if !matches!(variable, Variable::Struct(_)) {
                *variable = Variable::Struct(BTreeMap::new());
            }
            let Variable::Struct(fields) = variable else { return None };
            for (name, value) in serde_json::from_str::<Members<&RawValue>>(text).ok()? {
                let is_field = |field: &str| match names {
                    Names::Exact => name == field,
                    Names::Go => folded(&name) == folded(field),
                };
                if let Some((field, shape)) = shapes.iter().find(|(field, _)| is_field(field)) {
                    decode(fields.entry(field).or_insert(Variable::Unset), value, shape, names)?;
                }
            }
        }
        Shape::Map(shape) => {
            if !matches!(variable, Variable::Map(_)) {
                *variable = Variable::Map(BTreeMap::new());
            }
            let Variable::Map(values) = variable else { return None };
            for (key, value) in serde_json::from_str::<Members<&RawValue>>(text).ok()? {
                let mut element = Variable::Unset;
                decode(&mut element, value, shape, names)?;
                values.insert(key, element);
            }
        }
        Shape::List(shape) => {
            let mut elements = Vec::new();
            for value in serde_json::from_str::<Vec<&RawValue>>(text).ok()? {
                let mut element = Variable::Unset;
                decode(&mut element, value, shape, names)?;
                elements.push(element);
            }
            *variable = Variable::List(elements);
        }
    }
    Some(())
}

/// Each character in the smallest of its cases, as in Go's `foldName`.
fn folded(name: &str) -> String {
    let fold = |c: char| match c {
        '\u{212a}' => 'K',
        '\u{17f}' => 'S',
        c => c.to_ascii_uppercase(),
    };
    name.chars().map(fold).collect()
}
