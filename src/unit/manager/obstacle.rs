//! What keeps systemd from running the command of a unit.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::PathBuf;

use async_trait::async_trait;
use zbus::OwnedVariant;

use crate::id::UnitName;
use crate::unit::bus::{SERVICE_INTERFACE, UNIT_INTERFACE};
use crate::unit::error::Error;
use crate::unit::main_process::Command;
use crate::unit::obstacle::{Condition, Facts};
use crate::unit::policy;
use crate::unit::systemd::Obstacles;

use super::Manager;
use super::query::text;
use super::start::of_files;

/// How many units that a unit needs are looked at.
const MOST_UNITS: usize = 32;

#[async_trait]
impl Obstacles for Manager {
    async fn obstacle(&self, unit: &UnitName) -> Option<String> {
        let facts = self.facts(unit).await.ok()?;
        if facts.load_state == "not-found" {
            // systemd has unloaded the unit, with the results of its conditions.
            return of_files(unit, unloaded).await;
        }
        let own = move || (facts.obstacle(), facts.needs);
        let (obstacle, needs) = tokio::task::spawn_blocking(own).await.ok()?;
        match obstacle {
            Some(obstacle) => Some(obstacle),
            None => self.obstacle_in(needs).await,
        }
    }

    async fn restrictions(&self, unit: &UnitName) -> Option<String> {
        of_files(unit, policy::restrictions).await
    }
}

impl Manager {
    /// As [`Obstacles::obstacle`], in the units that a unit needs.
    async fn obstacle_in(&self, needs: Vec<String>) -> Option<String> {
        let (mut seen, mut queue) = (BTreeSet::new(), VecDeque::from(needs));
        while let Some(needed) = queue.pop_front() {
            if seen.len() == MOST_UNITS {
                return None;
            }
            if !seen.insert(needed.clone()) {
                continue;
            }
            let Ok(needed) = UnitName::new(needed) else {
                continue;
            };
            let facts = self.facts(&needed).await.ok()?;
            if facts.active_state == "active" {
                continue;
            }
            let other = move || (facts.obstacle_for_others(), facts.needs);
            let (obstacle, needs) = tokio::task::spawn_blocking(other).await.ok()?;
            if obstacle.is_some() {
                return obstacle;
            }
            queue.extend(needs);
        }
        None
    }

    async fn facts(&self, unit: &UnitName) -> Result<Facts, Error> {
        let all = self.get_all(unit, UNIT_INTERFACE).await?;
        let is_service = unit.as_str().ends_with(".service");
        let service = if is_service { self.get_all(unit, SERVICE_INTERFACE).await? } else { HashMap::new() };
        let needs = ["Requires", "Requisite", "BindsTo"].iter();
        let needs = needs.flat_map(|name| get::<Vec<String>>(&all, name).unwrap_or_default());
        let files = text(&all, "FragmentPath").into_iter();
        let files = files.chain(get::<Vec<String>>(&all, "DropInPaths").unwrap_or_default());
        let commands = ["ExecCondition", "ExecStartPre", "ExecStart", "ExecStartPost"].into_iter();
        let commands = commands.map(|name| (name, get::<Vec<Command>>(&service, name).unwrap_or_default()));
        Ok(Facts {
            unit: unit.to_string(),
            load_state: text(&all, "LoadState").unwrap_or_default(),
            active_state: text(&all, "ActiveState").unwrap_or_default(),
            conditions: get::<Vec<Condition>>(&all, "Conditions").unwrap_or_default(),
            assertions: get::<Vec<Condition>>(&all, "Asserts").unwrap_or_default(),
            result: text(&service, "Result").unwrap_or_default(),
            commands: commands.collect(),
            files: files.filter(|file| !file.is_empty()).map(PathBuf::from).collect(),
            needs: needs.collect(),
        })
    }
}

/// As [`Obstacles::obstacle`], for a unit that systemd has unloaded: the settings that may have kept it from starting.
fn unloaded(unit: &str) -> Option<String> {
    let settings = policy::conditions_of(unit)?;
    Some(format!("systemd has not started {unit}: one of these is not met: {settings}"))
}

fn get<T: TryFrom<OwnedVariant>>(values: &HashMap<String, OwnedVariant>, name: &str) -> Option<T> {
    values.get(name).and_then(|value| T::try_from(value.clone()).ok())
}
