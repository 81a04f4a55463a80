//! What both benches need: settings from the environment, models, and the quick mode.

use crate::synth::{self, Shape};
use ggraft::file::mmap::MappedGguf;
use ggraft::file::types::GgmlType;
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Whether a bench shall only show that it works: cargo passes `--bench` when it measures, and whoever calls `cargo bench -- --test`
/// does not want figures (criterion has the same rule).
pub fn is_quick() -> bool {
    let is_there = |name: &str| std::env::args().any(|a| a == name);
    is_there("--test") || !is_there("--bench")
}

/// Whether a bench shall take the time that the published tables take: `GGRAFT_BENCH_FULL` is set and not 0.
pub fn is_full() -> bool {
    !matches!(&var("GGRAFT_BENCH_FULL", "0")[..], "" | "0")
}

/// The environment variable `name`, or `default`.
pub fn var(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

/// The number in the environment variable `name`, or `default`.
///
/// # Panics
/// If it is none.
pub fn number(name: &str, default: usize) -> usize {
    let text = var(name, &default.to_string());
    text.parse()
        .unwrap_or_else(|_| panic!("{name}: '{text}' is no number"))
}

/// How long a row may be measured: rounds begin as long as there is time, the first one that counts in any case.
/// `GGRAFT_BENCH_SECONDS`, 10 by default and without end for a full bench.
pub fn budget() -> Duration {
    let default = if is_full() { u32::MAX as usize } else { 10 };
    Duration::from_secs(number("GGRAFT_BENCH_SECONDS", default) as u64)
}

/// Says on stderr how far a bench is before each row of its tables, so that nobody takes a long row for a hang.
pub struct Progress {
    rows: usize,
    done: Cell<usize>,
    start: Instant,
}

impl Progress {
    /// Of a bench that measures so many `rows`; `what` says which.
    pub fn new(rows: usize, what: &str) -> Self {
        eprintln!("{rows} rows: {what}");
        Self {
            rows,
            done: Cell::new(0),
            start: Instant::now(),
        }
    }

    /// The next one begins.
    pub fn row(&self, name: &str) {
        self.done.set(self.done.get() + 1);
        let seconds = self.start.elapsed().as_secs();
        let (minutes, seconds) = (seconds / 60, seconds % 60);
        eprintln!(
            "[{}/{}, {minutes}:{seconds:02}] {name}",
            self.done.get(),
            self.rows
        );
    }
}

/// The type of that name, in capital letters or small ones.
pub fn type_called(name: &str) -> Option<GgmlType> {
    let mut all = GgmlType::ALL.iter().copied();
    all.find(|t| t.name().eq_ignore_ascii_case(name))
}

/// The types in the environment variable `name`, or `default`, separated by commas.
///
/// # Panics
/// If one is unknown.
pub fn types(name: &str, default: &str) -> Vec<GgmlType> {
    let called =
        |wanted: &str| type_called(wanted).unwrap_or_else(|| panic!("{name}: no type '{wanted}'"));
    var(name, default).split(',').map(called).collect()
}

/// The shapes in the environment variable `name`, or `default`, separated by commas.
///
/// # Panics
/// If one is unknown.
pub fn shapes(name: &str, default: &str) -> Vec<&'static Shape> {
    let called = |wanted: &str| {
        synth::shape(wanted).unwrap_or_else(|| panic!("{name}: no shape '{wanted}'"))
    };
    var(name, default).split(',').map(called).collect()
}

/// As many threads as the machine has, or `GGRAFT_BENCH_THREADS`.
pub fn threads() -> usize {
    number("GGRAFT_BENCH_THREADS", ggraft::default_threads())
}

/// The synthetic model of this shape and type in `GGRAFT_BENCH_DIR` (target/bench-models), written on first use.
///
/// # Panics
/// If there is no room for it.
pub fn model_file(shape: &Shape, ty: GgmlType) -> PathBuf {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/bench-models");
    let dir = PathBuf::from(var("GGRAFT_BENCH_DIR", default));
    let path = dir.join(format!("{}-{}.gguf", shape.name, ty.name()));
    if !path.exists() {
        std::fs::create_dir_all(&dir).expect("a folder for models");
        synth::write(&path, shape, ty, false).expect("room for the model");
    }
    path
}

/// Which types the matrices of a model have, by their share of the weights: rows that are not whole blocks fall back to
/// another type (see [`synth::matrix_type`]).
///
/// # Panics
/// If the file is not a GGUF file.
pub fn weight_types(path: &Path) -> String {
    let file = MappedGguf::open(path).unwrap_or_else(|e| panic!("{e}"));
    let mut shares: Vec<(GgmlType, u64)> = Vec::new();
    for (_, tensor) in file.tensors().filter(|(_, t)| t.ne[1] > 1) {
        match shares.iter_mut().find(|(ty, _)| *ty == tensor.ty) {
            Some((_, n)) => *n += tensor.n_elements(),
            None => shares.push((tensor.ty, tensor.n_elements())),
        }
    }
    shares.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
    let all: u64 = shares.iter().map(|(_, n)| n).sum();
    let percent = |n: u64| (100.0 * n as f64 / all as f64).round();
    let shown = shares
        .iter()
        .map(|(ty, n)| format!("{} {} %", ty.name(), percent(*n)));
    shown.collect::<Vec<_>>().join(", ")
}

/// How long `f` takes.
pub fn timed(f: impl FnOnce()) -> Duration {
    let start = Instant::now();
    f();
    start.elapsed()
}

/// The middle one, in seconds.
///
/// # Panics
/// If there is none.
pub fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

/// Waits a moment: idle threads of libllama's poll for a while and would slow down who comes next.
pub fn settle() {
    std::thread::sleep(Duration::from_millis(if is_quick() { 0 } else { 300 }));
}
