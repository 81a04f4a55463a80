//! What ggraft is for, in one process: the embedded model answers alone, then with one adapter after the other.
//!
//!     cargo run --release --example demo

use ggraft::adapter::{ImportOptions, import_peft};
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{ExistingText, GenerateOptions};
use ggraft::{Adapter, Model, ModelOptions, Session, SessionOptions};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

/// Folder under models/peft, and what it was trained for.
const ADAPTERS: [(&str, &str); 4] = [
    ("persona_pirate-prefix", "prefix: speak like a pirate"),
    ("persona_butler-prefix_proj", "prefix: speak like a butler"),
    (
        "sentiment-prompt_text",
        "prompt: is the review good, bad or mixed?",
    ),
    (
        "facts_county-p_tuning",
        "P-tuning: name the county of the town",
    ),
];

const PROMPTS: [&str; 3] = [
    "The rain has not stopped for three days.\n",
    "Review: The soup was cold and the room was noisy.",
    "Wethercombe",
];

fn main() -> ggraft::Result<()> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let start = Instant::now();
    let model = Model::open(models.join("tinylm-q8_0.gguf"), &ModelOptions::default())?;
    println!("opened {} in {}", name(model.path()), show(start.elapsed()));

    let start = Instant::now();
    let adapters = ADAPTERS
        .iter()
        .map(|(folder, _)| {
            let dir = models.join("peft").join(folder);
            import_peft(
                &dir,
                model.shape(),
                Some(model.fingerprint()),
                &ImportOptions::default(),
            )
        })
        .collect::<ggraft::Result<Vec<Adapter>>>()?;
    println!(
        "imported {} PEFT adapters in {}\n",
        adapters.len(),
        show(start.elapsed())
    );

    let mut session = Session::new(&model, &SessionOptions::default().n_ctx(512))?;
    answer(&mut session, "no adapter", None)?;
    // Twice: the first attach compiles the adapter for this base, the second one copies what is resident.
    for (adapter, (_, what)) in adapters.iter().zip(ADAPTERS) {
        session.swap(adapter, ExistingText::Drop)?;
        let start = Instant::now();
        session.swap(adapter, ExistingText::Drop)?;
        answer(&mut session, what, Some(start.elapsed()))?;
    }

    // In the middle of a text: what the pirate begins, the butler ends.
    println!("== pirate and butler, swapped between two tokens");
    session.swap(&adapters[0], ExistingText::Drop)?;
    session.prompt(PROMPTS[0])?;
    let options = GenerateOptions::default()
        .sampler(SamplerParams::greedy())
        .max_tokens(1);
    let pirate = session.generate(&options, |_| ControlFlow::Continue(()))?;
    let start = Instant::now();
    session.swap(&adapters[1], ExistingText::Recompute)?;
    let swap = start.elapsed();
    let options = GenerateOptions::default()
        .sampler(SamplerParams::greedy())
        .max_tokens(40);
    let butler = session.generate(&options, |_| ControlFlow::Continue(()))?;
    println!(
        "   {} [swap, text recomputed in {}] {}",
        pirate.text.trim(),
        show(swap),
        butler.text.trim()
    );
    Ok(())
}

fn answer(session: &mut Session, what: &str, attach: Option<Duration>) -> ggraft::Result<()> {
    match attach {
        Some(time) => println!("== {what} (attached in {})", show(time)),
        None => println!("== {what}"),
    }
    for prompt in PROMPTS {
        session.reset();
        session.prompt(prompt)?;
        let options = GenerateOptions::default()
            .sampler(SamplerParams::greedy())
            .max_tokens(40);
        let out = session.generate(&options, |_| ControlFlow::Continue(()))?;
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
