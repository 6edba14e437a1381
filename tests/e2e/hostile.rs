//! Attacks with text by a user of the machine or by the author of a container. No text becomes a directive of a unit,
//! a field of another program's journal lines, or a path outside of the container, and other users can read no
//! secrets.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::common::container::Container;
use crate::common::leaks::{self, Traces};
use crate::common::node::{Node, unique};
use crate::common::shim::{self, Bundle, Shim};
use crate::common::spec::Spec;
use crate::common::systemd::{self, Cursor};
use crate::common::task::{Io, SIGKILL};
use crate::common::{process, wait};

/// Exists if text of a container was run, or used as a path.
const PWNED: &str = "/run/e2e-pwned";

#[test]
fn no_other_user_can_hold_up_the_start_of_a_container() {
    needs!(OurShim);
    let node = Node::exclusive();
    let lock = "/run/containerd-shim-systemd-v1.lock";
    // An earlier version made the lock readable for every user.
    fs::write(lock, "").expect("write the lock");
    process::succeed("chmod", &["0644", lock]);
    assert_eq!(process::as_nobody(&["flock", "--exclusive", "--nonblock", lock, "true"]).code, Some(0));
    shim::stop_daemon();
    node.container("locked", Spec::sleeping()).started(&Io::default()).end();
    for kind in ["--exclusive", "--shared"] {
        let locked = process::as_nobody(&["flock", kind, "--nonblock", lock, "true"]);
        assert!(locked.code != Some(0) && locked.stderr.contains("ermission denied"), "{locked:?}");
    }
}

#[test]
fn the_arguments_of_an_exec_are_visible_in_no_unit_no_record_and_no_log() {
    needs!(OurShim);
    let node = Node::exclusive();
    let since = Cursor::now();
    let (secret, variable) = (unique("hunter2"), unique("s3cret"));
    let with_secrets = |spec: Spec| spec.env(&format!("TOKEN={variable}"));
    let script = format!(": --password={secret}; sleep 100000 & wait");
    let container = node.container("secret", with_secrets(Spec::sh(&script))).started(&Io::default());
    let exec = container.exec(with_secrets(Spec::sh(&script))).started(&Io::default());
    let missing = Spec::new(&["/no/such/program", &format!("--password={secret}")]);
    let failed = container.exec(with_secrets(missing)).added(&Io::default());
    let refusal = failed.start().expect_err("a program that does not exist");
    let units = [systemd::unit_of(&container), systemd::unit_of_exec(&container, &exec)];
    let shown = units.map(|unit| {
        let shown = process::as_nobody(&["systemctl", "show", "--all", "--", &unit]);
        assert!(shown.text().contains(&format!("Id={unit}")), "{shown:?}");
        shown.text() + &process::as_nobody(&["systemctl", "cat", "--", &unit]).text()
    });
    let log: Vec<_> = since.entries_since(&[]).iter().map(ToString::to_string).collect();
    for (what, text) in [("units", shown.concat()), ("log", log.concat()), ("error", refusal.to_string())] {
        assert!(!text.contains(&secret) && !text.contains(&variable), "{what}: {text}");
    }
    let records = process::as_nobody(&[
        "grep",
        "-r",
        "-l",
        "-F",
        "-e",
        &secret,
        "-e",
        &variable,
        "/run/containerd-shim-systemd-v1",
    ]);
    assert_eq!(records.text(), "", "{records:?}");
}

/// Text with a special meaning for systemd, a shell, journald, a terminal, or a path.
fn hostile() -> Vec<String> {
    let texts = [
        format!("a\n[Service]\nExecStopPost=/bin/touch {PWNED}\nb"),
        format!("a\r\n[Unit]\r\nOnFailure=poweroff.target\r\nExecStartPre=/bin/touch {PWNED}"),
        format!("a\u{2028}ExecStopPost=/bin/touch {PWNED}\u{85}\u{2029}\u{b}\u{c}x"),
        format!("%n %H %% %u ${{PATH}} $(touch {PWNED}) `touch {PWNED}` ; touch {PWNED}"),
        format!(r"\x0aExecStopPost=/bin/touch {PWNED}\n\012\u000a"),
        "ends with a backslash\\".to_string(),
        "x OBJECT_SYSTEMD_UNIT=ssh.service _UID=0 PRIORITY=0\nPRIORITY=0\nSYSLOG_IDENTIFIER=sshd".to_string(),
        "\"'quoted\" 'and' \\\"open".to_string(),
        "\u{1b}[2J\u{1b}]0;title\u{7}\u{202e}txet\u{feff}\u{0}after".to_string(),
        format!("../../../../..{PWNED}"),
        "<0>PANIC \u{10ffff}".to_string(),
        "long ".repeat(20_000),
    ];
    texts.into()
}

/// The annotations that the shim reads for names and fields.
const NAMES: [&str; 8] = [
    "nerdctl/name",
    "io.kubernetes.cri.sandbox-name",
    "io.kubernetes.cri.sandbox-namespace",
    "io.kubernetes.cri.sandbox-uid",
    "io.kubernetes.cri.container-name",
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri.image-name",
    "e2e.example/label",
];

