//! What the unanswered requests of all connections together may need.
//!
//! A part of each connection counts for nothing ([`OWN`]), so that a client that has used up the budget does not hold up the
//! others. That also makes the sum independent of the order in which connections are adopted: the next daemon has
//! room for everything that an earlier one took.

use std::sync::{Arc, Mutex, PoisonError};

/// A number of unanswered requests, and their weight ([`super::weight`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amount {
    /// The number of requests.
    pub count: usize,
    /// The sum of their weights.
    pub weight: u64,
}

/// For all connections together.
pub const ALL: Amount = Amount { count: 32_768, weight: 128 << 20 };
/// For each connection, in addition.
const OWN: Amount = Amount { count: 16, weight: 16 << 10 };

impl Amount {
    const NONE: Self = Self { count: 0, weight: 0 };

    /// What exceeds a connection's own part.
    fn beyond_own(self) -> Self {
        Self { count: self.count.saturating_sub(OWN.count), weight: self.weight.saturating_sub(OWN.weight) }
    }
}

/// The budget of all connections.
#[derive(Clone, Debug)]
pub struct Budget {
    all: Amount,
    used: Arc<Mutex<Amount>>,
}

impl Default for Budget {
    fn default() -> Self {
        Self::of(ALL)
    }
}

impl Budget {
    /// A budget with these limits.
    pub fn of(all: Amount) -> Self {
        Self { all, used: Arc::new(Mutex::new(Amount::NONE)) }
    }

    /// What a new connection uses of this budget.
    pub fn share(&self) -> Share {
        Share { budget: self.clone(), requests: Amount::NONE, incomplete: 0 }
    }

    /// Replaces what a connection uses. False if there is no room for it; nothing changes then.
    fn replace(&self, old: Amount, new: Amount) -> bool {
        let (old, new) = (old.beyond_own(), new.beyond_own());
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let count = used.count - old.count + new.count;
        let weight = used.weight - old.weight + new.weight;
        let grows = new.count > old.count || new.weight > old.weight;
        if grows && (count > self.all.count || weight > self.all.weight) {
            return false;
        }
        *used = Amount { count, weight };
        true
    }
}

/// What one connection uses of the budget.
#[derive(Debug)]
pub struct Share {
    budget: Budget,
    requests: Amount,
    /// The bytes of a request that is not complete.
    incomplete: u64,
}

impl Share {
    /// Adds a request. False if there is no room for it.
    pub fn add(&mut self, weight: u64) -> bool {
        let Amount { count, weight: sum } = self.requests;
        self.change(Amount { count: count + 1, weight: sum + weight }, self.incomplete)
    }

    /// Removes a request that was added.
    pub fn remove(&mut self, weight: u64) {
        let Amount { count, weight: sum } = self.requests;
        let requests = Amount { count: count.saturating_sub(1), weight: sum.saturating_sub(weight) };
        self.change(requests, self.incomplete);
    }

    /// Says how much of an incomplete request there is. False if there is no room for it.
    pub fn set_incomplete(&mut self, bytes: u64) -> bool {
        self.change(self.requests, bytes)
    }

    fn change(&mut self, requests: Amount, incomplete: u64) -> bool {
        let total =
            |requests: Amount, incomplete| Amount { weight: requests.weight + incomplete, ..requests };
        let (old, new) = (total(self.requests, self.incomplete), total(requests, incomplete));
        let has_room = self.budget.replace(old, new);
        if has_room {
            (self.requests, self.incomplete) = (requests, incomplete);
        }
        has_room
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.change(Amount::NONE, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_connection_has_its_own_part_however_much_others_use() {
        let budget = Budget::default();
        let mut greedy = budget.share();
        while greedy.add(4 << 20) {}
        assert!(!greedy.set_incomplete(4 << 20));
        let mut shares: Vec<_> = (0..1000).map(|_| budget.share()).collect();
        for share in &mut shares {
            assert!(share.add(OWN.weight / 2) && share.set_incomplete(OWN.weight / 2));
            assert!(!share.add(1 << 20) && !share.set_incomplete(1 << 20));
        }
        drop(greedy);
        assert!(shares[0].add(4 << 20));
    }

    #[test]
    fn requests_are_limited_by_their_number_as_well() {
        let budget = Budget::default();
        let (mut one, mut other) = (budget.share(), budget.share());
        let taken = std::iter::from_fn(|| one.add(1).then_some(())).count();
        assert_eq!(taken, ALL.count + OWN.count);
        assert!((0..OWN.count).all(|_| other.add(1)) && !other.add(1));
        one.remove(1);
        assert!(other.add(1) && !other.add(1));
        drop((one, other));
        assert_eq!(*budget.used.lock().unwrap(), Amount::NONE);
    }

    #[test]
    fn what_an_earlier_daemon_took_fits_in_any_order() {
        let all = Amount { count: 300, weight: 4 << 20 };
        let (before, mut taken) = (Budget::of(all), Vec::new());
        let mut shares: Vec<_> = (0..20).map(|_| before.share()).collect();
        for (number, weight) in (0..2000).map(|step: usize| (step * 7 % 20, (step as u64 * 5231) % 60_000)) {
            if shares[number].add(weight) {
                taken.push((number, weight));
            }
        }
        assert!((100..500).contains(&taken.len()), "{}", taken.len());
        let after = Budget::of(all);
        let mut shares: Vec<_> = (0..20).map(|_| after.share()).collect();
        assert!(taken.into_iter().rev().all(|(number, weight)| shares[number].add(weight)));
    }
}
