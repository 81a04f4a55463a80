//! Many users of one model, beside libllama.
//!
//!     cargo bench --bench users
//!
//! Users who write at the same time, each with a prefix adapter of its own, beside as many sequences of libllama (of one model, in one cache or in one for
//! each, whichever is faster), and beside LoRA adapters of libllama, which it computes one after the other. What a token of an ensemble costs; what beginnings in common and adapters
//! in memory cost; how long a running text waits for its next token while a long prompt joins.
//!
//! `cargo bench -- --test` runs all of it once on a tiny model, whose figures say nothing.
//!
//! Environment: `GGRAFT_BENCH_SHAPE` (llama-1b), `GGRAFT_BENCH_TYPES` (q4_k), `GGRAFT_BENCH_USERS` (1,2,4,8,16,32), `GGRAFT_BENCH_THREADS` (physical cores),
//! `GGRAFT_BENCH_WHAT` (writing,ensemble,prefix,adapters,joining), `GGRAFT_BENCH_DIR` (where the synthetic models are kept, target/bench-models).

use ggraft::file::types::GgmlType;
use ggraft::infer::engine::{EngineOptions, Event, Request, Scheduler};
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{Combine, Ensemble, ExistingText, GenerateOptions};
use ggraft::{Adapter, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::bench::{
    Progress, is_quick, median, model_file, settle, shapes, threads, timed, types, var,
};
use ggraft_testkit::{adapters, oracle, process_size, synth};
use std::hint::black_box;
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

/// Rows of the adapters.
const P: usize = 20;
/// Tokens of each text.
const TEXT: usize = 128;
/// Rank of the LoRA adapters.
const RANK: usize = 8;

struct Setup {
    shape: &'static synth::Shape,
    ty: GgmlType,
    users: Vec<usize>,
    n_threads: usize,
    /// Tokens that are written and measured.
    written: usize,
    /// Tokens of a long prompt, and of a beginning in common.
    long: usize,
    common: usize,
    chats: usize,
    adapters: usize,
    what: String,
}

fn setup() -> Setup {
    let quick = is_quick();
    let either = |full, small| if quick { small } else { full };
    let users = var(
        "GGRAFT_BENCH_USERS",
        if quick { "1,2" } else { "1,2,4,8,16,32" },
    );
    let count = |n: &str| n.trim().parse().expect("GGRAFT_BENCH_USERS: numbers");
    Setup {
        shape: shapes(
            "GGRAFT_BENCH_SHAPE",
            if quick { "tiny" } else { "llama-1b" },
        )[0],
        ty: types("GGRAFT_BENCH_TYPES", "q4_k")[0],
        users: users.split(',').map(count).collect(),
        n_threads: threads(),
        written: either(32, 4),
        long: either(4096, 128),
        common: either(1000, 100),
        chats: either(100, 5),
        adapters: either(1000, 20),
        what: var(
            "GGRAFT_BENCH_WHAT",
            "writing,ensemble,prefix,adapters,joining",
        ),
    }
}

/// Token ids that differ from position to position and from text to text.
fn tokens(n: usize, text: usize) -> Vec<i32> {
    (0..n)
        .map(|i| ((i * 37 + text * 101) % 900) as i32 + 20)
        .collect()
}

fn options(s: &Setup) -> EngineOptions {
    let mut options = EngineOptions::default();
    options.n_ctx = Some(s.long + 1024);
    options.n_threads = Some(s.n_threads);
    options
}

/// Goes on for ever.
fn writing(n: usize) -> GenerateOptions {
    let mut generate = GenerateOptions::default()
        .sampler(SamplerParams::greedy())
        .max_tokens(n);
    generate.ignore_eog = true;
    generate
}

/// Steps until all texts of `requests` are being written, and a few more.
fn until_all_write(scheduler: &mut Scheduler, requests: usize, texts: usize) {
    let mut more = 3;
    while more > 0 {
        let all = scheduler.len() == [requests, 0] && scheduler.texts_written() == texts;
        more -= usize::from(all);
        for (_, event) in scheduler.step() {
            if let Event::Failed(e) = event {
                panic!("{e}");
            }
        }
    }
}

/// Seconds of a step in which so many users get a token each, the median.
fn our_step(s: &Setup, model: &Model, adapters: &[Adapter], n: usize) -> f64 {
    let mut scheduler = Scheduler::new(model, &options(s)).expect("an engine");
    for (i, adapter) in adapters.iter().enumerate().take(n) {
        // Those who begin first write until the last one does.
        let generate = writing(s.written + 64 + n * TEXT / 2);
        let request = Request::tokens(tokens(TEXT, i))
            .adapter(adapter)
            .generate(generate);
        scheduler.submit(request).expect("room");
    }
    written_step(s, &mut scheduler, n, n)
}

/// Seconds of a step, the median, in which `requests` get a token each, for which `texts` are computed.
fn written_step(s: &Setup, scheduler: &mut Scheduler, requests: usize, texts: usize) -> f64 {
    until_all_write(scheduler, requests, texts);
    let times = (0..s.written).map(|_| {
        let before = scheduler.positions_computed();
        let time = timed(|| drop(black_box(scheduler.step())));
        assert_eq!(
            scheduler.positions_computed() - before,
            texts,
            "a token for each"
        );
        time
    });
    median(times.collect())
}

/// The same of libllama with so many sequences.
fn their_step(s: &Setup, model: &Rc<oracle::Model>, n: usize, kv_unified: bool) -> f64 {
    let each = TEXT + P + s.written;
    let options = oracle::Options {
        n_ctx: (each * n).next_multiple_of(256),
        n_threads: s.n_threads,
        kv_type: GgmlType::F16,
        flash_attention: None,
        n_sequences: n,
        kv_unified,
        ..Default::default()
    };
    let mut llama = oracle::Llama::new(model.clone(), &options).expect("a context");
    // The adapters' rows are tokens like others.
    for i in 0..n {
        let text = tokens(TEXT + P, i).into_iter().enumerate();
        let text: Vec<_> = text.map(|(at, id)| (i, at, id)).collect();
        llama.step_sequences(&text, |_| ()).expect("room");
    }
    let times = (0..s.written).map(|at| {
        let step: Vec<_> = (0..n).map(|i| (i, TEXT + P + at, 20 + i as i32)).collect();
        timed(|| {
            let read = |row: &[f32]| {
                black_box(row.len());
            };
            llama.step_sequences(&step, read).expect("room");
        })
    });
    median(times.collect())
}

/// The same with a LoRA adapter for each, one after the other.
fn their_lora_step(s: &Setup, model: &Rc<oracle::Model>, loras: &[oracle::Lora], n: usize) -> f64 {
    let options = oracle::Options {
        n_ctx: ((TEXT + s.written) * n).next_multiple_of(256),
        n_threads: s.n_threads,
        kv_type: GgmlType::F16,
        flash_attention: None,
        n_sequences: n,
        ..Default::default()
    };
    let mut llama = oracle::Llama::new(model.clone(), &options).expect("a context");
    for i in 0..n {
        let text = tokens(TEXT, i).into_iter().enumerate();
        let text: Vec<_> = text.map(|(at, id)| (i, at, id)).collect();
        llama.step_sequences(&text, |_| ()).expect("room");
    }
    let times = (0..s.written.min(4)).map(|at| {
        timed(|| {
            for i in 0..n {
                llama.set_lora(&loras[i % loras.len()]);
                let step = [(i, TEXT + at, 20)];
                let read = |row: &[f32]| {
                    black_box(row.len());
                };
                llama.step_sequences(&step, read).expect("room");
            }
        })
    });
    median(times.collect())
}

fn writing_rows(s: &Setup, progress: &Progress, path: &Path, model: &Model) {
    println!(
        "\nUsers who write at the same time, tokens a second of all together; libllama repacks by default\n\n\
         | users | ggraft, prefixes that differ | of one user's | libllama, one model | of one user's | the same, LoRA that differ | of one user's | ratio | ratio |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    let most = *s.users.iter().max().expect("users");
    let prefixes: Vec<_> = (0..most)
        .map(|i| adapters::prefix(model, P, i as u32))
        .collect();
    let theirs = Rc::new(oracle::Model::load(path, true).expect("loads"));
    let dir = tempfile::tempdir().expect("a folder");
    let lora = |i: usize| {
        let file = dir.path().join(format!("{i}.gguf"));
        synth::write_lora(&file, s.shape, RANK, i as u64).expect("room");
        oracle::Lora::load(&theirs, &file).expect("loads")
    };
    // More than there are change nothing: each is set anew.
    let loras: Vec<_> = (0..most.min(8)).map(lora).collect();
    let mut of_one = None;
    for &n in &s.users {
        progress.row(&format!("{n} users who write"));
        let ours = our_step(s, model, &prefixes, n);
        settle();
        let unified = their_step(s, &theirs, n, true);
        settle();
        let apart = their_step(s, &theirs, n, false);
        settle();
        let in_turn = their_lora_step(s, &theirs, &loras, n);
        settle();
        let speeds = [ours, unified.min(apart), in_turn].map(|seconds| n as f64 / seconds);
        let first = *of_one.get_or_insert(speeds);
        let [a, b, c] = speeds;
        println!(
            "| {n} | {a:.1} | {:.2} | {b:.1} | {:.2} | {c:.1} | {:.2} | {:.2} | {:.2} |",
            a / first[0],
            b / first[1],
            c / first[2],
            a / b,
            a / c
        );
    }
}

/// Members of an ensemble, who get the same tokens in the same steps.
fn ensemble_rows(s: &Setup, progress: &Progress, model: &Model) {
    println!(
        "\nA token of an ensemble of prefixes\n\n| members | how they speak together | ms | of one member's |\n| --- | --- | --- | --- |"
    );
    let mut of_one = None;
    let four = Combine::ALL.map(|combine| (4, combine));
    for (n, combine) in [(1, Combine::MeanProb)].into_iter().chain(four) {
        progress.row(&format!("an ensemble of {n}"));
        let members = (0..n).map(|i| Some(adapters::prefix(model, P, i)));
        let ensemble = Ensemble::new(members, combine).expect("members");
        let mut scheduler = Scheduler::new(model, &options(s)).expect("an engine");
        let request = Request::tokens(tokens(TEXT, 0))
            .ensemble(&ensemble)
            .generate(writing(s.written + 64));
        scheduler.submit(request).expect("room");
        let seconds = written_step(s, &mut scheduler, 1, n as usize);
        let first = *of_one.get_or_insert(seconds);
        let name = if n == 1 { "" } else { combine.name() };
        println!(
            "| {n} | {name} | {:.1} | {:.2} |",
            seconds * 1e3,
            seconds / first
        );
        settle();
    }
}

/// Chats that begin with the same system prompt.
fn prefix_row(s: &Setup, progress: &Progress, model: &Model) {
    progress.row("chats with the same beginning");
    let adapter = adapters::prefix(model, P, 1);
    let mut scheduler = Scheduler::new(model, &options(s)).expect("an engine");
    let mut chat = |i: usize| {
        let mut prompt = tokens(s.common, 0);
        prompt.extend(tokens(8, i + 1));
        let request = Request::tokens(prompt)
            .adapter(&adapter)
            .generate(writing(1));
        timed(|| {
            scheduler.submit(request).expect("room");
            while !scheduler.is_idle() {
                black_box(scheduler.step());
            }
        })
    };
    let first = chat(0).as_secs_f64();
    let rest = median((1..s.chats).map(&mut chat).collect());
    println!(
        "\n{} chats with the same system prompt of {} tokens and 8 of their own: the first prompt {:.1} ms, the others {:.1} ms each, {:.0} times faster; keys and values of all {:.1} MB, of the first {:.1} MB",
        s.chats,
        s.common,
        first * 1e3,
        rest * 1e3,
        first / rest,
        scheduler.kv_bytes() as f64 / 1e6,
        (s.common + 8) as f64 * kv_bytes_of_a_token(model) / 1e6,
    );
}

fn kv_bytes_of_a_token(model: &Model) -> f64 {
    let options = SessionOptions::default().n_ctx(1 << 10).n_threads(1);
    let session = Session::new(model, &options).expect("a session");
    session.kv_bytes() as f64 / 1024.0
}

/// Adapters in memory, and sessions that have nothing but one of them.
fn adapter_rows(s: &Setup, progress: &Progress, model: &Model) {
    progress.row("adapters in memory");
    let options = SessionOptions::default().n_ctx(1024).n_threads(s.n_threads);
    let resident = || process_size("RssAnon").unwrap_or(0) as f64;
    let mut session = Session::new(model, &options).expect("a session");
    let all: Vec<_> = (0..s.adapters)
        .map(|i| adapters::prefix(model, P, i as u32))
        .collect();
    let before = resident();
    for adapter in &all {
        session.swap(adapter, ExistingText::Drop).expect("fits");
    }
    let bytes = (resident() - before) / s.adapters as f64;
    let mut turn = all.iter().cycle();
    let swaps = (0..all.len()).map(|_| {
        let next = turn.next().expect("endless");
        timed(|| session.swap(next, ExistingText::Drop).expect("fits"))
    });
    let swap = median(swaps.collect());
    println!(
        "\n{} adapters of {P} rows: {:.0} kB each ready for use, {:.0} kB of rows; attaching one {:.2} us",
        s.adapters,
        bytes / 1e3,
        P as f64 * kv_bytes_of_a_token(model) / 1e3,
        swap * 1e6
    );
    progress.row("idle users");
    let n = 10_000;
    let before = resident();
    let idle = (0..n).map(|_| {
        let mut session = Session::new(model, &options).expect("a session");
        session.attach(&all[0], ExistingText::Drop).expect("fits");
        session
    });
    let idle: Vec<_> = idle.collect();
    let each = (resident() - before) / n as f64;
    println!(
        "\n{} idle users of one adapter: {each:.0} bytes each",
        idle.len()
    );
}

/// A running text while a long prompt joins.
fn joining_row(s: &Setup, progress: &Progress, model: &Model) {
    progress.row("a long prompt joins");
    let mut scheduler = Scheduler::new(model, &options(s)).expect("an engine");
    let request = |n, text, m| Request::tokens(tokens(n, text)).generate(writing(m));
    scheduler.submit(request(TEXT, 0, 900)).expect("room");
    until_all_write(&mut scheduler, 1, 1);
    let step = |scheduler: &mut Scheduler| timed(|| drop(black_box(scheduler.step())));
    let alone = median((0..s.written).map(|_| step(&mut scheduler)).collect());
    scheduler.submit(request(s.long, 1, 1)).expect("room");
    let mut beside = Vec::new();
    let start = Instant::now();
    while scheduler.len()[0] + scheduler.len()[1] > 1 {
        beside.push(step(&mut scheduler));
    }
    let seconds = start.elapsed().as_secs_f64();
    let worst = beside.iter().max().expect("steps").as_secs_f64();
    let usual = median(beside);
    println!(
        "\nTime between two tokens of a running text: alone {:.1} ms; while a prompt of {} tokens joins {:.1} ms, {:.2} times as long (at most {:.1} ms); the prompt takes {seconds:.1} s",
        alone * 1e3,
        s.long,
        usual * 1e3,
        usual / alone,
        worst * 1e3,
    );
}

fn main() {
    let s = setup();
    let wanted = |what: &str| s.what.contains(what);
    let rows = (if wanted("writing") { s.users.len() } else { 0 })
        + if wanted("ensemble") { 5 } else { 0 }
        + usize::from(wanted("prefix"))
        + if wanted("adapters") { 2 } else { 0 }
        + usize::from(wanted("joining"));
    let progress = Progress::new(
        rows,
        &format!("{} of {} ({})", s.what, s.shape.name, s.ty.name()),
    );
    println!(
        "{} ({}), {} threads",
        s.shape.name,
        s.ty.name(),
        s.n_threads
    );
    let path = model_file(s.shape, s.ty);
    let model = Model::open(&path, &ModelOptions::default()).expect("opens");
    if wanted("writing") {
        writing_rows(&s, &progress, &path, &model);
    }
    if wanted("ensemble") {
        ensemble_rows(&s, &progress, &model);
    }
    if wanted("prefix") {
        prefix_row(&s, &progress, &model);
    }
    if wanted("adapters") {
        adapter_rows(&s, &progress, &model);
    }
    if wanted("joining") {
        joining_row(&s, &progress, &model);
    }
}
