//! What ggraft is for, in one process: an adapter is trained on the frozen quantized model and used at once, then the model
//! answers with one adapter after the other.
//!
//!     cargo run --release --package ggraft-demo

use ggraft::adapter::AdapterKind;
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{ExistingText, GenerateOptions};
use ggraft::train::data::Dataset;
use ggraft::train::{TrainOptions, Trainer};
use ggraft::{Adapter, Model, ModelOptions, Session, SessionOptions};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

/// File in models/adapters, and what it was trained for. All of them by scripts/train-examples.sh.
const ADAPTERS: [(&str, &str); 3] = [
    ("butler", "prompt: speak like a butler"),
    ("sentiment", "P-tuning: is the review good, bad or mixed?"),
    ("county", "P-tuning around the town: name its county"),
];

const PROMPTS: [&str; 3] = [
    "The rain has not stopped for three days.\n",
    "Review: The soup was cold and the room was noisy.",
    "Wethercombe",
];

/// Steps of the training: enough to hear the pirate.
const STEPS: u64 = 200;

/// A model this small gains little from more, and threads that wait for each other crawl where cores are busy.
const THREADS: usize = 1;

fn main() -> ggraft::Result<()> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models");
    let start = Instant::now();
    let model = Model::open(models.join("tinylm-q8_0.gguf"), &ModelOptions::default())?;
    println!(
        "opened {} in {}\n",
        name(model.path()),
        show(start.elapsed())
    );
    let options = SessionOptions::default().n_ctx(512).n_threads(THREADS);
    let mut session = Session::new(&model, &options)?;
    answer(&mut session, "no adapter", None)?;

    let pirate = train(&model, &models.join("tasks/persona_pirate"))?;
    let adapters = ADAPTERS
        .iter()
        .map(|(file, _)| Adapter::load(&models.join(format!("adapters/{file}.gguf"))))
        .collect::<ggraft::Result<Vec<_>>>()?;
    let trained = [(&pirate, "prefix, trained just now: speak like a pirate")];
    let loaded = adapters.iter().zip(ADAPTERS.map(|(_, what)| what));
    // Twice: the first attach compiles the adapter for this base, the second one copies what is resident.
    for (adapter, what) in trained.into_iter().chain(loaded) {
        session.swap(adapter, ExistingText::Drop)?;
        let start = Instant::now();
        session.swap(adapter, ExistingText::Drop)?;
        answer(&mut session, what, Some(start.elapsed()))?;
    }

    // In the middle of a text: what the pirate begins, the butler ends.
    println!("== pirate and butler, swapped between two tokens");
    session.swap(&pirate, ExistingText::Drop)?;
    session.prompt(PROMPTS[0])?;
    let pirate = session.generate(&greedy(1), |_| ControlFlow::Continue(()))?;
    let start = Instant::now();
    session.swap(&adapters[0], ExistingText::Recompute)?;
    let swap = start.elapsed();
    let butler = session.generate(&greedy(40), |_| ControlFlow::Continue(()))?;
    println!(
        "   {} [swap, text recomputed in {}] {}",
        pirate.text.trim(),
        show(swap),
        butler.text.trim()
    );
    Ok(())
}

/// A prefix of 20 rows from the pirate's 800 lines.
fn train(model: &Model, task: &Path) -> ggraft::Result<Adapter> {
    let rows = |split: &str| Dataset::read_jsonl(task.join(split))?.examples(model);
    let mut options = TrainOptions::new(AdapterKind::Prefix);
    options.steps = Some(STEPS);
    options.threads = Some(THREADS);
    let mut trainer = Trainer::new(model, options, rows("train.jsonl")?, rows("valid.jsonl")?)?;
    println!("== training a prefix through the quantized weights: the pirate's 800 lines");
    if let Some(loss) = trainer.valid_loss()? {
        println!("   step   0: validation loss {loss:.4}");
    }
    for report in trainer.reports() {
        let report = report?;
        if let Some(loss) = report.valid_loss.filter(|_| report.step % 40 == 0) {
            println!(
                "   step {:>3}: validation loss {loss:.4}, training loss {:.4}, {:.0} tok/s",
                report.step,
                report.loss,
                report.tokens as f64 / report.seconds
            );
        }
    }
    let (summary, adapter) = (trainer.summary(), trainer.adapter()?);
    println!(
        "   {} trained values in {:.0} s\n",
        summary.trained_parameters, summary.seconds
    );
    Ok(adapter)
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions::default()
        .sampler(SamplerParams::greedy())
        .max_tokens(max_tokens)
}

fn answer(session: &mut Session, what: &str, attach: Option<Duration>) -> ggraft::Result<()> {
    match attach {
        Some(time) => println!("== {what} (attached in {})", show(time)),
        None => println!("== {what}"),
    }
    for prompt in PROMPTS {
        session.reset();
        session.prompt(prompt)?;
        let out = session.generate(&greedy(40), |_| ControlFlow::Continue(()))?;
        println!(
            "   {:<50} -> {} [{:.0} tok/s]",
            prompt.trim(),
            out.text.trim().lines().next().unwrap_or_default(),
            out.timings.decode_rate()
        );
    }
    println!();
    Ok(())
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn show(time: Duration) -> String {
    if time.as_millis() >= 10 {
        format!("{} ms", time.as_millis())
    } else {
        format!("{} µs", time.as_micros())
    }
}
