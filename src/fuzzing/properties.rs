//! Fuzz targets for what the shim sends to systemd: properties that annotations request, descriptions and journal fields.

use zbus::{Signature, Variant};

use crate::id::{Namespace, TaskId, TaskKey};
use crate::oci::bundle::Spec;
use crate::oci::metadata;
use crate::task::request::{Property, PropertySource};
use crate::text;
use crate::unit::annotation::{self, Additions, Extension};

use super::first_line;

/// The largest message body for one property, in bytes. The longest list has 4096 numbers and 16 KiB of text.
const MAX_BODY: usize = 96 << 10;

/// Target: the name and the value of a property. A property that is accepted can be sent over D-Bus, and systemd writes one
/// line for it to the unit's file.
pub(super) fn annotation(data: &[u8]) {
    let Some((name, value)) = first_line(data) else { return };
    let Ok(value) = std::str::from_utf8(value) else { return };
    for source in [PropertySource::Annotation, PropertySource::StopSignal, PropertySource::Options] {
        let property = Property { source, name: name.to_owned(), value: value.to_owned() };
        let extension = Extension::new(&[name.to_owned()]).unwrap_or_default();
        for extension in [Extension::default(), extension] {
            let Ok(checked) = annotation::check([property.clone()], &extension) else { continue };
            let additions = Additions::new(None, &checked.properties);
            let additions =
                additions.unwrap_or_else(|error| panic!("a checked property is refused: {error}"));
            let (sent, length) = additions.sent();
            assert!(length <= MAX_BODY, "{name}: a body of {length} bytes");
            assert_eq!(sent.len(), checked.properties.len());
            for (name, value) in sent {
                let signature = value.value_signature().to_string();
                assert!(signature.len() <= 255, "{name}: a signature of {} characters", signature.len());
                check_lines(&name, &value, 0);
            }
        }
    }
}

/// Checks that no text in a value contains a line break, and that no value is nested deeply.
fn check_lines(name: &str, value: &Variant<'_>, depth: usize) {
    assert!(depth <= 8, "{name} is nested too deep");
    match value {
        Variant::Str(text) => assert_eq!(text::flaw(text.as_str()), None, "{name}: {text:?}"),
        Variant::Array(array) if *array.element_signature() == Signature::U8 => {
            // Masks and addresses are bytes, and systemd writes them as numbers.
            let bytes: Vec<u8> = array.iter().filter_map(|byte| u8::try_from(byte).ok()).collect();
            let is_number =
                name.contains("Allowed") || name.starts_with("IPAddress") || name.ends_with("Mask");
            let is_line = std::str::from_utf8(&bytes).is_ok_and(|text| text::flaw(text).is_none());
            assert!(is_line || is_number || name == "CPUAffinity", "{name}: {bytes:?}");
        }
        Variant::Array(array) => array.iter().for_each(|element| check_lines(name, element, depth + 1)),
        Variant::Structure(fields) => {
            fields.fields().iter().for_each(|field| check_lines(name, field, depth + 1));
        }
        Variant::Bool(_) | Variant::F64(_) | Variant::U8(_) | Variant::I16(_) | Variant::U16(_) => {}
        Variant::I32(_) | Variant::U32(_) | Variant::I64(_) | Variant::U64(_) => {}
        other => panic!("{name}: {other:?} is of a type that is not read"),
    }
}

/// Target: the spec of a container. Its description, its identifier and its journal fields have one line each.
pub(super) fn metadata(data: &[u8]) {
    let Ok(spec) = Spec::parse(data) else { return };
    let (Ok(namespace), Ok(id)) = (Namespace::new("default"), TaskId::new("web")) else { return };
    let key = TaskKey::usual(namespace, id);
    let metadata = metadata::of(&key, &spec);
    let fields = metadata.fields.iter().map(|(_, value)| value.as_str());
    for line in
        [metadata.description.as_str(), metadata::identifier(&metadata.fields)].into_iter().chain(fields)
    {
        if let Some(flaw) = text::flaw(line) {
            panic!("{line:?}: {flaw}");
        }
    }
    for (name, _) in &metadata.fields {
        let is_name = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
        assert!(
            name.bytes().all(is_name) && !name.starts_with('_'),
            "{name:?} is no name of a journal field"
        );
    }
}
