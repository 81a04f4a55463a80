//! Latency beside libllama: same file, same threads, same run.
//!
//!     cargo bench --bench latency
//!
//! First tables of ratios: both engines take turns, a round each, and the median of the rounds' ratios is what counts,
//! so that a drift of the machine's speed hits both alike. The first tables compare like with like (both with repacked
//! weights or both without) and both engines' defaults (ggraft without, libllama with): synthetic models, prompts of further types of weights, real models if there are any
//! (`make models`). A summary has ggraft beside the better of libllama's two ways. Then long contexts with the defaults, both
//! engines beside other threads that keep all cores busy, and changes of the
//! adapter, ggraft's prefixes beside libllama's LoRA. Last criterion's absolute figures of what only ggraft has: loading,
//! compiling, attaching and swapping adapters, beside a prefill of as many tokens.
//!
//! Some minutes by default: no round begins in a row that was measured for ten seconds, but one
//! counts in any case; each row says how many did. `GGRAFT_BENCH_FULL=1` measures all rounds. `cargo bench -- --test` runs all of it once on a tiny model, whose figures say nothing.
//!
//! Environment: `GGRAFT_BENCH_SHAPE` (llama-1b), `GGRAFT_BENCH_TYPES` (q4_k,q4_0,q8_0), `GGRAFT_BENCH_MORE_TYPES` (of prompts only: q6_k,q5_k,q3_k,iq4_xs),
//! `GGRAFT_REAL_MODELS` (a folder of models, models/real), `GGRAFT_BENCH_THREADS` (physical cores),
//! `GGRAFT_BENCH_PREFILL` (512), `GGRAFT_BENCH_ROUNDS` (5), `GGRAFT_BENCH_SECONDS` (10 for a row, full: no limit),
//! `GGRAFT_BENCH_DEPTHS` (4096 of each type, 16384 of the first one), `GGRAFT_BENCH_WHAT` (open,prefill,decode,more,real,depth,busy,swap,adapters), `GGRAFT_BENCH_DIR` (where the synthetic models are kept,
//! target/bench-models).

