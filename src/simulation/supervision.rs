//! Tests how supervision handles reports of the kernel, of systemd and of containers, and queries that fail.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use crate::cgroup;
use crate::config;
use crate::effects::{Failure, Plan};
use crate::oci::options;
use crate::ops::Status;
use crate::services::files::SlowFiles;
use crate::services::own_unit::OwnUnit;
use crate::services::{Delivery, Error};
use crate::store::{self, Store};
use crate::supervise::removal::{Removal, Stop};
use crate::suspect::Crashes;
use crate::sys;
use crate::task::request::Mount;
use crate::unit::fake::Sleeper;
use crate::unit::name;

use super::harness::{Step, World, runtime_files, waiting_client};
use super::runtime::Starts;
use super::scenarios::{UP, WITH_EXEC, cgroups, exit_after, up};

/// Longer than a container that notifies often has to wait.
const A_PAUSE: Duration = Duration::from_millis(100);

/// The fake runtime and systemd answer at once: this is enough for any retry.
const A_WHILE: Duration = Duration::from_secs(1);

fn received(socket: &UnixDatagram) -> Option<(String, Option<u32>)> {
    let mut text = vec![0; 8192];
    let (length, sender) = sys::receive_from_process(socket, &mut text).ok()?;
    text.truncate(length);
    Some((String::from_utf8(text).unwrap(), sender))
}

#[test]
fn allowed_notifications_reach_systemd_in_the_name_of_the_init_process() {
    let world = World::new("notify");
    // Only root can send in the name of another process.
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let systemd = UnixDatagram::bind(world.notify_socket()).unwrap();
    systemd.set_nonblocking(true).unwrap();
    setsockopt(&systemd, sockopt::PassCred, &true).unwrap();
    let (mut call, init, path) = (world.create_call(), world.init(), world.container_socket());
    if let options::OptionsSource::Given(options) = &mut call.options {
        options.notify = true;
    }
    let there = path.clone();
    let heard = world.live(move |shim| async move {
        let pid = shim.create(call, Delivery::First).await.unwrap().unwrap();
        shim.start(&init, Delivery::First).await.unwrap();
        let container = UnixDatagram::unbound().unwrap();
        container.connect(&path).unwrap();
        let mut heard = Vec::new();
        for text in ["READY=1\nMAINPID=1", "MAINPID=1", &"X".repeat(5000), "EXTEND_TIMEOUT_USEC=3000000"] {
            sys::send_as(&container, text, pid).unwrap();
            tokio::time::sleep(A_PAUSE).await;
            heard.extend(received(&systemd));
        }
        // A process outside of the container has got the socket.
        container.send(b"STOPPING=1").unwrap();
        tokio::time::sleep(A_PAUSE).await;
        heard.extend(received(&systemd));
        // This sends more notifications than the daemon forwards without a pause.
        let mut pings = 0;
        for _ in 0..60 {
            sys::send_as(&container, "WATCHDOG=1", pid).unwrap();
            tokio::time::sleep(A_PAUSE).await;
            let ping = ("WATCHDOG=1".to_owned(), Some(pid));
            pings += usize::from(received(&systemd) == Some(ping));
        }
        assert!(there.exists());
        shim.tasks.kill(&init, nix::libc::SIGKILL as u32, false, Delivery::First).await.unwrap();
        shim.wait(&init, Delivery::First).await.unwrap();
        shim.delete(&init, Delivery::First, waiting_client()).await.unwrap();
        assert!(!there.exists());
        (pid, heard, pings)
    });
    let (pid, heard, pings) = heard.unwrap();
    let expected = ["READY=1", "EXTEND_TIMEOUT_USEC=3000000"].map(|text| (text.to_owned(), Some(pid)));
    assert_eq!(heard, expected);
    assert_eq!(pings, 60);
}

#[test]
fn systemd_is_asked_for_kills_that_the_kernel_did_not_report() {
    let world = up("oom-asked", &UP);
    world.systemd.set_oom_kills(Some(2));
    // The cgroup does not exist any more, and with it the count of the kernel.
    world.systemd.end_unheard(&world.unit(), 9);
    let exit = exit_after(&world, || {});
    assert_eq!(exit.map(|exit| exit.status), Some(9));
    assert_eq!(world.events(), ["create", "start", "oom", "oom", "exit"]);
}

