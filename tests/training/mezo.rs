//! Gradients without a way back: the same losses by libllama, estimates that mean the gradient, runs that go on where they stood.

use crate::{Fixture, batch, options};
use ggraft::adapter::{AdapterKind, Precision, Template};
use ggraft::file::types::GgmlType;
use ggraft::train::{Init, Mezo, Objective, Reparam, TrainOptions, Trainer};
use ggraft_testkit::fixture::{FixtureSpec, Variant};
use ggraft_testkit::metrics::{cosine, nmse};

/// The parameter that stands for directly trained rows.
const ROWS: &str = "prompt_embeddings";

fn mezo(method: AdapterKind, directions: usize, epsilon: f32) -> TrainOptions {
    let mut o = options(method);
    o.mezo = Some(Mezo::default().directions(directions).epsilon(epsilon));
    o
}

/// The same with a tape.
fn taped(mut o: TrainOptions) -> TrainOptions {
    o.mezo = None;
    o
}

#[test]
fn libllama_finds_the_losses_that_we_find() {
    let mut compared = 0;
    for variant in [
        Variant::Llama,
        Variant::Gemma2,
        Variant::Gemma3,
        Variant::Gpt2,
        Variant::Qwen2,
    ] {
        let fixture = Fixture::new(variant);
        for (method, template) in [
            (AdapterKind::Prefix, None),
            (AdapterKind::Prompt, None),
            (AdapterKind::PTuning, Some("{v:2}{bos}{prompt}{v:3}")),
        ] {
            for smoothing in [0.0, 0.1] {
                // So near that both ends are where the rows are.
                let mut o = mezo(method, 1, 1e-4);
                o.label_smoothing = smoothing;
                o.template = template.map(|t| t.parse::<Template>().unwrap());
                let loss = |o| fixture.trainer(o, &batch()).gradient(&batch()).unwrap().0;
                let (got, want) = (loss(o.clone()), loss(taped(o)));
                let what = format!("{} {method} {smoothing}", variant.name());
                assert!((got - want).abs() <= 2e-3 * want, "{what}: {got} {want}");
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 30);
}

#[test]
fn batches_of_more_rows_than_texts_are_computed_in_parts() {
    let fixture = Fixture::new(Variant::Llama);
    let rows: Vec<_> = (0..80)
        .map(|i| crate::example(i, 1 + i as usize % 3, 3))
        .collect();
    let mut o = mezo(AdapterKind::Prefix, 1, 1e-4);
    o.batch = 80;
    let loss = |o| fixture.trainer(o, &rows).gradient(&rows).unwrap().0;
    let (got, want) = (loss(o.clone()), loss(taped(o)));
    assert!((got - want).abs() <= 2e-3 * want, "{got} {want}");
}

#[test]
fn estimates_mean_the_gradient() {
    let fixture = Fixture::new(Variant::Llama);
    for method in [AdapterKind::Prefix, AdapterKind::Prompt] {
        let mut o = mezo(method, 1024, 1e-2);
        o.length = Some(2);
        let gradient = |o| {
            let mut trainer = fixture.trainer(o, &batch());
            trainer.gradient(&batch()).unwrap().1.remove(ROWS).unwrap()
        };
        let (got, want) = (gradient(o.clone()), gradient(taped(o)));
        let (d, n) = (want.len() as f64, 1024.0);
        // Of a sum of as many directions, each with a part of the gradient.
        let expected = (n / (n + d)).sqrt();
        let cosine = cosine(&got, &want);
        assert!(
            (cosine - expected).abs() < 0.1,
            "{method}: {cosine} {expected}"
        );
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter()
                .zip(b)
                .map(|(&a, &b)| f64::from(a) * f64::from(b))
                .sum()
        };
        // And as long as the gradient in its direction.
        let along = dot(&got, &want) / dot(&want, &want);
        assert!((along - 1.0).abs() < 0.2, "{method}: {along}");
    }
}

#[test]
fn runs_start_where_runs_with_a_tape_start() {
    for variant in [Variant::Llama, Variant::Gemma2, Variant::Qwen2] {
        let fixture = Fixture::of(&FixtureSpec::new(variant, GgmlType::Q8_0));
        for (method, init) in [
            (AdapterKind::Prompt, Init::Vocab),
            (AdapterKind::Prompt, Init::Text("a cat".to_owned())),
            (AdapterKind::Prefix, Init::Text("a cat".to_owned())),
        ] {
            let mut o = mezo(method, 1, 0.1);
            o.init = Some(init.clone());
            let rows = |o| {
                let trainer = fixture.trainer(o, &batch());
                let (_, (_, rows)) = trainer.parameters().pop_first().unwrap();
                rows
            };
            let far = nmse(&rows(o.clone()), &rows(taped(o)));
            let what = format!("{} {method} {init:?}", variant.name());
            // Products of quantized weights are rounded in other ways.
            assert!(far <= 1e-3, "{what}: {far:.2e}");
        }
    }
}

#[test]
fn runs_that_are_resumed_take_the_same_steps() {
    let fixture = Fixture::new(Variant::Llama);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.ckpt");
    for (method, reparam) in [
        (AdapterKind::Prefix, Reparam::None),
        (AdapterKind::PTuning, Reparam::Mlp),
    ] {
        let mut o = mezo(method, 3, 0.1);
        o.reparam = Some(reparam);
        o.batch = 2;
        o.steps = Some(6);
        let file = |trainer: &Trainer| trainer.adapter().unwrap().to_gguf(Precision::F32);
        let mut whole = fixture.trainer(o.clone(), &batch());
        while whole.step().unwrap().is_some() {}
        let mut first = fixture.trainer(o.clone(), &batch());
        for _ in 0..3 {
            first.step().unwrap().unwrap();
        }
        assert!(file(&first) != file(&whole), "{method}: steps do nothing");
        first.save_checkpoint(&path).unwrap();
        let mut second = Trainer::resume(&fixture.model, &path, batch(), Vec::new()).unwrap();
        // What is computed in between changes nothing.
        second.gradient(&batch()).unwrap();
        while second.step().unwrap().is_some() {}
        assert!(file(&second) == file(&whole), "{method}: another adapter");
    }
}

#[test]
fn losses_fall() {
    let fixture = Fixture::new(Variant::Llama);
    for method in [AdapterKind::Prefix, AdapterKind::Prompt] {
        let mut o = mezo(method, 16, 0.1);
        o.length = Some(1);
        o.steps = Some(60);
        o.clip = 1.0;
        o.lr = Some(2e-2);
        let mut trainer = fixture.trainer(o, &batch());
        let before = trainer.gradient(&batch()).unwrap().0;
        while trainer.step().unwrap().is_some() {}
        let after = trainer.gradient(&batch()).unwrap().0;
        assert!(after < before - 0.05, "{method}: {before} {after}");
    }
}

#[test]
fn what_forward_passes_cannot_do_is_refused() {
    let fixture = Fixture::new(Variant::Llama);
    let refused = |o: TrainOptions, why: &str| {
        let e = Trainer::new(&fixture.model, o, batch(), Vec::new());
        let e = e.map(drop).unwrap_err().to_string();
        assert!(e.contains(why), "{e}");
    };
    refused(mezo(AdapterKind::Prefix, 0, 0.1), "directions");
    refused(mezo(AdapterKind::Prefix, 1, 0.0), "epsilon");
    refused(mezo(AdapterKind::Prefix, 1, f32::NAN), "epsilon");
    let mut o = mezo(AdapterKind::Prefix, 1, 0.1);
    o.loss = Objective::Distill {
        context: "a".to_owned(),
        top_k: 4,
    };
    refused(o, "distillation");
}
