use super::*;

fn annotation(name: &str, value: &str) -> Property {
    Property { source: PropertySource::Annotation, name: name.to_owned(), value: value.to_owned() }
}

fn named(name: &str, value: &str) -> Result<(String, String), Error> {
    let Additions(mut list) = Additions::new(None, &[annotation(name, value)])?;
    let (name, value) = list.pop().unwrap();
    Ok((name, value.to_string()))
}

fn refusal(name: &str, value: &str) -> String {
    named(name, value).expect_err(name).to_string()
}

#[test]
fn runcs_own_examples_are_understood() {
    let set = |name: &str, value: &str| named(name, value).unwrap();
    assert_eq!(
        set("TimeoutStopUSec", "uint64 123456789"),
        ("TimeoutStopUSec".into(), "uint64 123456789".into())
    );
    let checked = check([annotation("CollectMode", "'inactive-or-failed'")], &Extension::default()).unwrap();
    assert!(checked.properties.is_empty() && checked.left_out[0].1.contains("until it is deleted"));
}

#[test]
fn seconds_become_microseconds() {
    for value in ["90", "byte 90", "int16 90", "uint16 90", "uint32 90", "int64 90", "uint64 90", "90.0"] {
        let property = named("TimeoutStopSec", value).unwrap();
        assert_eq!(property, ("TimeoutStopUSec".into(), "uint64 90000000".into()), "{value}");
    }
    assert_eq!(named("WatchdogSec", "0.25").unwrap().1, "uint64 250000");
    for value in ["-1", "'90s'", "true", "-0.5", "inf", "nan", "1e15", "uint64 18446744073710"] {
        let text = refusal("TimeoutStopSec", value);
        assert!(text.contains("org.systemd.property.TimeoutStopSec: ") && text.contains("seconds"), "{text}");
    }
}

#[test]
fn sec_stays_where_no_small_letter_stands_before_it() {
    for name in ["TimeoutStopUSec", "TimerSlackNSec", "Sec"] {
        assert_eq!(named(name, "uint64 5").unwrap(), (name.to_owned(), "uint64 5".into()));
    }
}

#[test]
fn a_name_is_made_of_letters() {
    for name in ["", "Ab", "After=", "Stop_Sec", "A b c", "After1", "Äfter", "a.b.c"] {
        let text = refusal(name, "'x'");
        assert!(text.starts_with(&format!("annotation org.systemd.property.{name}: ")), "{text}");
    }
}

#[test]
fn errors_in_a_value_name_the_property_and_the_position() {
    let text = refusal("After", "['x.service'");
    assert!(text.starts_with("annotation org.systemd.property.After: "), "{text}");
    assert!(text.ends_with("at character 13"), "{text}");
}

#[test]
fn properties_that_the_shim_depends_on_are_denied_with_a_reason() {
    for name in [
        "ExecStart",
        "ExecStartEx",
        "ExecStopPost",
        "Type",
        "PIDFile",
        "GuessMainPID",
        "NotifyAccess",
        "RemainAfterExit",
        "Restart",
        "RestartSec",
        "RestartUSec",
        "SuccessExitStatus",
        "AddRef",
        "Slice",
        "Delegate",
        "DelegateSubgroup",
        "KillMode",
        "User",
        "Group",
        "DynamicUser",
        "RootDirectory",
        "RootImage",
        "WorkingDirectory",
        "PrivateMounts",
        "PrivateTmp",
        "ProtectSystem",
        "MountFlags",
        "StandardOutput",
        "StandardInputFileDescriptor",
        "Environment",
        "EnvironmentFiles",
        "SystemCallFilter",
        "RefuseManualStop",
    ] {
        let text = refusal(name, "5");
        assert!(text.contains(&format!("org.systemd.property.{name}: ")), "{text}");
        assert!(text.contains("can't be set: "), "{text}");
    }
}

#[test]
fn usual_properties_of_a_service_may_be_set() {
    for name in [
        "After",
        "Wants",
        "Requires",
        "BindsTo",
        "PartOf",
        "Conflicts",
        "OnFailure",
        "Description",
        "KillSignal",
        "TimeoutStartUSec",
        "RuntimeMaxUSec",
        "MemoryHigh",
        "CPUWeight",
        "TasksMax",
        "ManagedOOMMemoryPressure",
        "OOMPolicy",
        "OOMScoreAdjust",
        "DefaultDependencies",
        "LogExtraFields",
        "LogLevelMax",
        "DeviceAllow",
        "IPAddressDeny",
        "RestrictNetworkInterfaces",
    ] {
        assert_eq!(denied(name), None, "{name}");
    }
}

