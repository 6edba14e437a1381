//! Pods of a hostile author: what a kubelet passes on may be refused, and reaches nothing outside of its own pod.

use std::collections::HashMap;
use std::path::Path;

use crate::common::{daemon, process, systemd};
use crate::cri::{Cri, HANDLER, OF_NODE, may_crash_containerd, unit_of};
use crate::cri_messages::*;

/// A place in a configuration: its name, and what puts a text there.
type Place<'c, C> = (&'c str, &'c dyn Fn(&mut C));

/// What a command in a unit's file would make.
const INJECTED: &str = "/run/clients-injected";

fn texts() -> Vec<(&'static str, String)> {
    let section = format!("a %H ${{HOME}}\n[Service]\nExecStopPost=/bin/touch {INJECTED}\n");
    vec![
        ("a section of a unit", section),
        ("a field of the journal", "x OBJECT_SYSTEMD_UNIT=ssh.service\nMESSAGE=forged\\".to_string()),
        ("a path with control characters", "../../../../etc/x\u{1}\u{7f}\u{1b}[31m\r\t\u{2028}".to_string()),
        ("a long text", "x".repeat(70_000)),
    ]
}

/// Asserts that nothing in the unit of a container comes from hostile text.
fn assert_clean(what: &str, id: &str) {
    let unit = unit_of(id);
    for property in ["ExecStopPost", "ExecStartPost", "OnFailure"] {
        assert_eq!(systemd::property(&unit, property), "", "{what}: {unit}");
    }
    let fields = systemd::property(&unit, "LogExtraFields");
    let forged = |field: &str| ["OBJECT_", "MESSAGE=", "_"].iter().any(|name| field.starts_with(name));
    assert!(!fields.split([' ', '\n']).any(forged), "{what}: {fields}");
}

#[test]
fn texts_of_a_hostile_author_stay_in_the_pod() {
    needs!(OurShim);
    let cri = Cri::new();
    let bystander = cri.pod("bystander");
    let container = cri.sleeping(&bystander, "bystander");
    let (pid, restarts) = (cri.pid(&container), daemon::restarts());
    let disturbed = std::env::var("CLIENTS_DISTURB").is_ok_and(|name| !name.is_empty());
    let crashes = may_crash_containerd();
    for (what, text) in texts() {
        // CNI refuses such names, and containerd then leaves the network namespace behind.
        let is_no_name = text.contains('\n') || text.len() > 1000;
        let annotate = |annotations: &mut HashMap<String, String>| {
            for name in ["Description", "ExecStopPost", "LogExtraFields", "Slice", "User"] {
                let value = format!("'{}'", text.replace('\n', "\\n"));
                annotations.insert(format!("org.systemd.property.{name}"), value);
            }
            annotations.insert("nerdctl/name".to_string(), text.clone());
            annotations.insert(format!("key {text}"), text.clone());
        };
        // Annotations that are no property of a unit, names, and the pod's hostname.
        let pods: [Place<PodSandboxConfig>; 4] = [
            ("names", &|config| {
                let metadata = config.metadata.as_mut().expect("metadata");
                metadata.name = text.clone();
                metadata.namespace = text.clone();
                metadata.uid = text.clone();
                config.annotations.insert(format!("key {text}"), text.clone());
                if is_no_name {
                    let linux = config.linux.as_mut().expect("linux");
                    let context = linux.security_context.as_mut().expect("a context");
                    context.namespace_options.as_mut().expect("options").network = OF_NODE;
                }
            }),
            ("annotations", &|config| annotate(&mut config.annotations)),
            ("hostname", &|config| config.hostname = text.clone()),
            ("parent", &|config| config.linux.as_mut().expect("linux").cgroup_parent = text.clone()),
        ];
        for (place, change) in pods {
            let what = format!("{what} in the pod's {place}");
            if place == "names" && is_no_name && crashes {
                continue;
            }
            match cri.try_pod(HANDLER, "hostile", change) {
                Err(error) => println!("{what}: {:.200}", error.to_string()),
                Ok(pod) => {
                    process::succeed("systemctl", &["daemon-reload"]);
                    assert_clean(&what, &pod.id);
                    cri.remove(&pod);
                }
            }
            assert!(!Path::new(INJECTED).exists(), "{what}");
        }
        let pod = cri.pod("hostile");
        let containers: [Place<ContainerConfig>; 4] = [
            ("name", &|config| config.metadata.as_mut().expect("metadata").name = text.clone()),
            ("annotations", &|config| annotate(&mut config.annotations)),
            ("command", &|config| config.command = vec!["true".to_string(), text.clone()]),
            ("environment", &|config| {
                config.envs = vec![KeyValue { key: "KEY".to_string(), value: text.clone() }];
            }),
        ];
        for (place, change) in containers {
            let what = format!("{what} in the container's {place}");
            let started = cri.try_create(&pod, place, &["sleep", "100023"], change).and_then(|container| {
                let request = StartContainerRequest { container_id: container.id.clone() };
                cri.try_call(request).map(|_| container)
            });
            match started {
                Err(error) => println!("{what}: {:.200}", error.to_string()),
                Ok(container) => {
                    assert_clean(&what, &container.id);
                    cri.stop(&container, 0);
                }
            }
        }
        cri.remove(&pod);
        assert!(!Path::new(INJECTED).exists(), "{what}");
    }
    assert_eq!(cri.ask(&container, &["echo", "on"]), "on");
    assert_eq!(cri.pid(&container), pid);
    assert!(disturbed || daemon::restarts() == restarts, "the daemon has ended");
}
