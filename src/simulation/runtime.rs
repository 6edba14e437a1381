//! An OCI runtime for tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::effects::{Effects, Failure};
use crate::launch::contract::CommandKind;
use crate::oci::runtime::{Cli, Error as RuntimeError, OciRuntime};
use crate::store::Store;
use crate::unit::fake::FakeSystemd;

/// How the next commands `start` end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Starts {
    #[default]
    Work,
    /// They release init, and fail afterwards: a poststart hook has failed.
    FailAfterwards,
    /// They do not end.
    Hang,
    /// They work. The commands that mount the rootfs for a restore do not end.
    AfterHangingMounts,
}

/// An OCI runtime that keeps a directory for each container, as runc does.
pub(crate) struct FakeRuntime {
    pub(super) effects: Arc<Effects>,
    pub(super) systemd: Arc<FakeSystemd>,
    pub(super) store: Store,
    pub(super) starts: Starts,
}

impl FakeRuntime {
    async fn call(&self, verb: &'static str, cli: &Cli<'_>) -> Result<PathBuf, RuntimeError> {
        let kept = cli.runtime.root.join(cli.id.as_str());
        match self.effects.reach(format!("runtime {verb}")).await {
            Ok(()) => Ok(kept),
            Err(Failure::Timeout | Failure::NoReply) => {
                Err(RuntimeError::TimedOut { verb, limit: Duration::from_secs(120) })
            }
            Err(failure @ Failure::TooManyFiles) => {
                Err(RuntimeError::Spawn { verb, binary: cli.runtime.binary.clone(), source: failure.io() })
            }
            Err(failure) => Err(RuntimeError::Failed { verb, reason: failure.io().to_string() }),
        }
    }
}

#[async_trait]
impl OciRuntime for FakeRuntime {
    async fn start(&self, cli: &Cli<'_>) -> Result<(), RuntimeError> {
        let failed = |reason: &str| RuntimeError::Failed { verb: "start", reason: reason.to_owned() };
        let kept = self.call("start", cli).await?;
        if self.starts == Starts::Hang {
            std::future::pending::<()>().await;
        }
        fs::remove_file(kept.join("exec.fifo"))
            .map_err(|_| failed("cannot start a container that is running"))?;
        if self.starts == Starts::FailAfterwards { Err(failed("a hook has failed")) } else { Ok(()) }
    }

    async fn update(&self, cli: &Cli<'_>, _: &Path) -> Result<(), RuntimeError> {
        self.call("update", cli).await.map(drop)
    }

    async fn delete(&self, cli: &Cli<'_>) -> Result<(), RuntimeError> {
        let kept = self.call("delete", cli).await?;
        let _ = fs::remove_dir_all(kept);
        Ok(())
    }

    async fn launch(
        &self,
        cli: &Cli<'_>,
        verb: &'static str,
        limit: Duration,
        command: &[String],
    ) -> Result<(), RuntimeError> {
        assert_eq!(command[1..3], ["launch", verb]);
        let kept = self.call(verb, cli).await?;
        if self.starts == Starts::AfterHangingMounts && verb == CommandKind::Mount.word() {
            tokio::time::sleep(limit).await;
            return Err(RuntimeError::TimedOut { verb, limit });
        }
        if verb != "checkpoint" {
            return Ok(());
        }
        let begun: serde_json::Value =
            serde_json::from_slice(&fs::read(cli.dir.join("checkpoint.json")).unwrap()).unwrap();
        fs::create_dir_all(cli.dir.join("criu-dump")).unwrap();
        fs::write(cli.dir.join("criu-dump/dump.log"), "Dumping finished successfully").unwrap();
        if begun["request"]["exit"] == true {
            let _ = fs::remove_dir_all(kept);
            let tasks = self.store.load_all(&Arc::default()).unwrap();
            let task = tasks.into_iter().flatten().find(|found| found.task.key.id == *cli.id).unwrap().task;
            self.systemd.end_by_signal(task.unit(), nix::libc::SIGKILL);
        }
        Ok(())
    }
}