#[test]
fn an_exit_is_reported_whatever_query_or_record_fails() {
    for failure in [Failure::Timeout, Failure::NoSpace] {
        for effect in 0.. {
            let world = up("exit-fails", &WITH_EXEC);
            let (systemd, effects) = (world.systemd.clone(), world.effects.clone());
            let (unit, exec_unit) = (world.unit(), world.exec_unit());
            let (init, exec) = (world.init(), world.exec());
            let exits = world.live(move |shim| async move {
                effects.plan(Plan::Fail(effect, failure));
                systemd.end(&exec_unit, 3);
                systemd.end(&unit, 4);
                // The bus may be lost, too.
                systemd.lose_signals();
                tokio::time::sleep(A_WHILE).await;
                systemd.lose_signals();
                tokio::time::sleep(A_WHILE).await;
                [&exec, &init].map(|key| shim.tasks.state(key).unwrap().exit.map(|exit| exit.status))
            });
            assert_eq!(exits, Some([Some(3), Some(4)]), "effect {effect}, {failure:?}");
            assert_eq!(world.events()[4..], ["exec-exit", "exit"], "effect {effect}, {failure:?}");
            if !world.effects.was_reached() {
                assert!(effect > 2, "too few effects: {effect}");
                break;
            }
        }
    }
}

/// A query that was under way when the process ended is answered before the daemon has handled the report of its end.
#[test]
fn the_exit_of_a_unit_that_disappears_is_the_one_that_systemd_reported() {
    let world = up("disappears", &WITH_EXEC);
    let (systemd, units) = (world.systemd.clone(), [world.unit(), world.exec_unit()]);
    let keys = [world.init(), world.exec()];
    let exits = world.live(move |shim| async move {
        let mut exits = Vec::new();
        // Nobody handles what is reported from now on.
        systemd.observed_by(Arc::default());
        for (unit, key) in units.iter().zip(&keys).rev() {
            let (entry, process) = shim.tasks.process(key).unwrap();
            systemd.end_and_unload(unit, 3);
            shim.units.query(&entry, &process).await;
            exits.push(shim.wait(key, Delivery::First).await.unwrap().status);
        }
        exits
    });
    assert_eq!(exits, Some(vec![3, 3]));
}

/// While there is no daemon, init ends and the kernel gives its pid to another process.
#[test]
fn another_process_with_the_pid_of_an_ended_process_gets_no_signal() {
    let world = up("reused", &UP);
    let (init, stranger) = (world.init(), Sleeper::spawn());
    let pid = stranger.pid();
    let container = world
        .live(move |shim| async move {
            let (entry, _) = shim.tasks.process(&init).unwrap();
            let task = entry.task().clone();
            (task.init.pid().unwrap(), task.cgroup().unwrap().to_owned())
        })
        .unwrap();
    let record = world.state_dir().join(world.task.namespace.as_str()).join("web/record.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace(&format!("\"pid\":{}", container.0), &format!("\"pid\":{pid}"))).unwrap();
    let init = world.init();
    let sent = world.live(move |shim| async move {
        let pidfd = shim.tasks.process(&init).unwrap().1.live().process.is_some();
        (pidfd, shim.tasks.kill(&init, nix::libc::SIGKILL as u32, false, Delivery::First).await)
    });
    let (has_pidfd, sent) = sent.unwrap();
    assert!(!has_pidfd && matches!(sent, Err(Error::Finished)), "{sent:?}");
    assert_eq!(sys::peek_exit(pid), Ok(None), "the other process lives");
}

/// Tools of an administrator move processes, and a privileged container can move its own.
#[test]
fn the_next_daemon_can_kill_processes_that_were_moved_to_another_cgroup() {
    let world = up("moved", &WITH_EXEC);
    let (init, exec, elsewhere) = (world.init(), world.exec(), Path::new("/moved.slice"));
    let pids = world.live(move |shim| async move {
        [&init, &exec].map(|key| shim.tasks.state(key).unwrap().pid.unwrap())
    });
    cgroup::fake::make(elsewhere);
    for pid in pids.unwrap() {
        cgroup::fake::place(elsewhere, pid);
    }
    let keys = [world.exec(), world.init()];
    let exits = world.live(move |shim| async move {
        let mut exits = Vec::new();
        for key in keys {
            shim.tasks.kill(&key, nix::libc::SIGKILL as u32, false, Delivery::First).await.unwrap();
            exits.push(shim.wait(&key, Delivery::First).await.unwrap().status);
        }
        exits
    });
    assert_eq!(exits, Some(vec![137, 137]));
}

