//! Gradients against differences of the loss, and those of quantized bases against those of the F32 base.

use crate::{Fixture, METHODS, batch, corpus, distance, numbers, options};
use ggraft::adapter::{AdapterKind, Template};
use ggraft::file::types::GgmlType;
use ggraft::train::data::Example;
use ggraft::train::{Objective, Reparam, Trainer};
use ggraft::{Model, ModelOptions};
use ggraft_testkit::fixture::{FixtureSpec, Variant, all_types, all_variants};
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
        let mut spec = FixtureSpec::new(variant, GgmlType::F32);
        let (step, tolerance) = match variant.experts() {
            _ if has_gelu(variant) => (4e-2, 2e-2),
            None => (1e-2, 2e-3),
            // The loss has steps where other experts are chosen, and differences say nothing across one: the way is shorter, and the weights are some of which no token
            // comes to one on it, nor any of gpt-oss's gates to 7, where they are cut.
            Some(_) => {
                spec.seed = if variant == Variant::GptOss { 8 } else { 7 };
                (1e-3, 2e-3)
            }
        };
        let fixture = Fixture::of(&spec);
        for method in METHODS {
            let mut trainer = fixture.trainer(options(method), &batch());
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

/// Norm of a gradient.
fn norm(gradient: &[f32]) -> f64 {
    let squares = gradient.iter().map(|&g| f64::from(g).powi(2));
    squares.sum::<f64>().sqrt()
}

#[test]
fn gradients_on_quantized_bases_point_where_those_on_the_exact_base_do() {
    let open = |ty: &str| {
        let path = format!("{}/models/tinylm-{ty}.gguf", env!("CARGO_MANIFEST_DIR"));
        Model::open(path, &ModelOptions::default()).unwrap()
    };
    let exact = open("f16");
    let rows: Vec<Example> = corpus(&exact);
    // Weights of four bits are other weights; those of eight are nearly the same.
    for (ty, least, size) in [("q8_0", 0.998, 0.02), ("q4_k_m", 0.92, 0.35)] {
        let quantized = open(ty);
        for method in METHODS {
            let got = gradient(&quantized, method, &rows);
            let want = gradient(&exact, method, &rows);
            let (found, ratio) = (cosine(&got, &want), norm(&got) / norm(&want));
            println!("tinylm {ty} {method}: cosine {found:.4}, {ratio:.3} of the length");
            assert!(found >= least, "{ty} {method}: cosine {found}");
            assert!(
                (ratio - 1.0).abs() <= size,
                "{ty} {method}: {ratio} of the length"
            );
        }
    }
}

/// The gradient on a quantized base against that on the same weights in F32. What differs is that products of the forward pass
/// round activations to eight bits, and those backwards to BF16 on some CPUs. (The weights before they were quantized say
/// little: PEFT's own gradients on them and on the quantized ones of the conformance case llama_256 are at a cosine of 0.86.)
#[test]
fn gradients_on_quantized_bases_are_those_on_the_weights_that_they_stand_for() {
    use Variant::*;
    const LIMIT: f64 = 0.09;
    let specs = |ty: GgmlType, variants: &[Variant]| -> Vec<FixtureSpec> {
        let spec = |&v| FixtureSpec::new(v, ty);
        variants.iter().map(spec).collect()
    };
    let mut all = specs(
        GgmlType::Q8_0,
        &[Qwen3, Gemma2, Phi3, Gpt2, StableLm, Granite, Qwen2Moe],
    );
    all.extend(specs(
        GgmlType::Q4_K,
        &[Qwen2, Gemma3Scaled, Phi3, StableLm, Granite],
    ));
    // Each type has a function of its own.
    let types = all_types().iter().filter(|ty| ty.is_quantized());
    all.extend(types.flat_map(|&ty| specs(ty, &[Llama])));
    assert!(all.len() > 16, "{}", all.len());
    for quantized in all {
        let ty = quantized.weight_type;
        let exact = FixtureSpec {
            weight_type: GgmlType::F32,
            rounded_to: Some(ty),
            ..quantized.clone()
        };
        let [base, exact] = [&quantized, &exact].map(Fixture::of);
        for method in METHODS {
            let got = gradient(&base.model, method, &batch());
            let found = distance(&got, &gradient(&exact.model, method, &batch()));
            let name = quantized.variant.name();
            println!("{name} {} {method}: {found:.4}", ty.name());
            assert!(found <= LIMIT, "{name} {} {method}: {found}", ty.name());
        }
    }

    // The limit is one that matters: weights that are wrong by a rounding to four bits are far beyond it.
    let quantized = FixtureSpec::new(Llama, GgmlType::Q4_K);
    let before = FixtureSpec {
        weight_type: GgmlType::F32,
        ..quantized.clone()
    };
    let [quantized, before] = [&quantized, &before].map(Fixture::of);
    for method in METHODS {
        let got = gradient(&quantized.model, method, &batch());
        let found = distance(&got, &gradient(&before.model, method, &batch()));
        assert!(found > 3.0 * LIMIT, "{method}: {found}");
    }
}
