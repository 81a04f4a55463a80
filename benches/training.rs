//! What training costs.
//!
//!     cargo bench --bench training
//!
//! A table of the product that carries the gradient back through a frozen matrix, beside ggml's own products of that
//! shape: a `mul_mat` with the transposed matrix kept as BF16, and the forward pass. All three take turns, and the best of
//! the rounds is what counts.
//!
//! Then steps of prefix tuning on synthetic models of real shapes: time, speed and peak memory, each configuration in a
//! process of its own. `scripts/peft_step.py` measures the same step with PEFT.
//!
//! `cargo bench -- --test` runs all of it once on a tiny model, whose figures say nothing.
//!
//! Environment: `GGRAFT_BENCH_WHAT` (products,steps), `GGRAFT_BENCH_TYPES` (q4_k,q8_0,q6_k,f16), `GGRAFT_BENCH_ROWS`
//! (8,64,512), `GGRAFT_BENCH_SHAPES` (smollm-135m,llama-1b), `GGRAFT_BENCH_STEP_TYPES` (q4_k,q8_0),
//! `GGRAFT_BENCH_THREADS` (physical cores), `GGRAFT_BENCH_ROUNDS` (10), `GGRAFT_BENCH_DIR` (where the synthetic models are kept,
//! target/bench-models).

use ggraft::adapter::AdapterKind;
use ggraft::file::types::GgmlType;
use ggraft::measure::{Seconds, mul_mat_back_seconds};
use ggraft::train::data::Example;
use ggraft::train::{Init, TrainOptions, Trainer};
use ggraft::{Model, ModelOptions};
use ggraft_testkit::bench::{
    is_quick, model_file, number, shapes, threads, types, var, weight_types,
};
use ggraft_testkit::{process_size, synth};
use std::process::Command;

/// Frozen matrices, `ne = [K, N]`: both sides of a feed-forward network.
const MATRICES: [[usize; 2]; 2] = [[2048, 8192], [8192, 2048]];

struct Setup {
    types: Vec<GgmlType>,
    matrices: [[usize; 2]; 2],
    rows: Vec<usize>,
    shapes: Vec<&'static synth::Shape>,
    step_types: Vec<GgmlType>,
    n_threads: usize,
    rounds: usize,
    steps: u64,
}

fn setup() -> Setup {
    let quick = is_quick();
    let either = |full: &'static str, small: &'static str| if quick { small } else { full };
    let rows = var("GGRAFT_BENCH_ROWS", either("8,64,512", "8"));
    let rows = rows.split(',').map(parsed);
    Setup {
        types: types("GGRAFT_BENCH_TYPES", either("q4_k,q8_0,q6_k,f16", "q4_k")),
        matrices: match quick {
            true => MATRICES.map(|ne| ne.map(|n| n / 8)),
            false => MATRICES,
        },
        rows: rows.collect(),
        shapes: shapes(
            "GGRAFT_BENCH_SHAPES",
            either("smollm-135m,llama-1b", "tiny"),
        ),
        step_types: types("GGRAFT_BENCH_STEP_TYPES", either("q4_k,q8_0", "q4_k")),
        n_threads: threads(),
        rounds: number("GGRAFT_BENCH_ROUNDS", if quick { 1 } else { 10 }),
        steps: if quick { 2 } else { STEPS },
    }
}

fn parsed(text: &str) -> usize {
    text.parse()
        .unwrap_or_else(|_| panic!("'{text}' is no number"))
}

fn products(s: &Setup) {
    println!(
        "\nProducts of W on {} threads, dX = W^T dY and Y = W X, GFLOP/s, best of {} rounds\n",
        s.n_threads, s.rounds
    );
    println!(
        "| type | W | T | back | ggml BF16 | ratio | forward | ggml forward | ratio |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    for &ty in &s.types {
        for [k, n] in s.matrices {
            for &t in &s.rows {
                let Seconds {
                    back,
                    ggml_bf16,
                    forward,
                    ggml_forward,
                } = mul_mat_back_seconds(ty, k, n, t, s.n_threads, s.rounds);
                let speed = |seconds: f64| 2e-9 * (k * n * t) as f64 / seconds;
                println!(
                    "| {} | {k} x {n} | {t} | {:.0} | {:.0} | {:.2} | {:.0} | {:.0} | {:.2} |",
                    ty.name(),
                    speed(back),
                    speed(ggml_bf16),
                    ggml_bf16 / back,
                    speed(forward),
                    speed(ggml_forward),
                    ggml_forward / forward
                );
            }
        }
    }
}

