//! The Task API, versions 2 and 3: one short method per RPC. `sandbox` has the Sandbox API.
//!
//! ttrpc drops a handler when the client's deadline passes. Verbs with side effects therefore run in
//! futures of their own, and the handlers only wait for them.

use std::collections::HashMap;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::{Task, create_task};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info_span};
use ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use ttrpc::{Request, Response};

use crate::id::{Namespace, Owner, ProcessKey, TaskKey};
use crate::ops::Shim;
use crate::services::{Delivery, Error};
use crate::suspect::{self, Suspect};
use crate::transport::frame::REPLAYED;
use crate::transport::sockets::{Holder, Lease, Leases, Socket};

use super::{convert, metrics, status};

/// The result of a call.
pub(super) type RpcResult<T> = ttrpc::Result<T>;

/// Who makes a request.
pub(super) struct Caller {
    /// The containerd. `None` if it is unknown.
    pub(super) owner: Option<Owner>,
    /// The namespace in the metadata of the request, or else the one that has leased the socket.
    pub(super) namespace: Namespace,
}

/// The Task service of one socket.
pub struct TaskService {
    pub(super) shim: Arc<Shim>,
    /// The lease of the socket over which it is called. `None` for the socket that every caller may use.
    holder: Option<Holder>,
}

/// The names of the service: version 3 is version 2 renamed (containerd 2.0).
pub(super) const V3: &str = "containerd.task.v3.Task";
pub(super) const V2: &str = "containerd.task.v2.Task";

impl TaskService {
    /// A service for one socket.
    pub fn new(shim: Arc<Shim>, socket: Socket, leases: &Leases) -> Self {
        let holder = match socket {
            Socket::Any => None,
            Socket::Of(number) => Some(leases.holder(number)),
        };
        Self { shim, holder }
    }

    /// The lease of the socket over which the service is called.
    fn lease(&self) -> RpcResult<Lease> {
        let lease = self.holder.as_ref().map(Holder::lease).transpose();
        let unreadable =
            |error| status::unavailable(format!("can't tell which containerd uses this socket: {error}"));
        Ok(lease.map_err(unreadable)?.flatten().unwrap_or_default())
    }

    /// Who makes a request.
    pub(super) fn caller(&self, ctx: &TtrpcContext) -> RpcResult<Caller> {
        let named = convert::namespace(&ctx.metadata).map_err(status::invalid)?;
        let Lease { owner, namespace } = self.lease()?;
        let namespace = named.or(namespace).ok_or_else(|| {
            status::invalid(match &self.holder {
                None => convert::Error::NoNamespace,
                Some(_) => convert::Error::NoLease,
            })
        })?;
        Ok(Caller { owner, namespace })
    }

    /// The task with this namespace and id that belongs to the caller.
    fn located(&self, owner: Option<&Owner>, named: &TaskKey) -> TaskKey {
        match (owner, &self.holder) {
            (Some(owner), _) => self.shim.tasks.own(named, owner),
            (None, None) => self.shim.tasks.without_lease(named),
            // An earlier version has leased the socket, or somebody has removed the lease.
            (None, Some(_)) => self.shim.tasks.any(named),
        }
    }

    fn key(&self, ctx: &TtrpcContext, id: &str) -> RpcResult<TaskKey> {
        let Caller { owner, namespace } = self.caller(ctx)?;
        let named = convert::key(namespace, id).map_err(status::invalid)?;
        Ok(self.located(owner.as_ref(), &named))
    }

    /// The process of a request: the init process, if the request names no exec.
    pub(super) fn process(&self, ctx: &TtrpcContext, id: &str, exec: &str) -> RpcResult<ProcessKey> {
        let Caller { owner, namespace } = self.caller(ctx)?;
        let named = convert::process(namespace, id, exec).map_err(status::invalid)?;
        Ok(ProcessKey { task: self.located(owner.as_ref(), &named.task), ..named })
    }

    /// The task that a caller is about to create from a bundle.
    pub(super) async fn created_by(
        &self,
        owner: Option<&Owner>,
        verb: &str,
        named: &TaskKey,
        bundle: &Path,
    ) -> RpcResult<TaskKey> {
        match owner {
            Some(owner) => Ok(self.shim.tasks.own(named, owner)),
            None => {
                let own = self.shim.tasks.own_by_bundle(&self.shim.files, named, bundle).await;
                own.map_err(|error| refuse(verb, &named.init(), &error.busy_means_exists()))
            }
        }
    }

