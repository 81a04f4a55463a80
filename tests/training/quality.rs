//! Whether training is of use: the example tasks in a few steps, measured as a user would, by what a session predicts and
//! writes with the adapter.

use crate::{MODELS, model};
use ggraft::adapter::{AdapterKind, Precision, Template};
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{ExistingText, GenerateOptions};
use ggraft::train::data::{Content, Dataset, Example, Row};
use ggraft::train::{TrainOptions, Trainer};
use ggraft::{Adapter, Model, Session, SessionOptions};
use std::collections::BTreeSet;
use std::fs;
use std::ops::ControlFlow;

/// The first rows of a task.
fn rows(task: &str, split: &str, n: usize) -> Dataset {
    let all = Dataset::read_jsonl(format!("{MODELS}/tasks/{task}/{split}.jsonl")).unwrap();
    Dataset::from_rows(all.rows().iter().take(n).cloned().collect::<Vec<Row>>()).unwrap()
}

/// Trains with one thread; the adapter as its file has it.
fn train(
    model: &Model,
    mut o: TrainOptions,
    train: &Dataset,
    valid: &[Example],
) -> (Trainer, Adapter) {
    o.threads = Some(1);
    let examples = train.examples(model).unwrap();
    let mut trainer = Trainer::new(model, o, examples, valid.to_vec()).unwrap();
    while trainer.step().unwrap().is_some() {}
    let file = trainer.adapter().unwrap().to_gguf(Precision::F16);
    (trainer, Adapter::from_gguf(&file).unwrap())
}

fn session(model: &Model, adapter: Option<&Adapter>) -> Session {
    let mut session = Session::new(model, &SessionOptions::default().n_threads(1)).unwrap();
    if let Some(adapter) = adapter {
        session.attach(adapter, ExistingText::Recompute).unwrap();
    }
    session
}

/// Mean cross-entropy of what must be predicted.
fn loss(session: &mut Session, rows: &[Example]) -> f64 {
    let (mut sum, mut n) = (0.0, 0.0);
    for row in rows {
        session.reset();
        session.prompt_tokens(&row.given).unwrap();
        for &(id, counts) in &row.then {
            let logits = session.logits().unwrap();
            let mass: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            if counts {
                sum += mass.ln() - f64::from(logits[id as usize]);
                n += 1.0;
            }
            session.feed(&[id]).unwrap();
        }
    }
    sum / n
}

/// Share of the rows whose greedy completion, given the right one, is `good`.
fn share(
    session: &mut Session,
    data: &Dataset,
    n: usize,
    good: impl Fn(&str, &str) -> bool,
) -> f64 {
    let greedy = GenerateOptions::default()
        .sampler(SamplerParams::greedy())
        .max_tokens(n);
    let hits = data.rows().iter().filter(|row| {
        let Content::Completion { prompt, completion } = &row.content else {
            panic!("a row without prompt");
        };
        session.reset();
        session.prompt(prompt).unwrap();
        let done = session
            .generate(&greedy, |_| ControlFlow::Continue(()))
            .unwrap();
        good(&done.text, completion.as_deref().unwrap())
    });
    hits.count() as f64 / data.rows().len() as f64
}

/// The words by which `eval.py` knows a pirate.
fn pirates_words() -> BTreeSet<String> {
    let script = fs::read_to_string(format!("{MODELS}/tasks/eval.py")).unwrap();
    let (_, words) = script.split_once("\"pirate\": \"").unwrap();
    let (words, _) = words.split_once('"').unwrap();
    words.split(' ').map(str::to_owned).collect()
}

/// Defaults except for the number of steps: the validation loss falls, and the model speaks like a pirate.
fn becomes_a_pirate(name: &str) {
    let model = model(name);
    let lexicon = pirates_words();
    let speaks = |text: &str, _: &str| {
        let lower = text.to_lowercase();
        let mut words = lower.split(|c: char| !c.is_alphabetic() && c != '\'');
        words.any(|w| lexicon.contains(w) || lexicon.contains(w.trim_matches('\'')))
    };
    let test = rows("persona_pirate", "test", 20);
    let valid = rows("persona_pirate", "valid", 16)
        .examples(&model)
        .unwrap();
    let mut alone = session(&model, None);
    let before = (
        loss(&mut alone, &valid),
        share(&mut alone, &test, 16, speaks),
    );
    assert!(before.0 > 0.36 && before.1 < 0.3, "{name}: {before:?}");

    let mut o = TrainOptions::new(AdapterKind::Prefix);
    o.steps = Some(12);
    o.eval_every = Some(12);
    let (trainer, adapter) = train(&model, o, &rows("persona_pirate", "train", 200), &valid);
    let mut grafted = session(&model, Some(&adapter));
    let after = (
        loss(&mut grafted, &valid),
        share(&mut grafted, &test, 16, speaks),
    );
    assert!(
        after.0 < 0.29 && after.1 > 0.8,
        "{name}: {before:?} -> {after:?}"
    );
    // Half precision in the file and in the KV cache changes little of what training measured.
    let measured = trainer.summary().best_valid_loss.unwrap();
    assert!(
        (after.0 / measured - 1.0).abs() < 0.01,
        "{name}: {} {measured}",
        after.0
    );
}

#[test]
fn a_prefix_on_q8_0_makes_a_pirate() {
    becomes_a_pirate("tinylm-q8_0");
}

#[test]
fn a_prefix_on_q4_k_m_makes_a_pirate() {
    becomes_a_pirate("tinylm-q4_k_m");
}

#[test]
fn p_tuning_within_the_text_asks_for_facts() {
    let model = model("tinylm-q8_0");
    let test = rows("facts_trade", "test", 40);
    let exact = |text: &str, right: &str| text.lines().next().unwrap_or("").trim() == right.trim();
    let before = share(&mut session(&model, None), &test, 6, exact);
    assert!(before < 0.2, "{before}");
    let mut o = TrainOptions::new(AdapterKind::PTuning);
    o.template = Some(Template::parse("{v:10} {prompt} {v:10}").unwrap());
    o.steps = Some(50);
    let (_, adapter) = train(&model, o, &rows("facts_trade", "train", 100), &[]);
    let after = share(&mut session(&model, Some(&adapter)), &test, 6, exact);
    assert!(after > 0.9, "{before} -> {after}");
}

/// New names are told from a hundred old ones that are read eight times, thanks to the weight decay that such a run has.
#[test]
fn rows_that_are_read_often_are_not_learned_by_heart() {
    let model = model("tinylm-q8_0");
    let valid = rows("facts_trade", "valid", 20).examples(&model).unwrap();
    let best = |weight_decay: Option<f64>| {
        let mut o = TrainOptions::new(AdapterKind::Prefix);
        (o.steps, o.eval_every, o.weight_decay) = (Some(100), Some(25), weight_decay);
        let (trainer, _) = train(&model, o, &rows("facts_trade", "train", 100), &valid);
        trainer.summary().best_valid_loss.unwrap()
    };
    let (with, without) = (best(None), best(Some(0.0)));
    assert!(with < 0.8 * without, "{with} {without}");
}
