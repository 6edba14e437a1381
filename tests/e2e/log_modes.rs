//! The option `Log` sends output to the client, to the journal, to both, or nowhere.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::protobuf::well_known_types::any::Any as ShimAny;
use prost_types::Any;
use serde_json::Value;
use ttrpc::Code;

use crate::common::container::Container;
use crate::common::daemon::{self, Frozen};
use crate::common::exec::Exec;
use crate::common::node::{Node, unique};
use crate::common::options;
use crate::common::process;
use crate::common::shim::{Bundle, Shim, over_ttrpc};
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::systemd::{self, DAEMON_SERVICE};
use crate::common::task::{Io, Process, SIGKILL, SIGTERM};
use crate::common::wait;
use crate::runtime_options::GenericOptions;

/// The options as a table in CRI's configuration.
pub fn log(mode: &str) -> Any {
    GenericOptions { config_body: format!("Log = \"{mode}\"\n"), ..Default::default() }.to_any()
}

/// A message as text. What is not UTF-8 is a list of numbers in journalctl's JSON.
fn message(entry: &Value) -> String {
    match &entry["MESSAGE"] {
        Value::Array(bytes) => bytes.iter().map(|byte| byte.as_u64().unwrap_or(0) as u8 as char).collect(),
        text => text.as_str().unwrap_or_default().to_string(),
    }
}

/// A process that has run to its end and is deleted, in a container that is still known.
struct Ran<'n> {
    container: Container<'n>,
    exec: Option<Exec<'n>>,
    /// The bytes of both streams that the client got.
    seen: String,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Init,
    Exec,
}