use criterion::{BatchSize, Criterion};
use ggraft::adapter::Precision;
use ggraft::file::types::GgmlType;
use ggraft::infer::ExistingText;
use ggraft::{Adapter, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::bench::{
    Progress, budget, is_full, is_quick, model_file, number, shapes, threads, timed,
    types as types_of, var, weight_types,
};
use ggraft_testkit::{adapters, oracle, synth};
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Virtual tokens of the adapters.
const P: usize = 20;
const DECODE: usize = 32;
const N_CTX: usize = 1024;
/// Longest prefill that leaves room for all that comes with it.
const MAX_PREFILL: usize = 512;

/// Rank of the LoRA adapters.
const RANK: usize = 8;

struct Setup {
    shape: &'static synth::Shape,
    types: Vec<GgmlType>,
    /// What is compared in tables of ratios.
    tables: Vec<Table>,
    n_threads: usize,
    /// Tokens of a prefill.
    prefill: usize,
    /// Long contexts: types of weights and tokens.
    depths: Vec<(GgmlType, usize)>,
    /// Of one row at most, as long as there is time.
    rounds: usize,
    budget: Duration,
    progress: Progress,
    what: String,
    /// Between turns: idle workers of libllama's pool keep polling for a tenth of a second and would slow down whoever
    /// comes next.
    settle: Duration,
}

fn setup() -> Setup {
    let quick = is_quick();
    let (shape, types_, more, rounds, settle) = match quick {
        true => ("tiny", "q4_k", "q6_k", 1, 0),
        false => (
            "llama-1b",
            "q4_k,q4_0,q8_0",
            "q6_k,q5_k,q3_k,iq4_xs",
            5,
            300,
        ),
    };
    let prefill = number("GGRAFT_BENCH_PREFILL", if quick { 128 } else { 512 });
    assert!(
        (1..=MAX_PREFILL).contains(&prefill),
        "GGRAFT_BENCH_PREFILL: 1 to {MAX_PREFILL}"
    );
    let what = var(
        "GGRAFT_BENCH_WHAT",
        "open,prefill,decode,more,real,depth,busy,swap,adapters",
    );
    let shape = shapes("GGRAFT_BENCH_SHAPE", shape)[0];
    let types = types_of("GGRAFT_BENCH_TYPES", types_);
    let more = types_of("GGRAFT_BENCH_MORE_TYPES", more);
    let depths = long_contexts(&types, quick);
    let wanted = |name: &str| what.contains(name);
    let tables = tables(shape, &types, &more, wanted);
    let compared = tables
        .iter()
        .map(|t| t.subjects.len() * t.what.len() * t.repack.len());
    let rows = compared.sum::<usize>()
        + if wanted("depth") { 2 * depths.len() } else { 0 }
        + if wanted("busy") { BUSY } else { 0 }
        + if wanted("swap") { SWAPS } else { 0 }
        + if wanted("adapters") { ADAPTERS } else { 0 };
    let names: Vec<_> = types.iter().map(|ty| ty.name()).collect();
    let progress = Progress::new(
        rows,
        &format!("{what} of {} ({})", shape.name, names.join(", ")),
    );
    Setup {
        shape,
        types,
        tables,
        n_threads: threads(),
        prefill,
        depths,
        rounds: number("GGRAFT_BENCH_ROUNDS", rounds),
        budget: budget(),
        progress,
        what,
        settle: Duration::from_millis(settle),
    }
}

/// What `GGRAFT_BENCH_DEPTHS` asks for, of all types. Libllama's prompts of 16384 tokens take ten minutes: unless asked
/// for, of the first type only.
fn long_contexts(types: &[GgmlType], quick: bool) -> Vec<(GgmlType, usize)> {
    let asked = var("GGRAFT_BENCH_DEPTHS", "");
    let of_all = match (asked.as_str(), quick) {
        ("", true) => "64",
        ("", false) => "4096",
        (asked, _) => asked,
    };
    let depth = |n: &str| {
        n.trim()
            .parse()
            .expect("GGRAFT_BENCH_DEPTHS: numbers of tokens")
    };
    let depths: Vec<usize> = of_all.split(',').map(depth).collect();
    let mut contexts: Vec<_> = types
        .iter()
        .flat_map(|&ty| depths.iter().map(move |&depth| (ty, depth)))
        .collect();
    if asked.is_empty() && !quick {
        contexts.push((types[0], 16384));
    }
    contexts
}

/// A file, and how it is called.
struct Subject {
    name: String,
    path: PathBuf,
}

/// Both engines on some files.
struct Table {
    title: String,
    subjects: Vec<Subject>,
    /// Which of open, prefill and decode.
    what: Vec<&'static str>,
    repack: &'static [Repack],
}

fn tables(
    shape: &synth::Shape,
    types: &[GgmlType],
    more: &[GgmlType],
    wanted: impl Fn(&str) -> bool,
) -> Vec<Table> {
    let of_types = |types: &[GgmlType]| {
        let subject = |&ty: &GgmlType| Subject {
            name: ty.name().to_owned(),
            path: model_file(shape, ty),
        };
        types.iter().map(subject).collect()
    };
    let mut all = ["open", "prefill", "decode"].to_vec();
    all.retain(|what| wanted(what));
    let mut tables = Vec::new();
    if !all.is_empty() {
        tables.push(Table {
            title: shape.name.to_owned(),
            subjects: of_types(types),
            what: all,
            repack: &REPACK,
        });
    }
    if wanted("more") {
        tables.push(Table {
            title: format!("{}, further types", shape.name),
            subjects: of_types(more),
            what: vec!["prefill"],
            repack: &REPACK[..MAPPED],
        });
    }
    if wanted("real") && !is_quick() {
        tables.push(Table {
            title: "real models".to_owned(),
            subjects: real_models(),
            what: vec!["open", "prefill", "decode"],
            repack: &REPACK[..MAPPED],
        });
    }
    tables
}

/// All files in the folder of real models.
fn real_models() -> Vec<Subject> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/models/real");
    let folder = var("GGRAFT_REAL_MODELS", default);
    let entries = std::fs::read_dir(&folder).into_iter().flatten();
    let paths = entries.map(|entry| entry.expect("a folder that can be read").path());
    let mut paths: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
        .collect();
    paths.sort();
    let name = |path: &Path| path.file_stem().expect("a file").display().to_string();
    let subject = |path: PathBuf| Subject {
        name: name(&path),
        path,
    };
    paths.into_iter().map(subject).collect()
}

