//! CheckpointContainer of CRI, which a kubelet calls for its API of checkpoints.

use crate::common::stdio::Scratch;
use crate::common::{process, systemd};
use crate::cri::{Cri, RUNNING, is_containerd_2};
use crate::cri_messages::*;

#[test]
fn a_checkpoint_of_a_container_is_an_archive_and_the_container_continues() {
    needs!(OurShim, Criu, Iptables);
    if !is_containerd_2("cri_checkpoint", "this containerd takes no checkpoints over CRI") {
        return;
    }
    let cri = Cri::new();
    let pod = cri.pod("checkpoint");
    let container = cri.sleeping(&pod, "checkpoint");
    let pid = cri.pid(&container);
    let scratch = Scratch::new("archive");
    cri.call(CheckpointContainerRequest {
        container_id: container.id.clone(),
        location: scratch.text("checkpoint.tar"),
        timeout: 60,
    });
    let files = process::succeed("tar", &["--list", "--file", &scratch.text("checkpoint.tar")]);
    for name in ["checkpoint/inventory.img", "config.dump", "spec.dump"] {
        assert!(files.lines().any(|file| file == name), "{name} in {files}");
    }
    assert_eq!((cri.status(&container).state, cri.pid(&container)), (RUNNING, pid));
    assert_eq!(systemd::main_pid(&container.unit()), pid);
    assert_eq!(cri.ask(&container, &["echo", "here"]), "here");
}
