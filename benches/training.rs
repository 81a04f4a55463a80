//! What training costs.
//!
//!     cargo bench --bench training
//!
//! A table of the product that carries the gradient back through a frozen matrix, beside ggml's own products of that
//! shape: a `mul_mat` with the transposed matrix kept as BF16, and the forward pass. All three take turns, and the best of
//! the rounds is what counts.
//!
//! The same and attention at every level of CPU that this one has, each in a process of its own, beside the naive definition.
//!
//! Then steps of prefix tuning on synthetic models of real shapes: time, speed and peak memory, each configuration in a
//! process of its own. Beside them the same steps with PEFT (`scripts/peft_step.py`, in BF16), if there is a Python that has it.
//!
//! Some minutes by default: of the large shape two configurations are measured, and no step begins in a row that was measured
//! for ten seconds, but one counts in any case; each row says how many did. `GGRAFT_BENCH_FULL=1` measures all rows that
//! docs/BENCHMARKS.md shows, four steps each. `cargo bench -- --test` runs all of it once on a tiny model, whose figures say nothing.
//!
//! Environment: `GGRAFT_BENCH_WHAT` (products,levels,steps), `GGRAFT_BENCH_PYTHON` (python3), `GGRAFT_BENCH_TYPES` (q4_k,q4_0,q8_0,q6_k,f16), `GGRAFT_BENCH_ROWS`
//! (8,64,512), `GGRAFT_BENCH_SHAPES` (smollm-135m,llama-1b), `GGRAFT_BENCH_STEP_TYPES` (q4_k,q8_0),
//! `GGRAFT_BENCH_THREADS` (physical cores), `GGRAFT_BENCH_ROUNDS` (of products, 3, full: 10), `GGRAFT_BENCH_SECONDS` (10 for a
//! row of steps, full: no limit), `GGRAFT_BENCH_DIR` (where the synthetic models are kept, target/bench-models).

use ggraft::adapter::AdapterKind;
use ggraft::file::types::GgmlType;
use ggraft::measure::{
    AttentionShape, Seconds, attention_seconds, mul_mat_back_seconds, naive_seconds,
};
use ggraft::train::data::Example;
use ggraft::train::{Init, TrainOptions, Trainer};
use ggraft::{CpuLevel, Model, ModelOptions};
use ggraft_testkit::bench::{
    Progress, budget, is_full, is_quick, model_file, number, shapes, threads, type_called, types,
    var, weight_types,
};
use ggraft_testkit::{process_size, synth};
use std::path::Path;
use std::process::Command;
use std::str::FromStr;
use std::time::Instant;

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
        types: types(
            "GGRAFT_BENCH_TYPES",
            either("q4_k,q4_0,q8_0,q6_k,f16", "q4_k"),
        ),
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
        rounds: number(
            "GGRAFT_BENCH_ROUNDS",
            match (quick, is_full()) {
                (true, _) => 1,
                (false, false) => 3,
                (false, true) => 10,
            },
        ),
        steps: if quick { 2 } else { STEPS },
    }
}

fn parsed<T: FromStr>(text: &str) -> T {
    text.parse()
        .unwrap_or_else(|_| panic!("'{text}' is no number"))
}

fn products(s: &Setup, progress: &Progress) {
    println!(
        "\nProducts of W on {} threads, dX = W^T dY and Y = W X, GFLOP/s, best of {} rounds\n",
        s.n_threads, s.rounds
    );
    println!(
        "| type | W | T | back | ggml BF16 | ratio | forward, 14 bits | ratio | 8 bits | ratio | ggml forward |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    for &ty in &s.types {
        for [k, n] in s.matrices {
            for &t in &s.rows {
                progress.row(&format!("product of {}, {k} x {n}, {t} rows", ty.name()));
                let Seconds {
                    back,
                    ggml_bf16,
                    forward,
                    forward_in_bytes,
                    ggml_forward,
                } = mul_mat_back_seconds(ty, k, n, t, s.n_threads, s.rounds);
                let speed = |seconds: f64| 2e-9 * (k * n * t) as f64 / seconds;
                let beside_ggml = |seconds: f64| match seconds.is_nan() {
                    true => " |  ".to_owned(),
                    false => format!("{:.0} | {:.2}", speed(seconds), ggml_forward / seconds),
                };
                println!(
                    "| {} | {k} x {n} | {t} | {:.0} | {:.0} | {:.2} | {} | {} | {:.0} |",
                    ty.name(),
                    speed(back),
                    speed(ggml_bf16),
                    ggml_bf16 / back,
                    beside_ggml(forward),
                    beside_ggml(forward_in_bytes),
                    speed(ggml_forward),
                );
            }
        }
    }
}

