//! Security labels: AppArmor profiles of sandboxes, of containers, and of containers that are restored.

use crate::common::apparmor::{Profile, label};
use crate::common::checkpoint::{COUNTING, last, options};
use crate::common::leaks::{self, Traces};
use crate::common::node::{Node, unique};
use crate::common::pod::{
    LOCALHOST, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, SecurityProfile, pod,
};
use crate::common::shim::Shim;
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::task::{Io, SIGTERM};
use crate::common::wait;
use crate::sandbox_odd::Direct;

fn confined_by(profile: &str) -> Option<prost_types::Any> {
    let apparmor = Some(SecurityProfile { profile_type: LOCALHOST, localhost_ref: profile.to_string() });
    let security_context = Some(LinuxSandboxSecurityContext { apparmor, ..Default::default() });
    pod(|pod| pod.linux = Some(LinuxPodSandboxConfig { security_context, ..Default::default() }))
}

#[test]
fn a_sandbox_has_the_apparmor_profile_that_its_pod_names() {
    needs!(OurShim, AppArmor);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let profile = Profile::load(&unique("e2e-sandbox"));
    drop(Direct::new(&shim, "warm").create());
    let before = Traces::take();
    let sandbox = Direct::new(&shim, "labelled");
    sandbox.create_with(confined_by(&profile.name), "").expect("create");
    let pid = sandbox.start().expect("start");
    assert_eq!(label(pid).expect("a label"), profile.shown());
    sandbox.shut_down().expect("shut down");

    // The same id, with a profile that the node does not have, and with none.
    for name in ["e2e-no-such-profile", "", "e2e no\nname"] {
        let (code, reason) = sandbox.create_with(confined_by(name), "").expect_err(name);
        assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION, "{reason}");
        assert!(reason.contains("AppArmor") && reason.contains(&format!("{name:?}")), "{reason}");
        assert_eq!(sandbox.state().expect_err("it does not exist").0, ttrpc::Code::NOT_FOUND);
    }
    sandbox.create_with(confined_by("unconfined"), "").expect("create");
    let pid = sandbox.start().expect("start");
    assert_eq!(label(pid).expect("a label"), "unconfined");
    drop(sandbox);
    leaks::assert_none("labelled sandboxes", &before);
}

#[test]
fn a_container_has_its_apparmor_profile_also_after_a_restore() {
    needs!(OurShim, AppArmor, Criu);
    let node = Node::exclusive();
    let profile = Profile::load(&unique("e2e-container"));
    let spec = || Spec::sh(COUNTING).apparmor(&profile.name);
    let fifos = Fifos::new("labelled");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let original = node.container("labelled", spec()).started(&fifos.io());
    stdout.until(|bytes| bytes.ends_with(b"3\n"));
    assert_eq!(label(original.pid()).expect("a label"), profile.shown());
    let exec = original.exec(Spec::sleeping().apparmor(&profile.name)).add(&Io::default()).expect("exec");
    let pid = exec.start().expect("start an exec");
    wait::until_true("the exec has its label", || label(pid).is_ok_and(|label| label == profile.shown()));
    exec.end();
    let images = original.checkpoint(options(|options| options.exit = true)).expect("checkpoint");
    assert_eq!(original.exit_status(), 137);

    let fifos = Fifos::new("restored");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let copy = node.container("copy", spec()).make();
    copy.create_from(&images, &fifos.io()).expect("create");
    let pid = copy.start().expect("restore");
    assert!(last(&stdout.until(|bytes| bytes.ends_with(b"\n"))) >= 3);
    assert_eq!(label(pid).expect("a label"), profile.shown());
    copy.kill(SIGTERM).expect("kill");
    assert_eq!(copy.exit_status(), 7);
    drop((copy, original, images));
    crate::common::checkpoint::remove_unpacked();

    let unknown = node.container("unknown", Spec::sleeping().apparmor("e2e-no-such-profile")).make();
    let error = unknown.create(&Io::default()).expect_err("there is no such profile");
    assert!(error.message().contains("apparmor"), "{error}");
}
