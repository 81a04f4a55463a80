//! Adapters in contexts of libllama's, beside its LoRA adapters.
//!
//!     cargo bench --bench host
//!
//! What it takes to learn a context's form, to prepare a prefix of 20 rows for it, to attach, swap and detach it; and what steps of one and two sequences take, with an adapter each and with
//! as many tokens instead.
//!
//! `cargo bench -- --test` runs all of it once on a tiny model, whose figures say nothing.
//!
//! Environment: `GGRAFT_BENCH_SHAPE` (llama-1b), `GGRAFT_BENCH_TYPES` (q4_k), `GGRAFT_BENCH_THREADS` (physical cores), `GGRAFT_BENCH_DIR` (where the synthetic models are kept,
//! target/bench-models).

use ggraft::file::types::GgmlType;
use ggraft::host::{Api, Host};
use ggraft::model::Base;
use ggraft::{Model, ModelOptions};
use ggraft_testkit::bench::{is_quick, median, model_file, settle, shapes, threads, timed, types};
use ggraft_testkit::{adapters, oracle, synth};
use std::hint::black_box;
use std::rc::Rc;
use std::time::Duration;

/// Rows of the adapters, and rank of the LoRA adapters.
const P: usize = 20;
const RANK: usize = 8;

fn main() {
    let quick = is_quick();
    let shape = shapes(
        "GGRAFT_BENCH_SHAPE",
        if quick { "tiny" } else { "llama-1b" },
    )[0];
    let ty = types("GGRAFT_BENCH_TYPES", "q4_k")[0];
    let (rounds, n_threads) = (if quick { 2 } else { 31 }, threads());
    let path = model_file(shape, ty);
    let model = Model::open(&path, &ModelOptions::default()).expect("a model");
    let adapters = [1, 2].map(|seed| adapters::prefix(&model, P, seed));
    let theirs = Rc::new(oracle::Model::load(&path, true).expect("loads"));
    println!(
        "{} ({ty}), {n_threads} threads, medians of {rounds} rounds\n",
        shape.name
    );

    let repeat = |f: &mut dyn FnMut()| {
        let times: Vec<Duration> = (0..rounds).map(|_| timed(&mut *f)).collect();
        median(times) * 1e3
    };
    println!("| cache | learn its form, ms | prepare a prefix | attach | swap | detach |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for kv_type in [GgmlType::F16, GgmlType::Q8_0] {
        let llama = context(&theirs, n_threads, kv_type, 2);
        // SAFETY: the context lives as long as the host, and nobody else uses it meanwhile.
        let new = || unsafe {
            let base = Base::open(&path).expect("a model");
            Host::new(Api::linked(), llama.context(), base, 0).expect("a context")
        };
        let learn = repeat(&mut || drop(new()));
        let mut host = new();
        let prepare = repeat(&mut || drop(black_box(host.prepare(&adapters[0], 0))));
        let grafts = adapters
            .each_ref()
            .map(|a| host.prepare(a, 0).expect("fits"));
        let detach_before = |host: &mut Host| host.detach(0).expect("a sequence");
        let mut attach = Vec::new();
        for _ in 0..rounds {
            detach_before(&mut host);
            attach.push(timed(|| {
                host.attach(&grafts[0], 0).expect("room");
            }));
        }
        let mut i = 0;
        let swap = repeat(&mut || {
            i += 1;
            host.swap(&grafts[i % 2], 0).expect("room");
        });
        let mut detach = Vec::new();
        for _ in 0..rounds {
            host.swap(&grafts[0], 0).expect("room");
            detach.push(timed(|| detach_before(&mut host)));
        }
        let (attach, detach) = (median(attach) * 1e3, median(detach) * 1e3);
        println!(
            "| {kv_type} | {learn:.2} | {prepare:.3} | {attach:.3} | {swap:.3} | {detach:.4} |"
        );
    }

    // A LoRA adapter of libllama's own.
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("lora.gguf");
    synth::write_lora(&file, shape, RANK, 1).expect("room");
    let load = repeat(&mut || drop(oracle::Lora::load(&theirs, &file).expect("loads")));
    let mut llama = context(&theirs, n_threads, GgmlType::F16, 2);
    let loras = [1, 2].map(|_| oracle::Lora::load(&theirs, &file).expect("loads"));
    let mut i = 0;
    let set = repeat(&mut || {
        i += 1;
        llama.set_lora(&loras[i % 2]);
    });
    println!(
        "\nlibllama's LoRA adapters of rank {RANK}: loading one {load:.2} ms, setting another one {set:.4} ms"
    );

    let both = adapters.each_ref().map(Some);
    println!("\n| a step of libllama's | ms |\n| --- | --- |");
    for (what, adapters) in [
        ("one sequence", &[None][..]),
        ("one sequence with an adapter", &both[..1]),
        ("two sequences", &[None; 2]),
        ("two sequences with an adapter each", &both),
    ] {
        settle();
        let ms = step(&path, &theirs, n_threads, adapters, rounds);
        println!("| {what} | {ms:.2} |");
    }
}

fn context(
    model: &Rc<oracle::Model>,
    n_threads: usize,
    kv_type: GgmlType,
    n_sequences: usize,
) -> oracle::Llama {
    let options = oracle::Options {
        n_ctx: 512,
        n_threads,
        kv_type,
        flash_attention: Some(true),
        n_sequences,
        kv_unified: true,
        ..Default::default()
    };
    oracle::Llama::new(model.clone(), &options).expect("a context")
}

/// Milliseconds of a decode of a token for each of some sequences.
fn step(
    path: &std::path::Path,
    model: &Rc<oracle::Model>,
    n_threads: usize,
    adapters: &[Option<&ggraft::Adapter>],
    rounds: usize,
) -> f64 {
    let mut llama = context(model, n_threads, GgmlType::F16, adapters.len());
    let base = Base::open(path).expect("a model");
    // SAFETY: as above.
    let mut host =
        unsafe { Host::new(Api::linked(), llama.context(), base, 0).expect("a context") };
    // As many tokens where there is no adapter.
    let mut filled: Vec<_> = Vec::new();
    for (seq, adapter) in adapters.iter().enumerate() {
        match adapter {
            Some(adapter) => {
                let graft = host.prepare(adapter, seq as i32).expect("fits");
                host.attach(&graft, seq as i32).expect("room");
            }
            None => filled.extend((0..P).map(|at| (seq, at, 20))),
        }
    }
    if !filled.is_empty() {
        llama.step_sequences(&filled, |_| ()).expect("room");
    }
    let times = (0..rounds).map(|at| {
        let tokens: Vec<_> = (0..adapters.len()).map(|seq| (seq, P + at, 20)).collect();
        timed(|| {
            let read = |row: &[f32]| {
                black_box(row.len());
            };
            llama.step_sequences(&tokens, read).expect("room");
        })
    });
    median(times.collect()) * 1e3
}