/// Holds `kind;type;numbers` in the process that measures kernels of one level of CPU.
const CASE: &str = "GGRAFT_BENCH_CASE";

/// Kernels at every level that this CPU has, in processes of their own.
fn levels(s: &Setup, progress: &Progress) {
    let levels: Vec<_> = CpuLevel::available().collect();
    let names: Vec<_> = levels.iter().map(|level| level.name()).collect();
    println!(
        "\nKernels at each level of CPU on {} threads, GFLOP/s, best of {} rounds; naive: as defined, on one thread\n\n\
         | what | type | T | {} | ggml | naive |\n| --- | --- | --- |{} --- | --- |",
        s.n_threads,
        s.rounds,
        names.join(" | "),
        " --- |".repeat(levels.len()),
    );
    let [k, n] = s.matrices[0];
    // The speeds at each level, given how much work a case is.
    let at_all_levels = |what: &str, case: &str, flop: f64| -> Vec<Vec<f64>> {
        let at = |level: &CpuLevel| {
            progress.row(&format!("{what} at {level}"));
            let mut command = again(CASE, case);
            let out = output(command.env(CpuLevel::VARIABLE, level.name())).expect("it runs");
            let seconds = out.split_whitespace().map(parsed::<f64>);
            seconds.map(|seconds| flop / seconds).collect()
        };
        levels.iter().map(at).collect()
    };
    let row = |what: &str, ty: GgmlType, t: usize, ours: &[f64], ggml: f64, naive: &str| {
        let ours = ours.iter().map(|x| match x.is_nan() {
            true => " |".to_owned(),
            false => format!(" {x:.0} |"),
        });
        println!(
            "| {what} | {} | {t} |{} {ggml:.0} | {naive} |",
            ty.name(),
            ours.collect::<String>()
        );
    };
    let best = |column: usize, all: &[Vec<f64>]| {
        let column = all.iter().map(|figures| figures[column]);
        column.fold(f64::NAN, f64::max)
    };
    for &(ty, t) in &level_products(s) {
        let flop = 2e-9 * (k * n * t) as f64;
        let numbers = format!("{k};{n};{t};{};{}", s.n_threads, s.rounds);
        let what = format!("products of {}, {t} rows", ty.name());
        let all = at_all_levels(&what, &format!("product;{};{numbers}", ty.name()), flop);
        // 14 bits or F32, and 8 bits or BF16: whichever is faster.
        let forward: Vec<_> = all.iter().map(|x| x[1].max(x[2])).collect();
        let back: Vec<_> = all.iter().map(|x| x[0]).collect();
        let naive = format!("{:.1}", flop / naive_seconds(ty, k, n, t));
        row("W X", ty, t, &forward, best(3, &all), &naive);
        row("W^T dY", ty, t, &back, best(4, &all), "");
    }
    for &(t, n) in &level_attentions() {
        let [d, h, hk] = HEADS;
        // Only the last tokens' own keys are hidden, and few of them.
        let flop = 4e-9 * (d * h * t * n) as f64;
        let numbers = format!("{d};{h};{hk};{t};{n};{};{}", s.n_threads, s.rounds);
        let ty = GgmlType::F16;
        let what = format!("attention of {t} tokens of {n}");
        let all = at_all_levels(&what, &format!("attention;{};{numbers}", ty.name()), flop);
        let ours: Vec<_> = all.iter().map(|x| x[0]).collect();
        row(
            &format!("attention, {n} keys"),
            ty,
            t,
            &ours,
            best(1, &all),
            "",
        );
    }
}

