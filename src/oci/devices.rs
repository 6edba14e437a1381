//! Translates the device rules of a spec into `DeviceAllow=` of the unit (pure).
//!
//! runc filters devices in the container's cgroup, systemd in the unit's, and a device must pass both filters. The
//! unit's filter therefore either equals runc's, so that `systemctl show` shows it, or is left open: it must never
//! be the stricter one.

use std::collections::BTreeMap;

use crate::task::request::DeviceAllow;

use super::resources::DeviceRule;

/// The devices that runc (1.1 to 1.3) and crun allow to every container, whatever its spec says: every container
/// may create any node, and use `null`, `zero`, `full`, `random`, `urandom`, `tty`, `console`, `ptmx`, pseudo
/// terminals and `tun` (the last only up to runc 1.1).
const ALWAYS: [(&str, &str); 12] = [
    ("char-*", "m"),
    ("block-*", "m"),
    ("/dev/char/1:3", "rwm"),
    ("/dev/char/1:5", "rwm"),
    ("/dev/char/1:7", "rwm"),
    ("/dev/char/1:8", "rwm"),
    ("/dev/char/1:9", "rwm"),
    ("/dev/char/5:0", "rwm"),
    ("/dev/char/5:1", "rwm"),
    ("/dev/char/5:2", "rwm"),
    ("char-136", "rwm"),
    ("/dev/char/10:200", "rwm"),
];

/// The devices that the rules allow beside [`ALWAYS`]. `None` if `DeviceAllow=` can't express the rules: it can only
/// if they deny everything first, and allow some devices after that.
pub fn allowed(rules: &[DeviceRule]) -> Option<Vec<DeviceAllow>> {
    // A rule for all devices overrides the rules before it. Without such a rule, everything is denied at first.
    let rules = match rules.iter().rposition(|rule| matches!(rule.kind.as_str(), "" | "a")) {
        Some(at) if rules.get(at)?.allow => return None,
        Some(at) => rules.get(at + 1..)?,
        None => rules,
    };
    let mut devices = BTreeMap::new();
    for rule in rules {
        if !rule.allow {
            return None;
        }
        merge(&mut devices, device(rule)?, &rule.access);
    }
    let always = |device: &str| ALWAYS.iter().find(|(known, _)| *known == device).map(|(_, access)| *access);
    let more = devices.into_iter().filter(|(device, access)| {
        let always = always(device).unwrap_or_default();
        !access.chars().all(|letter| always.contains(letter))
    });
    Some(more.map(|(device, access)| DeviceAllow { device, access }).collect())
}

/// The whole list for systemd. Each device is in it once, because a second entry would replace the first.
pub fn with_defaults(own: &[DeviceAllow]) -> Vec<DeviceAllow> {
    let mut devices = BTreeMap::new();
    for (device, access) in ALWAYS {
        merge(&mut devices, device.to_owned(), access);
    }
    for DeviceAllow { device, access } in own {
        merge(&mut devices, device.clone(), access);
    }
    devices.into_iter().map(|(device, access)| DeviceAllow { device, access }).collect()
}

/// A device in the syntax of `DeviceAllow=` (systemd.resource-control(5)). `None` for one minor number of all
/// major numbers, for which there is no syntax.
fn device(rule: &DeviceRule) -> Option<String> {
    let kind = if rule.kind == "b" { "block" } else { "char" };
    let number = |number: Option<i64>| number.filter(|number| *number >= 0);
    match (number(rule.major), number(rule.minor)) {
        (Some(major), Some(minor)) => Some(format!("/dev/{kind}/{major}:{minor}")),
        (Some(major), None) => Some(format!("{kind}-{major}")),
        (None, None) => Some(format!("{kind}-*")),
        (None, Some(_)) => None,
    }
}

fn merge(devices: &mut BTreeMap<String, String>, device: String, access: &str) {
    let before = devices.get(&device).map_or("", String::as_str);
    let merged: String =
        "rwm".chars().filter(|letter| before.contains(*letter) || access.contains(*letter)).collect();
    devices.insert(device, merged);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `allow c 1:3 rw`, `deny a *:* rwm`.
    fn rule(text: &str) -> DeviceRule {
        let words: Vec<&str> = text.split([' ', ':']).collect();
        let [verb, kind, major, minor, access] = words[..] else { unreachable!("{text}") };
        let number = |word: &str| (word != "*").then(|| word.parse().unwrap());
        DeviceRule {
            allow: verb == "allow",
            kind: kind.to_owned(),
            major: number(major),
            minor: number(minor),
            access: access.to_owned(),
        }
    }

    fn allows(rules: &[&str]) -> Option<Vec<String>> {
        let rules: Vec<DeviceRule> = rules.iter().map(|text| rule(text)).collect();
        let devices = allowed(&rules)?;
        Some(devices.into_iter().map(|allow| format!("{} {}", allow.device, allow.access)).collect())
    }

    #[test]
    fn rules_become_device_names_of_systemd() {
        let rules = [
            "deny a *:* rwm",
            "allow c 10:229 rwm",
            "allow b 8:0 r",
            "allow c 226:* rw",
            "allow b 8:* m",
            "allow c *:* r",
        ];
        let devices = allows(&rules).unwrap();
        let expected = ["/dev/block/8:0 r", "/dev/char/10:229 rwm", "block-8 m", "char-* r", "char-226 rw"];
        assert_eq!(devices, expected);
    }

    #[test]
    fn devices_that_every_container_may_use_are_not_listed() {
        let rules =
            ["deny a *:* rwm", "allow c *:* m", "allow c 1:3 rwm", "allow c 5:2 rw", "allow c 136:* rwm"];
        assert_eq!(allows(&rules), Some(vec![]));
        assert_eq!(allows(&[]), Some(vec![]));
        let all = with_defaults(&[]);
        assert!(all.iter().any(|allow| allow.device == "/dev/char/1:9" && allow.access == "rwm"));
    }

    #[test]
    fn each_device_is_listed_once() {
        let rules = [rule("allow c *:* rw"), rule("allow b 8:0 w"), rule("allow b 8:0 r")];
        let all = with_defaults(&allowed(&rules).unwrap());
        let access = |device: &str| -> Vec<&str> {
            all.iter().filter(|allow| allow.device == device).map(|allow| allow.access.as_str()).collect()
        };
        assert_eq!((access("char-*"), access("/dev/block/8:0")), (vec!["rwm"], vec!["rw"]));
    }

    #[test]
    fn rules_that_systemd_cant_express_give_no_list() {
        for rules in [
            &["allow a *:* rwm"][..],
            &["deny a *:* rwm", "allow a *:* rwm"],
            &["allow a *:* rwm", "deny c 1:3 rwm"],
            &["deny a *:* rwm", "allow c 226:* rw", "deny c 226:1 rw"],
            &["allow c *:3 r"],
        ] {
            assert_eq!(allows(rules), None, "{rules:?}");
        }
    }

    #[test]
    fn a_rule_for_all_devices_overrides_the_rules_before_it() {
        assert_eq!(
            allows(&["allow a *:* rwm", "deny a *:* rwm", "allow b 8:0 r"]).unwrap(),
            ["/dev/block/8:0 r"]
        );
        assert_eq!(allows(&["allow c *:3 r", "deny a *:* rwm"]), Some(vec![]));
    }
}
