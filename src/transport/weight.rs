//! How much memory a request may need once it is decoded (pure).
//!
//! An element of a message needs two bytes in a request, and a hundred and more in memory. ttrpc decodes a request before
//! the daemon knows anything about it, and keeps it for as long as its call lasts. So the elements of a request are
//! counted here first. The walk reads the bytes with the same functions as the decoder, and keeps nothing.

use protobuf::CodedInputStream;
use protobuf::rt::WireType;

use super::frame::{Frame, HEADER};

/// How many fields a request may have, with those of the messages in it. An element of a list is a field. Real requests have
/// less than a hundred, apart from the mounts of a rootfs.
pub const MOST_FIELDS: usize = 8192;
/// How many entries and how many bytes the metadata of a request may have. containerd sends a namespace, and what traces its
/// calls.
pub const MOST_METADATA: usize = 64;
pub const MOST_METADATA_BYTES: usize = 64 << 10;
/// What each field counts, in bytes.
pub const FIELD_WEIGHT: u64 = 128;

/// Why a request is refused before it is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooComplex {
    /// There are too many fields.
    #[error("the request has more than {MOST_FIELDS} fields")]
    Fields,
    /// There are too many metadata entries.
    #[error("the request has more than {MOST_METADATA} entries of metadata")]
    Metadata,
    /// The metadata is too long.
    #[error("the request has more than {MOST_METADATA_BYTES} bytes of metadata")]
    MetadataBytes,
}

/// The fields of a message that are messages themselves. All other fields are not looked into.
#[derive(Clone, Copy)]
struct Shape(&'static [(u32, Self)]);

const FLAT: Shape = Shape(&[]);
const ANY: Shape = FLAT;
const ANY_WITH_OPTIONS: Shape = Shape(&[(2, FLAT)]);
/// The configuration of a pod in CreateSandbox (`proto/cri.proto`).
const POD: Shape = Shape(&[(1, FLAT), (4, FLAT), (8, Shape(&[(2, POD_SECURITY), (3, FLAT), (5, FLAT)]))]);
const POD_SECURITY: Shape = Shape(&[
    (1, Shape(&[(5, Shape(&[(2, FLAT), (3, FLAT)]))])),
    (2, FLAT),
    (3, FLAT),
    (8, FLAT),
    (9, FLAT),
    (10, FLAT),
]);

/// The shape of a payload of the Task API or of the Sandbox API.
fn shape(method: &[u8]) -> Shape {
    match method {
        b"Create" => Shape(&[(3, FLAT), (10, ANY_WITH_OPTIONS)]),
        b"CreateSandbox" => Shape(&[(3, FLAT), (4, Shape(&[(2, POD)])), (6, FLAT)]),
        b"Exec" => Shape(&[(7, ANY)]),
        b"Checkpoint" => Shape(&[(3, ANY_WITH_OPTIONS)]),
        b"Update" | b"UpdateSandbox" => Shape(&[(2, ANY), (3, FLAT)]),
        _ => FLAT,
    }
}

/// The weight of a request: its length, and [`FIELD_WEIGHT`] for each of its fields.
///
/// # Errors
/// No client sends such a request.
pub fn weigh(request: &Frame) -> Result<u64, TooComplex> {
    let (mut count, mut metadata, mut metadata_bytes) = (0, 0, 0);
    let (mut method, mut payload): (&[u8], &[u8]) = (b"", b"");
    for (number, value) in fields(request.bytes.get(HEADER..).unwrap_or_default()) {
        step(&mut count)?;
        match number {
            // Of several values, the last one counts.
            2 => method = value,
            3 => payload = value,
            5 => {
                metadata += 1;
                metadata_bytes += value.len();
                add(value, FLAT, &mut count)?;
            }
            _ => {}
        }
        if metadata > MOST_METADATA {
            return Err(TooComplex::Metadata);
        }
        if metadata_bytes > MOST_METADATA_BYTES {
            return Err(TooComplex::MetadataBytes);
        }
    }
    add(payload, shape(method), &mut count)?;
    Ok(request.bytes.len() as u64 + count as u64 * FIELD_WEIGHT)
}

/// Adds the fields of a message.
fn add(message: &[u8], shape: Shape, count: &mut usize) -> Result<(), TooComplex> {
    for (number, value) in fields(message) {
        step(count)?;
        if let Some((_, inner)) = shape.0.iter().find(|(known, _)| *known == number) {
            add(value, *inner, count)?;
        }
    }
    Ok(())
}

fn step(count: &mut usize) -> Result<(), TooComplex> {
    *count += 1;
    if *count > MOST_FIELDS { Err(TooComplex::Fields) } else { Ok(()) }
}

/// The number and the content of each field of a message, up to where the message is broken. The content of a number is
/// empty. A field that is cut off has the content that is there: the decoder takes this for the whole field if the field is a
/// message.
fn fields(message: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    let mut input = CodedInputStream::from_bytes(message);
    std::iter::from_fn(move || {
        let tag = input.read_raw_tag_or_eof().ok()??;
        let kind = WireType::new(tag & 7)?;
        let length = if kind == WireType::LengthDelimited {
            // The decoder accepts 64 bits for the length of a message.
            let announced = input.read_raw_varint64().ok()?;
            let left = message.len().checked_sub(usize::try_from(input.pos()).ok()?)?;
            let length = usize::try_from(announced).unwrap_or(left).min(left);
            input.skip_raw_bytes(length.try_into().ok()?).ok()?;
            length
        } else {
            input.skip_field(kind).ok()?;
            0
        };
        let end = usize::try_from(input.pos()).ok()?;
        Some((tag >> 3, message.get(end.checked_sub(length)?..end)?))
    })
}

#[cfg(test)]
mod tests;