/// Types and rows whose products are measured at each level.
fn level_products(s: &Setup) -> Vec<(GgmlType, usize)> {
    let types = match is_quick() {
        true => &s.types[..1],
        false => &[GgmlType::Q4_K, GgmlType::Q8_0, GgmlType::F16][..],
    };
    let rows = match is_quick() {
        true => &[1][..],
        false => &[1, 8, 64],
    };
    let all = types
        .iter()
        .flat_map(|&ty| rows.iter().map(move |&t| (ty, t)));
    all.collect()
}

/// d, H and Hk of Llama 3.2 1B.
const HEADS: [usize; 3] = [64, 32, 8];

/// Tokens, and keys in the cache, of attention at each level.
fn level_attentions() -> Vec<(usize, usize)> {
    match is_quick() {
        true => vec![(1, 64)],
        false => vec![(1, 4096), (8, 1024), (64, 1024)],
    }
}

/// Measures one case at this process's level and prints the seconds.
fn case(what: &str) {
    let fields: Vec<&str> = what.split(';').collect();
    let (kind, ty) = (fields[0], fields[1]);
    let ty = type_called(ty).expect("a type");
    let numbers: Vec<usize> = fields[2..].iter().map(|n| parsed(n)).collect();
    match (kind, &numbers[..]) {
        ("product", &[k, n, t, n_threads, rounds]) => {
            let x = mul_mat_back_seconds(ty, k, n, t, n_threads, rounds);
            println!(
                "{} {} {} {} {}",
                x.back, x.forward, x.forward_in_bytes, x.ggml_forward, x.ggml_bf16
            );
        }
        ("attention", &[d, h, hk, t, n, n_threads, rounds]) => {
            let shape = AttentionShape { d, h, hk, t, n };
            let [own, ggml] = attention_seconds(ty, shape, n_threads, rounds);
            println!("{own} {ggml}");
        }
        _ => panic!("{CASE}={what}"),
    }
}

/// Holds `file;T;targets;threads;bytes;steps;seconds` in the process that measures one configuration.
const STEP: &str = "GGRAFT_BENCH_STEP";
/// Virtual tokens.
const P: usize = 20;
/// Steps at most; the first one allocates memory and maps the weights, the best of the others counts.
const STEPS: u64 = 5;

/// A configuration of a step: T, targets (the last ones), bytes for activations (0: the default).
type Configuration = (usize, usize, u64);

const CONFIGURATIONS: [Configuration; 5] = [
    (128, 128, 0),
    (512, 512, 0),
    (512, 128, 0),
    (512, 512, 256 << 20),
    (1024, 1024, 0),
];

/// Width of the embedding from which on a step takes minutes on slow machines.
const LARGE: usize = 1024;

/// What is measured of a shape, unless everything is: of a large one what PEFT can do as well, but for
/// the longest text.
fn configurations(shape: &synth::Shape) -> &'static [Configuration] {
    match shape.n_embd >= LARGE && !is_full() {
        true => &CONFIGURATIONS[..2],
        false => &CONFIGURATIONS,
    }
}

/// What a configuration takes.
struct Step {
    /// Of the best one behind the first.
    seconds: f64,
    recomputed_layers: usize,
    /// Peaks, in bytes.
    anonymous: u64,
    resident: u64,
    /// Steps that counted.
    counted: usize,
}