/// The directives of the unit's file, and the names of the fields of its lines in the journal. journald adds those that begin
/// with an underscore itself, some of them only if the process still runs.
fn shape(container: &Container) -> (BTreeSet<String>, BTreeSet<String>) {
    let unit = systemd::unit_of(container);
    let file =
        fs::read_to_string(Path::new("/run/systemd/transient").join(&unit)).expect("read a unit's file");
    let directive = |line: &str| {
        let is_other = line.is_empty() || line.starts_with(['#', ';']);
        (!is_other).then(|| line.split('=').next().unwrap_or_default().to_string())
    };
    let entries = systemd::journal(&[&format!("OBJECT_SYSTEMD_UNIT={unit}"), "MESSAGE=marker"]);
    let entry = entries.first().and_then(|entry| entry.as_object()).expect("a line of the container");
    let own = entry.keys().filter(|name| !name.starts_with('_'));
    (file.lines().filter_map(directive).collect(), own.cloned().collect())
}

#[test]
fn no_text_of_a_container_becomes_a_directive_a_field_or_a_path() {
    needs!(OurShim);
    let node = Node::exclusive();
    node.container("first", Spec::sleeping()).started(&Io::default()).exec_sh("exit 0").end();
    let before = Traces::take();
    let named = |text: &str| {
        let spec = Spec::sh("echo marker; exec sleep 100000").env(&format!("E2E={text}"));
        NAMES.iter().fold(spec, |spec, name| spec.annotation(name, text))
    };
    let start = |spec: Spec| {
        let container = node.container("text", spec).started(&Io::default());
        wait::until_true("a line in the journal", || {
            !systemd::journal(&[
                &format!("OBJECT_SYSTEMD_UNIT={}", systemd::unit_of(&container)),
                "MESSAGE=marker",
            ])
            .is_empty()
        });
        container
    };
    let plain = shape(&start(named("plain")));
    let mut wrong = Vec::new();
    for text in hostile() {
        // The OCI runtime refuses a NUL in a variable.
        let spec = named(&text.replace('\0', "")).annotation("nerdctl/name", &text);
        let container = start(spec);
        process::succeed("systemctl", &["daemon-reload"]);
        let unit = systemd::unit_of(&container);
        let found = shape(&container);
        let states = ["ExecStartPre", "ExecStopPost", "ExecStop", "OnFailure"]
            .map(|name| systemd::property(&unit, name));
        let description = systemd::property(&unit, "Description");
        let identifier = systemd::property(&unit, "SyslogIdentifier");
        let is_line = |text: &str| {
            text.len() < 1500
                && !text.chars().any(|c| c.is_control() || ('\u{2028}'..='\u{202e}').contains(&c))
        };
        if found != plain || states.concat() != "" || !is_line(&description) || !is_line(&identifier) {
            wrong.push((text.chars().take(100).collect::<String>(), found, states, description));
        }
        let exec = container
            .exec(Spec::new(&["/bin/sh", "-c", "sleep 100000", &text.replace('\0', "")]))
            .started(&Io::default());
        let of_exec = systemd::property(&systemd::unit_of_exec(&container, &exec), "Description");
        assert!(of_exec.starts_with("/bin/sh (exec ") && is_line(&of_exec), "{of_exec}");
        container.kill(SIGKILL).expect("kill");
        assert_eq!(container.exit_status(), 137);
        container.end();
    }
    assert!(wrong.is_empty(), "{plain:?}\n{wrong:#?}");
    assert!(!Path::new(PWNED).exists());
    leaks::assert_none("containers with hostile text", &before);
}

#[test]
fn invalid_names_paths_and_options_are_refused_without_a_trace() {
    needs!(OurShim);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    node.container("first", Spec::sleeping()).started(&Io::default()).exec_sh("exit 0").end();
    let before = Traces::take();
    type Change = fn(&mut containerd_shim_protos::api::CreateTaskRequest, &str);
    let changes: [(&str, Change); 7] = [
        ("id", |request, text| request.id = text.to_string()),
        ("bundle", |request, text| request.bundle = text.to_string()),
        ("bundle below", |request, text| request.bundle = format!("/run/{text}")),
        ("stdin", |request, text| request.stdin = text.to_string()),
        ("stdout", |request, text| request.stdout = format!("binary:///{text}?a={text}")),
        ("stderr", |request, text| request.stderr = format!("file:///run/e2e-none/{text}/../..{PWNED}")),
        ("mount", |request, text| {
            let mut mount = containerd_shim_protos::types::mount::Mount::new();
            mount.type_ = text.to_string();
            mount.source = text.to_string();
            mount.target = text.to_string();
            mount.options = vec![text.to_string(), format!("lowerdir={text}"), format!("uidmap={text}")];
            request.rootfs = vec![mount];
        }),
    ];
    for text in hostile() {
        for (what, change) in changes {
            let bundle = Bundle::new("text");
            let mut request = bundle.request(&unique("text"));
            change(&mut request, &text);
            let begun: String = text.chars().take(60).collect();
            let (code, reason) = shim.create(request).map(drop).expect_err(&format!("{what} {begun:?}"));
            assert!(reason.len() < 20_000, "{what} {begun:?}: {code:?} {} bytes", reason.len());
        }
        let bundle = Bundle::new("text");
        bundle.write_config(&Spec::sleeping().cgroups_path(&format!("{text}:{text}:{text}")).to_json());
        shim.create(bundle.request(&unique("text"))).map(drop).expect_err("a path of a cgroup");
    }
    assert!(!Path::new(PWNED).exists());
    leaks::assert_none("refused text", &before);
}
