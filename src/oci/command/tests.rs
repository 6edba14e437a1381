use super::*;
use std::fs;

use super::super::state::State;
use crate::id::TaskId;
use crate::task::request::{Containerd, Runtime};
use futures_util::FutureExt;
use tempfile::TempDir;

/// A directory for a test, with an OCI runtime that is this shell script.
fn scratch(script: &str) -> (TempDir, Runtime) {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    fs::create_dir_all(dir.join("root/web")).unwrap();
    let binary = dir.join("runtime");
    crate::oci::write_script(&binary, &format!("cd {}\n{script}", dir.display()));
    let path = std::env::var("PATH").unwrap();
    let runtime = Runtime { binary, root: dir.join("root"), path, limit_sec: 1, ..Runtime::default() };
    (scratch, runtime)
}

/// True if the process whose pid is in this file ends within the time limit.
fn ends(file: &Path) -> bool {
    let pid = fs::read_to_string(file).unwrap().trim().parse().unwrap();
    let Ok(process) = sys::pidfd_open(pid) else { return true };
    sys::ends_within(&process, Duration::from_secs(10)).unwrap()
}

#[tokio::test]
async fn a_command_that_does_not_end_is_killed_with_all_that_it_started() {
    let script = "trap '' TERM INT HUP; setsid sleep 1000 & echo $! > child; sleep 1000";
    let (dir, runtime) = scratch(script);
    let id = TaskId::new("web").unwrap();
    let containerd = Containerd::default();
    let cli =
        Cli { runtime: &runtime, id: &id, containerd: &containerd, bundle: dir.path(), dir: dir.path() };
    let error = CommandLine::default().start(&cli).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { verb: "start", .. }), "{error}");
    assert!(error.to_string().contains("within 1 s"), "{error}");
    cli.settled("start", runtime.limit()).await.unwrap();
    assert!(ends(&dir.path().join("child")));
}

#[tokio::test]
async fn a_command_that_nobody_waits_for_is_killed() {
    let (dir, runtime) = scratch("echo $$ > self; kill -USR1 $PPID; sleep 1000");
    let mut begun = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::user_defined1()).unwrap();
    let runtime = Runtime { limit_sec: 1000, ..runtime };
    let id = TaskId::new("web").unwrap();
    let containerd = Containerd::default();
    let cli =
        Cli { runtime: &runtime, id: &id, containerd: &containerd, bundle: dir.path(), dir: dir.path() };
    let commands = CommandLine::default();
    tokio::select! {
        ended = commands.start(&cli) => panic!("{ended:?}"),
        _ = begun.recv() => {}
    }
    assert!(ends(&dir.path().join("self")));
}

fn state(cli: &Cli<'_>) -> State {
    State::of(cli.runtime, cli.id)
}

/// Deletes a container as the daemon does: what the runtime can't delete, the daemon removes if it may.
async fn delete(cli: &Cli<'_>) -> Result<(), Error> {
    let Err(error) = CommandLine::default().delete(cli).await else { return Ok(()) };
    if state(cli).clear(error.leftover()).unwrap() { Ok(()) } else { Err(error) }
}

/// A runtime whose only thread for blocking work is busy until the sender is dropped.
fn busy_runtime() -> (tokio::runtime::Runtime, std::sync::mpsc::Sender<()>) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    drop(runtime.spawn_blocking(move || ended.recv()));
    (runtime, end)
}

