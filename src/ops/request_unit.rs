//! Asks systemd to start the unit of an init process or of an exec, also if another unit has its name.

use crate::id::UnitName;
use crate::services::Error;
use crate::unit;
use crate::unit::job::StartJob;
use crate::unit::systemd::Systemd;

/// The daemon that began a Create or a Start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Daemon {
    /// This daemon.
    This,
    /// An earlier daemon. It may already have asked systemd to start the unit.
    Earlier,
}

/// What to do about a unit that already has the name.
pub(super) struct NameTaken<Own, Remove> {
    /// Resolves to true if an earlier daemon asked for the unit. This daemon then does not ask again.
    pub(super) is_own: Own,
    /// Removes a unit that a failed process left behind.
    pub(super) remove: Remove,
}

/// Asks systemd to start a unit. Returns the job, or `None` if systemd already had the request of an earlier daemon.
///
/// # Errors
/// systemd refuses the unit, or a unit of another owner has the name.
pub(super) async fn request_unit<Begin, Own, Remove>(
    manager: &dyn Systemd,
    unit: &UnitName,
    begun_by: Daemon,
    begin: impl Fn() -> Begin,
    taken: NameTaken<impl FnOnce() -> Own, impl FnOnce() -> Remove>,
) -> Result<Option<StartJob>, Error>
where
    Begin: Future<Output = Result<StartJob, unit::error::Error>>,
    Own: Future<Output = Result<bool, Error>>,
    Remove: Future<Output = Result<(), Error>>,
{
    let mut begun = begin().await;
    if is_taken(&begun) && begun_by == Daemon::Earlier && (taken.is_own)().await? {
        // systemd got to the request of the earlier daemon after this daemon had queried the unit.
        return Ok(None);
    }
    if is_taken(&begun) {
        (taken.remove)().await?;
        begun = begin().await;
    }
    if is_taken(&begun) && manager.free_name(unit).await? {
        begun = begin().await;
    }
    Ok(Some(begun?))
}

fn is_taken(begun: &Result<StartJob, unit::error::Error>) -> bool {
    matches!(begun, Err(unit::error::Error::Exists { .. }))
}