fn option(name: &str, value: &str) -> Property {
    Property { source: PropertySource::Options, name: name.to_owned(), value: value.to_owned() }
}

fn extension(names: &[&str]) -> Extension {
    Extension::new(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap()
}

fn shown(checked: &[Property]) -> Vec<String> {
    checked.iter().map(|property| format!("{property} = {}", property.value)).collect()
}

#[test]
fn an_annotation_overrides_an_option_only_where_the_administrator_says_so() {
    let asked = || {
        [
            option("TimeoutStopSec", "5"),
            option("After", "['a.service']"),
            annotation("TimeoutStopUSec", "uint64 7"),
            annotation("MemoryHigh", "uint64 7"),
        ]
    };
    let checked = check(asked(), &Extension::default()).unwrap();
    assert_eq!(
        shown(&checked.properties),
        [
            "runtime option Properties.TimeoutStopSec = 5",
            "runtime option Properties.After = ['a.service']",
            "annotation org.systemd.property.MemoryHigh = uint64 7",
        ]
    );
    assert!(checked.left_out[0].1.contains("AnnotationProperties"));
    let checked = check(asked(), &extension(&["TimeoutStopSec"])).unwrap();
    assert_eq!(shown(&checked.properties)[1], "annotation org.systemd.property.TimeoutStopUSec = uint64 7");
    assert!(checked.left_out.is_empty());
}

/// Why an annotation is refused; nothing if it is not.
fn refused(name: &str, value: &str, extension: &Extension) -> Option<String> {
    check([annotation(name, value)], extension).err().map(|error| error.to_string())
}

#[test]
fn an_annotation_sets_properties_that_affect_only_its_own_container() {
    for (name, value) in [
        ("After", "['a.service', 'b@1.target']"),
        ("CPUQuotaPerSecUSec", "uint64 500000"),
        ("CPUWeight", "uint64 100"),
        ("CPUWeight", "uint64 18446744073709551615"),
        ("Description", "'100% mine'"),
        ("Documentation", "['https://example.org/a']"),
        ("IPAddressDeny", "[(2, [byte 10, 0, 0, 0], uint32 8)]"),
        ("KillSignal", "2"),
        ("KillSignal", "28"),
        ("MemoryMax", "uint64 1000000"),
        ("RuntimeMaxSec", "3600"),
        ("TimeoutStopSec", "300"),
        ("TimeoutStopUSec", "uint64 123456789"),
    ] {
        assert_eq!(refused(name, value, &Extension::default()), None, "{name}={value}");
    }
}

#[test]
fn an_annotation_sets_no_property_that_affects_others() {
    for (name, value) in [
        ("RuntimeDirectory", "['systemd']"),
        ("StateDirectoryMode", "uint32 511"),
        ("FailureAction", "'reboot-force'"),
        ("SuccessAction", "'poweroff'"),
        ("Conflicts", "['kubelet.service']"),
        ("Wants", "['debug-shell.service']"),
        ("Before", "['ssh.service']"),
        ("OnFailure", "['poweroff.target']"),
        ("PropagatesStopTo", "['a.service']"),
        ("CPUSchedulingPolicy", "1"),
        ("Nice", "-20"),
        ("OOMScoreAdjust", "-1000"),
        ("LimitRTPRIO", "uint64 99"),
        ("MemoryMin", "uint64 1"),
        ("MemoryLow", "uint64 1"),
        ("CPUWeight", "uint64 101"),
        ("IOWeight", "uint64 10000"),
        ("LogExtraFields", "[[byte 65, 61, 66]]"),
        ("SyslogIdentifier", "'sshd'"),
        ("IPAddressAllow", "[(2, [byte 10, 0, 0, 0], uint32 8)]"),
        ("RestrictNetworkInterfaces", "(true, ['eth0'])"),
        ("AllowedCPUs", "[byte 255]"),
        ("DeviceAllow", "[('/dev/sda', 'rwm')]"),
        ("TimeoutStopSec", "301"),
        ("TimeoutStopUSec", "uint64 0"),
        ("TimeoutStopUSec", "uint64 18446744073709551615"),
        ("KillSignal", "18"),
        ("KillSignal", "0"),
        ("KillSignal", "-9"),
        ("FinalKillSignal", "9"),
        ("After", "['a.slice']"),
        ("After", "['%H.service']"),
        ("After", "['a b.service']"),
        ("Documentation", "['https://a/%H']"),
        ("NextYearsProperty", "true"),
        ("Foo", "5"),
    ] {
        let reason = refused(name, value, &Extension::default());
        assert!(reason.is_some_and(|reason| reason.contains("can't be set: ")), "{name}={value}");
    }
    let many = format!("[{}]", vec!["'a.service'"; 33].join(","));
    assert!(refused("After", &many, &Extension::default()).is_some());
}

#[test]
fn a_container_that_is_ordered_after_other_units_stops_soon() {
    let of = |after: Property, stop: Property, extension: &Extension| {
        check([stop, after], extension).err().map(|error| error.to_string())
    };
    let after = || annotation("After", "['a.service']");
    let none = Extension::default();
    assert_eq!(of(after(), annotation("TimeoutStopSec", "60"), &none), None);
    for (name, value) in [("TimeoutStopSec", "61"), ("TimeoutStopUSec", "uint64 300000000")] {
        let refusal = of(after(), annotation(name, value), &none).unwrap();
        assert!(refusal.contains(name) && refusal.contains("at most 60 s"), "{refusal}");
        // The administrator decides otherwise.
        for allowed in ["After", "TimeoutStopUSec"] {
            assert_eq!(of(after(), annotation(name, value), &extension(&[allowed])), None);
        }
        assert_eq!(of(option("After", "['a.service']"), annotation(name, value), &none), None);
        assert_eq!(of(after(), option(name, value), &none), None);
    }
}

#[test]
fn the_administrator_allows_more_but_not_what_breaks_a_task() {
    assert_eq!(refused("Wants", "['a.service']", &extension(&["Wants"])), None);
    assert_eq!(refused("TimeoutStopSec", "900", &extension(&["TimeoutStopSec"])), None);
    let named = |name: &str| Extension::new(&[name.to_owned()]).unwrap_err().to_string();
    assert!(
        named("ExecStart").contains("AnnotationProperties") && named("ExecStart").contains("can't be set")
    );
    assert!(named("Wants*").contains("letters"), "{}", named("Wants*"));
}

#[test]
fn no_text_adds_a_line_to_a_units_file() {
    for text in [
        r#""web\n[Service]\nExecStopPost=/bin/false""#,
        r#""a\rb""#,
        r#""a\tb""#,
        r#""a\u001bb""#,
        r#""a\u007fb""#,
        r#""a\u0085b""#,
        r#""a\u2028b""#,
        r#""a\u202eb""#,
        r#""ends with \\""#,
        "'a\nb'",
    ] {
        for property in
            [option("Description", text), annotation("Description", text), option("SourcePath", text)]
        {
            let error = check([property.clone()], &Extension::default()).unwrap_err();
            assert!(matches!(error, Error::Text { .. }), "{property} {text}: {error}");
            let error = Additions::new(None, &[property]).unwrap_err();
            assert!(matches!(error, Error::Text { .. }), "{error}");
        }
        // At every depth of nesting.
        for (name, value) in [
            ("After", format!("[{text}]")),
            ("Conditions", format!("[('ConditionPathExists', false, false, {text})]")),
        ] {
            let error = check([option(name, &value)], &Extension::default()).unwrap_err();
            assert!(matches!(error, Error::Text { .. }), "{error}");
        }
    }
    for bytes in ["[[byte 65, 61, 10, 66]]", "[[byte 65, 61, 92]]", "[[byte 65, 61, 255]]"] {
        let error = check([option("LogExtraFields", bytes)], &Extension::default()).unwrap_err();
        assert!(matches!(error, Error::Text { .. }), "{error}");
    }
    // Bytes of a mask and of an address are no text.
    let masks = [
        option("AllowedCPUs", "[byte 10, 92]"),
        option("IPAddressDeny", "[(2, [byte 10, 10, 10, 92], uint32 32)]"),
    ];
    assert_eq!(check(masks, &Extension::default()).unwrap().properties.len(), 2);
}

#[test]
fn a_value_of_the_wrong_type_is_refused_with_both_types() {
    let types = Types(
        [("TimeoutStopUSec", "t"), ("After", "as"), ("CoredumpFilter", "ay")]
            .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
            .into(),
    );
    for (name, value) in [
        ("TimeoutStopUSec", "uint64 5"),
        ("TimeoutStopSec", "5"),
        ("After", "['x']"),
        ("After", "@as []"),
        ("CoredumpFilter", "uint64 5"),
        ("TimeoutStopUSecScale", "uint32 5"),
    ] {
        types.check(&[annotation(name, value)]).unwrap();
    }
    let wrong = |name, value| types.check(&[annotation(name, value)]).unwrap_err().to_string();
    assert_eq!(
        wrong("TimeoutStopUSec", "5"),
        "annotation org.systemd.property.TimeoutStopUSec: TimeoutStopUSec is a number of type uint64, but 5 is a \
         number of type int32: write uint64 5"
    );
    assert!(wrong("NotKnownYet", "5").ends_with("this systemd has no property NotKnownYet"));
    assert!(wrong("AfterScale", "5").ends_with("write uint32 5"));
    assert!(wrong("After", "'x'").ends_with("After is a list of strings, but 'x' is a string: write ['x']"));
}

#[test]
fn the_devices_of_the_spec_come_before_requested_devices() {
    let devices = [DeviceAllow { device: "/dev/char/1:3".to_owned(), access: "rw".to_owned() }];
    let list = Additions::new(Some(&devices), &[annotation("DevicePolicy", "'auto'")]).unwrap().0;
    let shown: Vec<String> = list.iter().map(|(name, value)| format!("{name} {value}")).collect();
    assert_eq!(
        shown,
        ["DevicePolicy \"strict\"", "DeviceAllow [(\"/dev/char/1:3\", \"rw\")]", "DevicePolicy \"auto\"",]
    );
}

/// The properties of a transient service in three versions of systemd: name, type, and whether StartTransientUnit accepts
/// the property (`w`) or systemd only shows it (`r`). The lists come from `busctl introspect` and from the errors of
/// StartTransientUnit. `-` stands for the type of a property that systemd does not show.
const OF_SYSTEMD: [&str; 3] =
    [include_str!("systemd-252.txt"), include_str!("systemd-257.txt"), include_str!("systemd-262.txt")];
/// The properties that only the administrator may set.
const ADMINISTRATOR: &str = include_str!("administrator.txt");

#[test]
fn every_property_of_systemd_is_either_allowed_or_denied() {
    let administrator: Vec<&str> = ADMINISTRATOR.lines().collect();
    let allowed: Vec<&str> = allowed::names().collect();
    let is_nobodys = |name| denied(name).is_some() || LEFT_OUT.iter().any(|(left_out, _)| *left_out == name);
    for line in OF_SYSTEMD.iter().flat_map(|list| list.lines()) {
        let mut columns = line.split(' ');
        let (name, _, can_be_set) =
            (columns.next().unwrap(), columns.next().unwrap(), columns.next().unwrap());
        let lists = [allowed.contains(&name), administrator.contains(&name), is_nobodys(name)];
        let count = lists.iter().filter(|is_on_it| **is_on_it).count();
        match can_be_set {
            "w" => assert_eq!(count, 1, "{name} has to be on one list: annotations, administrator, nobody"),
            _ => assert!(!lists[0], "{name} can't be set, and annotations may set it"),
        }
    }
    // A misspelled name on a list would protect nobody.
    for name in allowed.iter().chain(&administrator) {
        let is_known = |list: &str| list.lines().any(|line| line.split(' ').next() == Some(*name));
        assert!(OF_SYSTEMD.iter().any(|list| is_known(list)), "no systemd has {name}");
    }
    for name in &allowed {
        let can_be_set = |list: &str| {
            list.lines().any(|line| line.starts_with(&format!("{name} ")) && line.ends_with(" w"))
        };
        assert!(can_be_set(OF_SYSTEMD[1]) && can_be_set(OF_SYSTEMD[2]), "systemd does not take {name}");
    }
}