    /// The dispatch tables: the Task service under both of its names, and the Sandbox service.
    pub fn services(self: Arc<Self>) -> HashMap<String, Service> {
        let tasks: Arc<dyn Task + Send + Sync> = self.clone();
        let by_name = |name: &str| {
            let mut table = create_task(tasks.clone()).into_iter();
            let (_, service) = table.find(|(found, _)| found == V3)?;
            Some((name.to_owned(), service))
        };
        let sandboxes = create_sandbox(self);
        [V2, V3].into_iter().filter_map(by_name).chain(sandboxes).map(suspected).collect()
    }

    /// Runs a verb to its end, even if the handler is dropped.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        verb: &'static str,
        key: &ProcessKey,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> RpcResult<T> {
        let exec = key.exec.as_ref().map(tracing::field::display);
        let span =
            info_span!("call", verb, namespace = %key.task.namespace, id = %key.task.id, exec_id = exec);
        let key = key.clone();
        let begun = Instant::now();
        let logged = async move {
            let result = work.await;
            match &result {
                Ok(_) => tracing::debug!("{verb} of {key} succeeded in {} ms", begun.elapsed().as_millis()),
                Err(error) => log(verb, &key, error),
            }
            result
        };
        let result = tokio::spawn(suspect::inherit(logged.instrument(span))).await;
        result.unwrap_or(Err(Error::Stopping)).map_err(|error| status::status(&error))
    }
}

pub(super) type Method = Box<dyn MethodHandler + Send + Sync>;

pub(super) fn suspected((name, mut service): (String, Service)) -> (String, Service) {
    let methods = service.methods.drain();
    service.methods = methods.map(|(name, handler)| (name, Box::new(Suspected(handler)) as Method)).collect();
    (name, service)
}

/// A method that records its request while it runs: if the daemon crashes, the next one knows by which request.
struct Suspected(Method);

#[async_trait]
impl MethodHandler for Suspected {
    async fn handler(&self, ctx: TtrpcContext, request: Request) -> RpcResult<Response> {
        let suspect = Suspect::request(ctx.mh.stream_id, &request.service, &request.method, &request.payload);
        suspect.watch(self.0.handler(ctx, request)).await
    }
}

/// Whether the request is replayed. The client does not know: the connection marks requests that an earlier daemon has
/// read.
pub(super) fn delivery(ctx: &TtrpcContext) -> Delivery {
    if ctx.mh.flags & REPLAYED != 0 { Delivery::Replayed } else { Delivery::First }
}

/// Logs a failed call and returns the error for the client.
pub(super) fn refuse(verb: &str, key: &ProcessKey, error: &Error) -> ttrpc::Error {
    log(verb, key, error);
    status::status(error)
}