/// Holds `file;T;targets;threads;bytes;steps` in the process that measures one configuration.
const STEP: &str = "GGRAFT_BENCH_STEP";
/// Virtual tokens.
const P: usize = 20;
/// Steps; the first one allocates memory and maps the weights, the best of the others counts.
const STEPS: u64 = 5;

/// A configuration of a step: T, targets (the last ones), bytes for activations (0: the default).
const CONFIGURATIONS: [(usize, usize, u64); 5] = [
    (512, 512, 0),
    (512, 128, 0),
    (512, 512, 256 << 20),
    (1024, 1024, 0),
    (128, 128, 0),
];

fn steps(s: &Setup) {
    println!(
        "\nOne step of prefix tuning, P = {P}, {} threads, best of {} steps\n",
        s.n_threads,
        s.steps - 1
    );
    println!(
        "| shape | type: of its weights | T | targets | memory | ms per step | tok/s | layers computed twice | peak anonymous | peak resident |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    for shape in &s.shapes {
        for &ty in &s.step_types {
            let file = model_file(shape, ty);
            let weights = weight_types(&file);
            for (t, targets, memory) in CONFIGURATIONS {
                let what = format!(
                    "{};{t};{targets};{};{memory};{}",
                    file.display(),
                    s.n_threads,
                    s.steps
                );
                let me = std::env::current_exe().expect("this program has a path");
                let out = Command::new(me).env(STEP, what).output().expect("it runs");
                assert!(
                    out.status.success(),
                    "{}",
                    String::from_utf8_lossy(&out.stderr)
                );
                let memory = match memory {
                    0 => "default".to_owned(),
                    bytes => format!("{} MiB", bytes >> 20),
                };
                println!(
                    "| {} | {}: {weights} | {t} | {targets} | {memory} | {} |",
                    shape.name,
                    ty.name(),
                    String::from_utf8_lossy(&out.stdout).trim()
                );
            }
        }
    }
}

/// Measures one configuration and prints the rest of its line.
fn step(what: &str) {
    let fields: Vec<&str> = what.split(';').collect();
    let &[file, t, targets, n_threads, memory, steps] = &fields[..] else {
        panic!("{STEP}={what}");
    };
    let (t, targets) = (parsed(t), parsed(targets));
    let model = Model::open(file, &ModelOptions::default()).expect("a model");
    let mut options = TrainOptions::new(AdapterKind::Prefix);
    options.length = Some(P);
    options.init = Some(Init::Random);
    options.batch = 1;
    options.steps = Some(parsed(steps) as u64);
    options.threads = Some(parsed(n_threads));
    options.memory = Some(parsed(memory) as u64).filter(|&bytes| bytes > 0);
    let row = Example {
        given: Vec::new(),
        then: (0..t)
            .map(|i| (((i * 7919) % 1000) as i32, i >= t - targets))
            .collect(),
        weight: 1.0,
        bos: false,
    };
    let mut trainer = Trainer::new(&model, options, vec![row], Vec::new()).expect("a run");
    let mut anonymous = 0;
    let mut best = f64::INFINITY;
    while let Some(report) = trainer.step().expect("a step") {
        // The memory of a step is kept for the next one.
        anonymous = anonymous.max(process_size("RssAnon").unwrap_or(0));
        if report.step > 1 {
            best = best.min(report.seconds);
        }
    }
    println!(
        "{:.0} | {:.1} | {} | {} MB | {} MB",
        best * 1e3,
        t as f64 / best,
        trainer.summary().recomputed_layers,
        anonymous / 1_000_000,
        process_size("VmHWM").unwrap_or(0) / 1_000_000,
    );
}

fn main() {
    if let Ok(what) = std::env::var(STEP) {
        return step(&what);
    }
    let s = setup();
    let what = var("GGRAFT_BENCH_WHAT", "products,steps");
    if what.contains("products") {
        products(&s);
    }
    if what.contains("steps") {
        steps(&s);
    }
}
