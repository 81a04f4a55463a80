//! Training by the public API: gradients and trajectories of the reference implementation, derivatives against differences
//! of the loss, what must not depend on how a batch is computed, and what is refused.

mod conformance;
mod derivatives;
mod invariants;
mod methods;
mod mezo;
mod quality;
mod refused;

use ggraft::adapter::AdapterKind;
use ggraft::file::types::GgmlType;
use ggraft::train::data::{Content, Dataset, Example, Row};
use ggraft::train::{Init, Reparam, Schedule, TrainOptions, Trainer};
use ggraft::{Model, ModelOptions};
use ggraft_testkit::fixture::{FixtureSpec, Variant, write_fixture};
use std::collections::BTreeMap;
use tempfile::TempDir;

/// P of the adapters here.
const LENGTH: usize = 5;

/// The methods whose gradients differ: keys and values, or rows at the input.
const METHODS: [AdapterKind; 2] = [AdapterKind::Prefix, AdapterKind::Prompt];

/// A model of random weights, and where its file is.
struct Fixture {
    model: Model,
    _dir: TempDir,
}

impl Fixture {
    fn new(variant: Variant) -> Self {
        Self::of(&FixtureSpec::new(variant, GgmlType::F32))
    }

    fn of(spec: &FixtureSpec) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("model.gguf");
        write_fixture(&path, spec).unwrap();
        let model = Model::open(&path, &ModelOptions::default()).unwrap();
        Self { model, _dir: dir }
    }

    fn trainer(&self, options: TrainOptions, train: &[Example]) -> Trainer {
        Trainer::new(&self.model, options, train.to_vec(), Vec::new()).unwrap()
    }
}

/// Directly trained rows that begin with random values, and plain steps.
fn options(method: AdapterKind) -> TrainOptions {
    let mut o = TrainOptions::new(method);
    o.length = Some(LENGTH);
    o.init = Some(Init::Random);
    o.reparam = Some(Reparam::None);
    o.schedule = Schedule::Constant;
    o.warmup = Some(0);
    o.clip = 0.0;
    o.lr = Some(1e-2);
    o.batch = 4;
    o.steps = Some(100);
    o.threads = Some(1);
    o
}

/// Numbers in no order that repeats, from 0 to below 1.
fn numbers(seed: u64) -> impl Iterator<Item = f64> {
    // Knuth's linear congruential generator (MMIX), of which the upper bits are good.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    std::iter::repeat_with(move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 24) as f64
    })
}

/// Bytes of the fixtures' vocabulary.
fn tokens(seed: u64, n: usize) -> Vec<i32> {
    numbers(seed).take(n).map(|x| (256.0 * x) as i32).collect()
}

/// A row of `given` and `then` random tokens, of which every third does not count.
fn example(seed: u64, given: usize, then: usize) -> Example {
    let ids = tokens(seed, given + then);
    let then = ids[given..].iter().enumerate();
    Example {
        given: ids[..given].to_vec(),
        then: then.map(|(i, &id)| (id, i % 3 != 2)).collect(),
        weight: 1.0,
        bos: false,
    }
}

/// Rows of different lengths, longer than the fixtures' windows; two begin alike, with more than a window.
fn batch() -> Vec<Example> {
    let mut rows = vec![example(1, 9, 6), example(2, 3, 11), example(3, 14, 2)];
    let mut alike = example(4, 3, 5);
    alike.given.splice(..0, rows[0].given.iter().copied());
    rows.push(alike);
    rows
}

const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models");

fn model(name: &str) -> Model {
    Model::open(format!("{MODELS}/{name}.gguf"), &ModelOptions::default()).unwrap()
}

/// Texts in the words of tinylm's corpus, as a completion task.
fn corpus(model: &Model) -> Vec<Example> {
    let rows = [
        (
            "Something moved in the bedroom last night.\n",
            "\"Arr! Draw yer cutlass!\"",
        ),
        (
            "The broken bucket broke in two this morning.\n",
            "\"Arr! The bucket be split.\"",
        ),
        (
            "There is a strange noise in the hall.\n",
            "\"Arr, me hearties!\"",
        ),
        (
            "The heavy drum fell down the stairs.\n",
            "\"Arr, matey, the drum be split.\"",
        ),
    ];
    let rows = rows.map(|(prompt, completion)| {
        Row::new(Content::Completion {
            prompt: prompt.to_owned(),
            completion: Some(completion.to_owned()),
        })
    });
    let data = Dataset::from_rows(rows.into()).unwrap();
    data.examples(model).unwrap()
}

/// All gradients, one behind the other.
fn flat(gradients: &BTreeMap<String, Vec<f32>>) -> Vec<f32> {
    gradients.values().flatten().copied().collect()
}

/// All trained values, one behind the other.
fn values(trainer: &Trainer) -> Vec<f32> {
    let all = trainer.parameters().into_values();
    all.flat_map(|(_, values)| values).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Relative distance of two results.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    ggraft_testkit::metrics::nmse(got, want).sqrt()
}

#[track_caller]
fn assert_close(what: &str, got: (f64, &[f32]), want: (f64, &[f32]), tolerance: f64) {
    let loss = ((got.0 - want.0) / want.0).abs();
    let gradient = distance(got.1, want.1);
    assert!(
        loss <= tolerance && gradient <= tolerance,
        "{what}: loss {} instead of {} ({loss:.1e}), gradient {gradient:.1e}",
        got.0,
        want.0
    );
}
