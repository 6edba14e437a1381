//! A profile of AppArmor that the tests load themselves, without its tools.

use std::fs;
use std::io;

const LOAD: &str = "/sys/kernel/security/apparmor/.load";
const REMOVE: &str = "/sys/kernel/security/apparmor/.remove";

/// A profile that forbids nothing: its processes show its name, and the kernel logs what it does not allow. It is removed on
/// drop.
pub struct Profile {
    pub name: String,
}

impl Profile {
    pub fn load(name: &str) -> Profile {
        fs::write(LOAD, compiled(name)).unwrap_or_else(|error| panic!("load profile {name}: {error}"));
        Profile { name: name.to_string() }
    }

    /// What `/proc/PID/attr/current` says for a process with this profile.
    pub fn shown(&self) -> String {
        format!("{} (complain)", self.name)
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        if let Err(error) = fs::write(REMOVE, &self.name) {
            eprintln!("can't remove profile {}: {error}", self.name);
        }
    }
}

/// The label of a process.
pub fn label(pid: u32) -> io::Result<String> {
    fs::read_to_string(format!("/proc/{pid}/attr/current")).map(|label| label.trim_end().to_string())
}

/// The binary form of a profile in mode complain, with no rules (`security/apparmor/policy_unpack.c`, version 5 of the interface,
/// which all kernels of the tests accept).
fn compiled(name: &str) -> Vec<u8> {
    const U32: u8 = 2;
    const NAME: u8 = 4;
    const STRING: u8 = 5;
    const STRUCT: u8 = 7;
    const STRUCT_END: u8 = 8;
    const COMPLAIN: u32 = 1;
    let text = |kind: u8, text: &str| {
        let length = u16::try_from(text.len() + 1).expect("a short name");
        [&[kind][..], &length.to_le_bytes(), text.as_bytes(), &[0]].concat()
    };
    let number = |number: u32| [&[U32][..], &number.to_le_bytes()].concat();
    let flags = [0, COMPLAIN, 0];
    // Allowed, audited, quiet and killed.
    let capabilities = [0; 4];
    let mut policy =
        [text(NAME, "version"), number(5), text(NAME, "profile"), vec![STRUCT], text(STRING, name)].concat();
    policy.extend(text(NAME, "flags"));
    policy.push(STRUCT);
    policy.extend(flags.into_iter().flat_map(number));
    policy.push(STRUCT_END);
    policy.extend(capabilities.into_iter().flat_map(number));
    policy.push(STRUCT_END);
    policy
}
