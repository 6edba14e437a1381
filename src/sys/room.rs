//! Waiting for what the system or this process lacks at the moment.

use std::io;
use std::time::Duration;

use super::lacks_room;

/// The pause before the next attempt.
const PAUSE: Duration = Duration::from_millis(100);

/// Opens something as soon as there is room for it ([`lacks_room`]). `what` waits for it, for the log.
///
/// # Errors
/// It can't be opened for another reason.
pub async fn once_there_is_room<T>(what: &str, open: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let mut is_logged = false;
    loop {
        match open() {
            Err(error) if lacks_room(&error) => {
                if !is_logged {
                    tracing::warn!(%error, "{what} waits for something of which the system has no more: {error}");
                    is_logged = true;
                }
                tokio::time::sleep(PAUSE).await;
            }
            opened => return opened,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use std::cell::Cell;

    #[tokio::test(start_paused = true)]
    async fn what_finds_no_room_is_opened_once_there_is_some() {
        let missing = Cell::new(3);
        let open = || match missing.get() {
            0 => Ok(7),
            left => {
                missing.set(left - 1);
                Err(if left == 2 { Errno::ENFILE } else { Errno::EMFILE }.into())
            }
        };
        assert_eq!(once_there_is_room("a test", open).await.unwrap(), 7);
        let denied = once_there_is_room("a test", || Err::<(), _>(Errno::EACCES.into())).await;
        assert_eq!(denied.unwrap_err().raw_os_error(), Some(Errno::EACCES as i32));
    }
}
