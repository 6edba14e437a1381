use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicIsize, Ordering};

use async_trait::async_trait;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::shim_async::{Events, create_events};
use tokio::sync::Notify;
use ttrpc::asynchronous::{Server, TtrpcContext};

use super::*;
use crate::id::{TaskId, UnitName};
use crate::services::Delivery;
use crate::services::pending::Stored;
use crate::services::publishing::Publishing;
use crate::simulation::harness::{Step, World};
use crate::store::Store;
use crate::task::lifecycle::Exit;
use crate::task::outbox::TaskEvent;
use crate::task::request::Mount;
use crate::transport::ConnectionStore;

/// A store that keeps nothing.
struct Nowhere;

#[async_trait]
impl ConnectionStore for Nowhere {
    async fn keep(&self, _: &str, _: &[BorrowedFd<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn forget(&self, _: &str) {}
}

/// A containerd. While it takes an event of a task that runs out of memory, another of its processes is killed.
struct Containerd {
    tasks: Arc<Tasks>,
    noisy: Arc<Entry>,
    /// How many more processes will be killed.
    left: AtomicIsize,
    topics: Mutex<Vec<String>>,
    /// Notified once it has the exit of a task.
    exit: Arc<Notify>,
}

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let topic = request.envelope.topic.clone();
        if topic == "/tasks/exit" {
            self.exit.notify_one();
        } else if self.left.fetch_sub(1, Ordering::Relaxed) > 0 {
            self.noisy.task().owe(TaskEvent::OutOfMemory, 1);
            self.tasks.announce(&self.noisy);
        }
        self.topics.lock().unwrap().push(topic);
        Ok(Empty::default())
    }
}

#[test]
fn a_task_that_always_owes_events_does_not_delay_those_of_others() {
    const KILLS: isize = 300;
    let world = World::new("taking-turns");
    world.take(&[Step::Create], Delivery::First).unwrap().unwrap();
    let init = world.init();
    let task =
        world.live(move |shim| async move { shim.tasks.process(&init).unwrap().0.task().clone() }).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let address = dir.path().join("containerd.ttrpc").display().to_string();
    let deleted = |id: &str, events: Vec<TaskEvent>| {
        let mut task = task.clone();
        task.key.id = TaskId::new(id).unwrap();
        task.containerd.ttrpc_address = address.clone();
        task.outbox.clear();
        events.into_iter().for_each(|event| task.owe(event, 1));
        let entry = Arc::new(Entry::detached(task));
        entry.init.live().disk.stored = Stored::Nowhere;
        entry
    };
    let exit = TaskEvent::Exited { pid: 1, exit: Exit { status: 0, at_usec: 1 } };
    let noisy = deleted("noisy", vec![TaskEvent::OutOfMemory; 3]);
    let quiet = deleted("quiet", vec![exit]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let topics = runtime.block_on(async {
        let (tasks, outgoing) = Tasks::new(Store::new(dir.path().join("state")));
        let tasks = Arc::new(tasks);
        let containerd = Arc::new(Containerd {
            tasks: tasks.clone(),
            noisy: noisy.clone(),
            left: AtomicIsize::new(KILLS),
            topics: Mutex::default(),
            exit: Arc::default(),
        });
        let server = Server::new().bind(&format!("unix://{address}")).unwrap();
        let mut server = server.register_service(create_events(containerd.clone()));
        server.start().await.unwrap();
        tasks.announce(&noisy);
        tasks.announce(&quiet);
        let (connections, earlier) = EventConnections::adopt(Arc::new(Nowhere), &mut Vec::new());
        tokio::spawn(publish(tasks, outgoing, connections, earlier));
        containerd.exit.notified().await;
        containerd.topics.lock().unwrap().clone()
    });
    let before = topics.iter().take_while(|topic| *topic == "/tasks/oom").count();
    assert!(before <= 2, "{before} events of the other task came first");
}

#[test]
fn an_event_that_fits_into_no_message_is_dropped_and_any_other_waits_for_containerd() {
    let world = World::new("too-long-event");
    world.take(&[Step::Create], Delivery::First).unwrap().unwrap();
    let init = world.init();
    let dropped = world.live(move |shim| async move {
        let (entry, _) = shim.tasks.process(&init).unwrap();
        // Nobody listens there.
        let (connections, _) = EventConnections::adopt(Arc::new(Nowhere), &mut Vec::new());
        let mut link = Link::new(shim.tasks.clone(), connections, "/nonexistent".to_owned(), None);
        let mut dropped = Vec::new();
        for bytes in [LARGEST / 2, LARGEST] {
            // The event of a Create contains the mounts.
            let options = vec!["x".repeat(usize::try_from(bytes).unwrap())];
            let mut task = entry.task().clone();
            task.request.rootfs = vec![Mount { options, ..Mount::default() }];
            let event = TaskEvent::Created { pid: task.init.pid() };
            let outgoing = Outgoing { seq: 1, at_usec: 1, event, task };
            let delivery = tokio::time::timeout(FORWARD_LIMIT, link.deliver(&outgoing));
            dropped.push(delivery.await.unwrap_or(false));
        }
        dropped
    });
    assert_eq!(dropped, Some(vec![false, true]));
}

/// A store that keeps names.
#[derive(Default)]
struct Kept(Mutex<Vec<String>>);

impl Kept {
    fn names(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

#[async_trait]
impl ConnectionStore for Kept {
    async fn keep(&self, name: &str, _: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.0.lock().unwrap().push(name.to_owned());
        Ok(())
    }

    fn forget(&self, name: &str) {
        self.0.lock().unwrap().retain(|kept| kept != name);
    }
}

/// A containerd that accepts every event.
struct Accepting;

#[async_trait]
impl Events for Accepting {
    async fn forward(&self, _: &TtrpcContext, _: ForwardRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }
}

/// Waits for a moment, until something is true.
async fn becomes(is: impl Fn() -> bool) -> bool {
    let wait = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), wait).await.is_ok()
}

#[test]
fn a_containerd_that_has_no_task_any_more_keeps_no_connection_and_loses_no_event() {
    let world = World::new("gone-containerd");
    world.take(&[Step::Create], Delivery::First).unwrap().unwrap();
    let init = world.init();
    let task =
        world.live(move |shim| async move { shim.tasks.process(&init).unwrap().0.task().clone() }).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let of = |id: &str| {
        let mut task = task.clone();
        task.key.id = TaskId::new(id).unwrap();
        task.init.unit = UnitName::new(format!("{id}.service")).unwrap();
        task.containerd.ttrpc_address = dir.path().join(id).display().to_string();
        task.outbox.clear();
        task
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut servers = Vec::new();
        for id in ["used", "gone", "other"] {
            let server = Server::new().bind(&format!("unix://{}", of(id).containerd.ttrpc_address)).unwrap();
            let mut server = server.register_service(create_events(Arc::new(Accepting)));
            server.start().await.unwrap();
            servers.push(server);
        }
        let (tasks, outgoing) = Tasks::new(Store::new(dir.path().join("state")));
        let tasks = Arc::new(tasks);
        let kept = Arc::new(Kept::default());
        let (connections, earlier) = EventConnections::adopt(kept.clone(), &mut Vec::new());
        tokio::spawn(publish(tasks.clone(), outgoing, connections, earlier));
        let used = tasks.registry.insert(of("used")).unwrap().0;
        let [gone, other] = ["gone", "other"].map(|id| Arc::new(Entry::detached(of(id))));
        for entry in [&used, &gone, &other, &gone] {
            entry.init.live().disk.stored = Stored::Nowhere;
            entry.task().owe(TaskEvent::OutOfMemory, 1);
            tasks.announce(entry);
            assert!(becomes(|| entry.task().outbox.is_empty()).await, "{} is delivered", entry.key);
            let expected: &[&str] = match kept.0.lock().unwrap().last().unwrap().as_str() {
                "events-0" => &["events-0"],
                "events-1" => &["events-0", "events-1"],
                "events-2" => &["events-0", "events-2"],
                _ => &["events-0", "events-3"],
            };
            assert!(becomes(|| kept.names() == expected).await, "{:?}, not {expected:?}", kept.names());
        }
        assert_eq!(kept.names(), ["events-0", "events-3"]);
    });
}

