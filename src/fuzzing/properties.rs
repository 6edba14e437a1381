//! What systemd is told: properties that annotations ask for, descriptions and journal fields.

use crate::id::{Namespace, TaskId, TaskKey};
use crate::oci::bundle::Spec;
use crate::oci::face;
use crate::task::request::{Asker, Property};
use crate::text;
use crate::unit::annotation::{self, Additions, Extension};

use super::first_line;

/// A property by name and value: what is accepted can be sent over D-Bus, and writes one line of a unit's file.
pub(super) fn annotation(data: &[u8]) {
    let Some((name, value)) = first_line(data) else { return };
    let Ok(value) = std::str::from_utf8(value) else { return };
    for asker in [Asker::Annotation, Asker::StopSignal, Asker::Options] {
        let property = Property { asker, name: name.to_owned(), value: value.to_owned() };
        let extension = Extension::new(&[name.to_owned()]).unwrap_or_default();
        for extension in [Extension::default(), extension] {
            let Ok(checked) = annotation::check([property.clone()], &extension) else { continue };
            let additions = Additions::new(None, &checked.properties);
            let additions =
                additions.unwrap_or_else(|error| panic!("a checked property is refused: {error}"));
            for (name, signature) in additions.encode() {
                assert!(signature.len() <= 255, "{name}: a signature of {} characters", signature.len());
            }
        }
    }
}

/// The spec of a container: its description, identifier and journal fields are lines.
pub(super) fn face(data: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<Spec>(data) else { return };
    let (Ok(namespace), Ok(id)) = (Namespace::new("default"), TaskId::new("web")) else { return };
    let key = TaskKey::usual(namespace, id);
    let face = face::of(&key, &spec);
    let fields = face.fields.iter().map(|(_, value)| value.as_str());
    for line in [face.description.as_str(), face::identifier(&face)].into_iter().chain(fields) {
        if let Some(flaw) = text::flaw(line) {
            panic!("{line:?}: {flaw}");
        }
    }
    for (name, _) in &face.fields {
        let is_name = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
        assert!(
            name.bytes().all(is_name) && !name.starts_with('_'),
            "{name:?} is no name of a journal field"
        );
    }
}
