//! Tests of sandboxes from Create to Shutdown, on a simulated node.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::effects::{Failure, Plan};
use crate::id::{Owner, ProcessKey};
use crate::oci::pod::{Namespace, Pod, Seccomp};
use crate::ops::Shim;
use crate::services::{Delivery, Error, WaitsFor};

use super::harness::World;
use crate::ops::{CreateSandbox, Status};

impl World {
    fn create_sandbox_call(&self) -> CreateSandbox {
        let call = self.create_call();
        CreateSandbox {
            key: call.key,
            bundle: call.request.bundle,
            rootfs: Vec::new(),
            pod: Some(Pod { name: "web".to_owned(), ..Pod::default() }),
            network: String::new(),
            options: call.options,
            has_lease: None,
        }
    }

    /// A call for a pod with files in a directory of containerd. Returns the path of one of them.
    fn call_with_files(&self, namespace: &str) -> (CreateSandbox, PathBuf) {
        let root = self.state_dir().with_file_name("containerd");
        let of_task = format!("io.containerd.sandbox.controller.v1.shim/{namespace}/web");
        let [bundle, work] = ["state", "root"].map(|dir| root.join(dir).join(&of_task));
        let plugin = root.join("root/io.containerd.grpc.v1.cri");
        [&bundle, &plugin].into_iter().for_each(|dir| std::fs::create_dir_all(dir).unwrap());
        std::os::unix::fs::symlink(work, bundle.join("work")).unwrap();
        self.called_from(&bundle);
        // A pod with the IPC namespace of the node needs no mount.
        let pod = Pod { name: "web".to_owned(), ipc: Namespace::Node, ..Pod::default() };
        let call = CreateSandbox { bundle, pod: Some(pod), ..self.create_sandbox_call() };
        (call, plugin.join("sandboxes/web/hosts"))
    }

    fn spec(&self, call: &CreateSandbox) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(call.bundle.join("config.json")).unwrap()).unwrap()
    }
}

#[test]
fn a_sandbox_lives_and_leaves_nothing() {
    let world = World::new("sandbox-life");
    let (call, init) = (world.create_sandbox_call(), world.init());
    let spec_of = call.clone();
    let states = world.live(move |shim| async move {
        shim.create_sandbox(call, Delivery::First).await.unwrap();
        let created = shim.sandbox_state(&init.task).await.unwrap();
        shim.start_sandbox(&init, Delivery::First).await.unwrap();
        let running = shim.sandbox_state(&init.task).await.unwrap();
        shim.stop_sandbox(&init.task, None, Delivery::First).await.unwrap();
        // A sandbox that has ended is stopped.
        shim.stop_sandbox(&init.task, None, Delivery::First).await.unwrap();
        let stopped = shim.sandbox_state(&init.task).await.unwrap();
        shim.shut_down_sandbox(&init.task).await.unwrap();
        // There is nothing to shut down any more.
        shim.shut_down_sandbox(&init.task).await.unwrap();
        [created.status, running.status, stopped.status]
    });
    assert_eq!(states, Some([Status::Created, Status::Running, Status::Stopped]));
    assert_eq!(world.spec(&spec_of)["process"]["args"][0], "/sandbox");
    assert_eq!(world.remains(), Vec::<String>::new());
    assert_eq!(world.events(), ["create", "start", "exit", "delete"]);
}

#[test]
fn a_replayed_create_finds_the_sandbox_and_leaves_its_spec_alone() {
    let world = World::new("sandbox-replay");
    let call = world.create_sandbox_call();
    let first = call.clone();
    world
        .live(move |shim| async move { shim.create_sandbox(first, Delivery::First).await })
        .unwrap()
        .unwrap();
    std::fs::write(call.bundle.join("config.json"), "{\"edited\": true}").unwrap();
    let (again, other) = (call.clone(), call.clone());
    let (replayed, repeated) = world
        .live(move |shim| async move {
            (
                shim.create_sandbox(again, Delivery::Replayed).await,
                shim.create_sandbox(other, Delivery::First).await,
            )
        })
        .unwrap();
    assert!(replayed.is_ok() && matches!(repeated, Err(Error::Exists { .. })), "{replayed:?} {repeated:?}");
    assert_eq!(world.spec(&call)["edited"], true);
}

