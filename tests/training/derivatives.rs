//! Gradients against differences of the loss, and those of quantized bases against those of the F32 base.

use crate::{Fixture, METHODS, batch, corpus, numbers, options};
use ggraft::adapter::{AdapterKind, Template};
use ggraft::file::types::GgmlType;
use ggraft::train::data::Example;
use ggraft::train::{Objective, Reparam, Trainer};
use ggraft::{Model, ModelOptions};
use ggraft_testkit::fixture::{FixtureSpec, Variant, all_variants};
use ggraft_testkit::metrics::cosine;

/// The parameter that stands for directly trained rows.
const ROWS: &str = "prompt_embeddings";

/// A direction whose entries have mean 0 and variance 1, so that a derivative along it is about as large as the gradient.
fn direction(seed: u64, n: usize) -> Vec<f64> {
    let numbers = numbers(seed).take(n);
    numbers.map(|x| 12f64.sqrt() * (x - 0.5)).collect()
}

/// Compares the gradient with central differences along random directions; distances are relative to the gradient's norm.
fn check(what: &str, trainer: &mut Trainer, rows: &[Example], step: f64, tolerance: f64) {
    let start = trainer.parameters();
    let (_, gradients) = trainer.gradient(rows).unwrap();
    for (name, (_, values)) in &start {
        let gradient = &gradients[name];
        let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>();
        for seed in 1..=2 {
            let direction = direction(seed, values.len());
            let mut loss = |t: f64| {
                let moved = values.iter().zip(&direction);
                let moved: Vec<f32> = moved.map(|(&x, d)| (f64::from(x) + t * d) as f32).collect();
                trainer.set_parameter(name, &moved).unwrap();
                trainer.gradient(rows).unwrap().0
            };
            // The error of the difference is of fourth order (Richardson).
            let mut slope = |h: f64| (loss(h) - loss(-h)) / (2.0 * h);
            let difference = (4.0 * slope(step) - slope(2.0 * step)) / 3.0;
            let product = gradient.iter().zip(&direction);
            let derivative = product.map(|(&g, d)| f64::from(g) * d).sum::<f64>();
            let error = (difference - derivative).abs() / norm.sqrt();
            assert!(
                error <= tolerance,
                "{what}, {name}: {derivative:.6} instead of {difference:.6} ({error:.4})"
            );
        }
        trainer.set_parameter(name, values).unwrap();
    }
}

/// Fixtures whose activation ggml looks up in a table of F16 on some processors: the loss has steps there.
fn has_gelu(variant: Variant) -> bool {
    use Variant::*;
    matches!(
        variant,
        Gemma | Gemma2 | Gemma3 | Gemma3Scaled | Gpt2 | Starcoder2
    )
}

#[test]
fn gradients_of_every_architecture_are_slopes_of_the_loss() {
    for &variant in all_variants() {
        let fixture = Fixture::new(variant);
        for method in METHODS {
            let mut trainer = fixture.trainer(options(method), &batch());
            let (step, tolerance) = if has_gelu(variant) {
                (4e-2, 2e-2)
            } else {
                (1e-2, 2e-3)
            };
            let what = format!("{} {method}", variant.name());
            check(&what, &mut trainer, &batch(), step, tolerance);
        }
    }
}

#[test]
fn gradients_within_a_template_through_an_encoder_and_of_smoothed_labels_are_slopes_of_the_loss() {
    // P-tuning's encoders have ReLUs, where differences say little; the conformance cases have them.
    let mut encoder = options(AdapterKind::Prefix);
    encoder.reparam = Some(Reparam::Mlp);
    encoder.hidden = Some(24);
    let mut template = options(AdapterKind::PTuning);
    template.template = Some(Template::parse("{v:2}a{prompt}b{v:3}").unwrap());
    template.loss = Objective::All;
    let mut smoothed = options(AdapterKind::Prefix);
    smoothed.label_smoothing = 0.2;
    let fixture = Fixture::new(Variant::Llama);
    for (what, options) in [
        ("encoder", encoder),
        ("template", template),
        ("smoothed labels", smoothed),
    ] {
        let mut trainer = fixture.trainer(options, &batch());
        check(what, &mut trainer, &batch(), 1e-2, 2e-3);
    }
}

/// The gradient with respect to directly trained random rows.
fn gradient(model: &Model, method: AdapterKind, rows: &[Example]) -> Vec<f32> {
    let mut trainer = Trainer::new(model, options(method), rows.to_vec(), Vec::new()).unwrap();
    let (_, mut found) = trainer.gradient(rows).unwrap();
    found.remove(ROWS).unwrap()
}

#[track_caller]
fn assert_same_direction(what: &str, got: &[f32], want: &[f32], least: f64) {
    let found = cosine(got, want);
    println!("{what}: {found:.4}");
    assert!(found >= least, "{what}: cosine {found}");
}

#[test]
fn gradients_on_quantized_bases_point_where_those_on_the_exact_base_do() {
    let open = |ty: &str| {
        let path = format!("{}/models/tinylm-{ty}.gguf", env!("CARGO_MANIFEST_DIR"));
        Model::open(path, &ModelOptions::default()).unwrap()
    };
    let exact = open("f16");
    let rows: Vec<Example> = corpus(&exact);
    for (ty, least) in [("q8_0", 0.98), ("q4_k_m", 0.9)] {
        let quantized = open(ty);
        for method in METHODS {
            assert_same_direction(
                &format!("tinylm {ty} {method}"),
                &gradient(&quantized, method, &rows),
                &gradient(&exact, method, &rows),
                least,
            );
        }
    }
}

#[test]
fn gradients_on_quantized_bases_of_random_weights() {
    use Variant::*;
    // Random weights are hard to quantize, in particular to four bits: PEFT's own gradients on the quantized weights of the
    // conformance case llama_256 are at a cosine of 0.86 from those on the original ones.
    let q8 = &[Llama, Qwen3, Gemma2, Phi3, Gpt2, StableLm, Granite][..];
    let q4 = &[Llama, Qwen2, Gemma3Scaled, Phi3, StableLm, Granite];
    for (ty, variants, least) in [(GgmlType::Q8_0, q8, 0.98), (GgmlType::Q4_K, q4, 0.8)] {
        for &variant in variants {
            let quantized = FixtureSpec::new(variant, ty);
            let exact = FixtureSpec {
                weight_type: GgmlType::F32,
                ..quantized.clone()
            };
            let [quantized, exact] = [quantized, exact].map(|spec| Fixture::of(&spec));
            for method in METHODS {
                assert_same_direction(
                    &format!("{} {} {method}", variant.name(), ty.name()),
                    &gradient(&quantized.model, method, &batch()),
                    &gradient(&exact.model, method, &batch()),
                    least,
                );
            }
        }
    }
}
