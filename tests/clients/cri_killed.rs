//! Pods at work while our daemon is killed several times a second.

use crate::common::daemon;
use crate::cri::Cri;

/// As many kills as a test waits for, however fast the machine is.
const KILLS: u64 = 20;

#[test]
fn pods_come_and_go_while_our_daemon_is_killed() {
    needs!(OurShim);
    let cri = Cri::new();
    daemon::killed_during(|kills| {
        for turn in kills.turns(3, KILLS) {
            let pod = cri.pod("killed");
            let container = cri.sleeping(&pod, "killed");
            cri.stop(&container, 30);
            assert_eq!(cri.ended(&container).exit_code, 143, "turn {turn}");
            cri.remove(&pod);
        }
    });
}