/// Logs a failed call. A call for a process that does not exist is usual, and logged at level debug.
fn log(verb: &str, key: &ProcessKey, error: &Error) {
    let text = status::text(error);
    match error {
        Error::UnknownTask { .. } | Error::UnknownExec { .. } | Error::Finished => {
            tracing::debug!("{verb} of {key} refused: {text}");
        }
        _ => tracing::warn!("{verb} of {key} failed: {text}"),
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, ctx: &TtrpcContext, request: StateRequest) -> RpcResult<StateResponse> {
        let key = self.process(ctx, &request.id, &request.exec_id)?;
        let state = self.shim.tasks.state(&key).map_err(|error| refuse("state", &key, &error))?;
        Ok(convert::state(key.id(), state))
    }

    async fn create(&self, ctx: &TtrpcContext, request: CreateTaskRequest) -> RpcResult<CreateTaskResponse> {
        let Caller { owner, namespace } = self.caller(ctx)?;
        let mut call = convert::create(namespace, request).map_err(status::invalid)?;
        call.key = self.created_by(owner.as_ref(), "create", &call.key, &call.request.bundle).await?;
        let (shim, delivery) = (self.shim.clone(), delivery(ctx));
        call.request.has_lease = Some(owner.is_some());
        let init = call.key.init();
        let pid = self.run("create", &init, async move { shim.create(call, delivery).await }).await?;
        Ok(CreateTaskResponse { pid: convert::pid(pid), ..CreateTaskResponse::default() })
    }

    async fn exec(&self, ctx: &TtrpcContext, request: ExecProcessRequest) -> RpcResult<Empty> {
        let Caller { owner, namespace } = self.caller(ctx)?;
        let mut call = convert::exec(namespace, request).map_err(status::invalid)?;
        call.task = self.located(owner.as_ref(), &call.task);
        let process = ProcessKey { task: call.task.clone(), exec: Some(call.exec.clone()) };
        let (shim, delivery) = (self.shim.clone(), delivery(ctx));
        self.run("exec", &process, async move { shim.add_exec(call, delivery).await }).await?;
        Ok(Empty::new())
    }

    async fn start(&self, ctx: &TtrpcContext, request: StartRequest) -> RpcResult<StartResponse> {
        let key = self.process(ctx, &request.id, &request.exec_id)?;
        let (shim, process, delivery) = (self.shim.clone(), key.clone(), delivery(ctx));
        let pid = self.run("start", &process, async move { shim.start(&key, delivery).await }).await?;
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    async fn delete(&self, ctx: &TtrpcContext, request: DeleteRequest) -> RpcResult<DeleteResponse> {
        let mut key = self.process(ctx, &request.id, &request.exec_id)?;
        let given_up = convert::gives_up(&ctx.metadata).map_err(status::invalid)?;
        if let Some(owner) = &given_up {
            key.task = self.shim.tasks.own(&key.task, owner);
        }
        let (shim, process, delivery) = (self.shim.clone(), key.clone(), delivery(ctx));
        let gone = CancellationToken::new();
        // ttrpc drops this handler when the client's deadline passes.
        let _waits = gone.clone().drop_guard();
        let deleted = self.run("delete", &process, async move {
            match given_up {
                Some(owner) => shim.clean_up(&key.task, &owner).await,
                None => shim.delete(&key, delivery, &gone).await,
            }
        });
        let deleted = deleted.await?;
        Ok(convert::delete(deleted.pid, deleted.exit))
    }

    async fn pids(&self, ctx: &TtrpcContext, request: PidsRequest) -> RpcResult<PidsResponse> {
        let key = self.process(ctx, &request.id, "")?;
        let pids = self.shim.tasks.pids(&key.task).await.map_err(|error| refuse("pids", &key, &error))?;
        convert::pids(pids).map_err(status::invalid)
    }

    async fn kill(&self, ctx: &TtrpcContext, request: KillRequest) -> RpcResult<Empty> {
        let key = self.process(ctx, &request.id, &request.exec_id)?;
        let (shim, process, delivery) = (self.shim.clone(), key.clone(), delivery(ctx));
        let (signal, all) = (request.signal, request.all);
        self.run("kill", &process, async move { shim.tasks.kill(&key, signal, all, delivery).await }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, ctx: &TtrpcContext, request: ResizePtyRequest) -> RpcResult<Empty> {
        let key = self.process(ctx, &request.id, &request.exec_id)?;
        let (shim, process) = (self.shim.clone(), key.clone());
        let (columns, rows) = (request.width, request.height);
        self.run("resize", &process, async move { shim.tasks.resize(&key, columns, rows).await }).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, ctx: &TtrpcContext, request: CloseIORequest) -> RpcResult<Empty> {
        let key = self.process(ctx, &request.id, &request.exec_id)?;
        self.shim.close_stdin(&key).map_err(|error| refuse("close-io", &key, &error))?;
        Ok(Empty::new())
    }

    async fn wait(&self, ctx: &TtrpcContext, request: WaitRequest) -> RpcResult<WaitResponse> {
        let key = self.process(ctx, &request.id, &request.exec_id)?;
        let exit = self.shim.wait(&key, delivery(ctx)).await.map_err(|error| refuse("wait", &key, &error))?;
        Ok(convert::wait(exit))
    }

    async fn connect(&self, ctx: &TtrpcContext, request: ConnectRequest) -> RpcResult<ConnectResponse> {
        let key = self.key(ctx, &request.id)?;
        let task_pid = convert::pid(self.shim.tasks.init_pid(&key));
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, ..ConnectResponse::default() })
    }

    /// Does nothing: the daemon serves all tasks of the node, and does not end with one of them.
    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> RpcResult<Empty> {
        Ok(Empty::new())
    }

    async fn stats(&self, ctx: &TtrpcContext, request: StatsRequest) -> RpcResult<StatsResponse> {
        let key = self.process(ctx, &request.id, "")?;
        let stats = self.shim.stats(&key.task).await.map_err(|error| refuse("stats", &key, &error))?;
        metrics::stats(stats).map_err(status::invalid)
    }

    async fn pause(&self, ctx: &TtrpcContext, request: PauseRequest) -> RpcResult<Empty> {
        let (key, delivery) = (self.process(ctx, &request.id, "")?, delivery(ctx));
        let (shim, task) = (self.shim.clone(), key.task.clone());
        self.run("pause", &key, async move { shim.pause(&task, delivery).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, ctx: &TtrpcContext, request: ResumeRequest) -> RpcResult<Empty> {
        let (key, delivery) = (self.process(ctx, &request.id, "")?, delivery(ctx));
        let (shim, task) = (self.shim.clone(), key.task.clone());
        self.run("resume", &key, async move { shim.resume(&task, delivery).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, ctx: &TtrpcContext, request: CheckpointTaskRequest) -> RpcResult<Empty> {
        let (key, delivery) = (self.process(ctx, &request.id, "")?, delivery(ctx));
        let checkpoint =
            convert::checkpoint(request.path, request.options.as_ref()).map_err(status::invalid)?;
        let (shim, task) = (self.shim.clone(), key.task.clone());
        self.run("checkpoint", &key, async move { shim.checkpoint(&task, checkpoint, delivery).await })
            .await?;
        Ok(Empty::new())
    }

    async fn update(&self, ctx: &TtrpcContext, request: UpdateTaskRequest) -> RpcResult<Empty> {
        let (key, delivery) = (self.process(ctx, &request.id, "")?, delivery(ctx));
        let (shim, task) = (self.shim.clone(), key.task.clone());
        let resources = request.resources.into_option().unwrap_or_default().value;
        self.run("update", &key, async move { shim.update(&task, resources, delivery).await }).await?;
        Ok(Empty::new())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Mutex, PoisonError};

    use tracing_subscriber::layer::SubscriberExt;
    use ttrpc::Code;

    use super::*;
    use crate::api::messages::SystemdOptions;
    use crate::simulation::harness::World;

    /// What is logged.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn context() -> TtrpcContext {
        let namespace = (convert::NAMESPACE_KEY.to_owned(), vec!["absent".to_owned()]);
        TtrpcContext {
            mh: ttrpc::MessageHeader::default(),
            metadata: [namespace].into(),
            timeout_nano: 0,
            connection_data: Arc::default(),
        }
    }

    #[test]
    fn a_call_without_a_namespace_is_told_why_there_is_none() {
        let texts = World::new("no-namespace").live(|shim| async move {
            [Socket::Any, Socket::Of(3)].map(|socket| {
                let service = TaskService::new(shim.clone(), socket, &Leases::new("/no/leases"));
                let context = TtrpcContext { metadata: Default::default(), ..context() };
                service.caller(&context).err().unwrap().to_string()
            })
        });
        let [for_all, for_one] = texts.unwrap();
        assert!(for_all.contains("at most 32"), "{for_all}");
        assert!(for_one.contains("restart containerd") && !for_one.contains("at most"), "{for_one}");
    }

    /// A Create for this bundle of a world, with the runtime of the world.
    fn create(world: &World, bundle: &Path) -> CreateTaskRequest {
        let root = world.runtime_root().parent().unwrap().display().to_string();
        let options = SystemdOptions {
            binary_name: "/bin/true".to_owned(),
            root,
            log: "none".to_owned(),
            ..SystemdOptions::default()
        };
        CreateTaskRequest {
            id: world.task.id.to_string(),
            bundle: bundle.display().to_string(),
            options: Some(convert::any("containerd.systemd.v1.Options", &options).unwrap()).into(),
            ..CreateTaskRequest::default()
        }
    }

    #[test]
    fn a_caller_without_a_lease_does_not_delete_the_task_of_one_that_has_a_lease() {
        let world = World::new("absent");
        let bundle = world.create_call().request.bundle;
        let elsewhere = world.state_dir().with_file_name("elsewhere").join("absent").join("web");
        std::fs::create_dir_all(&elsewhere).unwrap();
        for file in std::fs::read_dir(&bundle).unwrap().flatten() {
            std::fs::copy(file.path(), elsewhere.join(file.file_name())).unwrap();
        }
        let [of_leased, of_other] = [create(&world, &bundle), create(&world, &elsewhere)];
        let leases = Leases::new(world.state_dir());
        let owner = Owner::new("0123456789abcdef").unwrap();
        let socket = leases.claim(&owner, None).unwrap().unwrap();
        let task = world.task.clone();
        let lived = world.live(move |shim| async move {
            let [leased, any] =
                [socket, Socket::Any].map(|socket| TaskService::new(shim.clone(), socket, &leases));
            let id = || task.id.to_string();
            let delete = || DeleteRequest { id: id(), ..DeleteRequest::default() };
            let state = || StateRequest { id: id(), ..StateRequest::default() };
            let ctx = &context();
            leased.create(ctx, of_leased).await.unwrap();
            for answer in [any.state(ctx, state()).await.map(drop), any.delete(ctx, delete()).await.map(drop)]
            {
                let error = answer.unwrap_err();
                assert!(
                    matches!(&error, ttrpc::Error::RpcStatus(status) if status.code() == Code::NOT_FOUND)
                );
            }
            // Of a task of an earlier version, nobody knows whether its client had a lease.
            let entry = shim.tasks.entry(&task.of(owner)).unwrap();
            for (has_lease, is_found) in [(None, true), (Some(true), false)] {
                entry.task().request.has_lease = has_lease;
                assert_eq!(any.state(ctx, state()).await.is_ok(), is_found);
            }
            // A further containerd for which there was no lease. Its tasks have an owner, too.
            any.create(ctx, of_other).await.unwrap();
            any.delete(ctx, delete()).await.unwrap();
            leased.delete(ctx, delete()).await.unwrap();
        });
        lived.unwrap();
        assert_eq!(world.remains(), Vec::<String>::new());
    }

    #[test]
    fn every_call_that_fails_is_logged_with_its_name_and_its_task() {
        let (world, log) = (World::new("logged"), Log::default());
        let writer = log.clone();
        let to_log = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(move || writer.clone());
        let _logged = tracing::subscriber::set_default(tracing_subscriber::registry().with(to_log));
        let failed = world.live(move |shim| async move {
            let service = TaskService::new(shim, Socket::Any, &Leases::new("/no/leases"));
            let mut failed = Vec::new();
            macro_rules! call {
                ($verb:literal, $method:ident, $request:ident) => {
                    let request = $request { id: $verb.to_owned(), ..Default::default() };
                    failed.push(($verb, service.$method(&context(), request).await.map(drop)));
                };
            }
            call!("state", state, StateRequest);
            call!("start", start, StartRequest);
            call!("delete", delete, DeleteRequest);
            call!("pids", pids, PidsRequest);
            call!("kill", kill, KillRequest);
            call!("resize", resize_pty, ResizePtyRequest);
            call!("close-io", close_io, CloseIORequest);
            call!("wait", wait, WaitRequest);
            call!("stats", stats, StatsRequest);
            call!("pause", pause, PauseRequest);
            call!("resume", resume, ResumeRequest);
            call!("update", update, UpdateTaskRequest);
            let bundle = "/no/such/bundle".to_owned();
            let request = CreateTaskRequest { id: "create".to_owned(), bundle, ..Default::default() };
            failed.push(("create", service.create(&context(), request).await.map(drop)));
            let process = protobuf::MessageField::some(protobuf::well_known_types::any::Any::new());
            let request = ExecProcessRequest {
                id: "exec".to_owned(),
                exec_id: "e".to_owned(),
                spec: process,
                ..Default::default()
            };
            failed.push(("exec", service.exec(&context(), request).await.map(|_: Empty| ())));
            let path = "/checkpoint".to_owned();
            let request = CheckpointTaskRequest { id: "checkpoint".to_owned(), path, ..Default::default() };
            failed.push(("checkpoint", service.checkpoint(&context(), request).await.map(drop)));
            failed
        });
        let text = log.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let text = String::from_utf8(text).unwrap();
        for (verb, answer) in failed.unwrap() {
            assert!(answer.is_err(), "{verb}");
            let is_named =
                |line: &str| line.contains(&format!("{verb} of absent/{verb}")) && !line.contains("INFO");
            assert!(text.lines().any(is_named), "{verb} fails with {answer:?} in silence: {text}");
        }
    }
}
