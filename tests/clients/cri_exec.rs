//! ExecSync, exec and attach over CRI.

use containerd_client::tonic::Code;

use crate::channels::Ended;
use crate::common::{process, wait};
use crate::cri::{Cri, RUNNING};
use crate::cri_messages::*;

#[test]
fn exec_sync_returns_output_and_exit_code() {
    let cri = Cri::new();
    let pod = cri.pod("exec-sync");
    let container = cri.sleeping(&pod, "exec-sync");
    let ran = cri.exec_sync(&container, &["sh", "-c", "seq 1 20000; echo error >&2; exit 9"]);
    let numbers: String = (1..=20_000).map(|number| format!("{number}\n")).collect();
    assert_eq!((ran.exit_code, ran.stderr.as_slice()), (9, &b"error\n"[..]));
    assert!(ran.stdout == numbers.as_bytes(), "{} bytes", ran.stdout.len());
    let missing = ExecSyncRequest {
        container_id: container.id.clone(),
        cmd: vec!["/there/is/no/such/program".to_string()],
        timeout: 60,
    };
    let error = cri.try_call(missing).unwrap_err();
    assert!(error.message().contains("no such file or directory"), "{error:?}");
    for number in 0..10 {
        assert_eq!(cri.exec_sync(&container, &["sh", "-c", &format!("exit {number}")]).exit_code, number);
    }
}

#[test]
fn exec_sync_ends_a_command_that_takes_too_long() {
    let cri = Cri::new();
    let pod = cri.pod("timeout");
    let container = cri.sleeping(&pod, "timeout");
    let cmd = ["sleep", "100021"].map(str::to_string).to_vec();
    let error =
        cri.try_call(ExecSyncRequest { container_id: container.id.clone(), cmd, timeout: 1 }).unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    wait::until_true("the command is gone", || process::with_command_line("sleep 100021").is_empty());
    assert_eq!(cri.ask(&container, &["echo", "on"]), "on");
}

#[test]
fn exec_is_a_dialogue() {
    let cri = Cri::new();
    let pod = cri.pod("exec");
    let container = cri.sleeping(&pod, "exec");
    let mut plain =
        cri.exec(&container, &["sh", "-c", "echo error >&2; read word; echo \"said $word\"; exit 5"], false);
    plain.enter("hello\n");
    let expected = Ended { stdout: "said hello\n".to_string(), stderr: "error\n".to_string(), code: 5 };
    assert_eq!(plain.ended(), expected);

    let mut terminal = cri.exec(&container, &["sh"], true);
    terminal.until("# ");
    terminal.resize(77, 33);
    terminal.enter("while [ \"$(stty size)\" != '33 77' ]; do usleep 20000; done; echo re''sized\n");
    terminal.until("resized");
    terminal.enter("exit 6\n");
    assert_eq!(terminal.ended().code, 6);
}

#[test]
fn attach_is_a_dialogue_and_leaves_the_container_running() {
    let cri = Cri::new();
    let pod = cri.pod("attach");
    let script = "while read -r word; do echo \"said $word\"; done; exit 4";
    for tty in [false, true] {
        let name = if tty { "terminal" } else { "plain" };
        let container = cri.create(&pod, name, &["sh", "-c", script], |config| {
            config.stdin = true;
            config.tty = tty;
        });
        cri.start(&container);
        for word in ["one", "two"] {
            let mut client = cri.attach(&container, tty);
            client.enter(&format!("{word}\n"));
            client.until(&format!("said {word}"));
        }
        assert_eq!(cri.status(&container).state, RUNNING);
        container.until_logged("said two");
    }
}
