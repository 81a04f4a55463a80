//! `ggraft train` as its users meet it: what it prints and writes, how it is stopped and goes on, how it fails.

mod failures;
#[cfg(unix)]
mod interrupted;
mod results;
mod resumed;
mod rows;
mod starts;

use ggraft::file::types::GgmlType;
use ggraft_testkit::command::{stderr, stdout};
use ggraft_testkit::fixture::{FixtureSpec, Variant, write_fixture};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::Duration;
use tempfile::TempDir;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tinylm-q8_0.gguf");
const TASKS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tasks");

/// A folder with a model and a few rows to train on and to evaluate.
struct Place {
    folder: TempDir,
    model: PathBuf,
}

impl Place {
    /// With the embedded model.
    fn new() -> Self {
        // A name that a shell must have quoted.
        let folder = tempfile::Builder::new().prefix("it's a ").tempdir();
        let place = Self {
            folder: folder.unwrap(),
            model: MODEL.into(),
        };
        place.take_rows("facts_trade", "train", 6);
        place.take_rows("facts_trade", "valid", 3);
        place
    }

    /// With a model of random weights that takes a millisecond for a step.
    fn random() -> Self {
        let mut place = Self::new();
        place.model = place.path("model.gguf");
        let spec = FixtureSpec::new(Variant::Llama, GgmlType::F32);
        write_fixture(&place.model, &spec).unwrap();
        place
    }

    /// The first rows of a task as `train.jsonl` or `valid.jsonl`.
    fn take_rows(&self, task: &str, split: &str, n: usize) {
        let text = fs::read_to_string(format!("{TASKS}/{task}/{split}.jsonl")).unwrap();
        let rows: String = text.split_inclusive('\n').take(n).collect();
        self.write(&format!("{split}.jsonl"), rows);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    #[track_caller]
    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    #[track_caller]
    fn text(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }

    fn exists(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// Everything in the folder, sorted.
    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(self.folder.path()).unwrap();
        let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name();
        let mut names: Vec<_> = names.map(|e| name(e).into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A line of arguments for `ggraft`, split at white space; `@` stands for the folder, `@@` for the model.
    fn args(&self, line: &str) -> Vec<String> {
        let folder = format!("{}/", self.folder.path().display());
        line.split_whitespace()
            .map(|word| word.replace("@@", self.model.to_str().unwrap()))
            .map(|word| word.replace('@', &folder))
            .collect()
    }

    /// Trains with one thread, and with the rows here unless `line` names others.
    fn train_args(&self, line: &str) -> Vec<String> {
        let mut args = self.args("train -t 1 -m @@");
        if !line.contains("--data") {
            args.extend(self.args("--data @train.jsonl"));
        }
        args.extend(self.args(line));
        args
    }

    fn train(&self, line: &str) -> Output {
        command(&self.train_args(line)).output().unwrap()
    }

    /// A run that must succeed; what it printed.
    #[track_caller]
    fn trained(&self, line: &str) -> String {
        stdout(&self.train(line))
    }

    /// A run that must fail; the line that says why.
    #[track_caller]
    fn refused(&self, line: &str) -> String {
        failure(&self.train(line))
    }

    /// A run whose options cannot be; the line that says why.
    #[track_caller]
    fn misused(&self, line: &str) -> String {
        let output = self.train(line);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        error_line(&output)
    }

    fn spawn(&self, line: &str) -> Running {
        Running(command(&self.train_args(line)).spawn().unwrap())
    }

    /// The rows of a log.
    #[track_caller]
    fn log(&self, name: &str) -> Vec<Value> {
        self.text(name).lines().map(json).collect()
    }

    /// The rows of a log without what no two runs have in common.
    #[track_caller]
    fn log_without_times(&self, name: &str) -> Vec<Value> {
        let mut rows = self.log(name);
        for row in &mut rows {
            row.as_object_mut().unwrap().remove("seconds").unwrap();
        }
        rows
    }

    /// How many whole lines a log has, which may not be there yet.
    fn lines(&self, name: &str) -> usize {
        let bytes = fs::read(self.path(name)).unwrap_or_default();
        bytes.iter().filter(|&&b| b == b'\n').count()
    }

    /// Waits until `child` has logged `n` steps; false if it ended before.
    fn wait_for_steps(&self, child: &mut Child, log: &str, n: usize) -> bool {
        loop {
            if self.lines(log) >= n {
                return true;
            }
            if child.try_wait().unwrap().is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A process that does not outlive its test.
struct Running(Child);

impl Running {
    /// What it printed, once it has ended.
    fn end(mut self) -> Output {
        let (out, err) = (self.0.stdout.take(), self.0.stderr.take());
        let read = |mut from: Box<dyn std::io::Read + Send>| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                from.read_to_end(&mut bytes).unwrap();
                bytes
            })
        };
        let out = out.map(|s| read(Box::new(s)));
        let err = err.map(|s| read(Box::new(s)));
        let bytes =
            |t: Option<std::thread::JoinHandle<_>>| t.map_or(Vec::new(), |t| t.join().unwrap());
        Output {
            status: self.0.wait().unwrap(),
            stdout: bytes(out),
            stderr: bytes(err),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command<S: AsRef<OsStr>>(args: &[S]) -> Command {
    ggraft_testkit::command::command(env!("CARGO_BIN_EXE_ggraft"), args)
}

/// What stdout says of a command that must succeed.
#[track_caller]
fn ok<S: AsRef<OsStr>>(args: &[S]) -> String {
    stdout(&command(args).output().unwrap())
}

/// Asserts a failure with status 1 and one error line at the end of stderr, and returns that line.
#[track_caller]
fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    error_line(output)
}

/// The last line of stderr, the only one that is an error.
#[track_caller]
fn error_line(output: &Output) -> String {
    let text = stderr(output);
    let errors = text.lines().filter(|l| l.starts_with("error: ")).count();
    assert_eq!(errors, 1, "{text}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let last = text.lines().last().unwrap();
    assert!(last.starts_with("error: "), "{text}");
    last.to_owned()
}

/// What a user's shell makes of a line.
fn in_shell(line: &str) -> Output {
    let folder = Path::new(env!("CARGO_BIN_EXE_ggraft")).parent().unwrap();
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("sh");
    shell
        .args(["-c", line])
        .env("PATH", path)
        .env_remove("RUST_LOG");
    shell.output().unwrap()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The adapter can be read and fits the model.
#[track_caller]
fn assert_loads(adapter: &Path) {
    let adapter = adapter.to_str().unwrap();
    let found = json(&ok(&["inspect", adapter, "--json"]));
    assert!(found.get("problem").is_none_or(Value::is_null), "{found}");
}

/// Numbers in no order that repeats, from 0 to below 1.
fn numbers(seed: u64) -> impl Iterator<Item = f64> {
    // Knuth's linear congruential generator (MMIX), of which the upper bits are good.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    std::iter::repeat_with(move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 24) as f64
    })
}