/// The times of attempts, in milliseconds, to reach a containerd that is away. `happens` gets what notes signs.
async fn attempts<W: Future<Output = ()>>(happens: impl FnOnce(Arc<Publishing>) -> W) -> Vec<u128> {
    let publishing = Arc::new(Publishing::default());
    let (mut pauses, begun, mut times) = (Pauses::new(publishing.signs()), Instant::now(), Vec::new());
    let trying = async {
        loop {
            pauses.begin_attempt();
            times.push(begun.elapsed().as_millis());
            pauses.pause().await;
        }
    };
    tokio::select! {
        () = trying => {}
        () = happens(publishing) => {}
    }
    times
}

/// As [`attempts`], while so many signs come, one in each interval.
async fn attempts_while_signs_come(count: u32, interval: Duration) -> Vec<u128> {
    attempts(|publishing| async move {
        for _ in 0..count {
            publishing.note_sign();
            tokio::time::sleep(interval).await;
        }
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn a_sign_of_containerd_ends_a_pause_at_once() {
    let times = attempts(|publishing| async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        publishing.note_sign();
        tokio::time::sleep(EAGER / 2).await;
    })
    .await;
    let (before, after): (Vec<_>, Vec<_>) = times.into_iter().partition(|time| *time < 60_000);
    assert!(before.len() < 20, "{before:?}");
    assert!(after.first().is_some_and(|time| *time < 60_010), "{after:?}");
    assert!(after.len() > 15, "an attempt that is too early is soon repeated: {after:?}");
}

#[tokio::test(start_paused = true)]
async fn many_signs_of_containerd_make_no_busy_loop() {
    let times = attempts_while_signs_come(1000, Duration::from_millis(1)).await;
    assert!(times.len() <= 21, "{times:?}");
}

#[tokio::test(start_paused = true)]
async fn the_signs_of_one_containerd_cause_few_attempts_to_reach_another_that_is_gone() {
    let times = attempts_while_signs_come(100, Duration::from_secs(1)).await;
    let late = times.iter().filter(|time| **time > 20_000).count();
    assert!((75..=85).contains(&late), "{late}: {times:?}");
}

#[tokio::test(start_paused = true)]
async fn a_sign_during_an_attempt_is_not_lost() {
    let publishing = Publishing::default();
    let mut pauses = Pauses::new(publishing.signs());
    pauses.next = LONGEST_PAUSE;
    pauses.begin_attempt();
    publishing.note_sign();
    let begun = Instant::now();
    pauses.pause().await;
    assert!(begun.elapsed() < FIRST_PAUSE * 2, "{:?}", begun.elapsed());
}
