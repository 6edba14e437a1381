//! The command line of the benchmark.

use super::common::node::{OUR_RUNTIME, STOCK_RUNTIME};

pub const USAGE: &str = "\
usage: side_by_side [--iterations N] [--parallel N] [--containers N,N,…] [--json PATH]
                    [--runtime NAME] [--against NAME]

  --iterations N      containers of each runtime, one after the other (default 50)
  --parallel N        containers at once in the second part (default 8)
  --containers N,…    how many to keep running while memory is measured (default 1,10,50)
  --json PATH         write every number there
  --runtime NAME      the runtime to measure (default io.containerd.systemd.v1)
  --against NAME      the runtime to measure it against (default io.containerd.runc.v2)";

#[derive(Debug)]
pub struct Arguments {
    pub iterations: usize,
    pub parallel: usize,
    pub containers: Vec<usize>,
    pub json: Option<String>,
    pub runtimes: [String; 2],
}

impl Arguments {
    /// Rounds of the parallel part: about as many containers as in the first, but enough for a median.
    pub fn rounds(&self) -> usize {
        self.iterations.div_ceil(self.parallel).max(10)
    }

    pub fn measures_ours(&self) -> bool {
        self.runtimes.iter().any(|runtime| runtime == OUR_RUNTIME)
    }
}

pub enum Parsed {
    Run(Arguments),
    Help,
    Wrong(String),
}

pub fn parse(words: impl Iterator<Item = String>) -> Parsed {
    let mut arguments = Arguments {
        iterations: 50,
        parallel: 8,
        containers: vec![1, 10, 50],
        json: None,
        runtimes: [OUR_RUNTIME.to_string(), STOCK_RUNTIME.to_string()],
    };
    let mut words = words;
    while let Some(word) = words.next() {
        if ["--help", "-h"].contains(&word.as_str()) {
            return Parsed::Help;
        }
        if word == "--bench" {
            continue; // cargo adds it
        }
        let Some(value) = words.next() else { return Parsed::Wrong(format!("{word} needs a value")) };
        if let Err(what) = arguments.set(&word, &value) {
            return Parsed::Wrong(what);
        }
    }
    Parsed::Run(arguments)
}

impl Arguments {
    fn set(&mut self, word: &str, value: &str) -> Result<(), String> {
        match word {
            "--iterations" => self.iterations = count(value)?,
            "--parallel" => self.parallel = count(value)?,
            "--containers" => self.containers = value.split(',').map(count).collect::<Result<_, _>>()?,
            "--json" => self.json = Some(value.to_string()),
            "--runtime" => self.runtimes[0] = value.to_string(),
            "--against" => self.runtimes[1] = value.to_string(),
            _ => return Err(format!("there is no {word}")),
        }
        Ok(())
    }
}

fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(format!("{text:?} is not a count")),
    }
}
