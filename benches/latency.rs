//! Latency beside libllama: same file, same threads, same run.
//!
//!     cargo bench --bench latency
//!
//! First a table of ratios: both engines take turns, a round each, and the median of the rounds' ratios is what counts,
//! so that a drift of the machine's speed hits both alike. Then criterion's absolute figures of what only ggraft has:
//! loading, compiling, attaching and swapping adapters, beside a prefill of as many tokens.
//!
//! Environment: `GGRAFT_BENCH_SHAPE` (llama-1b), `GGRAFT_BENCH_TYPES` (q4_k,q4_0,q8_0), `GGRAFT_BENCH_THREADS` (physical cores),
//! `GGRAFT_BENCH_ROUNDS` (5), `GGRAFT_BENCH_WHAT` (open,prefill,decode), `GGRAFT_BENCH_DIR` (where the synthetic models are kept, target/bench-models).

use criterion::{BatchSize, Criterion};
use ggraft::adapter::{AdapterKind, BaseSignature, Parts, Payload, Precision, PrefixLayer, Rows};
use ggraft::file::types::GgmlType;
use ggraft::infer::ExistingText;
use ggraft::{Adapter, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::{oracle, synth};
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Virtual tokens of the adapters.
const P: usize = 20;
const PREFILL: usize = 512;
const DECODE: usize = 32;
const N_CTX: usize = 1024;

struct Setup {
    shape: &'static synth::Shape,
    types: Vec<GgmlType>,
    n_threads: usize,
    rounds: usize,
    what: String,
    dir: PathBuf,
}

fn var(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

fn setup() -> Setup {
    let cores = ggraft::default_threads().to_string();
    let shape = var("GGRAFT_BENCH_SHAPE", "llama-1b");
    let default_dir = concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench-models");
    Setup {
        shape: synth::shape(&shape).unwrap_or_else(|| panic!("no shape '{shape}'")),
        types: var("GGRAFT_BENCH_TYPES", "q4_k,q4_0,q8_0")
            .split(',')
            .map(type_called)
            .collect(),
        n_threads: var("GGRAFT_BENCH_THREADS", &cores)
            .parse()
            .expect("a number of threads"),
        rounds: var("GGRAFT_BENCH_ROUNDS", "5")
            .parse()
            .expect("a number of rounds"),
        what: var("GGRAFT_BENCH_WHAT", "open,prefill,decode"),
        dir: PathBuf::from(var("GGRAFT_BENCH_DIR", default_dir)),
    }
}

fn type_called(name: &str) -> GgmlType {
    let found = GgmlType::ALL
        .iter()
        .copied()
        .find(|t| t.name().eq_ignore_ascii_case(name));
    found.unwrap_or_else(|| panic!("no type '{name}'"))
}

/// The synthetic model of this shape and type, written on first use.
fn model_file(s: &Setup, ty: GgmlType) -> PathBuf {
    let path = s.dir.join(format!("{}-{}.gguf", s.shape.name, ty.name()));
    if !path.exists() {
        std::fs::create_dir_all(&s.dir).expect("a folder for models");
        synth::write(&path, s.shape, ty, false).expect("room for the model");
    }
    path
}

/// Token ids that differ from position to position.
fn tokens(n: usize) -> Vec<i32> {
    (0..n as i32).map(|i| 1000 + i * 37 % 5000).collect()
}

/// A prefix adapter of small random rows.
fn prefix(model: &Model) -> Adapter {
    let shape = model.shape();
    let width = shape.kv_width();
    let mut state = 1u32;
    let mut rows = || {
        let values = (0..P * width)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.5
            })
            .collect();
        Rows::from_f32(width, values).expect("whole rows")
    };
    let layers = (0..shape.n_layer)
        .map(|_| PrefixLayer {
            k: rows(),
            v: rows(),
        })
        .collect();
    adapter(model, AdapterKind::Prefix, Payload::Prefix { layers })
}

/// A prompt adapter of small random rows.
fn prompt(model: &Model) -> Adapter {
    let width = model.shape().n_embd;
    let values = (0..P * width)
        .map(|i| ((i * 7919) % 1000) as f32 / 25_000.0 - 0.02)
        .collect();
    let rows = Rows::from_f32(width, values).expect("whole rows");
    adapter(model, AdapterKind::Prompt, Payload::Rows(rows))
}

fn adapter(model: &Model, kind: AdapterKind, payload: Payload) -> Adapter {
    Adapter::new(Parts {
        kind,
        payload,
        template: None,
        name: None,
        fingerprint: Some(model.fingerprint()),
        base: BaseSignature::from(model.shape()),
        provenance: Default::default(),
    })
    .expect("a well-formed adapter")
}

fn options(s: &Setup) -> SessionOptions {
    SessionOptions::default()
        .n_ctx(N_CTX)
        .n_threads(s.n_threads)
}

fn oracle_options(s: &Setup, repack: bool) -> oracle::Options {
    oracle::Options {
        n_ctx: N_CTX,
        n_threads: s.n_threads,
        kv_type: GgmlType::F16,
        flash_attention: None,
        repack,
        ..Default::default()
    }
}

fn timed(f: impl FnOnce()) -> Duration {
    let start = Instant::now();
    f();
    start.elapsed()
}