/// The list of processes was read before one of them left the container, or ended and its pid was given away.
#[test]
fn a_signal_for_all_processes_reaches_none_outside_of_the_container() {
    let world = up("strangers", &UP);
    let (init, stranger, (_, container)) = (world.init(), Sleeper::spawn(), cgroups(&world));
    let listed = stranger.pid();
    let exit = world
        .live(move |shim| async move {
            let pid = shim.tasks.state(&init).unwrap().pid.unwrap();
            fs::write(cgroup::dir(&container).join("cgroup.procs"), format!("{listed}\n{pid}\n")).unwrap();
            shim.tasks.kill(&init, nix::libc::SIGTERM as u32, true, Delivery::First).await.unwrap();
            shim.wait(&init, Delivery::First).await.unwrap()
        })
        .unwrap();
    // It is behind the stranger in the list.
    assert_eq!(exit.status, 143);
    assert_eq!(sys::peek_exit(listed), Ok(None), "the other process lives");
}

/// dbus-daemon has dropped the signals, without notice.
#[test]
fn an_exit_whose_signal_is_lost_is_recorded_nevertheless() {
    for has_pidfds in [true, false] {
        let world = up("lost-signals", &WITH_EXEC);
        let (systemd, unit, exec_unit) = (world.systemd.clone(), world.unit(), world.exec_unit());
        let (init, exec) = (world.init(), world.exec());
        let exits = world.live(move |shim| async move {
            if !has_pidfds {
                for key in [&init, &exec] {
                    shim.tasks.process(key).unwrap().1.live().process = None;
                }
            }
            systemd.end_unheard(&exec_unit, 3);
            systemd.end_unheard(&unit, 5);
            let limit = Duration::from_secs(30);
            let exit = async |key| tokio::time::timeout(limit, shim.wait(key, Delivery::First)).await;
            [exit(&exec).await, exit(&init).await].map(|exit| exit.unwrap().unwrap().status)
        });
        assert_eq!(exits, Some([3, 5]), "{has_pidfds}");
        assert_eq!(world.events()[4..], ["exec-exit", "exit"], "{has_pidfds}");
    }
}

#[test]
fn the_units_of_processes_that_run_are_not_queried() {
    let world = up("no-queries", &WITH_EXEC);
    let effects = world.effects.clone();
    let lived = world.live(move |_| async move {
        tokio::time::sleep(A_WHILE).await;
        effects.plan(Plan::Undisturbed);
        tokio::time::sleep(Duration::from_secs(600)).await;
    });
    lived.unwrap();
    let queries: Vec<_> =
        world.effects.log().into_iter().filter(|effect| effect.starts_with("read")).collect();
    assert_eq!(queries, Vec::<String>::new());
}

#[test]
fn the_order_of_stops_is_made_sure_of_at_the_start_and_whenever_signals_may_have_been_missed() {
    let world = up("order", &UP);
    let systemd = world.systemd.clone();
    let orders = systemd.orders();
    let new = world.live(move |_| async move {
        tokio::time::sleep(A_WHILE).await;
        let at_start = systemd.orders() - orders;
        systemd.lose_signals();
        tokio::time::sleep(A_WHILE).await;
        (at_start, systemd.orders() - orders)
    });
    assert_eq!(new, Some((1, 2)));
}

#[test]
fn the_references_of_earlier_daemons_last_until_the_next_one_has_its_own() {
    let world = up("references", &UP);
    let systemd = world.systemd.clone();
    let forgotten = systemd.forgotten();
    systemd.answer_references(false);
    let times = world.live(move |_| async move {
        tokio::time::sleep(A_WHILE).await;
        systemd.lose_signals();
        tokio::time::sleep(Duration::from_secs(60)).await;
        let while_refused = systemd.forgotten();
        systemd.answer_references(true);
        tokio::time::sleep(Duration::from_secs(60)).await;
        (while_refused - forgotten, systemd.forgotten() > forgotten)
    });
    assert_eq!(times, Some((0, true)));
}