#[test]
fn a_replayed_create_makes_the_sandbox_anew_if_what_was_begun_is_rolled_back() {
    let world = World::new("sandbox-anew");
    let (call, hosts) = world.call_with_files("sandbox-anew");
    let (first, init) = (call.clone(), world.init());
    world
        .live(move |shim| async move {
            shim.create_sandbox(first, Delivery::First).await.unwrap();
            shim.shut_down_sandbox(&init.task).await.unwrap();
        })
        .unwrap();
    let start = format!("start {}", world.unit());
    let at = world.effects.log().iter().position(|effect| *effect == start).unwrap();
    world.effects.plan(Plan::Stop(at));
    let again = call.clone();
    let ended = world.live(move |shim| async move { shim.create_sandbox(again, Delivery::First).await });
    assert!(ended.is_none() && world.effects.log().last() == Some(&start));
    world.effects.plan(Plan::Undisturbed);
    // The next daemon continues the Create, and waits for turns before the start of the unit.
    let turns = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let turns = turns.block_on(WaitsFor::Disk.all_turns(&world.task));
    let (effects, init) = (world.effects.clone(), world.init());
    let (replayed, is_sandbox) = world
        .live(move |shim| async move {
            let creating = shim.clone();
            let replayed =
                tokio::spawn(async move { creating.create_sandbox(call, Delivery::Replayed).await });
            tokio::time::sleep(Duration::from_millis(100)).await;
            effects.plan(Plan::Refuse("disk record.json"));
            drop(turns);
            let replayed = replayed.await.unwrap();
            assert!(effects.was_reached() && effects.log().contains(&start));
            (replayed, shim.tasks.entry(&init.task).unwrap().task().request.sandbox.is_some())
        })
        .unwrap();
    assert!(replayed.is_ok(), "{replayed:?}");
    assert!(is_sandbox && hosts.exists());
}

#[test]
fn a_sandbox_that_runs_is_killed_by_a_shutdown() {
    let world = World::new("sandbox-shutdown");
    let (call, init) = (world.create_sandbox_call(), world.init());
    let shut_down = world.live(move |shim| async move {
        shim.create_sandbox(call, Delivery::First).await?;
        shim.start(&init, Delivery::First).await?;
        shim.shut_down_sandbox(&init.task).await
    });
    assert!(shut_down.unwrap().is_ok());
    assert_eq!(world.remains(), Vec::<String>::new());
}

/// The files of both are in the same place.
#[test]
fn what_is_left_of_an_earlier_sandbox_is_removed_before_the_files_of_the_next_one_are_made() {
    let world = World::new("sandbox-again");
    let (call, hosts) = world.call_with_files("sandbox-again");
    let (first, second, init) = (call.clone(), call, world.init());
    let (effects, there) = (world.effects.clone(), hosts.clone());
    let (given_up, has_files) = world
        .live(move |shim| async move {
            shim.create_sandbox(first, Delivery::First).await.unwrap();
            effects.plan(Plan::Refuse("stop "));
            let given_up = shim.clean_up(&init.task, &Owner::default()).await;
            shim.create_sandbox(second, Delivery::First).await.unwrap();
            let has_files = there.exists();
            shim.shut_down_sandbox(&init.task).await.unwrap();
            (given_up, has_files)
        })
        .unwrap();
    assert!(matches!(given_up, Err(Error::NotRemoved { .. })), "{given_up:?}");
    assert!(has_files && !hosts.exists());
    assert_eq!(world.remains(), Vec::<String>::new());
}

