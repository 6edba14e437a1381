use super::testing::Systemd;
use super::*;
use std::fs::File;

fn names(found: &[(String, OwnedFd)]) -> Vec<&str> {
    let mut names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    names
}

#[test]
fn kept_descriptors_reach_the_next_daemon_until_they_are_removed() {
    let file = File::open("/dev/null").unwrap();
    let (mut stored, mut kept) = (Vec::new(), Vec::new());
    for daemon in 0..5 {
        let (systemd, notifier) = Systemd::new();
        let passed = std::mem::take(&mut stored);
        let passed: Vec<(String, OwnedFd)> = passed.into_iter().collect();
        stored = passed
            .iter()
            .map(|(name, fd): &(String, OwnedFd)| (name.clone(), fd.try_clone().unwrap()))
            .collect();
        let (store, found) = FdStore::with(notifier, 100, passed);
        assert_eq!(names(&found), kept, "daemon {daemon}");
        store.keep(&format!("c{daemon}"), &[file.as_fd(), file.as_fd()]).unwrap();
        store.keep(&format!("o{daemon}"), &[file.as_fd()]).unwrap();
        store.keep("t9", &[file.as_fd()]).unwrap();
        if daemon > 0 {
            store.forget(&format!("c{}", daemon - 1));
            store.forget("t9");
        }
        systemd.read(&mut stored);
        kept = vec![format!("c{daemon}"), format!("c{daemon}")];
        kept.extend((0..=daemon).map(|number| format!("o{number}")));
        kept.extend((daemon == 0).then(|| "t9".to_owned()));
    }
    assert!(stored.len() <= 6 + 2 * SPARE, "{} entries", stored.len());
}

#[test]
fn descriptors_that_an_earlier_version_stored_are_found_and_removed() {
    let (systemd, notifier) = Systemd::new();
    let direct = |name: &str| (name.to_owned(), OwnedFd::from(File::open("/dev/null").unwrap()));
    let passed = vec![direct("c1"), direct("c1"), direct("o2")];
    let mut stored = vec![direct("c1"), direct("c1"), direct("o2")];
    let (store, found) = FdStore::with(notifier, 100, passed);
    assert_eq!(names(&found), ["c1", "c1", "o2"]);
    store.forget("c1");
    store.forget("c1");
    systemd.read(&mut stored);
    stored.retain(|(name, _)| !name.starts_with(PREFIX));
    assert_eq!(names(&stored), ["o2"]);
}

#[test]
fn a_full_store_refuses_descriptors_until_others_are_removed() {
    let (systemd, notifier) = Systemd::new();
    let limit = STORE_RESERVE as usize + 100;
    let (store, _) = FdStore::with(notifier, limit, Vec::new());
    let (file, mut stored) = (File::open("/dev/null").unwrap(), Vec::new());
    for number in 0..limit {
        assert_eq!(store.has_room().is_ok(), number <= 100, "{number}");
        store.keep(&format!("c{number}"), &[file.as_fd()]).unwrap();
        systemd.read(&mut stored);
    }
    assert!(matches!(store.keep("o1", &[file.as_fd()]), Err(Error::Full { count: 600, limit: 600 })));
    store.forget("c7");
    store.forget("c7");
    store.keep("o1", &[file.as_fd()]).unwrap();
    assert!(store.keep("o2", &[file.as_fd()]).is_err());
    for number in 0..limit {
        store.forget(&format!("c{number}"));
        systemd.read(&mut stored);
    }
    assert_eq!(stored.len(), MAX_IDLE + 1, "empty holders do not stay in any number");
}

#[test]
fn a_holder_that_can_not_be_read_is_counted_and_no_new_work_begins() {
    let (systemd, notifier) = Systemd::new();
    let passed = |name: &str| (name.to_owned(), OwnedFd::from(File::open("/dev/null").unwrap()));
    let (store, found) = FdStore::with(notifier, 600, vec![passed("h1"), passed("o1"), passed("h7")]);
    assert_eq!(names(&found), ["o1"]);
    assert_eq!((store.count(), store.has_unread()), (3, true));
    let refused = store.has_room();
    assert!(matches!(refused, Err(Error::Unread { count: 2 })), "{refused:?}");
    store.has_room_for_connection().unwrap();
    let mut stored = vec![passed("h1"), passed("h7")];
    systemd.read(&mut stored);
    let holders = ["h1", "h7", "h8", "h9", "h10", "h11"];
    assert_eq!(
        stored.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
        holders,
        "the next daemon tries again"
    );
}

/// Fills the queue of a systemd that reads nothing.
fn fill(store: &FdStore) {
    while store.notifier().send_at_once("FDSTOREREMOVE=1\nFDNAME=none", &[]).is_ok() {}
}

#[tokio::test(start_paused = true)]
async fn while_systemd_reads_nothing_callers_wait_and_threads_do_not() {
    let (systemd, notifier) = Systemd::new();
    let (store, _) = FdStore::with(notifier, 600, Vec::new());
    let (file, mut stored) = (File::open("/dev/null").unwrap(), Vec::new());
    fill(&store);
    let begun = Instant::now();
    for number in 0..SPARE {
        store.keep_async(&format!("c{number}"), &[file.as_fd()]).await.unwrap();
    }
    assert_eq!(begun.elapsed().as_secs(), 0, "empty holders are left");
    let read = async {
        sleep(SEND_LIMIT / 2).await;
        systemd.read(&mut stored);
    };
    let fds = [file.as_fd()];
    let (kept, ()) = tokio::join!(store.keep_async("c9", &fds), read);
    kept.unwrap();
    assert!((SEND_LIMIT / 2..SEND_LIMIT).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    systemd.read(&mut stored);
    let (_, notifier) = Systemd::new();
    let (_, found) = FdStore::with(notifier, 600, stored);
    assert_eq!(names(&found), ["c0", "c1", "c2", "c3", "c9"]);
    fill(&store);
    let begun = Instant::now();
    let refused = loop {
        if let Err(error) = store.keep_async("c10", &[file.as_fd()]).await {
            break error;
        }
    };
    assert!(matches!(refused, Error::Send(Errno::EAGAIN)), "{refused:?}");
    assert!(begun.elapsed() >= SEND_LIMIT);
}

#[test]
fn empty_holders_that_systemd_can_not_remove_now_are_removed_later() {
    let (systemd, notifier) = Systemd::new();
    let (store, _) = FdStore::with(notifier, 600, Vec::new());
    let (file, mut stored) = (File::open("/dev/null").unwrap(), Vec::new());
    let many = MAX_IDLE + 20;
    for number in 0..=many {
        store.keep(&format!("c{number}"), &[file.as_fd()]).unwrap();
        systemd.read(&mut stored);
    }
    fill(&store);
    for number in 0..many {
        store.forget(&format!("c{number}"));
    }
    systemd.read(&mut stored);
    assert!(stored.len() > many, "{}", stored.len());
    // systemd's queue has less room than there are empty holders.
    for _ in 0..many {
        store.keep("o1", &[file.as_fd()]).unwrap();
        store.forget("o1");
        systemd.read(&mut stored);
    }
    assert_eq!((stored.len(), store.count()), (MAX_IDLE + 1, 1));
}

#[test]
fn the_names_of_a_full_store_fit_into_one_variable_of_the_environment() {
    const MAX_ARG_STRLEN: u32 = 128 << 10;
    let name = "h12345678:";
    assert!(STORE_LIMIT * name.len() as u32 + ("LISTEN_FDNAMES=".len() as u32) < MAX_ARG_STRLEN);
}