impl<'n> Ran<'n> {
    fn new(node: &'n Node, options: Any, kind: Kind, spec: Spec, has_client: bool) -> Ran<'n> {
        let fifos = Fifos::new("log");
        let (mut stdout, mut stderr) = (fifos.stdout(), fifos.stderr());
        let terminal = spec.has_terminal();
        let io = match (has_client, terminal) {
            (false, _) => Io::default(),
            (true, false) => fifos.output(),
            (true, true) => fifos.terminal(),
        };
        let container = |spec| node.container("log", spec).options(options);
        let (container, exec) = match kind {
            Kind::Init => (container(spec).started(&io), None),
            Kind::Exec => {
                let container = container(spec.sleeping_instead()).started(&Io::default());
                let exec = container.exec(spec).started(&io);
                (container, Some(exec))
            }
        };
        let process: &Process = exec.as_deref().unwrap_or(&container);
        // The client reads while the process runs: the room in a FIFO depends on the size of the writes.
        let seen = thread::scope(|scope| {
            let seen = scope.spawn(|| match (has_client, terminal) {
                (false, _) => String::new(),
                (true, false) => stdout.text() + &stderr.text(),
                (true, true) => stdout.text(),
            });
            assert_eq!(process.exit_status(), 0);
            process.delete().expect("delete");
            seen.join().expect("read what the client gets")
        });
        Ran { container, exec, seen }
    }

    /// Waits until `journalctl -u` of the container shows at least this number of entries with the text, and returns them.
    fn shown(&self, text: &str, at_least: usize) -> Vec<Value> {
        let mut entries = Vec::new();
        wait::within(wait::LIMIT, || {
            entries = systemd::journal(&["--unit", &systemd::unit_of(&self.container)]);
            entries.retain(|entry| message(entry).contains(text));
            (entries.len() >= at_least).then_some(())
        });
        entries
    }
}

/// For processes of every kind, asserts who gets their lines.
fn check(mode: &str, has_client: bool, client_gets: bool, journal_gets: bool) {
    check_kinds(mode, &[Kind::Init, Kind::Exec], has_client, client_gets, journal_gets);
}

fn check_kinds(mode: &str, kinds: &[Kind], has_client: bool, client_gets: bool, journal_gets: bool) {
    let node = Node::shared();
    for kind in kinds.iter().copied() {
        // A terminal without a client gets no input.
        for terminal in if has_client { &[false, true][..] } else { &[false] } {
            let what = format!("{mode}, {kind:?}, terminal: {terminal}, client: {has_client}");
            let word = unique("word");
            let spec = Spec::sh(&format!("echo {word} out; echo {word} err >&2"));
            let spec = if *terminal { spec.terminal() } else { spec };
            let ran = Ran::new(&node, log(mode), kind, spec, has_client);

            let end = if *terminal { "\r\n" } else { "\n" };
            let lines = format!("{word} out{end}{word} err{end}");
            assert_eq!(ran.seen, if client_gets { lines.as_str() } else { "" }, "the client, {what}");

            let expected = [format!("{word} err"), format!("{word} out")];
            let expected = if journal_gets { &expected[..] } else { &[] };
            let shown = ran.shown(&word, expected.len());
            let mut shown: Vec<String> =
                shown.iter().map(|entry| message(entry).trim().to_string()).collect();
            shown.sort();
            assert_eq!(shown, expected, "the journal, {what}");
        }
    }
}

#[test]
fn auto_copies_to_the_journal_except_the_output_of_execs_with_a_client() {
    needs!(OurShim);
    check_kinds("auto", &[Kind::Init], true, true, true);
    check_kinds("auto", &[Kind::Exec], true, true, false);
    check("auto", false, false, true);
}

#[test]
fn client_uses_the_streams_of_the_client_or_else_the_journal() {
    needs!(OurShim);
    check("client", true, true, false);
    check("client", false, false, true);
}

#[test]
fn journal_always_uses_the_journal() {
    needs!(OurShim);
    check("journal", true, false, true);
    check("journal", false, false, true);
}

#[test]
fn tee_uses_the_streams_of_the_client_and_the_journal() {
    needs!(OurShim);
    check("tee", true, true, true);
    check("tee", false, false, true);
}

#[test]
fn none_uses_the_streams_of_the_client_or_else_nothing() {
    needs!(OurShim);
    check("none", true, true, false);
    check("none", false, false, false);
}

#[test]
fn the_log_mode_can_be_set_by_our_own_options_message() {
    needs!(OurShim);
    let node = Node::shared();
    let ran = Ran::new(&node, options::log("journal"), Kind::Init, Spec::sh("echo by our own"), true);
    assert_eq!((ran.seen.as_str(), ran.shown("by our own", 1).len()), ("", 1));
}

#[test]
fn an_unknown_mode_is_an_invalid_argument_that_names_it() {
    needs!(OurShim);
    let node = Node::shared();
    let shim = Shim::connect(&node);
    let bundle = Bundle::new("log");
    let mut request = bundle.request(&unique("log"));
    let Any { type_url, value } = log("jurnal");
    request.options = Some(ShimAny { type_url, value, ..Default::default() }).into();
    let (code, text) = shim.create(request).expect_err("no such mode");
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(text.contains("jurnal"), "{text}");
}

#[test]
fn journal_entries_name_container_and_pod() {
    needs!(OurShim);
    let node = Node::shared();
    for (mode, terminal) in [("journal", false), ("tee", false), ("journal", true), ("tee", true)] {
        for kind in [Kind::Init, Kind::Exec] {
            let spec = Spec::sh("echo hello").annotation("nerdctl/name", "webshop");
            let spec = if terminal { spec.terminal() } else { spec };
            let ran = Ran::new(&node, log(mode), kind, spec, true);
            let entry = ran.shown("hello", 1).pop().expect("a line");
            let what = format!("{mode}, {kind:?}, terminal: {terminal}: {entry}");
            assert_eq!(entry["CONTAINER_ID"], ran.container.id.as_str(), "{what}");
            assert_eq!(entry["CONTAINER_NAMESPACE"], ran.container.namespace.as_str(), "{what}");
            assert_eq!(entry["CONTAINER_NAME"], "webshop", "{what}");
            assert_eq!(entry["SYSLOG_IDENTIFIER"], "webshop", "{what}");
            assert_eq!(
                entry["CONTAINER_EXEC_ID"].as_str(),
                ran.exec.as_ref().map(|exec| exec.id.as_str()),
                "{what}"
            );
        }
    }
}

#[test]
fn odd_lines_arrive_whole() {
    needs!(OurShim);
    let node = Node::shared();
    let script =
        r"head -c 60000 /dev/zero | tr '\0' L; echo; printf '\001\377binary\n'; printf 'the last one'";
    for (mode, terminal) in [("journal", false), ("tee", false), ("journal", true), ("tee", true)] {
        for kind in [Kind::Init, Kind::Exec] {
            let spec = Spec::sh(script);
            let spec = if terminal { spec.terminal() } else { spec };
            let what = format!("{mode}, {kind:?}, terminal: {terminal}");
            let ran = Ran::new(&node, log(mode), kind, spec, true);
            assert_eq!(ran.shown("the last one", 1).len(), 1, "{what}");
            assert_eq!(ran.shown("\u{1}\u{ff}binary", 1).len(), 1, "{what}");
            let long = ran.shown("LLL", 1);
            assert_eq!(long.iter().map(|entry| message(entry).trim().len()).sum::<usize>(), 60_000, "{what}");
        }
    }
}

#[test]
fn any_user_can_open_its_own_stdout_again() {
    needs!(OurShim);
    let node = Node::shared();
    for kind in [Kind::Init, Kind::Exec] {
        for uid in [0, 1000] {
            for (mode, has_client) in [("journal", true), ("journal", false), ("auto", false)] {
                let script = "echo first && echo second > /dev/stdout && echo third > /dev/stderr";
                let ran = Ran::new(&node, log(mode), kind, Spec::sh(script).user(uid, uid), has_client);
                for line in ["first", "second", "third"] {
                    assert_eq!(ran.shown(line, 1).len(), 1, "{line}, {mode}, {kind:?}, uid {uid}");
                }
            }
        }
    }
}

/// The mode, and how many lines a minute go to the journal.
pub fn limited(mode: &str, burst: u32) -> Any {
    let properties = format!("LogRateLimitBurst = \"uint32 {burst}\"\nLogRateLimitIntervalSec = \"60\"\n");
    let config_body = format!("Log = \"{mode}\"\n[Properties]\n{properties}");
    GenericOptions { config_body, ..Default::default() }.to_any()
}

#[test]
fn a_level_in_front_of_a_line_is_text_like_any_other() {
    needs!(OurShim);
    let node = Node::shared();
    for (mode, kind) in [("auto", Kind::Init), ("auto", Kind::Exec), ("tee", Kind::Init)] {
        let word = unique("level");
        let ran = Ran::new(&node, log(mode), kind, Spec::sh(&format!("echo '<0>{word}'")), false);
        let shown = ran.shown(&word, 1);
        let shown: Vec<_> = shown.iter().map(|entry| (message(entry), entry["PRIORITY"].as_str())).collect();
        assert_eq!(shown, [(format!("<0>{word}"), Some("6"))], "{mode}, {kind:?}");
    }
}

#[test]
fn more_lines_than_the_limit_reach_the_client_and_the_journal_counts_them() {
    needs!(OurShim);
    let node = Node::shared();
    for kind in [Kind::Init, Kind::Exec] {
        let word = unique("flood");
        let spec = Spec::sh(&format!("for i in $(seq 1000); do echo {word}; done"));
        let ran = Ran::new(&node, limited("tee", 100), kind, spec, true);
        assert_eq!(ran.seen.lines().count(), 1000, "the client, {kind:?}");
        // Both streams have one limit, and each of them says what was dropped since the last message.
        let dropped = || -> u32 {
            let said = ran.shown("are missing here", 1);
            said.iter().filter_map(|entry| entry["N_DROPPED"].as_str()?.parse::<u32>().ok()).sum()
        };
        wait::until_true("the journal says what is missing", || dropped() >= 900);
        assert_eq!(dropped(), 900, "{kind:?}");
        assert_eq!(ran.shown(&word, 100).len(), 100, "the journal, {kind:?}");
    }
}

#[test]
fn the_copy_has_a_limit_and_says_what_is_missing() {
    needs!(OurShim);
    let node = Node::shared();
    let word = unique("flood");
    let spec = Spec::sh(&format!("yes {word} | head -n 100000"));
    let ran = Ran::new(&node, limited("auto", 100), Kind::Init, spec, true);
    assert_eq!(ran.seen.lines().count(), 100_000, "the client");
    assert!(!ran.shown("are missing here: the container writes faster than", 1).is_empty());
    let copied = ran.shown(&word, 1).len();
    assert!((1..=100).contains(&copied), "{copied} lines in the journal");
}

#[test]
fn lines_that_are_written_one_at_a_time_are_all_in_the_copy() {
    needs!(OurShim);
    let node = Node::shared();
    for terminal in [false, true] {
        let word = unique("single");
        let fifos = Fifos::new("single");
        let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        let spec = Spec::sh(&format!("for i in $(seq 2000); do echo {word}; done"));
        let (spec, io) = if terminal { (spec.terminal(), fifos.terminal()) } else { (spec, fifos.output()) };
        let container = node.container("single", spec).started(&io);
        let seen = stdout.rest();
        assert_eq!(container.exit_status(), 0);
        assert_eq!(String::from_utf8_lossy(&seen).lines().count(), 2000, "terminal: {terminal}");
        wait::until_true("every line is in the journal", || {
            let messages = systemd::messages(&["--unit", &systemd::unit_of(&container)]);
            messages.iter().filter(|message| message.contains(&word)).count() == 2000
        });
        container.delete().expect("delete");
    }
}

/// Stops journald by a signal until the result is dropped.
pub fn freeze_journald() -> Frozen {
    Frozen::new(systemd::main_pid("systemd-journald.service"))
}

#[test]
fn a_journald_that_hangs_delays_neither_a_container_nor_its_client() {
    needs!(OurShim);
    let node = Node::exclusive();
    for terminal in [false, true] {
        let fifos = Fifos::new("hang");
        let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        // More than all pipes and the journal's socket hold.
        let spec =
            Spec::sh("trap 'seq 500000; echo over; exit 0' TERM; echo ready; while :; do sleep 0.1; done");
        let (spec, io) = if terminal { (spec.terminal(), fifos.terminal()) } else { (spec, fifos.output()) };
        let container = node.container("hang", spec).started(&io);
        stdout.until(|seen| seen.starts_with(b"ready"));
        let frozen = freeze_journald();
        container.kill(SIGTERM).expect("let it write");
        let seen = stdout.until(|seen| seen.trim_ascii_end().ends_with(b"over"));
        // systemd itself waits for journald when it logs that a unit has ended.
        drop(frozen);
        assert_eq!(container.exit_status(), 0);
        container.delete().expect("delete");
        assert_eq!(String::from_utf8_lossy(&seen).lines().count(), 500_001, "terminal: {terminal}");
        wait::until_true("the journal says what is missing", || {
            let messages = systemd::messages(&["--unit", &systemd::unit_of(&container)]);
            messages.iter().any(|message| message.contains("are missing here"))
        });
    }
}

/// Sends messages to journald until its socket takes no more.
pub fn fill_queue_of_journald() {
    // The buffer of one socket holds fewer messages than journald's queue.
    let is_taken = || {
        let socket = UnixDatagram::unbound().expect("make a socket");
        socket.set_nonblocking(true).expect("wait for nothing");
        let send = || socket.send_to(b"MESSAGE=filler\n", "/run/systemd/journal/socket");
        std::iter::from_fn(|| send().ok()).count() > 0
    };
    while is_taken() {}
}

#[test]
fn a_journald_that_hangs_delays_neither_failing_calls_nor_an_exit_nor_the_next_daemon() {
    needs!(OurShim);
    let node = Node::exclusive();
    let limit = Duration::from_secs(10);
    let container = node.container("hang", Spec::sleeping()).started(&Io::default());
    let (shim, bundle, word) = (Shim::connect(&node), Bundle::new("hang"), unique("jurnal"));
    let fail = || {
        let mut request = bundle.request(&unique("hang"));
        request.options = Some(over_ttrpc(log(&word))).into();
        let begun = Instant::now();
        let (_, text) = shim.create(request).expect_err("no such mode");
        assert!(text.contains(&word) && begun.elapsed() < limit, "{text} after {:?}", begun.elapsed());
    };
    let frozen = freeze_journald();
    fill_queue_of_journald();
    // The daemon has two threads for calls. It logs each call that fails.
    (0..5).for_each(|_| fail());
    let begun = Instant::now();
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    assert!(begun.elapsed() < limit, "an exit after {:?}", begun.elapsed());
    let told = || systemd::messages(&["--unit", DAEMON_SERVICE, "PRIORITY=4"]).into_iter();
    let count = |word: &str| told().filter(|message| message.contains(word)).count();
    let begun = Instant::now();
    let earlier = daemon::kill_now();
    daemon::wait_for_another(earlier);
    (0..5).for_each(|_| fail());
    assert!(begun.elapsed() < limit * 2, "the next daemon after {:?}", begun.elapsed());
    container.delete().expect("delete");
    drop(frozen);
    // What the first daemon could not send is lost with it.
    wait::until_true("the journal gets what the daemon has logged meanwhile", || count(&word) == 5);
}

#[test]
fn a_container_that_writes_to_the_journal_itself_has_a_limit_too() {
    needs!(OurShim);
    let node = Node::shared();
    // journald raises the limit where the disk has room: by no more than 16.
    let word = unique("flood");
    let spec = Spec::sh(&format!("yes {word} | head -n 20000"));
    let ran = Ran::new(&node, limited("client", 100), Kind::Init, spec, false);
    assert!(ran.shown(&word, 100).len() < 5000);
}

/// journald allows each unit only a few lines, until this is dropped.
struct FewLines;

impl FewLines {
    const DIRECTORY: &str = "/run/systemd/journald.conf.d";
    const FILE: &str = "/run/systemd/journald.conf.d/zz-few-lines.conf";

    fn new() -> FewLines {
        let few = FewLines;
        fs::create_dir_all(Self::DIRECTORY).expect("make a directory");
        fs::write(Self::FILE, "[Journal]\nRateLimitIntervalSec=10min\nRateLimitBurst=10\n")
            .expect("write a drop-in");
        process::succeed("systemctl", &["restart", "systemd-journald.service"]);
        few
    }
}

impl Drop for FewLines {
    fn drop(&mut self) {
        let _ = fs::remove_file(Self::FILE);
        process::run("systemctl", &["restart", "systemd-journald.service"]);
    }
}

#[test]
fn the_limit_of_journald_for_a_unit_is_not_one_for_all_containers_together() {
    needs!(OurShim);
    let node = Node::exclusive();
    let _few = FewLines::new();
    for _ in 0..4 {
        let word = unique("line");
        let script = format!("for i in $(seq 1000); do echo {word}; done");
        let ran = Ran::new(&node, log("journal"), Kind::Init, Spec::sh(&script), false);
        assert_eq!(ran.shown(&word, 1000).len(), 1000);
    }
}
