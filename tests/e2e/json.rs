//! JSON that runc's decoder accepts, but other decoders do not. JSON that works with the stock shim works with ours,
//! and means the same.

use crate::common::node::{Node, STOCK_RUNTIME, runtime_under_test};
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::task::Io;

/// Parts of a spec, and the text that replaces them.
const WRITTEN: [(&str, &str); 13] = [
    // The spec without a change.
    ("\"hostname\"", "\"hostname\""),
    // Neither the case of names matters, nor escapes in them. The long s is another case of s.
    ("\"hostname\"", "\"HostName\""),
    ("\"linux\"", "\"LINUX\""),
    ("\"cgroupsPath\"", "\"cgroup\u{17f}path\""),
    ("\"process\"", "\"Process\""),
    ("\"args\"", "\"A\\u0072gs\""),
    ("\"mounts\"", "\"MOUNTS\""),
    // The last of two values counts.
    ("\"hostname\":", "\"hostname\":\"first\",\"Hostname\":"),
    ("\"hostname\":\"e2e\"", "\"hostname\":\"e2e\",\"hostname\":null"),
    ("\"args\":", "\"args\":[\"/no/such/program\"],\"ARGS\":"),
    ("\"root\":", "\"root\":{\"path\":\"/no/such/rootfs\"},\"ROOT\":"),
    // One half of a surrogate pair.
    ("e2e\"", "\\ud800\""),
    // A value of another type is an error.
    ("\"hostname\":\"e2e\"", "\"hostname\":7"),
];

/// The output of the process of a spec; `None` if the container can't be created.
fn said(node: &Node, runtime: &str, (part, by): (&str, &str)) -> Option<String> {
    let scratch = Scratch::new("json");
    let spec =
        Spec::sh("{ hostname; cat /proc/self/cgroup; } >/out/text").bind(scratch.as_str(), "/out", &[]);
    let container = node.container("json", spec.written(part, by)).runtime(runtime).make();
    container.create(&Io::default()).ok()?;
    container.start().expect("start");
    assert_eq!(container.exit_status(), 0, "{runtime}: {part} as {by}");
    container.delete().expect("delete");
    Some(scratch.read("text"))
}

#[test]
fn a_spec_means_what_it_means_to_runc() {
    needs!(OurShim);
    let node = Node::shared();
    for written in WRITTEN {
        let ours = said(&node, &runtime_under_test(), written);
        let stock = said(&node, STOCK_RUNTIME, written);
        let host_name =
            |said: &Option<String>| said.as_ref().and_then(|said| said.lines().next().map(str::to_owned));
        assert_eq!(host_name(&ours), host_name(&stock), "{written:?}");
        // The container is in its unit, whatever the spelling of cgroupsPath.
        let is_in_unit = |said: String| {
            said.lines().any(|line| line.contains("/containerd-") && line.contains(".service/"))
        };
        assert!(ours.is_none_or(is_in_unit), "{written:?}");
    }
}

#[test]
fn the_process_of_an_exec_means_what_it_means_to_runc() {
    needs!(OurShim);
    let node = Node::shared();
    for (part, by) in [
        ("\"args\"", "\"args\""),
        ("\"args\"", "\"Args\""),
        ("\"args\"", "\"arg\u{17f}\""),
        ("\"args\":", "\"args\":[\"/no/such/program\"],\"ARGS\":"),
        ("\"cwd\":", "\"CWD\":\"/no/such/directory\",\"cwd\":"),
        ("\"args\":", "\"Terminal\":true,\"args\":"),
        ("\"args\":", "\"ARGS\":null,\"arguments\":"),
    ] {
        let status = [runtime_under_test().as_str(), STOCK_RUNTIME].map(|runtime| {
            let container = node.container("json", Spec::sleeping()).runtime(runtime).started(&Io::default());
            let exec = container.exec(Spec::sh("exit 7").written(part, by)).add(&Io::default()).ok()?;
            exec.start().ok()?;
            Some(exec.exit_status())
        });
        assert_eq!(status[0], status[1], "{part} as {by}");
    }
}
