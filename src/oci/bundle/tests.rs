use super::*;

fn spec(text: &str) -> Spec {
    Spec::parse(text.as_bytes()).unwrap()
}

#[test]
fn a_spec_is_read_as_runc_reads_it() {
    let text = r#"{"Linux":{"CgroupsPath":"/a"},"LINUX":{"Resources":{"PIDs":{"Limit":7}}},"Annotations":{"a":"1"},
        "annotations":{"a":"2"},"HOOKS":{"preStart":[{}]},"Mounts":[{"OPTIONS":["rshared"]}],"hostname":null}"#;
    let spec = spec(text);
    assert_eq!((spec.cgroups_path(), spec.annotation("a")), ("/a", Some("2")));
    assert_eq!(spec.resources().unwrap().pids_limit, Some(7));
    assert!(spec.has_hooks() && spec.shares_mounts_with_host());
}

#[test]
fn an_edited_field_is_there_once() {
    // Go takes the long s for an s, and would take the last of the two.
    let text =
        "{\"linux\":{\"cgroup\u{17f}Path\":\"/a\"},\"lin\u{75}x\":null,\"LINUX\":{\"CGROUPSPATH\":\"/a\"}}";
    let new = edited(text.as_bytes(), &at("/b")).unwrap();
    assert_eq!(String::from_utf8(new).unwrap(), r#"{"linux":{"cgroupsPath":"/b"}}"#);
}

#[test]
fn an_edit_returns_the_namespaces() {
    let text = br#"{"linux":{"Namespaces":[{"type":"pid"},{"Type":"network","PATH":"/run/netns/a"},{"path":null}]}}"#;
    let (_, found) = edited_with(text, &Edits::default()).unwrap();
    let expected = [("pid", ""), ("network", "/run/netns/a"), ("", "")];
    let expected = expected.map(|(kind, path)| Namespace { kind: kind.to_owned(), path: path.into() });
    assert_eq!(found.namespaces, expected);
    assert_eq!(edited_with(br#"{"linux":{"namespaces":null}}"#, &Edits::default()).unwrap().1.namespaces, []);
}

#[test]
fn an_annotation_of_the_client_stays() {
    let edits = Edits { annotation: Some(("org.criu.config", "/ours".into())), ..Edits::default() };
    for (text, expected) in [
        ("{}", r#"{"annotations":{"org.criu.config":"/ours"}}"#),
        (r#"{"annotations":{"a":"b"}}"#, r#"{"annotations":{"a":"b","org.criu.config":"/ours"}}"#),
        (r#"{"annotations":{"org.criu.config":""}}"#, r#"{"annotations":{"org.criu.config":""}}"#),
    ] {
        assert_eq!(String::from_utf8(edited(text.as_bytes(), &edits).unwrap()).unwrap(), expected);
    }
}

#[test]
fn invalid_specs_are_refused() {
    for text in
        ["[]", r#"{"linux":[]}"#, r#"{"process":1}"#, r#"{"mounts":{}}"#, r#"{"annotations":{"a":1}}"#]
    {
        assert!(Spec::parse(text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn rewriting_loses_nothing_that_no_library_knows() {
    let text = br#"{"ociVersion":"9.9","linux":{"cgroupsPath":"/a","future":{"n":18446744073709551615,"f":1.10}},"x":[1e400]}"#;
    let new = edited(text, &at("/b/c")).unwrap();
    let new = String::from_utf8(new).unwrap();
    assert!(new.contains(r#""cgroupsPath":"/b/c""#), "{new}");
    for kept in [r#""future":{"n":18446744073709551615,"f":1.10}"#, r#""x":[1e400]"#, r#""ociVersion":"9.9""#]
    {
        assert!(new.contains(kept), "{new}");
    }
}

#[test]
fn fields_that_are_not_edited_keep_their_meaning() {
    // For Go these are one field, of which the last value counts.
    let text = r#"{"root":{"path":"a"},"Root":{"path":"b"},"process":{"cwd":"/a","CWD":"/b","env":[]}}"#;
    let edits = Edits { env: vec!["A=1".to_owned()], ..Edits::default() };
    let new = String::from_utf8(edited(text.as_bytes(), &edits).unwrap()).unwrap();
    assert_eq!(new, text.replace("[]", r#"["A=1"]"#));
}

fn at(path: &str) -> Edits {
    Edits { cgroups_path: Some(path.into()), ..Edits::default() }
}

#[test]
fn variables_and_mounts_are_added_after_those_of_the_client() {
    let edits = Edits {
        env: vec!["B=2".to_owned()],
        binds: vec![("/run/y".into(), "/run/x".to_owned())],
        ..Edits::default()
    };
    let text = r#"{"mounts":[{"destination":"/a"}],"process":{"args":["x"],"env":["A=1"]}}"#;
    let new = edited(text.as_bytes(), &edits).unwrap();
    let mount = r#"{"destination":"/run/x","type":"bind","source":"/run/y","options":["bind"]}"#;
    let wanted = format!(
        r#"{{"mounts":[{{"destination":"/a"}},{mount}],"process":{{"args":["x"],"env":["A=1","B=2"]}}}}"#
    );
    assert_eq!(String::from_utf8(new).unwrap(), wanted);
    let new = edited(br#"{"mounts":null}"#, &edits).unwrap();
    assert!(String::from_utf8(new).unwrap().contains(mount));
}

#[test]
fn a_spec_without_linux_gets_one() {
    for text in ["{}", r#"{"linux":null}"#] {
        let new = edited(text.as_bytes(), &at("/b")).unwrap();
        assert_eq!(String::from_utf8(new).unwrap(), r#"{"linux":{"cgroupsPath":"/b"}}"#);
    }
}

#[test]
fn shared_mounts_are_noticed() {
    assert!(spec(r#"{"linux":{"rootfsPropagation":"rshared"}}"#).shares_mounts_with_host());
    assert!(
        spec(r#"{"mounts":[{"destination":"/a","options":["rbind","rshared"]}]}"#).shares_mounts_with_host()
    );
    let own = r#"{"mounts":[{"destination":"/a","options":["rslave"]},{"destination":"/b"}],"linux":{}}"#;
    assert!(!spec(own).shares_mounts_with_host());
}

#[test]
fn absent_and_null_fields_are_the_same() {
    for text in ["{}", r#"{"annotations":null,"linux":null,"process":null,"mounts":null}"#] {
        let spec = spec(text);
        assert_eq!((spec.cgroups_path(), spec.annotation("a")), ("", None));
        assert_eq!(spec.resources().unwrap(), Resources::default());
    }
}

#[test]
fn annotations_are_found_by_prefix() {
    let spec = spec(r#"{"annotations":{"p.b":"2","p.a":"","q.a":"3","p":"4"}}"#);
    assert_eq!(spec.annotations("p."), [("a", ""), ("b", "2")]);
}

#[test]
fn hooks_of_every_moment_count() {
    let hook = r#"[{"path":"/bin/true"}]"#;
    for kind in ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"] {
        assert!(spec(&format!(r#"{{"hooks":{{"{kind}":{hook}}}}}"#)).has_hooks(), "{kind}");
    }
    for text in ["{}", r#"{"hooks":null}"#, r#"{"hooks":{"prestart":[],"poststop":null}}"#] {
        assert!(!spec(text).has_hooks(), "{text}");
    }
}

#[test]
fn resources_come_from_the_spec_and_have_their_place_in_it() {
    let resources = spec(r#"{"linux":{"resources":{"pids":{"limit":7}}}}"#).resources().unwrap();
    assert_eq!(resources.pids_limit, Some(7));
    let error = spec(r#"{"linux":{"resources":{"pids":{"limit":"x"}}}}"#).resources().unwrap_err();
    assert!(error.to_string().starts_with("linux.resources.pids.limit "), "{error}");
    assert_eq!(spec(r#"{"linux":{"resources":null}}"#).resources().unwrap(), Resources::default());
}

#[test]
fn a_large_spec_is_parsed_once_others_are_and_a_small_one_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let with = |entries: usize| {
        let bundle = dir.path().join(entries.to_string());
        std::fs::create_dir(&bundle).unwrap();
        let text = serde_json::json!({"process": {"env": vec!["a=b"; entries]}, "hostname": "h"});
        std::fs::write(bundle.join(CONFIG), text.to_string()).unwrap();
        bundle
    };
    let (large, small) = (with(20_000), with(1000));
    let all = turns::turn(u64::MAX).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let hostname = Spec::read(&large).unwrap().hostname.clone();
            rewrite_whole(&large, Option::unwrap).unwrap();
            hostname
        });
        while turns::waiting() == 0 {
            assert!(!reader.is_finished(), "the large spec was parsed");
            std::thread::yield_now();
        }
        assert_eq!(Spec::read(&small).unwrap().hostname, "h");
        drop(all);
        assert_eq!(reader.join().unwrap(), "h");
    });
}

#[test]
fn lists_are_extended_at_their_ends() {
    let edits = Edits {
        env: vec!["C=\"3\"".to_owned()],
        binds: vec![("/host".into(), "/inside".to_owned())],
        ..Edits::default()
    };
    let mount = r#"{"destination":"/inside","type":"bind","source":"/host","options":["bind"]}"#;
    for (text, env, mounts) in [
        (r#"{}"#, "", ""),
        (r#"{"process":{"env":[ ]},"mounts":null}"#, "", ""),
        (
            r#"{"process":{"env":[ "A=]" , "B=" ]},"mounts":[{"source" : "a"} ]}"#,
            r#""A=]","B=","#,
            r#"{"source" : "a"},"#,
        ),
    ] {
        let new: Value = serde_json::from_slice(&edited(text.as_bytes(), &edits).unwrap()).unwrap();
        let expected = format!(r#"{{"process":{{"env":[{env}"C=\"3\""]}},"mounts":[{mounts}{mount}]}}"#);
        assert_eq!(new, serde_json::from_str::<Value>(&expected).unwrap(), "{text}");
    }
    for broken in [r#"{"process":{"env":{}}}"#, r#"{"mounts":"a"}"#, r#"{"process":[]}"#] {
        assert!(Spec::parse(broken.as_bytes()).is_err(), "{broken}");
    }
}

#[test]
fn the_label_of_the_files_is_read() {
    let labelled = spec(r#"{"linux":{"MountLabel":"system_u:object_r:container_file_t:s0:c1,c2"}}"#);
    assert_eq!(labelled.mount_label(), Some("system_u:object_r:container_file_t:s0:c1,c2"));
    for text in
        ["{}", r#"{"linux":{}}"#, r#"{"linux":{"mountLabel":null}}"#, r#"{"linux":{"mountLabel":""}}"#]
    {
        assert_eq!(spec(text).mount_label(), None, "{text}");
    }
}
