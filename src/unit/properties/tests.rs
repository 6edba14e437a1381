//! Tests of the properties of units.

use super::*;

fn of() -> std::collections::BTreeMap<&'static str, String> {
    let slice = UnitName::new("containerd-default.slice").unwrap();
    let shown = UnitMetadata {
        description: "web",
        identifier: "web",
        fields: &[("CONTAINER_ID".to_owned(), "web".to_owned())],
        slice: &slice,
        sandbox: None,
    };
    let command = ["/bin/shim".to_owned(), "launch".to_owned(), "$HOME".to_owned()];
    let (pid_file, launched) = (Path::new("/run/x/init.pid"), Path::new("/run/x/launched"));
    container(&shown, &command, &[], pid_file, launched, Duration::from_secs(600), false).as_text()
}

#[test]
fn versions_are_read_as_distributions_write_them() {
    for (text, version) in [("257.13-1~deb13u1", 257), ("252 (252.39)", 252), ("v258~rc1", 258), ("262", 262)]
    {
        assert_eq!(SystemdVersion::parse(text).map(SystemdVersion::number), Some(version));
    }
    assert_eq!(SystemdVersion::parse("git"), None);
    assert!(!SystemdVersion { number: 251 }.supported());
}

#[test]
fn no_default_of_systemd_reaches_a_container() {
    let properties = of();
    for (name, value) in [
        ("TasksMax", INFINITY.into()),
        ("OOMPolicy", "continue".into()),
        ("OOMScoreAdjust", 0_i32.into()),
        ("IgnoreSIGPIPE", false.into()),
        ("KeyringMode", "inherit".into()),
        ("TimeoutStartUSec", 600_000_000_u64.into()),
        ("KillMode", "mixed".into()),
        ("StartLimitIntervalUSec", 0_u64.into()),
    ] {
        let value: Variant<'_> = value;
        assert_eq!(properties.get(name), Some(&value.to_string()), "{name}");
    }
}

#[test]
fn containers_are_ordered_after_the_services_of_the_host_only_by_the_slice() {
    let after = |list: &Properties| list.as_text()["After"].clone();
    let shown = UnitMetadata {
        description: "",
        identifier: "",
        fields: &[],
        slice: &name::order_slice(),
        sandbox: None,
    };
    let list = |names: &[&str]| {
        Variant::from(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).to_string()
    };
    assert_eq!(of()["After"], list(&AFTER_CONTAINERS));
    assert_eq!(after(&logger(&shown, &[])), list(&AFTER_CONTAINERS));
    let order = order_slice();
    let services = ["network.target", "dbus.service", "containerd.service"];
    assert_eq!(after(&order), list(&services));
    // Without this, systemd does not stop the slice at shutdown, and the order would be lost.
    assert_eq!(order.as_text()["Conflicts"], list(&["shutdown.target"]));
    assert!(!order.as_text().contains_key("Requires") && !of().contains_key("Wants"));
}

#[test]
fn systemd_252_can_read_a_command_again() {
    assert!(of().contains_key("ExecStart") && !of().contains_key("ExecStartEx"));
}

/// The lines `Key=Value` of a unit file.
fn settings(text: &str) -> Vec<(&str, &str)> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('=')).collect()
}

#[test]
fn the_installed_socket_says_what_the_transient_one_does() {
    use crate::transport::sockets::Socket;
    let (installed, others): (Vec<_>, Vec<_>) =
        settings(include_str!("../../../units/containerd-shim-systemd-v1.socket"))
            .into_iter()
            .partition(|(key, _)| *key == "ListenStream");
    let paths: Vec<PathBuf> = Socket::all().map(Socket::path).collect();
    assert_eq!(installed.iter().map(|(_, path)| PathBuf::from(path)).collect::<Vec<_>>(), paths);
    let transient = daemon_socket(paths.into_iter()).as_text();
    for (key, text, property, value) in [
        ("SocketMode", "0600", "SocketMode", Variant::from(0o600_u32)),
        ("RemoveOnStop", "yes", "RemoveOnStop", true.into()),
        ("Backlog", "4096", "Backlog", 4096_u32.into()),
        ("DefaultDependencies", "no", "DefaultDependencies", false.into()),
        ("IgnoreOnIsolate", "yes", "IgnoreOnIsolate", true.into()),
        ("Conflicts", "shutdown.target", "Conflicts", vec!["shutdown.target"].into()),
        ("Before", "shutdown.target", "Before", vec!["shutdown.target"].into()),
        ("StartLimitIntervalSec", "0", "StartLimitIntervalUSec", 0_u64.into()),
    ] {
        assert!(others.contains(&(key, text)), "{key}");
        assert_eq!(transient[property], value.to_string(), "{property}");
    }
    // Documentation and WantedBy exist only for a file, Description and Listen are checked apart.
    assert_eq!((others.len(), transient.len()), (8 + 3, 8 + 2));
}

#[test]
fn the_installed_service_says_what_the_transient_one_does() {
    let transient =
        daemon_service(SystemdVersion { number: 257 }, &["/bin/shim".to_owned(), "serve".to_owned()]);
    let transient = transient.as_text();
    // D-Bus has numbers, lists and booleans where a file has words.
    let words = ["Description", "Type", "NotifyAccess", "Slice", "Restart", "KillMode", "OOMPolicy"];
    let numbers = ["FileDescriptorStoreMax", "FileDescriptorStorePreserve", "OOMScoreAdjust", "RestartSteps"];
    let words = words.iter().chain(&numbers);
    let installed = settings(include_str!("../../../units/containerd-shim-systemd-v1.service"));
    for key in words {
        let said = installed.iter().find(|(found, _)| found == key).map(|(_, value)| *value);
        let set = transient[key].trim_start_matches("uint32 ").trim_matches('"');
        assert_eq!(said, Some(set), "{key}");
    }
    let times = [
        ("RestartSec", "20ms", "RestartUSec", 20_000),
        ("RestartMaxDelaySec", "100ms", "RestartMaxDelayUSec", 100_000),
        ("TimeoutStartSec", "infinity", "TimeoutStartUSec", INFINITY),
        ("StartLimitIntervalSec", "0", "StartLimitIntervalUSec", 0),
    ];
    for (key, text, property, usec) in times {
        assert!(installed.contains(&(key, text)), "{key}");
        assert_eq!(transient[property], Variant::from(usec).to_string(), "{property}");
    }
}
