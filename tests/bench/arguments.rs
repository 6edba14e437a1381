//! The command line of the benchmark.

use std::process::ExitCode;

use super::common::command_line::{self, count};
use super::common::node::{OUR_RUNTIME, STOCK_RUNTIME};

pub const USAGE: &str = "\
usage: side_by_side [--only SUBJECT,…] [--iterations N] [--execs N] [--parallel N] [--containers N,…]
                    [--megabytes N] [--json PATH] [--html PATH] [--svg PATH] [--runtime NAME] [--against NAME]

  --only SUBJECT,…    what to measure (default: all of it):
                        containers  from Create to Delete
                        execs       the same, and their CPU
                        cpu         where the CPU time of a container and of an exec goes; messages, programs, files
                        terminals   containers and execs with a terminal
                        throughput  output to the client, with and without a terminal
                        logs        the journal's copy of a container's output, by switching it off
                        memory      what is kept while containers run
                        stats       a call of Stats, and its CPU
                        start       a call of our binary
                        journal     what it costs that nothing is lost when the daemon ends, by switching it
                                    off (needs a test build of the daemon)
  --iterations N      containers of each runtime, one after the other (default 50)
  --execs N           execs of each runtime, one after the other (default 100)
  --parallel N        containers or execs at once, containers with stats (default 8)
  --containers N,…    how many to keep running while memory is measured (default 1,10,50)
  --megabytes N       how much a process writes, through a terminal a tenth (default 1000)
  --json PATH         write every number there
  --html PATH         write a page with plots there
  --svg PATH          write one plot there
  --soak N,M          instead: N containers and M execs in a row, after which nothing may have grown
  --scale N           instead: this runtime alone, with one container and with N more, which do nothing
  --runtime NAME      the runtime to measure (default io.containerd.systemd.v1)
  --against NAME      the runtime to measure it against (default io.containerd.runc.v2)";

/// The parts of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Subject {
    Containers,
    Execs,
    Cpu,
    Terminals,
    Throughput,
    Logs,
    Memory,
    Stats,
    Start,
    Journal,
}

const SUBJECTS: [(&str, Subject); 10] = [
    ("containers", Subject::Containers),
    ("execs", Subject::Execs),
    ("cpu", Subject::Cpu),
    ("terminals", Subject::Terminals),
    ("throughput", Subject::Throughput),
    ("logs", Subject::Logs),
    ("memory", Subject::Memory),
    ("stats", Subject::Stats),
    ("start", Subject::Start),
    ("journal", Subject::Journal),
];

#[derive(Debug)]
pub struct Arguments {
    subjects: Vec<Subject>,
    pub iterations: usize,
    pub execs: usize,
    pub parallel: usize,
    pub containers: Vec<usize>,
    pub megabytes: u64,
    pub json: Option<String>,
    pub html: Option<String>,
    pub svg: Option<String>,
    /// The numbers of containers and execs.
    pub soak: Option<[usize; 2]>,
    /// The number of containers.
    pub scale: Option<usize>,
    pub runtimes: [String; 2],
}

impl Arguments {
    pub fn wants(&self, subject: Subject) -> bool {
        let is_ours = matches!(subject, Subject::Start | Subject::Journal);
        let is_there = !is_ours || self.runtimes.iter().any(|name| name == OUR_RUNTIME);
        is_there && self.subjects.contains(&subject)
    }
}

/// The arguments, or the exit code of the program.
pub fn parse(words: impl Iterator<Item = String>) -> Result<Arguments, ExitCode> {
    let mut arguments = Arguments {
        subjects: SUBJECTS.map(|(_, subject)| subject).to_vec(),
        iterations: 50,
        execs: 100,
        parallel: 8,
        containers: vec![1, 10, 50],
        megabytes: 1000,
        json: None,
        html: None,
        svg: None,
        soak: None,
        scale: None,
        runtimes: [OUR_RUNTIME.to_string(), STOCK_RUNTIME.to_string()],
    };
    // cargo adds this argument.
    let words = words.filter(|word| word != "--bench");
    command_line::read("side_by_side", USAGE, words, |word, value| arguments.set(word, value))?;
    Ok(arguments)
}

impl Arguments {
    fn set(&mut self, word: &str, value: &str) -> Result<(), String> {
        match word {
            "--only" => self.subjects = value.split(',').map(subject).collect::<Result<_, _>>()?,
            "--iterations" => self.iterations = count(value)?,
            "--execs" => self.execs = count(value)?,
            "--parallel" => self.parallel = count(value)?,
            "--containers" => self.containers = value.split(',').map(count).collect::<Result<_, _>>()?,
            "--megabytes" => self.megabytes = count(value)?,
            "--json" => self.json = Some(value.to_string()),
            "--html" => self.html = Some(value.to_string()),
            "--svg" => self.svg = Some(value.to_string()),
            "--soak" => self.soak = Some(pair(value)?),
            "--scale" => self.scale = Some(count(value)?),
            "--runtime" => self.runtimes[0] = value.to_string(),
            "--against" => self.runtimes[1] = value.to_string(),
            _ => return Err(format!("there is no {word}")),
        }
        Ok(())
    }
}

fn subject(text: &str) -> Result<Subject, String> {
    let found = SUBJECTS.iter().find(|(name, _)| *name == text);
    found.map(|(_, subject)| *subject).ok_or_else(|| format!("{text:?} can't be measured"))
}

/// Two numbers with a comma between them.
fn pair(text: &str) -> Result<[usize; 2], String> {
    let (first, second) = text.split_once(',').ok_or_else(|| format!("{text:?} is not N,M"))?;
    Ok([count(first)?, count(second)?])
}