#[test]
fn an_exit_that_systemd_does_not_confirm_changes_nothing() {
    let world = up("unconfirmed", &UP);
    let (systemd, unit, init) = (world.systemd.clone(), world.unit(), world.init());
    let exit = world.live(move |shim| async move {
        let pid = shim.tasks.state(&init).unwrap().pid.unwrap();
        systemd.tell_late(&unit, pid, 9);
        tokio::time::sleep(A_WHILE).await;
        shim.tasks.state(&init).unwrap().exit
    });
    assert_eq!(exit, Some(None));
    assert_eq!(world.events(), ["create", "start"]);
}

#[test]
fn a_late_report_about_an_earlier_unit_of_this_name_kills_nobody() {
    let world = up("earlier-unit", &UP);
    let (systemd, unit, init) = (world.systemd.clone(), world.unit(), world.init());
    let (_, container) = cgroups(&world);
    cgroup::fake::make(&container);
    fs::write(cgroup::dir(&container).join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
    let exit = world.live(move |shim| async move {
        let pid = shim.tasks.state(&init).unwrap().pid.unwrap();
        systemd.tell_late(&unit, pid + 1, 9);
        tokio::time::sleep(A_WHILE).await;
        shim.tasks.state(&init).unwrap().exit
    });
    assert_eq!(exit, Some(None));
    assert!(!cgroup::fake::is_to_be_killed(&container));
    assert_eq!(world.events(), ["create", "start"]);
}

#[test]
fn processes_that_init_left_behind_are_killed_before_its_exit_is_reported() {
    let world = up("left-behind", &UP);
    let (systemd, unit, (_, container)) = (world.systemd.clone(), world.unit(), cgroups(&world));
    let there = container.clone();
    let exit = exit_after(&world, move || {
        systemd.end_unheard(&unit, 5);
        cgroup::fake::make(&there);
        fs::write(cgroup::dir(&there).join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        systemd.tell(&unit);
        systemd.tell(&unit);
    });
    assert_eq!(exit.map(|exit| exit.status), Some(5));
    assert!(cgroup::fake::is_to_be_killed(&container));
    assert_eq!(world.events(), ["create", "start", "exit"]);
}

#[test]
fn limits_that_are_set_on_a_paused_container_reach_its_unit_again_after_resume() {
    let world = up("paused-limits", &[Step::Create, Step::Start, Step::Pause]);
    let (_, container) = cgroups(&world);
    // The OCI runtime writes the limit.
    fs::write(cgroup::dir(&container).join("pids.max"), "5\n").unwrap();
    world.take(&[Step::Update, Step::Resume], Delivery::First).unwrap().unwrap();
    let set = world.systemd.limited();
    assert_eq!(set, [world.unit(), world.unit()].map(|unit| unit.to_string()));
}

/// The record is that of a newer version, or the daemon has moved it aside because it crashed.
#[test]
fn no_create_and_no_exec_end_processes_whose_record_can_not_be_used() {
    for is_aside in [false, true] {
        let world = up("unmanaged", &WITH_EXEC);
        let units = world.systemd.units();
        let slice = name::namespace_slice(&world.task.namespace).unwrap().slice_cgroup();
        let container = slice.join(world.unit().as_str()).join("web");
        let namespace = world.task.namespace.as_str();
        let record = world.state_dir().join(namespace).join("web/record.json");
        let of_exec = record.with_file_name("execs").join("probe/record.json");
        let newer = r#"{"version":99}"#;
        fs::write(&of_exec, newer).unwrap();
        let call = world.exec_call();
        let added = world.live(move |shim| async move { shim.add_exec(call, Delivery::First).await });
        assert!(matches!(added.unwrap(), Err(Error::Store(store::Error::Newer { .. }))));
        assert_eq!(fs::read_to_string(&of_exec).unwrap(), newer);

        let kept = if is_aside {
            let aside = world.state_dir().join(".crashed").join(format!("{namespace}:web.json"));
            fs::create_dir(aside.parent().unwrap()).unwrap();
            fs::rename(&record, &aside).unwrap();
            aside
        } else {
            fs::write(&record, newer).unwrap();
            record
        };
        let text = fs::read_to_string(&kept).unwrap();
        let call = world.create_call();
        let created = world.live(move |shim| async move {
            cgroup::fake::make(&container);
            fs::write(cgroup::dir(&container).join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
            shim.create(call, Delivery::First).await
        });
        let created = created.unwrap();
        assert!(matches!(created, Err(Error::Store(_))), "{is_aside}: {created:?}");
        assert_eq!(fs::read_to_string(&kept).unwrap(), text);
        assert_eq!(world.systemd.units(), units, "{is_aside}");
    }
}

/// A quota of the unit would stop the burst of its container.
#[test]
fn the_unit_of_a_container_with_a_burst_of_cpu_time_has_no_quota() {
    for (burst, sets) in [("0", 0), ("20000", 1)] {
        let world = up("burst", &UP);
        let (unit, container) = cgroups(&world);
        for cgroup in [&unit, &container] {
            fs::write(cgroup::dir(cgroup).join("cpu.max"), "20000 100000\n").unwrap();
        }
        // The OCI runtime writes the burst.
        fs::write(cgroup::dir(&container).join("cpu.max.burst"), format!("{burst}\n")).unwrap();
        let task = world.task.clone();
        let resources = br#"{"cpu": {"burst": 20000}}"#.to_vec();
        let updated =
            world.live(move |shim| async move { shim.update(&task, resources, Delivery::First).await });
        updated.unwrap().unwrap();
        assert_eq!(world.systemd.limited().len(), sets, "{burst}");
    }
}

#[test]
fn init_is_killed_also_if_the_kernel_does_not_kill_the_cgroup() {
    let world = up("refused-kill", &[Step::Create]);
    let (init, (_, container)) = (world.init(), cgroups(&world));
    let (killed, exit) = world
        .live(move |shim| async move {
            fs::create_dir(cgroup::dir(&container).join("cgroup.kill")).unwrap();
            let killed = shim.tasks.kill(&init, nix::libc::SIGKILL as u32, true, Delivery::First).await;
            (killed, shim.wait(&init, Delivery::First).await.unwrap())
        })
        .unwrap();
    assert!(matches!(killed, Err(Error::Cgroup(_))), "{killed:?}");
    assert_eq!(exit.status, 137);
}

#[test]
fn the_delete_command_removes_what_a_task_without_a_daemon_has() {
    let world = up("killed", &WITH_EXEC);
    let store = Store::new(world.state_dir());
    let task = store.load_all(&Crashes::default()).unwrap().remove(0).unwrap().task;
    let (runtime, dir) = (world.runtime(), store.dir(&task.key));
    let exec = OwnUnit::of(world.exec(), world.exec_unit(), store.process_dir(&world.exec()), true);
    let removed = async {
        let (manager, oci, files) = (&*world.systemd, &runtime, &SlowFiles::new(config::FILES_LIMIT));
        let runtime_files = &runtime_files();
        let removal =
            Removal { manager, oci, files, runtime_files, task: &task, dir: &dir, stop: Stop::Killed };
        removal.of_task(async { vec![exec] }).await
    };
    let threads = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let troubles = threads.block_on(removed);
    assert_eq!(troubles.text(), "");
    assert_eq!(world.systemd.units(), []);
    assert!(!task.runtime.root.join(task.key.id.as_str()).exists());
}

#[test]
fn a_delete_can_be_repeated_once_the_disk_of_the_runtime_answers() {
    let mut world = up("dead-root", &[Step::Create, Step::Start, Step::Kill]);
    let disk = world.occupy_runtime_files();
    let refused = world.take(&[Step::Delete], Delivery::First).unwrap().unwrap_err();
    assert!(
        matches!(&refused, Error::NotRemoved { reason, .. } if reason.contains("do not answer")),
        "{refused}"
    );
    assert!(world.remains().contains(&world.runtime_root().join("web").display().to_string()));
    drop(disk);
    world.take(&[Step::Delete], Delivery::First).unwrap().unwrap();
    assert_eq!(world.remains(), Vec::<String>::new());
}

#[test]
fn a_failed_start_kills_nobody_while_the_disk_of_the_runtime_does_not_answer() {
    let mut world = up("dead-root-start", &[Step::Create]);
    let status = |world: &World| {
        let init = world.init();
        world.live(move |shim| async move { shim.tasks.state(&init).unwrap().status }).unwrap()
    };
    world.starts = Starts::FailAfterwards;
    let disk = world.occupy_runtime_files();
    world.take(&[Step::Start], Delivery::First).unwrap().unwrap_err();
    assert_eq!(status(&world), Status::Created);
    drop(disk);
    // The runtime refuses to start a container that runs.
    world.take(&[Step::Start], Delivery::First).unwrap().unwrap_err();
    assert_eq!(status(&world), Status::Stopped);
}

fn has_begun(world: &World, effect: &str) -> bool {
    world.effects.log().iter().any(|begun| begun == effect)
}

#[test]
fn a_recovery_is_not_held_up_by_the_disk_of_the_runtime() {
    let mut world = up("dead-root-recovery", &[Step::Create]);
    world.starts = Starts::Hang;
    let init = world.init();
    world.live(move |shim| async move {
        tokio::spawn(async move { shim.start(&init, Delivery::First).await });
    });
    assert!(has_begun(&world, "runtime start"));
    world.starts = Starts::Work;
    // A daemon that reads the disk itself would see that init does not wait.
    let fifo = world.runtime_root().join("web/exec.fifo");
    fs::remove_file(&fifo).unwrap();
    let disk = world.occupy_runtime_files();
    let init = world.init();
    let status = world.live(move |shim| async move {
        tokio::time::sleep(A_WHILE).await;
        shim.tasks.state(&init).unwrap().status
    });
    // It still waits for its start, as far as the daemon can find out.
    assert_eq!(status, Some(Status::Created));
    drop(disk);
    fs::write(&fifo, "").unwrap();
    world.take(&[Step::Start, Step::Kill, Step::Delete], Delivery::First).unwrap().unwrap();
    assert_eq!(world.remains(), Vec::<String>::new());
}

#[test]
fn an_exit_does_not_wait_for_a_journal_that_hangs() {
    let world = up("oom-hangs", &UP);
    world.systemd.set_oom_kills(None);
    world.systemd.end_unheard(&world.unit(), 9);
    let init = world.init();
    let exit = world.live(move |shim| async move {
        let begun = tokio::time::Instant::now();
        let exit = shim.wait(&init, Delivery::First).await.unwrap();
        (exit.status, begun.elapsed())
    });
    let (status, waited) = exit.unwrap();
    assert_eq!(status, 9);
    assert!(waited <= Duration::from_secs(6), "{waited:?}");
    assert_eq!(world.events(), ["create", "start", "exit"]);
}

#[test]
fn a_query_for_kills_that_systemd_refuses_does_not_hold_back_an_exit() {
    let world = up("oom-refused", &UP);
    world.systemd.end_unheard(&world.unit(), 9);
    // The daemon lists the units, reads the unit, and then asks for the kills.
    world.effects.plan(Plan::Fail(2, Failure::Refused));
    let exit = exit_after(&world, || {});
    assert_eq!(exit.map(|exit| exit.status), Some(9));
    assert!(world.effects.was_reached(), "{:?}", world.effects.log());
    assert_eq!(world.events(), ["create", "start", "exit"]);
}

#[test]
fn a_cgroup_that_can_not_be_watched_is_watched_as_soon_as_it_can_be() {
    let world = up("unwatched", &UP);
    let (_, container) = cgroups(&world);
    let events = cgroup::dir(&container).join("cgroup.events");
    // The kernel refuses to watch this one, as it does when there are too many watches.
    fs::remove_file(&events).unwrap();
    std::os::unix::fs::symlink(&events, &events).unwrap();
    let exit = exit_after(&world, move || {
        fs::remove_file(&events).unwrap();
        cgroup::fake::set_frozen(&container, true);
    });
    assert_eq!(exit, None);
    // `live` lets three seconds pass, the daemon tries again after ten.
    assert_eq!(world.events(), ["create", "start"]);
    let (_, container) = cgroups(&world);
    let events = cgroup::dir(&container).join("cgroup.events");
    fs::remove_file(&events).unwrap();
    std::os::unix::fs::symlink(&events, &events).unwrap();
    world.live(move |_| async move {
        fs::remove_file(&events).unwrap();
        cgroup::fake::set_frozen(&container, false);
        tokio::time::sleep(Duration::from_secs(11)).await;
        cgroup::fake::set_frozen(&container, true);
        tokio::time::sleep(A_WHILE).await;
    });
    assert_eq!(world.events(), ["create", "start", "paused"]);
}

#[test]
fn limits_that_systemd_refuses_stay_on_the_container() {
    let world = World::new("limits-refused");
    let (unit, container) = cgroups(&world);
    // The OCI runtime sets the limit while it creates the container.
    cgroup::fake::make(&unit);
    cgroup::fake::make(&container);
    fs::write(cgroup::dir(&container).join("pids.max"), "5\n").unwrap();
    let call = world.create_call();
    let created = world.live({
        let effects = world.effects.clone();
        move |shim| async move {
            effects.plan(Plan::Refuse("set properties of"));
            shim.create(call, Delivery::First).await
        }
    });
    created.unwrap().unwrap();
    assert!(world.effects.was_reached(), "{:?}", world.effects.log());
    assert_eq!(world.systemd.limited(), Vec::<String>::new());
    assert_eq!(fs::read_to_string(cgroup::dir(&container).join("pids.max")).unwrap(), "5\n");
}

/// A container whose client requests a cgroup outside of the unit.
fn elsewhere(name: &str) -> (World, PathBuf) {
    let world = World::new(name);
    let path = PathBuf::from(format!("/{name}-elsewhere/web"));
    let call = world.create_call();
    let spec = format!(r#"{{"linux":{{"cgroupsPath":"{}"}}}}"#, path.display());
    fs::write(call.request.bundle.join("config.json"), spec).unwrap();
    let created = world.live(move |shim| async move { shim.create(call, Delivery::First).await });
    created.unwrap().unwrap();
    world.take(&[Step::Start], Delivery::First).unwrap().unwrap();
    (world, path)
}

#[test]
fn a_container_in_a_cgroup_of_its_client_is_watched_there_and_shares_no_limits_with_its_unit() {
    let (world, path) = elsewhere("client-cgroup");
    let dir = cgroup::dir(&path);
    fs::write(dir.join("memory.events"), "oom 1\noom_kill 1\n").unwrap();
    exit_after(&world, || {});
    fs::write(dir.join("pids.max"), "5\n").unwrap();
    world.take(&[Step::Update], Delivery::First).unwrap().unwrap();
    let frozen = path.clone();
    exit_after(&world, move || cgroup::fake::set_frozen(&frozen, true));
    assert_eq!(world.events(), ["create", "start", "oom", "paused"]);
    assert_eq!(world.systemd.limited(), Vec::<String>::new());
    world.take(&[Step::Kill, Step::Delete], Delivery::First).unwrap().unwrap();
    assert_eq!(world.remains(), Vec::<String>::new());
    cgroup::fake::remove(path.parent().unwrap());
}

#[test]
fn a_recovery_is_not_held_up_by_the_mounts_of_a_restore() {
    let mut world = World::restoring("hanging-mounts");
    world.starts = Starts::AfterHangingMounts;
    let mut call = world.create_call();
    let (kind, source) = ("tmpfs".to_owned(), "tmpfs".to_owned());
    call.request.rootfs.push(Mount { kind, source, target: String::new(), options: Vec::new() });
    world.live(move |shim| async move {
        tokio::spawn(async move { shim.create(call, Delivery::First).await });
    });
    assert!(has_begun(&world, "runtime mount"));
    let passed = world.live(|_| async {
        // The clock is paused, and has advanced by as much as the recovery has waited.
        tokio::time::Instant::now().into_std().saturating_duration_since(std::time::Instant::now())
    });
    assert!(passed.is_some_and(|passed| passed < Duration::from_secs(60)), "{passed:?}");
}