/// Both engines in turn, after one round that does not count. Returns median seconds of each and the median ratio of
/// libllama's time to ggraft's: above 1, ggraft is faster.
fn duel(
    rounds: usize,
    mut ours: impl FnMut() -> Duration,
    mut theirs: impl FnMut() -> Duration,
) -> [f64; 3] {
    let (mut a, mut b, mut r) = (Vec::new(), Vec::new(), Vec::new());
    // Idle workers of libllama's pool keep polling for a tenth of a second and would slow down whoever comes next.
    let settle = || std::thread::sleep(Duration::from_millis(300));
    for round in 0..=rounds {
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
    [a, b, r].map(|mut v| {
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    })
}

fn row(
    what: &str,
    ty: GgmlType,
    repack: bool,
    unit: &str,
    per: f64,
    [ours, theirs, ratio]: [f64; 3],
) {
    let repack = if repack { "on" } else { "off" };
    let show = |t: f64| if per == 0.0 { t * 1e3 } else { per / t };
    println!(
        "| {what} | {} | {repack} | {:.1} {unit} | {:.1} {unit} | {ratio:.3} |",
        ty.name(),
        show(ours),
        show(theirs)
    );
}

fn ratios(s: &Setup) {
    println!(
        "\n{} on {} threads, F16 cache, median of {} rounds\n",
        s.shape.name, s.n_threads, s.rounds
    );
    println!(
        "| what | type | repack | ggraft | libllama | ratio |\n| --- | --- | --- | --- | --- | --- |"
    );
    for &ty in &s.types {
        let path = model_file(s, ty);
        for repack in [false, true] {
            let wanted = |what: &str| s.what.contains(what);
            if wanted("open") {
                let figures = duel(
                    s.rounds.min(3),
                    || timed(|| drop(black_box(open(&path, repack)))),
                    || {
                        timed(|| {
                            drop(black_box(
                                oracle::Model::load(&path, repack).expect("loads"),
                            ))
                        })
                    },
                );
                row("open", ty, repack, "ms", 0.0, figures);
            }
            if !wanted("prefill") && !wanted("decode") {
                continue;
            }
            let model = open(&path, repack);
            let mut ours = Session::new(&model, &options(s)).expect("a session");
            let mut theirs = oracle::Llama::load(&path, &oracle_options(s, repack)).expect("loads");
            let text = tokens(PREFILL);
            if wanted("prefill") {
                let figures = duel(
                    s.rounds,
                    || {
                        ours.reset();
                        timed(|| ours.feed(&text).expect("room"))
                    },
                    || {
                        theirs.clear();
                        timed(|| drop(black_box(theirs.prefill(&text).map(<[f32]>::len))))
                    },
                );
                row(
                    &format!("prefill {PREFILL}"),
                    ty,
                    repack,
                    "tok/s",
                    PREFILL as f64,
                    figures,
                );
            }
            if wanted("decode") {
                ours.reset();
                ours.attach(&prefix(&model), ExistingText::Drop)
                    .expect("fits");
                let fill = tokens(P);
                let figures = duel(
                    s.rounds,
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
                row(
                    &format!("decode at depth {P}"),
                    ty,
                    repack,
                    "tok/s",
                    DECODE as f64,
                    figures,
                );
            }
        }
    }
}

fn open(path: &Path, repack: bool) -> Model {
    Model::open(path, &ModelOptions::default().repack(repack)).expect("opens")
}

fn adapters(c: &mut Criterion, s: &Setup) {
    let path = model_file(s, s.types[0]);
    let model = open(&path, false);
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("prefix.gguf");
    let (a, b, soft) = (prefix(&model), prefix(&model), prompt(&model));
    a.save(&file, Precision::F16).expect("room for an adapter");

    let mut group = c.benchmark_group(format!("{}-{}", s.shape.name, s.types[0].name()));
    group.sample_size(20);
    group.bench_function("load prefix adapter from its file", |bench| {
        bench.iter(|| black_box(Adapter::load(&file).expect("loads")))
    });
    let mut session = Session::new(&model, &options(s)).expect("a session");
    group.bench_function("load, compile and attach from the file", |bench| {
        bench.iter(|| {
            let fresh = Adapter::load(&file).expect("loads");
            session.swap(&fresh, ExistingText::Drop).expect("fits");
        })
    });
    for (name, x) in [("prefix", &a), ("prompt", &soft)] {
        session.swap(x, ExistingText::Drop).expect("compiled once");
        group.bench_function(format!("attach resident {name} adapter"), |bench| {
            bench.iter(|| session.swap(x, ExistingText::Drop).expect("fits"))
        });
    }
    group.bench_function("swap between two resident adapters", |bench| {
        let mut turn = false;
        bench.iter(|| {
            turn = !turn;
            session
                .swap(if turn { &a } else { &b }, ExistingText::Drop)
                .expect("fits");
        })
    });
    group.bench_function("compile prompt adapter", |bench| {
        bench.iter_batched(
            || prompt(&model),
            |fresh| session.swap(&fresh, ExistingText::Drop).expect("fits"),
            BatchSize::SmallInput,
        )
    });
    session.detach(ExistingText::Drop).expect("attached before");
    let text = tokens(P);
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
    ratios(&s);
    let mut c = Criterion::default().configure_from_args();
    adapters(&mut c, &s);
    c.final_summary();
}