/// The files of a pod are in a directory of containerd.
#[test]
fn a_sandbox_whose_disk_does_not_answer_is_removed_once_it_answers() {
    let world = World::new("sandbox-disk");
    let (call, hosts) = world.call_with_files("sandbox-disk");
    let init = world.init();
    let there = hosts.clone();
    let (refused, had_files) = world
        .live(move |shim| async move {
            shim.create_sandbox(call, Delivery::First).await.unwrap();
            let disk = shim.files.occupy(&init);
            let refused = shim.shut_down_sandbox(&init.task).await;
            let had_files = there.exists();
            drop(disk);
            shim.shut_down_sandbox(&init.task).await.unwrap();
            (refused, had_files)
        })
        .unwrap();
    assert!(matches!(refused, Err(Error::NotRemoved { .. })), "{refused:?}");
    // The next try of the client must not take the task for another one.
    let reason = refused.unwrap_err().to_string();
    assert!(reason.contains("another call still works on its files"), "{reason}");
    assert!(had_files && !hosts.exists());
    assert_eq!(world.remains(), Vec::<String>::new());
}

#[test]
fn the_spec_of_a_client_gets_the_shims_process() {
    let world = World::new("sandbox-spec");
    let call = CreateSandbox { pod: None, ..world.create_sandbox_call() };
    std::fs::write(call.bundle.join("config.json"), r#"{"hostname":"x","process":{"args":["sh"]}}"#).unwrap();
    let spec_of = call.clone();
    world.live(move |shim| async move { shim.create_sandbox(call, Delivery::First).await }).unwrap().unwrap();
    let spec = world.spec(&spec_of);
    assert_eq!((&spec["hostname"], &spec["process"]["args"][0]), (&"x".into(), &"/sandbox".into()));
}

#[test]
fn unsupported_settings_of_a_pod_are_refused_before_anything_is_changed() {
    let world = World::new("sandbox-refused");
    let call = world.create_sandbox_call();
    let with = |pod: Pod| CreateSandbox { pod: Some(pod), ..call.clone() };
    let missing = Seccomp::File(Path::new("/there/is/no/such/profile.json").to_owned());
    let no_profile = with(Pod { seccomp: missing, ..Pod::default() });
    let climbs = CreateSandbox { bundle: "/run/../x".into(), ..call.clone() };
    let [profile, climbs] = world
        .live(move |shim| async move {
            let mut refused = Vec::new();
            for call in [no_profile, climbs] {
                refused.push(shim.create_sandbox(call, Delivery::First).await.unwrap_err());
            }
            <[Error; 2]>::try_from(refused).unwrap()
        })
        .unwrap();
    assert!(matches!(profile, Error::Profile(_)), "{profile}");
    assert!(matches!(climbs, Error::BundlePath(_)), "{climbs}");
    assert_eq!(world.spec(&call), serde_json::json!({}));
}

#[test]
fn calls_for_a_sandbox_that_was_never_created_are_not_found() {
    let world = World::new("sandbox-unknown");
    let init: ProcessKey = world.init();
    let (stopped, state) = world
        .live(move |shim| async move {
            (shim.stop_sandbox(&init.task, None, Delivery::First).await, shim.sandbox_state(&init.task).await)
        })
        .unwrap();
    assert!(matches!(stopped, Err(Error::UnknownTask { .. })));
    assert!(matches!(state, Err(Error::UnknownTask { .. })));
}

/// A call in the life of a sandbox.
#[derive(Clone, Copy, Debug)]
enum Call {
    Create,
    Start,
    Stop,
    ShutDown,
}

static LIFE: [Call; 4] = [Call::Create, Call::Start, Call::Stop, Call::ShutDown];

impl Call {
    async fn make(
        self,
        shim: &Arc<Shim>,
        create: &CreateSandbox,
        init: &ProcessKey,
        delivery: Delivery,
    ) -> Result<(), Error> {
        match self {
            Self::Create => shim.create_sandbox(create.clone(), delivery).await,
            Self::Start => shim.start_sandbox(init, delivery).await.map(drop),
            Self::Stop => shim.stop_sandbox(&init.task, None, delivery).await,
            Self::ShutDown => shim.shut_down_sandbox(&init.task).await,
        }
    }
}

/// Makes calls one after the other, in one daemon. Returns `None` if the daemon ended.
fn make(world: &World, calls: &'static [Call], delivery: Delivery) -> Option<Result<(), Error>> {
    let (create, init) = (world.create_sandbox_call(), world.init());
    world.live(move |shim| async move {
        for call in calls {
            call.make(&shim, &create, &init, delivery).await?;
        }
        Ok(())
    })
}

/// More effects than any call has.
const MANY: usize = 200;

/// Lets an effect of a call fail, and repeats a call that fails. Returns false if the call has no such effect.
fn fail_at(at: usize, effect: usize, failure: Failure) -> bool {
    let world = World::new(&format!("sandbox-fail-{at}-{failure:?}"));
    make(&world, &LIFE[..at], Delivery::First).unwrap().unwrap();
    let (effects, create, init) = (world.effects.clone(), world.create_sandbox_call(), world.init());
    let done = world.live(move |shim| async move {
        effects.plan(Plan::Fail(effect, failure));
        let done = LIFE[at].make(&shim, &create, &init, Delivery::First).await;
        let place =
            format!("{:?}, effect {effect} ({:?}) fails by {failure:?}", LIFE[at], effects.log().get(effect));
        let was_reached = effects.was_reached();
        effects.plan(Plan::Undisturbed);
        let again = match done {
            Ok(()) => Ok(()),
            Err(_) => LIFE[at].make(&shim, &create, &init, Delivery::First).await,
        };
        (place, was_reached, again.err().map(|error| error.to_string()))
    });
    let (place, was_reached, again) = done.unwrap();
    assert_eq!(again, None, "{place}");
    let rest = make(&world, &LIFE[at + 1..], Delivery::First).unwrap();
    assert_eq!(rest.err().map(|error| error.to_string()), None, "{place}");
    assert_eq!(world.remains(), Vec::<String>::new(), "{place}");
    assert_eq!(world.events(), ["create", "start", "exit", "delete"], "{place}");
    was_reached
}

#[test]
fn any_effect_in_the_life_of_a_sandbox_may_fail() {
    // The tests run in parallel, because most of their time is spent waiting for threads.
    std::thread::scope(|scope| {
        for failure in Failure::ALL {
            scope.spawn(move || {
                for (at, call) in LIFE.iter().enumerate() {
                    let last = (0..MANY).find(|effect| !fail_at(at, *effect, failure));
                    assert!(last.is_some_and(|effects| effects > 0), "{call:?}: {last:?}");
                }
            });
        }
    });
}

#[test]
fn the_daemon_may_end_at_any_step_in_the_life_of_a_sandbox() {
    for at in 0..LIFE.len() {
        let last = (0..MANY).find(|effect| {
            let world = World::new(&format!("sandbox-stop-{at}"));
            make(&world, &LIFE[..at], Delivery::First).unwrap().unwrap();
            world.effects.plan(Plan::Stop(*effect));
            let done = make(&world, &LIFE[at..=at], Delivery::First);
            let place =
                format!("{:?} stopped before effect {effect} ({:?})", LIFE[at], world.effects.log().last());
            let is_over = done.is_some();
            world.effects.plan(Plan::Undisturbed);
            let done = done.or_else(|| make(&world, &LIFE[at..=at], Delivery::Replayed));
            assert_eq!(done.unwrap().err().map(|error| error.to_string()), None, "{place}");
            let rest = make(&world, &LIFE[at + 1..], Delivery::First).unwrap();
            assert_eq!(rest.err().map(|error| error.to_string()), None, "{place}");
            assert_eq!(world.remains(), Vec::<String>::new(), "{place}");
            assert_eq!(world.events(), ["create", "start", "exit", "delete"], "{place}");
            is_over
        });
        assert!(last.is_some_and(|effects| effects > 0), "{:?}: {last:?}", LIFE[at]);
    }
}
