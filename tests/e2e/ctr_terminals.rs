//! `ctr` in a terminal, as a person uses it: `run`, `exec` and `attach`.

use crate::common::image::IMAGE;
use crate::common::node::{NAMESPACE, Need, Node, unique};
use crate::common::process;
use crate::common::pty::Pty;
use crate::common::spec::Spec;
use crate::common::task::Io;
use crate::ctr::Made;

const CTR: [&str; 3] = ["ctr", "--namespace", NAMESPACE];

/// Types commands into a shell: the shell calculates, prints the size of the terminal before and after a change, and
/// exits with 7.
fn use_shell(terminal: &mut Pty) {
    terminal.until("# ");
    terminal.enter("echo $((6 * 7))\n");
    terminal.until("42\r");
    // ctr sets the size after the start, and passes a new size on when it gets SIGWINCH.
    terminal.enter("while [ \"$(stty size)\" != '33 111' ]; do usleep 20000; done; echo si''zed\n");
    terminal.until("sized\r");
    terminal.resize(122, 44);
    terminal.enter("while [ \"$(stty size)\" != '44 122' ]; do usleep 20000; done; echo resi''zed\n");
    terminal.until("resized\r");
    // The interrupt ends the command, but neither the shell nor ctr.
    terminal.enter("sh -c 'echo begun; exec cat'\n");
    terminal.until("begun\r");
    terminal.enter("\x03");
    terminal.until("# ");
    terminal.enter("exit 7\n");
    assert_eq!(terminal.code(), Some(7));
}

#[test]
fn ctr_run_gives_a_shell_in_a_terminal() {
    let node = Node::shared();
    let made = Made(unique("ctr"));
    let shares = if Need::Controllers.missing().is_some() { &["--cpu-shares", "0"][..] } else { &[] };
    let run = ["run", "--rm", "--tty", "--runtime", &node.runtime];
    use_shell(&mut Pty::run(&[&CTR[..], &run, shares, &[IMAGE, &made.0, "sh"]].concat(), 111, 33));
}

#[test]
fn ctr_exec_gives_a_shell_in_a_terminal() {
    let node = Node::shared();
    let container = node.container("ctr", Spec::sleeping()).started(&Io::default());
    let exec = ["task", "exec", "--tty", "--exec-id", "shell", &container.id, "sh"];
    use_shell(&mut Pty::run(&[&CTR[..], &exec].concat(), 111, 33));
}

#[test]
fn ctr_exec_passes_streams_and_the_exit_code_on() {
    let node = Node::shared();
    let container = node.container("ctr", Spec::sleeping()).started(&Io::default());
    let script = "cat; echo trouble >&2; exit 8";
    let exec = ["--namespace", NAMESPACE, "task", "exec", "--exec-id", "plain", &container.id];
    let outcome = crate::common::shim::with_stdin(
        std::process::Command::new("ctr").args(exec).args(["sh", "-c", script]),
        b"from stdin\n",
    );
    assert_eq!((outcome.code, outcome.text().as_str()), (Some(8), "from stdin\n"), "{outcome:?}");
    assert!(outcome.stderr.contains("trouble"), "{outcome:?}");
}

#[test]
fn ctr_attach_comes_back_to_a_shell() {
    let node = Node::shared();
    let made = Made(unique("ctr"));
    let shares = if Need::Controllers.missing().is_some() { &["--cpu-shares", "0"][..] } else { &[] };
    let run = ["run", "--tty", "--runtime", &node.runtime];
    let mut first = Pty::run(&[&CTR[..], &run, shares, &[IMAGE, &made.0, "sh"]].concat(), 90, 20);
    first.until("# ");
    // The shell prints its prompt again when ctr sets the size, so a prompt does not show that the shell ran the command.
    first.enter("kept=yes; echo ke''pt\n");
    first.until("kept\r");
    // The terminal closes, as when a person closes the window.
    drop(first);
    let mut second = Pty::run(&[&CTR[..], &["task", "attach", &made.0]].concat(), 111, 33);
    second.enter("echo kept: $kept\n");
    second.until("kept: yes\r");
    second.enter("exit 9\n");
    assert_eq!(second.code(), Some(9));
    assert!(process::with_command_line(&format!("attach {}", made.0)).is_empty());
}
