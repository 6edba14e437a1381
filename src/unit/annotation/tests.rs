use super::*;

fn annotation(name: &str, value: &str) -> Property {
    Property { asker: Asker::Annotation, name: name.to_owned(), value: value.to_owned() }
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
    let checked = check([annotation("CollectMode", "'inactive-or-failed'")]).unwrap();
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
fn bad_text_is_told_with_name_and_place() {
    let text = refusal("After", "['x.service'");
    assert!(text.starts_with("annotation org.systemd.property.After: "), "{text}");
    assert!(text.ends_with("at character 13"), "{text}");
}

#[test]
fn what_the_promises_rest_on_is_denied_with_a_reason() {
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
fn what_a_person_wants_of_a_unit_may_be_set() {
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

#[test]
fn the_last_to_ask_for_a_property_gets_it() {
    let option = |name: &str, value: &str| Property {
        asker: Asker::Options,
        name: name.to_owned(),
        value: value.to_owned(),
    };
    let asked = [
        option("TimeoutStopSec", "5"),
        option("After", "['a.service']"),
        annotation("TimeoutStopUSec", "uint64 7"),
    ];
    let checked = check(asked).unwrap();
    let names: Vec<String> = checked.properties.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["runtime option Properties.After", "annotation org.systemd.property.TimeoutStopUSec"]);
}

#[test]
fn a_value_of_another_type_is_told_with_both_types() {
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
        ("NotKnownYet", "5"),
    ] {
        types.check(&[annotation(name, value)]).unwrap();
    }
    let wrong = |name, value| types.check(&[annotation(name, value)]).unwrap_err().to_string();
    assert_eq!(
        wrong("TimeoutStopUSec", "5"),
        "annotation org.systemd.property.TimeoutStopUSec: TimeoutStopUSec is of type \"t\", but 5 is of type \
         \"i\": write @t 5"
    );
    assert!(wrong("After", "'x'").ends_with("is of type \"as\", but 'x' is of type \"s\""));
}

#[test]
fn devices_stand_before_what_was_asked_for() {
    let devices = [DeviceAllow { device: "/dev/char/1:3".to_owned(), access: "rw".to_owned() }];
    let list = Additions::new(Some(&devices), &[annotation("DevicePolicy", "'auto'")]).unwrap().0;
    let shown: Vec<String> = list.iter().map(|(name, value)| format!("{name} {value}")).collect();
    assert_eq!(
        shown,
        ["DevicePolicy \"strict\"", "DeviceAllow [(\"/dev/char/1:3\", \"rw\")]", "DevicePolicy \"auto\"",]
    );
}