fn steps(s: &Setup, progress: &Progress) {
    println!(
        "\nOne step of prefix tuning, P = {P}, {} threads, best of up to {} steps behind the first\n",
        s.n_threads,
        s.steps - 1
    );
    println!(
        "| shape | type: of its weights | T | targets | memory | ms per step | tok/s | layers computed twice | peak anonymous | peak resident | steps |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    let mut ours = Vec::new();
    for shape in &s.shapes {
        for &ty in &s.step_types {
            let file = model_file(shape, ty);
            let weights = weight_types(&file);
            for &configuration in configurations(shape) {
                let (t, targets, bytes) = configuration;
                let memory = match bytes {
                    0 => "default".to_owned(),
                    bytes => format!("{} MiB", bytes >> 20),
                };
                progress.row(&format!(
                    "step of {}, {}, {t} tokens, {targets} targets, memory {memory}",
                    shape.name,
                    ty.name()
                ));
                let step = in_a_process(s, &file, configuration);
                println!(
                    "| {} | {}: {weights} | {t} | {targets} | {memory} | {:.0} | {:.1} | {} | {} MB | {} MB | {} |",
                    shape.name,
                    ty.name(),
                    step.seconds * 1e3,
                    t as f64 / step.seconds,
                    step.recomputed_layers,
                    step.anonymous / 1_000_000,
                    step.resident / 1_000_000,
                    step.counted,
                );
                if is_peft_able(&configuration) {
                    ours.push((*shape, ty, t, step));
                }
            }
        }
    }
    for shape in &s.shapes {
        let left = CONFIGURATIONS.len() - configurations(shape).len();
        if left > 0 {
            println!(
                "\n{}: {left} configurations of each type are left out, GGRAFT_BENCH_FULL=1 measures them",
                shape.name
            );
        }
    }
    beside_peft(s, progress, &ours);
}

/// Runs one configuration in a process of its own.
fn in_a_process(s: &Setup, file: &Path, (t, targets, bytes): Configuration) -> Step {
    let what = format!(
        "{};{t};{targets};{};{bytes};{};{}",
        file.display(),
        s.n_threads,
        s.steps,
        budget().as_secs()
    );
    let out = output(&mut again(STEP, &what)).expect("it runs");
    let fields: Vec<f64> = out.split_whitespace().map(parsed).collect();
    let &[seconds, recomputed_layers, anonymous, resident, counted] = &fields[..] else {
        panic!("{out}");
    };
    Step {
        seconds,
        recomputed_layers: recomputed_layers as usize,
        anonymous: anonymous as u64,
        resident: resident as u64,
        counted: counted as usize,
    }
}

/// This program once more, to do what the environment variable `name` says.
fn again(name: &str, what: &str) -> Command {
    let me = std::env::current_exe().expect("this program has a path");
    let mut command = Command::new(me);
    command.env(name, what);
    command
}

/// What a program prints; what it complains of if it fails, or why it does not run.
fn output(command: &mut Command) -> Result<String, String> {
    let out = command.output().map_err(|e| e.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match out.status.success() {
        true => Ok(text(&out.stdout)),
        false => Err(text(&out.stderr)),
    }
}

/// PEFT's step has all tokens as targets, and no limit of memory.
fn is_peft_able(&(t, targets, bytes): &Configuration) -> bool {
    t == targets && bytes == 0
}

/// The same steps with PEFT in BF16, where there is a Python that has it.
fn beside_peft(s: &Setup, progress: &Progress, ours: &[(&synth::Shape, GgmlType, usize, Step)]) {
    if is_quick() {
        return;
    }
    let python = var("GGRAFT_BENCH_PYTHON", "python3");
    let has_peft = output(Command::new(&python).args(["-c", "import peft, torch, transformers"]));
    if let Err(why) = has_peft {
        let why = why.lines().last().unwrap_or_default().to_owned();
        println!(
            "\nPEFT is left out, {python} does not have it ({why}): GGRAFT_BENCH_PYTHON names a Python with torch, transformers and peft"
        );
        return;
    }
    println!(
        "\nThe same steps with PEFT in BF16\n\n\
         | shape | type | T | ggraft tok/s | PEFT tok/s | ratio | ggraft's memory | PEFT's | ratio |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    for shape in &s.shapes {
        for configuration in configurations(shape).iter().filter(|c| is_peft_able(c)) {
            let t = configuration.0;
            progress.row(&format!("PEFT's step of {}, {t} tokens", shape.name));
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/peft_step.py");
            let out = output(
                Command::new(&python)
                    .args([script, shape.name, "--tokens", &t.to_string()])
                    .args(["--threads", &s.n_threads.to_string()])
                    .args(["--virtual-tokens", &P.to_string()]),
            );
            let line = out.unwrap_or_else(|why| panic!("{script}: {why}"));
            let theirs: Peft =
                serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"));
            for (_, ty, _, step) in ours
                .iter()
                .filter(|(of, _, n, _)| (of.name, *n) == (shape.name, t))
            {
                println!(
                    "| {} | {} | {t} | {:.1} | {:.1} | {:.2} | {} MB | {} MB | {:.2} |",
                    shape.name,
                    ty.name(),
                    t as f64 / step.seconds,
                    t as f64 / theirs.seconds,
                    theirs.seconds / step.seconds,
                    step.resident / 1_000_000,
                    theirs.peak_resident / 1_000_000,
                    step.resident as f64 / theirs.peak_resident as f64,
                );
            }
        }
    }
}

/// What scripts/peft_step.py prints.
#[derive(serde::Deserialize)]
struct Peft {
    seconds: f64,
    peak_resident: u64,
}

/// Measures one configuration and prints the fields of a [`Step`].
fn step(what: &str) {
    let fields: Vec<&str> = what.split(';').collect();
    let &[file, t, targets, n_threads, memory, steps, seconds] = &fields[..] else {
        panic!("{STEP}={what}");
    };
    let (t, targets): (usize, usize) = (parsed(t), parsed(targets));
    let model = Model::open(file, &ModelOptions::default()).expect("a model");
    let mut options = TrainOptions::new(AdapterKind::Prefix);
    options.length = Some(P);
    options.init = Some(Init::Random);
    options.batch = 1;
    options.steps = Some(parsed(steps));
    options.threads = Some(parsed(n_threads));
    options.memory = Some(parsed(memory)).filter(|&bytes| bytes > 0);
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
    let (mut best, mut counted) = (f64::INFINITY, 0);
    let start = Instant::now();
    while let Some(report) = trainer.step().expect("a step") {
        // The memory of a step is kept for the next one.
        anonymous = anonymous.max(process_size("RssAnon").unwrap_or(0));
        if report.step > 1 {
            best = best.min(report.seconds);
            counted += 1;
            if start.elapsed().as_secs() >= parsed(seconds) {
                break;
            }
        }
    }
    println!(
        "{best} {} {anonymous} {} {counted}",
        trainer.summary().recomputed_layers,
        process_size("VmHWM").unwrap_or(0),
    );
}

fn main() {
    if let Ok(what) = std::env::var(STEP) {
        return step(&what);
    }
    if let Ok(what) = std::env::var(CASE) {
        return case(&what);
    }
    let s = setup();
    let what = var("GGRAFT_BENCH_WHAT", "products,levels,steps");
    let wanted = |name: &str| what.contains(name);
    let n_products = s.types.len() * s.matrices.len() * s.rows.len();
    let measured = s.shapes.iter().map(|shape| configurations(shape).len());
    let n_steps = measured.sum::<usize>() * s.step_types.len();
    let of_peft = s.shapes.iter().flat_map(|shape| configurations(shape));
    let n_of_peft = match is_quick() {
        true => 0,
        false => of_peft.filter(|c| is_peft_able(c)).count(),
    };
    let n_levels = CpuLevel::available().count();
    let n_levels = n_levels * (level_products(&s).len() + level_attentions().len());
    let rows = [
        ("products", n_products),
        ("levels", n_levels),
        ("steps", n_steps + n_of_peft),
    ];
    let rows = rows.iter().filter(|(name, _)| wanted(name)).map(|(_, n)| n);
    let progress = Progress::new(rows.sum(), &what);
    if wanted("products") {
        products(&s, &progress);
    }
    if wanted("levels") {
        levels(&s, &progress);
    }
    if wanted("steps") {
        steps(&s, &progress);
    }
}