/// The search reads all of /proc.
#[test]
fn no_thread_of_the_runtime_searches_for_the_processes_of_a_command() {
    let (runtime, end) = busy_runtime();
    let (dir, of_web) = scratch("echo $$ > self.new; mv self.new self; sleep 1000");
    let of_web = Runtime { limit_sec: 1000, ..of_web };
    let (id, containerd) = (TaskId::new("web").unwrap(), Containerd::default());
    let cli = Cli { runtime: &of_web, id: &id, containerd: &containerd, bundle: dir.path(), dir: dir.path() };
    let commands = CommandLine::default();
    let file = dir.path().join("self");
    runtime.block_on(async {
        let begun = async {
            while !file.exists() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        // One that was dropped, and one of an earlier daemon.
        tokio::select! {
            ended = commands.start(&cli) => panic!("{ended:?}"),
            () = begun => {}
        }
        let process = sys::pidfd_open(fs::read_to_string(&file).unwrap().trim().parse().unwrap()).unwrap();
        assert!(!sys::ends_within(&process, Duration::from_millis(200)).unwrap(), "dropped");
        let settled = cli.settled_unless("start", Duration::from_secs(60), std::future::ready(()));
        tokio::pin!(settled);
        assert!(settled.as_mut().now_or_never().is_none());
        assert!(!sys::ends_within(&process, Duration::from_millis(200)).unwrap(), "settled");
        drop(end);
        settled.await.unwrap();
        assert!(sys::ends_within(&process, Duration::ZERO).unwrap());
    });
}

#[tokio::test]
async fn commands_for_a_container_run_one_after_the_other_and_leftover_children_delay_nothing() {
    let script = "mkdir running || exit 9; sleep 1000 & echo $! >> children; sleep 0.05; rmdir running";
    let (dir, runtime) = scratch(script);
    let runtime = Runtime { limit_sec: 60, ..runtime };
    let id = TaskId::new("web").unwrap();
    let containerd = Containerd::default();
    let cli =
        Cli { runtime: &runtime, id: &id, containerd: &containerd, bundle: dir.path(), dir: dir.path() };
    let commands = CommandLine::default();
    let ran = futures_util::future::join_all((0..4).map(|_| commands.start(&cli))).await;
    assert!(ran.iter().all(Result::is_ok), "{ran:?}");
    assert!(cli.holder().unwrap().is_none());
    // Otherwise they outlive the test, with every descriptor that it has inherited.
    let children = fs::read_to_string(dir.path().join("children")).unwrap();
    for child in children.lines().map(|pid| pid.parse().unwrap()) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    assert_eq!(children.lines().count(), 4);
}

#[tokio::test]
async fn a_delete_that_does_not_end_frees_the_id() {
    let (dir, runtime) = scratch("sleep 1000");
    let id = TaskId::new("web").unwrap();
    let containerd = Containerd::default();
    let cli =
        Cli { runtime: &runtime, id: &id, containerd: &containerd, bundle: dir.path(), dir: dir.path() };
    assert!(state(&cli).exists());
    delete(&cli).await.unwrap();
    assert!(!state(&cli).exists());
}

#[tokio::test]
async fn a_delete_that_is_killed_is_tried_again_and_then_done_without_the_runtime() {
    let killed_once = "[ -e killed ] || { touch killed; kill -9 $$; }; rm -r root/web";
    for script in [killed_once, "kill -9 $$"] {
        let (dir, runtime) = scratch(&format!("echo >> tries; {script}"));
        let id = TaskId::new("web").unwrap();
        let containerd = Containerd::default();
        let cli =
            Cli { runtime: &runtime, id: &id, containerd: &containerd, bundle: dir.path(), dir: dir.path() };
        fs::write(dir.path().join("root/web/state.json"), "{}").unwrap();
        delete(&cli).await.unwrap();
        assert!(!state(&cli).exists());
        assert_eq!(fs::read_to_string(dir.path().join("tries")).unwrap(), "\n\n");
    }
}

#[tokio::test]
async fn a_delete_fails_unless_the_state_is_broken() {
    let (dir, runtime) = scratch("exit 1");
    let id = TaskId::new("web").unwrap();
    let containerd = Containerd::default();
    let cli =
        Cli { runtime: &runtime, id: &id, containerd: &containerd, bundle: dir.path(), dir: dir.path() };
    for name in ["state.json", "status"] {
        let file = dir.path().join("root/web").join(name);
        fs::write(&file, r#"{"id":"web"}"#).unwrap();
        let error = delete(&cli).await.unwrap_err();
        assert!(matches!(error, Error::Failed { verb: "delete", .. }), "{error}");
        fs::write(&file, r#"{"id":"#).unwrap();
        delete(&cli).await.unwrap();
        assert!(!state(&cli).exists());
        fs::create_dir(dir.path().join("root/web")).unwrap();
    }
}

#[tokio::test]
async fn a_command_runs_with_the_oom_score_of_an_ordinary_process() {
    let (dir, runtime) = scratch("cat /proc/self/oom_score_adj > score");
    let id = TaskId::new("web").unwrap();
    let containerd = Containerd::default();
    let cli =
        Cli { runtime: &runtime, id: &id, containerd: &containerd, bundle: dir.path(), dir: dir.path() };
    CommandLine::default().start(&cli).await.unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("score")).unwrap(), "0\n");
}

#[test]
fn the_cgroup_of_a_command_is_recognised() {
    let all = crate::launch::cgroup::of_commands().unwrap();
    assert!(is_of_one_command(&all.join("default+web+1.0")));
    for other in [all.clone(), all.join("default+web+1.0/below"), "/commands/default+web+1.0".into()] {
        assert!(!is_of_one_command(&other), "{other:?}");
    }
}

#[tokio::test]
async fn a_command_runs_although_its_directory_was_removed() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, runtime) = scratch("rm -r root/web");
    let id = TaskId::new("web").unwrap();
    let containerd = Containerd::default();
    let logs = dir.path().join("default/web");
    let cli = Cli { runtime: &runtime, id: &id, containerd: &containerd, bundle: dir.path(), dir: &logs };
    cli.settled("delete", runtime.limit()).await.unwrap();
    assert!(!logs.exists());
    delete(&cli).await.unwrap();
    assert!(!state(&cli).exists());
    assert_eq!(fs::metadata(&logs).unwrap().permissions().mode() & 0o777, 0o700);
    // No program is to blame for a directory that can't be made.
    fs::remove_dir_all(dir.path().join("default")).unwrap();
    fs::write(dir.path().join("default"), "").unwrap();
    let error = CommandLine::default().delete(&cli).await.unwrap_err();
    assert!(matches!(error, Error::Directory { verb: "delete", .. }), "{error}");
}

