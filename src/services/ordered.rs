//! Locks that are taken in one order, so that no two threads wait for each other. In tests, a thread that takes them in
//! another order panics.

use std::sync::{Mutex, PoisonError};

/// A lock. A thread that holds it takes only locks with a larger rank.
pub struct Ordered<T, const RANK: u8>(Mutex<T>);

impl<T, const RANK: u8> Ordered<T, RANK> {
    pub fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    pub fn lock(&self) -> Guard<'_, T> {
        #[cfg(test)]
        let held = checked::Held::new(RANK);
        // A panic ends the daemon, so there is no poison to respect.
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        #[cfg(test)]
        let guard = Guard { guard, _held: held };
        guard
    }
}

impl<T: Default, const RANK: u8> Default for Ordered<T, RANK> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

#[cfg(not(test))]
pub use std::sync::MutexGuard as Guard;

#[cfg(test)]
pub use checked::Guard;

#[cfg(test)]
mod checked {
    use std::cell::RefCell;
    use std::ops::{Deref, DerefMut};
    use std::sync::MutexGuard;

    thread_local! {
        /// The ranks of the locks that this thread holds.
        static HELD: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }

    /// A lock that is held.
    pub struct Guard<'a, T> {
        pub(super) guard: MutexGuard<'a, T>,
        pub(super) _held: Held,
    }

    impl<T> Deref for Guard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            &self.guard
        }
    }

    impl<T> DerefMut for Guard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            &mut self.guard
        }
    }

    /// The rank of a lock that this thread holds.
    pub struct Held(u8);

    impl Held {
        pub(super) fn new(rank: u8) -> Self {
            HELD.with_borrow_mut(|held| {
                assert!(held.iter().all(|other| *other < rank), "rank {rank} after {held:?}");
                held.push(rank);
            });
            Self(rank)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            HELD.with_borrow_mut(|held| held.retain(|rank| *rank != self.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_taken_in_their_order() {
        let (first, second) = (Ordered::<_, 1>::new(1), Ordered::<_, 2>::new(2));
        for _ in 0..2 {
            let one = first.lock();
            assert_eq!(*one + *second.lock(), 3);
            *second.lock() = 2;
        }
        let _second = second.lock();
        let refused = |lock: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(lock)).is_err();
        assert!(refused(&|| drop(first.lock())));
        assert!(refused(&|| drop(second.lock())), "it would wait for itself");
    }
}