/// Rows about other threads that are busy.
const BUSY: usize = 4;
/// Rows about changes of the adapter, and about what only ggraft has.
const SWAPS: usize = 3;
const ADAPTERS: usize = 7;

/// Repacked weights here and in libllama: like with like, and the defaults of both.
const REPACK: [Repack; 3] = [
    (false, false, "off"),
    (false, true, "defaults: off, on"),
    (true, true, "on"),
];
/// So many with mapped weights here.
const MAPPED: usize = 2;
type Repack = (bool, bool, &'static str);

/// Token ids that differ from position to position.
fn tokens(n: usize) -> Vec<i32> {
    (0..n as i32).map(|i| 1000 + i * 37 % 5000).collect()
}

fn options(n_ctx: usize, n_threads: usize) -> SessionOptions {
    SessionOptions::default().n_ctx(n_ctx).n_threads(n_threads)
}

fn oracle_options(n_ctx: usize, n_threads: usize, repack: bool) -> oracle::Options {
    oracle::Options {
        n_ctx,
        n_threads,
        kv_type: GgmlType::F16,
        flash_attention: None,
        repack,
        ..Default::default()
    }
}

/// What a row shows.
struct Figures {
    unit: Unit,
    /// Median seconds of each.
    ours: f64,
    theirs: f64,
    /// Median ratio of libllama's time to ggraft's: above 1, ggraft is faster.
    ratio: f64,
    /// Rounds that counted.
    rounds: usize,
}

/// Both engines in turn, after one round that does not count: one round, and more until there are `rounds` or the row's time is
/// over.
fn duel(
    s: &Setup,
    rounds: usize,
    unit: Unit,
    mut ours: impl FnMut() -> Duration,
    mut theirs: impl FnMut() -> Duration,
) -> Figures {
    let start = Instant::now();
    let (mut a, mut b, mut r) = (Vec::new(), Vec::new(), Vec::new());
    let settle = || std::thread::sleep(s.settle);
    for round in 0..=rounds {
        if round > 1 && start.elapsed() > s.budget {
            break;
        }
        settle();
        let x = ours().as_secs_f64();
        settle();
        let y = theirs().as_secs_f64();
        if round > 0 {
            a.push(x);
            b.push(y);
            r.push(y / x);
        }
    }
    let rounds = r.len();
    let [ours, theirs, ratio] = [a, b, r].map(|mut v| {
        v.sort_by(f64::total_cmp);
        // The mean of the middle two, if two rounds are in the middle.
        (v[(v.len() - 1) / 2] + v[v.len() / 2]) / 2.0
    });
    Figures {
        unit,
        ours,
        theirs,
        ratio,
        rounds,
    }
}

/// How a figure is shown.
#[derive(Clone, Copy)]
enum Unit {
    Milliseconds,
    Microseconds,
    /// That many tokens a second.
    Tokens(usize),
}

impl Unit {
    fn show(self, seconds: f64) -> String {
        match self {
            Self::Milliseconds => format!("{:.1} ms", seconds * 1e3),
            Self::Microseconds => format!("{:.1} µs", seconds * 1e6),
            Self::Tokens(n) => format!("{:.1} tok/s", n as f64 / seconds),
        }
    }
}

fn row(what: &str, how: &str, figures: &Figures) {
    let &Figures {
        unit,
        ours,
        theirs,
        ratio,
        rounds,
    } = figures;
    println!(
        "| {what} | {how} | {} | {} | {ratio:.3} | {rounds} |",
        unit.show(ours),
        unit.show(theirs)
    );
}

/// A table; what its rows without repacking here say, for the summary.
fn ratios(s: &Setup, table: &Table) -> Vec<Beside> {
    println!(
        "\n{} on {} threads, F16 cache, medians of up to {} rounds\n",
        table.title, s.n_threads, s.rounds
    );
    if table.subjects.is_empty() {
        println!("None is there: `make models` fetches some.");
        return Vec::new();
    }
    for subject in &table.subjects {
        println!("{}: {}", subject.name, weight_types(&subject.path));
    }
    println!(
        "\n| what | weights | repack | ggraft | libllama | ratio | rounds |\n| --- | --- | --- | --- | --- | --- | --- |"
    );
    let mut beside = Vec::new();
    for subject in &table.subjects {
        for &(ours, theirs, name) in table.repack {
            let figures = compare(s, subject, &table.what, ours, theirs, name);
            if !ours {
                beside.extend(figures.into_iter().map(|(what, figures)| Beside {
                    what,
                    weights: subject.name.clone(),
                    repack: theirs,
                    figures,
                }));
            }
        }
    }
    beside
}

/// ggraft on the mapped file beside libllama, repacked or not.
struct Beside {
    what: String,
    weights: String,
    repack: bool,
    figures: Figures,
}

/// ggraft on the mapped file beside the better of libllama's two ways.
fn summary(all: &[Beside]) {
    println!(
        "\nMapped weights beside the better of libllama's two ways\n\n| what | weights | ggraft | libllama | repack | ratio |\n| --- | --- | --- | --- | --- | --- |"
    );
    for off in all.iter().filter(|row| !row.repack) {
        let on = all
            .iter()
            .find(|on| on.repack && (&on.what, &on.weights) == (&off.what, &off.weights))
            .expect("each has both");
        let (better, repack) = match off.figures.ratio < on.figures.ratio {
            true => (off, "off"),
            false => (on, "on"),
        };
        let Figures {
            ours,
            theirs,
            ratio,
            unit,
            ..
        } = better.figures;
        println!(
            "| {} | {} | {} | {} | {repack} | {ratio:.2} |",
            off.what,
            off.weights,
            unit.show(ours),
            unit.show(theirs),
        );
    }
}

/// A file, repacked or not in ggraft and in libllama.
fn compare(
    s: &Setup,
    subject: &Subject,
    what: &[&str],
    repack: bool,
    their_repack: bool,
    name: &str,
) -> Vec<(String, Figures)> {
    let path = &subject.path;
    let how = format!("{} | {name}", subject.name);
    let mut all = Vec::new();
    let mut done = |what: &str, figures: Figures| {
        row(what, &how, &figures);
        all.push((what.to_owned(), figures));
    };
    let wanted = |name: &str| what.contains(&name);
    let progress = |what: &str| {
        s.progress
            .row(&format!("{what}, {}, repack {name}", subject.name))
    };
    if wanted("open") {
        progress("open");
        let figures = duel(
            s,
            s.rounds.min(3),
            Unit::Milliseconds,
            || timed(|| drop(black_box(open(path, repack)))),
            || {
                timed(|| {
                    drop(black_box(
                        oracle::Model::load(path, their_repack).expect("loads"),
                    ))
                })
            },
        );
        done("open", figures);
    }
    if !wanted("prefill") && !wanted("decode") {
        return all;
    }
    let model = open(path, repack);
    let mut ours = Session::new(&model, &options(N_CTX, s.n_threads)).expect("a session");
    let mut theirs = oracle::Llama::load(path, &oracle_options(N_CTX, s.n_threads, their_repack))
        .expect("loads");
    let text = tokens(s.prefill.max(DECODE));
    let prefill = &text[..s.prefill];
    if wanted("prefill") {
        let what = format!("prefill {}", s.prefill);
        progress(&what);
        let figures = duel(
            s,
            s.rounds,
            Unit::Tokens(s.prefill),
            || {
                ours.reset();
                timed(|| ours.feed(prefill).expect("room"))
            },
            || {
                theirs.clear();
                timed(|| drop(black_box(theirs.prefill(prefill).map(<[f32]>::len))))
            },
        );
        done(&what, figures);
    }
    if wanted("decode") {
        let what = format!("decode at depth {P}");
        progress(&what);
        ours.reset();
        ours.attach(&adapters::prefix(&model, P, 1), ExistingText::Drop)
            .expect("fits");
        let fill = tokens(P);
        let figures = duel(
            s,
            s.rounds,
            Unit::Tokens(DECODE),
            || {
                ours.reset();
                timed(|| {
                    text[..DECODE]
                        .iter()
                        .for_each(|&t| ours.feed(&[t]).expect("room"))
                })
            },
            || {
                theirs.clear();
                theirs.prefill(&fill).expect("room");
                timed(|| {
                    for &t in &text[..DECODE] {
                        black_box(theirs.step(t).expect("room").len());
                    }
                })
            },
        );
        done(&what, figures);
    }
    all
}

/// Long contexts, with the defaults of both: a prompt, once, and then text behind it.
fn depths(s: &Setup) {
    println!(
        "\n| what | type | ggraft | libllama | ratio | rounds |\n| --- | --- | --- | --- | --- | --- |"
    );
    for &(ty, depth) in &s.depths {
        let path = model_file(s.shape, ty);
        let model = open(&path, false);
        // The text grows by a turn's tokens in each round, also in the one that does not count.
        let n_ctx = depth + (s.rounds + 1) * DECODE;
        let mut ours = Session::new(&model, &options(n_ctx, s.n_threads)).expect("a session");
        let their_options = oracle_options(n_ctx, s.n_threads, true);
        let mut theirs = oracle::Llama::load(&path, &their_options).expect("loads");
        let text = tokens(depth);
        // Pages of the file and of the cache are there.
        ours.feed(&text[..P]).expect("room");
        ours.reset();
        theirs.prefill(&text[..P]).expect("room");
        theirs.clear();
        let what = format!("prefill {depth}");
        s.progress.row(&format!("{what}, {}", ty.name()));
        let [a, b] = [
            timed(|| ours.feed(&text).expect("room")),
            timed(|| drop(black_box(theirs.prefill(&text).map(<[f32]>::len)))),
        ]
        .map(|t| t.as_secs_f64());
        let figures = Figures {
            unit: Unit::Tokens(depth),
            ours: a,
            theirs: b,
            ratio: b / a,
            rounds: 1,
        };
        row(&what, ty.name(), &figures);
        let what = format!("decode at depth {depth}");
        s.progress.row(&format!("{what}, {}", ty.name()));
        let next = &text[..DECODE.min(depth)];
        let figures = duel(
            s,
            s.rounds,
            Unit::Tokens(next.len()),
            || timed(|| next.iter().for_each(|&t| ours.feed(&[t]).expect("room"))),
            || {
                timed(|| {
                    for &t in next {
                        black_box(theirs.step(t).expect("room").len());
                    }
                })
            },
        );
        row(&what, ty.name(), &figures);
    }
}

/// Threads that do nothing but keep cores busy, until they are dropped.
struct BusyThreads {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl BusyThreads {
    fn new(n: usize) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let threads = (0..n).map(|_| {
            let over = Arc::clone(&over);
            std::thread::spawn(move || while !over.load(Ordering::Relaxed) {})
        });
        Self {
            threads: threads.collect(),
            over,
        }
    }
}

impl Drop for BusyThreads {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("it only counts time");
        }
    }
}

