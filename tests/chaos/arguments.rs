//! The command line.

use std::process::ExitCode;
use std::time::Duration;

use super::common::command_line::{self, count};
use super::common::disturb::Disturbance;
use super::common::node::number;
use super::work::Kind;

pub const USAGE: &str = "\
usage: chaos [--seconds N | --minutes N] [--seed N] [--disturb NAME,…] [--work NAME,…] [--workers N]

  --seconds N, --minutes N   how long (default 60 s)
  --seed N                   where chance begins (default: another one each time)
  --disturb NAME,…           what happens meanwhile (default: all; none for nothing):
                               kill        SIGKILL to the daemon
                               cgroup      SIGKILL to the daemon's whole cgroup
                               hang        SIGSTOP to the daemon, until its watchdog finds out
                               stall       SIGSTOP to the daemon during a systemctl daemon-reload
                               restart     systemctl restart of the daemon
                               reexec      systemctl daemon-reexec
                               reload      systemctl daemon-reload
                               bus         restart of the system bus
                               containerd  SIGKILL to containerd, and a new one
  --work NAME,…              what clients do (default: all):
                               run kill delete pause exec terminal output, and
                               pod with a containerd that has sandboxes
  --workers N                how many at once (default 6, in an emulated machine 3)
  --leaks yes|no             compare what is left with what was there (default yes); no, if another version of the
                             daemon is installed meanwhile, which has other descriptors and files

E2E_RUNTIME names another runtime than ours: then what happens to our daemon is left out.";

#[derive(Debug)]
pub struct Arguments {
    pub duration: Duration,
    pub seed: u64,
    pub disturbances: Vec<Disturbance>,
    pub kinds: Vec<Kind>,
    pub workers: usize,
    pub compares_leaks: bool,
}

/// The arguments, or the code to end with.
pub fn parse(words: impl Iterator<Item = String>) -> Result<Arguments, ExitCode> {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let mut arguments = Arguments {
        duration: Duration::from_secs(60),
        seed: clock.as_micros() as u64 % 1_000_000_000,
        disturbances: Disturbance::ALL.to_vec(),
        kinds: Kind::ALL.to_vec(),
        workers: number("CHAOS_WORKERS", 6, 3),
        compares_leaks: true,
    };
    command_line::read("chaos", USAGE, words, |word, value| arguments.set(word, value))?;
    Ok(arguments)
}

impl Arguments {
    fn set(&mut self, word: &str, value: &str) -> Result<(), String> {
        match word {
            "--seconds" => self.duration = Duration::from_secs(count(value)?),
            "--minutes" => self.duration = Duration::from_secs(60 * count::<u64>(value)?),
            "--seed" => self.seed = count(value)?,
            "--disturb" if value == "none" => self.disturbances = Vec::new(),
            "--disturb" => self.disturbances = named(value, &Disturbance::ALL, Disturbance::name)?,
            "--work" => self.kinds = named(value, &Kind::ALL, Kind::name)?,
            "--workers" => self.workers = count(value)?,
            "--leaks" if matches!(value, "yes" | "no") => self.compares_leaks = value == "yes",
            "--leaks" => return Err(format!("--leaks is yes or no, not {value:?}")),
            _ => return Err(format!("there is no {word}")),
        }
        Ok(())
    }
}

fn named<T: Copy>(names: &str, all: &[T], name: fn(T) -> &'static str) -> Result<Vec<T>, String> {
    let find = |wanted: &str| all.iter().copied().find(|one| name(*one) == wanted);
    names.split(',').map(|wanted| find(wanted).ok_or_else(|| format!("there is no {wanted:?}"))).collect()
}
