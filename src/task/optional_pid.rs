//! The form of a pid that may be absent, in records and in the replies to Delete: 0 for none. Earlier versions need a
//! number in every case, so they can read the files of this version.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Writes 0 for `None`.
///
/// # Errors
/// The serializer fails.
pub fn serialize<S: Serializer>(pid: &Option<u32>, serializer: S) -> Result<S::Ok, S::Error> {
    pid.unwrap_or_default().serialize(serializer)
}

/// Reads 0 as `None`.
///
/// # Errors
/// The value is not a pid.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    Ok(Some(u32::deserialize(deserializer)?).filter(|pid| *pid != 0))
}
