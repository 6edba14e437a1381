//! The Sandbox API (containerd 1.7 and later): one short method per RPC. Names of tasks and sandboxes are the same, and so
//! are the connections.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use protobuf::MessageField;
use ttrpc::asynchronous::TtrpcContext;

use crate::ops::{CreateSandbox, SandboxState, Status};
use crate::services::WaitsFor;

use super::task::{Caller, RpcResult, TaskService, delivery, refuse};
use super::{convert, metrics, pod, status};

#[async_trait]
impl Sandbox for TaskService {
    async fn create_sandbox(
        &self,
        ctx: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> RpcResult<CreateSandboxResponse> {
        let bundle = PathBuf::from(request.bundle_path);
        let Caller { owner, namespace } = self.caller(ctx)?;
        let named = convert::key(namespace, &request.sandbox_id).map_err(status::invalid)?;
        let key = self.created_by(owner.as_ref(), "create-sandbox", &named, &bundle).await?;
        let of_start = bundle.clone();
        let options = self
            .shim
            .files
            .run(WaitsFor::Disk, &key.init(), move || convert::options_of_start(&of_start))
            .await;
        let options =
            options.map_err(|error| refuse("create-sandbox", &key.init(), &error.busy_means_exists()))?;
        let call = CreateSandbox {
            key: key.clone(),
            rootfs: request.rootfs.into_iter().map(convert::mount).collect(),
            pod: pod::pod(request.options.as_ref()).map_err(status::invalid)?,
            network: request.netns_path,
            options: options.map_err(status::invalid)?,
            bundle,
            has_lease: Some(owner.is_some()),
        };
        let (shim, delivery) = (self.shim.clone(), delivery(ctx));
        let init = key.init();
        self.run("create-sandbox", &init, async move { shim.create_sandbox(call, delivery).await }).await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        ctx: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> RpcResult<StartSandboxResponse> {
        let key = self.process(ctx, &request.sandbox_id, "")?;
        let (shim, process, delivery) = (self.shim.clone(), key.clone(), delivery(ctx));
        let started = async move { shim.start_sandbox(&key, delivery).await };
        let (pid, state) = self.run("start-sandbox", &process, started).await?;
        let created_at = MessageField::some(convert::time(usec(state.created)));
        Ok(StartSandboxResponse { pid, created_at, ..StartSandboxResponse::default() })
    }

    async fn platform(&self, ctx: &TtrpcContext, request: PlatformRequest) -> RpcResult<PlatformResponse> {
        let key = self.process(ctx, &request.sandbox_id, "")?;
        self.shim.tasks.state(&key).map_err(|error| refuse("platform", &key, &error))?;
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = architecture().to_owned();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        ctx: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> RpcResult<StopSandboxResponse> {
        let (key, delivery) = (self.process(ctx, &request.sandbox_id, "")?, delivery(ctx));
        let (shim, task) = (self.shim.clone(), key.task.clone());
        let limit = Some(request.timeout_secs).filter(|secs| *secs > 0);
        let limit = limit.map(|secs| Duration::from_secs(secs.into()));
        self.run("stop-sandbox", &key, async move { shim.stop_sandbox(&task, limit, delivery).await })
            .await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        ctx: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> RpcResult<WaitSandboxResponse> {
        let key = self.process(ctx, &request.sandbox_id, "")?;
        let exit = self.shim.wait(&key, delivery(ctx)).await;
        let exit = exit.map_err(|error| refuse("wait-sandbox", &key, &error))?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(convert::time(exit.at_usec)),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        ctx: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> RpcResult<SandboxStatusResponse> {
        let key = self.process(ctx, &request.sandbox_id, "")?;
        let state = self.shim.sandbox_state(&key.task).await;
        let state = state.map_err(|error| refuse("sandbox-status", &key, &error))?;
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: convert::pid(state.pid),
            state: if is_ready(&state) { READY } else { NOT_READY }.to_owned(),
            info: if request.verbose { info(&state) } else { HashMap::new() },
            created_at: MessageField::some(convert::time(usec(state.created))),
            exited_at: state.exit.map(|exit| convert::time(exit.at_usec)).into(),
            ..SandboxStatusResponse::default()
        })
    }

    async fn ping_sandbox(&self, ctx: &TtrpcContext, request: PingRequest) -> RpcResult<PingResponse> {
        let key = self.process(ctx, &request.sandbox_id, "")?;
        self.shim.tasks.state(&key).map_err(|error| refuse("ping-sandbox", &key, &error))?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        ctx: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> RpcResult<ShutdownSandboxResponse> {
        let key = self.process(ctx, &request.sandbox_id, "")?;
        let (shim, task) = (self.shim.clone(), key.task.clone());
        self.run("shutdown-sandbox", &key, async move { shim.shut_down_sandbox(&task).await }).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        ctx: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> RpcResult<SandboxMetricsResponse> {
        let key = self.process(ctx, &request.sandbox_id, "")?;
        let stats = self.shim.sandbox_stats(&key.task).await;
        let stats = stats.map_err(|error| refuse("sandbox-metrics", &key, &error))?;
        let data = metrics::stats(stats).map_err(status::invalid)?.stats;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(convert::time(usec(SystemTime::now())));
        metric.id = request.sandbox_id;
        metric.data = data;
        Ok(response)
    }
}

/// CRI's names of the states of a pod, which containerd passes on as text.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

fn is_ready(state: &SandboxState) -> bool {
    matches!(state.status, Status::Running | Status::Paused)
}

/// What `crictl inspectp` shows. The values are JSON, and containerd reads "info".
fn info(state: &SandboxState) -> HashMap<String, String> {
    let status = match state.status {
        Status::Created => "created",
        Status::Running => "running",
        Status::Paused => "paused",
        Status::Stopped => "stopped",
    };
    let info = serde_json::json!({
        "pid": convert::pid(state.pid),
        "processStatus": status,
        "runtimeType": "io.containerd.systemd.v1",
    });
    let text = |text: &str| serde_json::Value::from(text).to_string();
    [("info", info.to_string()), ("unit", text(state.unit.as_str())), ("slice", text(state.slice.as_str()))]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
}

/// The architecture of this machine by Go's name.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn usec(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