#[tokio::test]
async fn what_a_command_says_is_the_reason_if_it_logs_nothing() {
    let (dir, runtime) = scratch(
        "[ \"$*\" != --version ] || exit 0; echo 'cannot open shared object file:' >&2; echo libfoo.so.2 >&2; exit 127",
    );
    let id = TaskId::new("web").unwrap();
    let containerd = Containerd::default();
    let cli =
        Cli { runtime: &runtime, id: &id, containerd: &containerd, bundle: dir.path(), dir: dir.path() };
    let binary = runtime.binary.display();
    let commands = CommandLine::default();
    for error in [commands.start(&cli).await.unwrap_err(), commands.delete(&cli).await.unwrap_err()] {
        let text = error.to_string();
        let expected = format!(
            "{binary} ended with code 127 and the message: cannot open shared object file: libfoo.so.2"
        );
        assert!(matches!(error, Error::Failed { .. }) && text.ends_with(&expected), "{text}");
    }
    assert!(commands.defect(&cli).await.is_none());
    crate::oci::write_script(&runtime.binary, "exit 3");
    let text = commands.defect(&cli).await.unwrap().to_string();
    assert_eq!(text, format!("OCI runtime --version failed: {binary} ended with code 3 and no message"));
    // The log has the better message.
    let log = r#"{"level":"error","msg":"logged"}"#;
    crate::oci::write_script(&runtime.binary, &format!("echo '{log}' > \"$4\"; echo said >&2; exit 1"));
    assert!(commands.start(&cli).await.unwrap_err().to_string().ends_with("failed: logged"));
}