/// Both engines with one thread and with all, alone and beside as many busy threads as there are cores to compute on. What counts is the last column: with all
/// threads an engine should not be slower than with one.
fn busy(s: &Setup) {
    /// Tokens of a turn: few, because ggml's threads need a second for each.
    const TURN: usize = 8;
    let ty = s.types[0];
    let path = model_file(s.shape, ty);
    let model = open(&path, false);
    println!(
        "\nDecode at depth {P}, {}, beside {} busy threads, tok/s\n\n| engine | threads | alone | beside busy threads | of one thread's |\n| --- | --- | --- | --- | --- |",
        ty.name(),
        s.n_threads
    );
    let fill = tokens(P);
    let text = tokens(TURN);
    let measure = |turn: &mut dyn FnMut() -> Duration| {
        let start = Instant::now();
        let mut times = Vec::new();
        while times.is_empty() || (times.len() < s.rounds && start.elapsed() < s.budget) {
            times.push(turn().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        TURN as f64 / times[times.len() / 2]
    };
    let both = |turn: &mut dyn FnMut() -> Duration| {
        turn();
        std::thread::sleep(s.settle);
        let alone = measure(turn);
        let _busy = BusyThreads::new(s.n_threads);
        (alone, measure(turn))
    };
    let threads = [1, s.n_threads];
    let show = |engine: &str, figures: [(f64, f64); 2]| {
        for (n, (alone, beside)) in threads.iter().zip(figures) {
            let ratio = beside / figures[0].1;
            println!("| {engine} | {n} | {alone:.1} | {beside:.1} | {ratio:.2} |");
        }
    };
    let figures = threads.map(|n| {
        s.progress
            .row(&format!("beside busy threads: ggraft, {n} threads"));
        let mut ours = Session::new(&model, &options(N_CTX, n)).expect("a session");
        both(&mut || {
            ours.reset();
            ours.feed(&fill).expect("room");
            timed(|| text.iter().for_each(|&t| ours.feed(&[t]).expect("room")))
        })
    });
    show("ggraft", figures);
    let figures = threads.map(|n| {
        s.progress
            .row(&format!("beside busy threads: libllama, {n} threads"));
        let their_options = oracle_options(N_CTX, n, true);
        let mut theirs = oracle::Llama::load(&path, &their_options).expect("loads");
        both(&mut || {
            theirs.clear();
            theirs.prefill(&fill).expect("room");
            timed(|| {
                for &t in &text {
                    black_box(theirs.step(t).expect("room").len());
                }
            })
        })
    });
    show("libllama", figures);
}

/// Another adapter takes over: a prefix here, a LoRA of rank [`RANK`] on queries and values in libllama. Without text, with
/// the first token after it, and in the middle of a conversation whose text is computed again under the new adapter: what is
/// cached was computed under the old one, in both engines.
fn swaps(s: &Setup) {
    let ty = s.types[0];
    let path = model_file(s.shape, ty);
    let model = open(&path, false);
    let adapters = [
        adapters::prefix(&model, P, 1),
        adapters::prefix(&model, P, 1),
    ];
    let mut ours = Session::new(&model, &options(N_CTX, s.n_threads)).expect("a session");
    let mut theirs =
        oracle::Llama::load(&path, &oracle_options(N_CTX, s.n_threads, false)).expect("loads");
    let dir = tempfile::tempdir().expect("a folder");
    let loras = [1, 2].map(|seed| {
        let file = dir.path().join(format!("{seed}.gguf"));
        synth::write_lora(&file, s.shape, RANK, seed).expect("room for an adapter");
        oracle::Lora::load(&Rc::clone(theirs.model()), &file).expect("loads")
    });
    // Compiled once.
    for adapter in &adapters {
        ours.swap(adapter, ExistingText::Drop).expect("fits");
    }
    println!(
        "\nSwap to another resident adapter, {} without repacking: prefixes of {P} tokens, LoRA of rank {RANK} (q, v)\n",
        ty.name()
    );
    println!(
        "| what | text | ggraft | libllama LoRA | ratio | rounds |\n| --- | --- | --- | --- | --- | --- |"
    );
    let text = tokens(s.prefill);
    // Each time another one.
    let (mut adapters, mut loras) = (adapters.iter().cycle(), loras.iter().cycle());
    let mut adapter = || adapters.next().expect("it never ends");
    let mut lora = || loras.next().expect("it never ends");
    s.progress.row("swap alone");
    let figures = duel(
        s,
        s.rounds,
        Unit::Microseconds,
        || {
            let next = adapter();
            timed(|| {
                ours.swap(next, ExistingText::Drop).expect("fits");
            })
        },
        || {
            let next = lora();
            timed(|| theirs.set_lora(next))
        },
    );
    row("swap alone", "none", &figures);
    s.progress.row("swap and one token");
    let figures = duel(
        s,
        s.rounds,
        Unit::Milliseconds,
        || {
            let next = adapter();
            timed(|| {
                ours.swap(next, ExistingText::Drop).expect("fits");
                ours.feed(&text[..1]).expect("room");
            })
        },
        || {
            let next = lora();
            theirs.clear();
            timed(|| {
                theirs.set_lora(next);
                black_box(theirs.step(text[0]).expect("room").len());
            })
        },
    );
    row("swap and one token", "none", &figures);
    s.progress.row("swap, text computed again");
    ours.reset();
    ours.feed(&text).expect("room");
    let figures = duel(
        s,
        s.rounds,
        Unit::Milliseconds,
        || {
            let next = adapter();
            timed(|| {
                ours.swap(next, ExistingText::Recompute).expect("room");
                black_box(ours.logits().expect("computed").len());
            })
        },
        || {
            let next = lora();
            timed(|| {
                theirs.set_lora(next);
                theirs.clear();
                black_box(theirs.prefill(&text).expect("room").len());
            })
        },
    );
    let how = format!("{} tokens", s.prefill);
    row("swap, text computed again", &how, &figures);
}

fn open(path: &Path, repack: bool) -> Model {
    Model::open(path, &ModelOptions::default().repack(repack)).expect("opens")
}

fn adapters(c: &mut Criterion, s: &Setup) {
    let path = model_file(s.shape, s.types[0]);
    let model = open(&path, false);
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("prefix.gguf");
    let (a, b, soft) = (
        adapters::prefix(&model, P, 1),
        adapters::prefix(&model, P, 1),
        adapters::prompt(&model, P, 1),
    );
    a.save(&file, Precision::F16).expect("room for an adapter");

    let mut group = c.benchmark_group(format!("{}-{}", s.shape.name, s.types[0].name()));
    group.sample_size(20);
    if !is_full() {
        group.warm_up_time(Duration::from_secs(1));
        group.measurement_time(Duration::from_secs(3));
    }
    s.progress.row("load prefix adapter from its file");
    group.bench_function("load prefix adapter from its file", |bench| {
        bench.iter(|| black_box(Adapter::load(&file).expect("loads")))
    });
    let mut session = Session::new(&model, &options(N_CTX, s.n_threads)).expect("a session");
    s.progress.row("load, compile and attach from the file");
    group.bench_function("load, compile and attach from the file", |bench| {
        bench.iter(|| {
            let fresh = Adapter::load(&file).expect("loads");
            session.swap(&fresh, ExistingText::Drop).expect("fits");
        })
    });
    for (name, x) in [("prefix", &a), ("prompt", &soft)] {
        s.progress.row(&format!("attach resident {name} adapter"));
        session.swap(x, ExistingText::Drop).expect("compiled once");
        group.bench_function(format!("attach resident {name} adapter"), |bench| {
            bench.iter(|| session.swap(x, ExistingText::Drop).expect("fits"))
        });
    }
    s.progress.row("swap between two resident adapters");
    group.bench_function("swap between two resident adapters", |bench| {
        let mut turn = false;
        bench.iter(|| {
            turn = !turn;
            session
                .swap(if turn { &a } else { &b }, ExistingText::Drop)
                .expect("fits");
        })
    });
    s.progress.row("compile prompt adapter");
    group.bench_function("compile prompt adapter", |bench| {
        bench.iter_batched(
            || adapters::prompt(&model, P, 1),
            |fresh| session.swap(&fresh, ExistingText::Drop).expect("fits"),
            BatchSize::SmallInput,
        )
    });
    session.detach(ExistingText::Drop).expect("attached before");
    let text = tokens(P);
    s.progress.row(&format!("prefill {P} tokens"));
    group.bench_function(format!("prefill {P} tokens, for comparison"), |bench| {
        bench.iter(|| {
            session.reset();
            session.feed(&text).expect("room");
        })
    });
    group.finish();
}

fn main() {
    let s = setup();
    let wanted = |what: &str| s.what.contains(what);
    let compared: Vec<_> = s.tables.iter().map(|table| ratios(&s, table)).collect();
    if !compared.is_empty() {
        summary(&compared.into_iter().flatten().collect::<Vec<_>>());
    }
    if wanted("depth") {
        depths(&s);
    }
    if wanted("busy") {
        busy(&s);
    }
    if wanted("swap") {
        swaps(&s);
    }
    if wanted("adapters") {
        let mut c = Criterion::default().configure_from_args();
        adapters(&mut c, &s);
        c.final_summary();
    }
}
