//! A JSON value together with its path in the document, so that every error can name the field.
//!
//! Unknown fields are skipped, and `null` is an absent value.

use serde_json::Value;

use super::Error;

/// A field, present or not.
pub(super) struct Field<'v> {
    path: String,
    value: Option<&'v Value>,
}

impl<'v> Field<'v> {
    /// The outermost value, and its name.
    pub(super) fn new(path: &str, value: &'v Value) -> Self {
        Self { path: path.to_owned(), value: Some(value).filter(|value| !value.is_null()) }
    }

    pub(super) fn is_present(&self) -> bool {
        self.value.is_some()
    }

    /// A field of this object.
    pub(super) fn get(&self, name: &str) -> Result<Self, Error> {
        let object = self.typed("an object", Value::as_object)?;
        let value = object.and_then(|object| object.get(name)).filter(|value| !value.is_null());
        Ok(Self { path: format!("{}.{name}", self.path), value })
    }

    /// The elements of this array.
    pub(super) fn items(&self) -> Result<Vec<Self>, Error> {
        let items = self.typed("a list", Value::as_array)?;
        let items = items.into_iter().flatten().enumerate();
        Ok(items.map(|(at, value)| Self::new(&format!("{}[{at}]", self.path), value)).collect())
    }

    /// The fields of this object, whatever their names.
    pub(super) fn entries(&self) -> Result<Vec<(&'v str, Self)>, Error> {
        let object = self.typed("an object", Value::as_object)?;
        let entries = object.into_iter().flatten();
        let entry = |(name, value): (&'v String, &'v Value)| {
            (name.as_str(), Self::new(&format!("{}.{name}", self.path), value))
        };
        Ok(entries.map(entry).collect())
    }

    pub(super) fn signed(&self) -> Result<Option<i64>, Error> {
        self.typed("a 64-bit integer", Value::as_i64)
    }

    pub(super) fn unsigned(&self) -> Result<Option<u64>, Error> {
        self.typed("a 64-bit integer that is not negative", Value::as_u64)
    }

    pub(super) fn unsigned_16(&self) -> Result<Option<u16>, Error> {
        let read = |value: &Value| value.as_u64().and_then(|number| u16::try_from(number).ok());
        self.typed("an integer from 0 to 65535", read)
    }

    pub(super) fn flag(&self) -> Result<bool, Error> {
        Ok(self.typed("true or false", Value::as_bool)?.unwrap_or_default())
    }

    /// Empty if absent.
    pub(super) fn text(&self) -> Result<String, Error> {
        Ok(self.typed("a string", Value::as_str)?.unwrap_or_default().to_owned())
    }

    fn typed<T>(
        &self,
        kind: &'static str,
        read: impl FnOnce(&'v Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.value else {
            return Ok(None);
        };
        let wrong = || Error::Invalid {
            field: self.path.clone(),
            rule: format!("must be {kind}"),
            value: value.to_string().chars().take(80).collect(),
        };
        read(value).map(Some).ok_or_else(wrong)
    }
}
