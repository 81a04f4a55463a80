//! What must not change a result: packing, recomputation, threads, accumulation, cancelling.

use crate::{
    Fixture, LENGTH, METHODS, MODELS, assert_close, batch, bits, corpus, distance, example, flat,
    options, values,
};
use ggraft::adapter::{AdapterKind, Precision};
use ggraft::infer::{ExistingText, FlashAttention, KvType};
use ggraft::train::data::Example;
use ggraft::train::{Init, Objective, OptimizerKind, Reparam, TrainError, TrainOptions, Trainer};
use ggraft::{Error, Kernels, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::fixture::{Variant, all_variants};

fn gradient(trainer: &mut Trainer, rows: &[Example]) -> (f64, Vec<f32>) {
    let (loss, found) = trainer.gradient(rows).unwrap();
    (loss, flat(&found))
}

/// Mean of losses and gradients of single rows, weighted by what they add to the loss.
fn mean_of_rows(trainer: &mut Trainer, rows: &[Example]) -> (f64, Vec<f32>) {
    let mut sum = (0.0, Vec::new());
    let mut mass = 0.0;
    for row in rows {
        let counted = row.then.iter().filter(|t| t.1).count();
        let weight = f64::from(row.weight) * counted as f64;
        let (loss, gradient) = gradient(trainer, std::slice::from_ref(row));
        sum.0 += weight * loss;
        sum.1.resize(gradient.len(), 0.0);
        for (sum, g) in sum.1.iter_mut().zip(gradient) {
            *sum += weight * f64::from(g);
        }
        mass += weight;
    }
    let gradient = sum.1.iter().map(|s| (s / mass) as f32).collect();
    (sum.0 / mass, gradient)
}

#[test]
fn a_batch_is_the_mean_of_its_rows() {
    use Variant::*;
    let mut weighted = batch();
    weighted[1].weight = 0.25;
    // All of them begin alike, longer than a window; two are equal.
    let mut alike = batch();
    for row in &mut alike {
        row.given.splice(..0, example(9, 8, 1).given);
    }
    alike.push(alike[0].clone());
    for variant in [
        Llama,
        Gemma2,
        Olmo2Swa,
        Gpt2,
        StableLmParallel,
        Phi3LongRope,
    ] {
        let fixture = Fixture::new(variant);
        for method in METHODS {
            let mut trainer = fixture.trainer(options(method), &batch());
            for (what, rows) in [("different", batch()), ("weighted", weighted.clone())]
                .into_iter()
                .chain([("alike", alike.clone())])
            {
                let (loss, found) = gradient(&mut trainer, &rows);
                let (mean, expected) = mean_of_rows(&mut trainer, &rows);
                let what = format!("{} {method}, {what}", variant.name());
                assert_close(&what, (loss, &found), (mean, &expected), 1e-5);
            }
        }
    }
}

#[test]
fn a_batch_of_several_graphs_is_the_mean_of_its_rows() {
    let fixture = Fixture::new(Variant::Llama);
    let mut trainer = fixture.trainer(options(AdapterKind::Prefix), &batch());
    // More tokens than one graph takes.
    let rows: Vec<Example> = (0..8)
        .map(|i| example(i, 60 + 10 * i as usize, 100))
        .collect();
    let (loss, found) = gradient(&mut trainer, &rows);
    let (mean, expected) = mean_of_rows(&mut trainer, &rows);
    assert_close("eight rows", (loss, &found), (mean, &expected), 1e-5);
}

#[test]
fn weights_count_rows() {
    let fixture = Fixture::new(Variant::Qwen2);
    for method in METHODS {
        let mut trainer = fixture.trainer(options(method), &batch());
        let mut rows = batch();
        rows[0].weight = 2.0;
        rows[1].weight = 0.0;
        let weighted = gradient(&mut trainer, &rows);
        let mut counted = batch();
        counted.push(counted[0].clone());
        counted.remove(1);
        let counted = gradient(&mut trainer, &counted);
        assert_close(
            method.name(),
            (weighted.0, &weighted.1),
            (counted.0, &counted.1),
            1e-5,
        );
    }
}

#[test]
fn recomputed_layers_give_the_same_bits() {
    for &variant in all_variants() {
        let fixture = Fixture::new(variant);
        for method in METHODS {
            let compute = |memory: u64| {
                let mut o = options(method);
                o.memory = Some(memory);
                let mut trainer = fixture.trainer(o, &batch());
                let (loss, found) = gradient(&mut trainer, &batch());
                let recomputed = trainer.summary().recomputed_layers;
                (recomputed, loss.to_bits(), bits(&found))
            };
            let (none, loss, kept) = compute(u64::MAX);
            assert_eq!(none, 0);
            let all = compute(0);
            assert_eq!(
                all,
                (fixture.model.shape().n_layer, loss, kept),
                "{} {method}",
                variant.name()
            );
        }
    }
}

#[test]
fn a_budget_recomputes_as_many_layers_as_it_must() {
    let fixture = Fixture::new(Variant::Gemma3);
    let mut found = Vec::new();
    let mut expected = None;
    for kilobytes in (0..2000).step_by(100) {
        let mut o = options(AdapterKind::Prompt);
        o.memory = Some(kilobytes << 10);
        let mut trainer = fixture.trainer(o, &batch());
        let gradient = bits(&gradient(&mut trainer, &batch()).1);
        assert_eq!(expected.get_or_insert_with(|| gradient.clone()), &gradient);
        found.push(trainer.summary().recomputed_layers);
    }
    assert!(found.is_sorted_by(|a, b| a >= b), "{found:?}");
    let between = found.iter().filter(|n| (1..7).contains(*n)).count();
    assert!(
        found[0] == 7 && between > 0 && found.ends_with(&[0]),
        "{found:?}"
    );
}

#[test]
fn threads_do_not_matter() {
    for (variant, method) in [
        (Variant::Gemma2, AdapterKind::Prefix),
        (Variant::Phi3, AdapterKind::Prompt),
        (Variant::OpenElm, AdapterKind::Prefix),
    ] {
        let fixture = Fixture::new(variant);
        let mut trainer = fixture.trainer(options(method), &batch());
        let one = gradient(&mut trainer, &batch());
        for n in [2, 3] {
            trainer.set_threads(n).unwrap();
            let several = gradient(&mut trainer, &batch());
            let what = format!("{} {method}, {n} threads", variant.name());
            println!("{what}: equal bits: {}", bits(&several.1) == bits(&one.1));
            assert_close(&what, (several.0, &several.1), (one.0, &one.1), 1e-5);
        }
    }
}

/// The adapter after a few steps, as a file.
fn file_after_steps(fixture: &Fixture, options: TrainOptions) -> Vec<u8> {
    let mut trainer = fixture.trainer(options, &batch());
    for _ in 0..4 {
        trainer.step().unwrap().unwrap();
    }
    trainer.adapter().unwrap().to_gguf(Precision::F32)
}

/// Beside a session, whose threads are the model's: neither waits for the other.
#[test]
fn threads_of_a_trainers_own_change_nothing() {
    let fixture = Fixture::new(Variant::Llama);
    let with = |background| {
        let mut o = options(AdapterKind::Prefix);
        (o.threads, o.background) = (Some(2), background);
        file_after_steps(&fixture, o)
    };
    assert!(with(true) == with(false));
}

#[test]
fn a_seed_decides_every_bit() {
    let fixture = Fixture::new(Variant::Llama);
    for (method, reparam) in [
        (AdapterKind::Prefix, Reparam::None),
        (AdapterKind::Prefix, Reparam::Mlp),
        (AdapterKind::Prompt, Reparam::None),
        (AdapterKind::PTuning, Reparam::Mlp),
        (AdapterKind::PTuning, Reparam::Lstm),
    ] {
        let file = |seed: u64| {
            let mut o = options(method);
            o.reparam = Some(reparam);
            o.dropout = 0.1;
            o.batch = 3;
            o.seed = seed;
            file_after_steps(&fixture, o)
        };
        let first = file(1);
        assert!(first == file(1), "{method} {reparam:?}: not reproducible");
        assert!(
            first != file(2),
            "{method} {reparam:?}: the seed does nothing"
        );
    }
}

#[test]
fn the_seed_shuffles() {
    let fixture = Fixture::new(Variant::Llama);
    let losses = |seed: u64| {
        let mut o = options(AdapterKind::Prompt);
        o.seed = seed;
        o.batch = 1;
        let mut trainer = fixture.trainer(o, &batch());
        let zeros = vec![0.0; values(&trainer).len()];
        trainer.set_parameter("prompt_embeddings", &zeros).unwrap();
        let losses: Vec<f64> = trainer.reports().take(4).map(|r| r.unwrap().loss).collect();
        losses
    };
    assert_ne!(losses(1), losses(2));
}

#[test]
fn accumulated_batches_are_one_batch() {
    let fixture = Fixture::new(Variant::Llama);
    for method in METHODS {
        let run = |batch_size: usize, accum: usize| {
            let mut o = options(method);
            o.batch = batch_size;
            o.accum = accum;
            o.optimizer = OptimizerKind::Sgd;
            let mut trainer = fixture.trainer(o, &[batch(), vec![example(7, 5, 9)]].concat());
            let losses = trainer.reports().take(3);
            let losses: Vec<f32> = losses.map(|r| r.unwrap().loss as f32).collect();
            (losses, values(&trainer))
        };
        let (whole, parts) = (run(4, 1), run(2, 2));
        assert!(distance(&parts.0, &whole.0) <= 1e-5, "{method}");
        assert!(distance(&parts.1, &whole.1) <= 1e-5, "{method}");
    }
}

/// A batch is what is computed together: of equal rows, which share all tokens but one each, a smaller batch computes more.
#[test]
fn a_microbatch_has_as_many_rows_as_the_batch() {
    let fixture = Fixture::new(Variant::Llama);
    let rows = vec![example(7, 5, 9); 4];
    let tokens = |batch: usize, accum: usize| {
        let mut o = options(AdapterKind::Prompt);
        (o.batch, o.accum) = (batch, accum);
        fixture.trainer(o, &rows).step().unwrap().unwrap().tokens
    };
    let length = (tokens(1, 1), tokens(4, 1), tokens(2, 2), tokens(1, 4));
    let (one, four, two_twice, four_times) = length;
    assert_eq!(four, one + 3);
    assert_eq!(two_twice, 2 * (one + 1));
    assert_eq!(four_times, 4 * one);
}

/// The base alone is the trainer's loss with an adapter that does nothing: a prompt has no such values, but a session has none.
#[test]
fn the_base_is_evaluated_without_the_adapter() {
    let fixture = Fixture::new(Variant::Llama);
    let losses: Vec<f64> = METHODS
        .map(|method| {
            let mut o = options(method);
            o.seed = 3;
            let mut trainer = Trainer::new(&fixture.model, o, batch(), batch()).unwrap();
            let with = trainer.valid_loss().unwrap().unwrap();
            let base = trainer.base_valid_loss().unwrap().unwrap();
            assert_ne!(with, base, "{method}");
            assert_eq!(trainer.summary().base_valid_loss, Some(base));
            base
        })
        .to_vec();
    assert_eq!(losses[0], losses[1]);
    let mut session = Session::new(
        &fixture.model,
        &SessionOptions::default().kv_type(KvType::F32),
    )
    .unwrap();
    let mut sum = 0.0;
    for row in batch() {
        session.reset();
        session.prompt_tokens(&row.given).unwrap();
        for &(id, counts) in &row.then {
            let logits = session.logits().unwrap();
            let z: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            if counts {
                sum += f64::from(row.weight) * (z.ln() - f64::from(logits[id as usize]));
            }
            session.feed(&[id]).unwrap();
        }
    }
    let mass: f64 = batch()
        .iter()
        .map(|r| f64::from(r.weight) * r.then.iter().filter(|t| t.1).count() as f64)
        .sum();
    assert!(
        (sum / mass - losses[0]).abs() < 1e-4,
        "{} and {}",
        sum / mass,
        losses[0]
    );
}

#[test]
fn frozen_rows_stay() {
    let fixture = Fixture::new(Variant::Qwen3);
    let mut o = options(AdapterKind::Prefix);
    o.freeze_first = 2;
    o.weight_decay = Some(0.1);
    let mut trainer = fixture.trainer(o, &batch());
    let before = values(&trainer);
    for _ in 0..3 {
        trainer.step().unwrap().unwrap();
    }
    let after = values(&trainer);
    let row = before.len() / LENGTH;
    let moved: Vec<bool> = before
        .chunks_exact(row)
        .zip(after.chunks_exact(row))
        .map(|(a, b)| bits(a) != bits(b))
        .collect();
    assert_eq!(moved, [false, false, true, true, true]);
    assert_eq!(trainer.summary().trained_parameters, 3 * row as u64);
    assert_eq!(trainer.summary().adapter_values, 5 * row as u64);
}

#[test]
fn dropout_trains_and_is_reproducible() {
    let fixture = Fixture::new(Variant::Llama);
    for method in METHODS {
        let run = |dropout: f32| {
            let mut o = options(method);
            o.dropout = dropout;
            let mut trainer = fixture.trainer(o, &batch());
            let before = gradient(&mut trainer, &batch()).0;
            let losses = trainer.reports().take(30);
            let losses: Vec<f64> = losses.map(|r| r.unwrap().loss).collect();
            let after = gradient(&mut trainer, &batch()).0;
            assert!(after < 0.95 * before, "{method}: {after} after {before}");
            (losses, bits(&values(&trainer)))
        };
        let dropped = run(0.5);
        assert!(dropped == run(0.5), "{method}: not reproducible");
        assert!(dropped != run(0.0), "{method}: dropout does nothing");
    }
}

/// Logits of a session with the trainer's adapter, of all tokens behind a row's first.
fn logits(fixture: &Fixture, trainer: &Trainer, row: &Example) -> Vec<Vec<f64>> {
    let o = SessionOptions::default()
        .n_ctx(64)
        .n_threads(1)
        .kv_type(KvType::F32)
        .flash_attention(FlashAttention::Off);
    let mut session = Session::new(&fixture.model, &o).unwrap();
    let adapter = trainer.latest().unwrap();
    session.attach(&adapter, ExistingText::Drop).unwrap();
    let mut rows = Vec::new();
    let ids: Vec<i32> = row.ids().collect();
    session
        .feed_with_logits(&ids, |_, row| {
            rows.push(row.iter().map(|&x| f64::from(x)).collect());
        })
        .unwrap();
    rows
}

#[test]
fn smoothed_labels_as_the_formula_says() {
    const SMOOTHING: f32 = 0.3;
    let fixture = Fixture::new(Variant::Gemma2);
    for method in METHODS {
        let mut o = options(method);
        o.label_smoothing = SMOOTHING;
        let row = example(5, 4, 12);
        let mut trainer = fixture.trainer(o, std::slice::from_ref(&row));
        let logits = logits(&fixture, &trainer, &row);
        let counted = row.then.iter().zip(row.given.len()..).filter(|(t, _)| t.1);
        let losses: Vec<f64> = counted
            .map(|(&(id, _), at)| {
                let x = &logits[at - 1];
                let log_sum = x.iter().map(|x| x.exp()).sum::<f64>().ln();
                let mean = x.iter().sum::<f64>() / x.len() as f64;
                let s = f64::from(SMOOTHING);
                log_sum - (1.0 - s) * x[id as usize] - s * mean
            })
            .collect();
        let expected = losses.iter().sum::<f64>() / losses.len() as f64;
        let (loss, _) = gradient(&mut trainer, std::slice::from_ref(&row));
        assert!(
            (loss - expected).abs() < 1e-4 * expected,
            "{method}: {loss} instead of {expected}"
        );
    }
}

#[test]
fn the_validation_loss_is_not_smoothed() {
    let fixture = Fixture::new(Variant::Llama);
    let loss = |smoothing: f32| {
        let mut o = options(AdapterKind::Prefix);
        o.label_smoothing = smoothing;
        let row = vec![example(5, 4, 12)];
        let mut trainer = Trainer::new(&fixture.model, o, row.clone(), row).unwrap();
        trainer.valid_loss().unwrap().unwrap()
    };
    assert_eq!(loss(0.3), loss(0.0));
}

#[test]
fn a_cancelled_step_changes_nothing() {
    let fixture = Fixture::new(Variant::Llama);
    for method in METHODS {
        let mut o = options(method);
        o.dropout = 0.2;
        o.batch = 3;
        let [mut plain, mut cancelled] =
            [o.clone(), o].map(|o| fixture.trainer(o, &[batch(), batch()].concat()));
        let token = cancelled.cancel_token();
        for _ in 0..4 {
            token.cancel();
            let before = bits(&values(&cancelled));
            let stopped = cancelled.step().unwrap_err();
            assert!(matches!(stopped, Error::Train(TrainError::Cancelled)));
            let stopped = cancelled.gradient(&batch()).unwrap_err();
            assert!(matches!(stopped, Error::Train(TrainError::Cancelled)));
            assert_eq!(bits(&values(&cancelled)), before);
            token.reset();
            let (a, b) = (
                plain.step().unwrap().unwrap(),
                cancelled.step().unwrap().unwrap(),
            );
            assert_eq!((a.step, a.loss.to_bits()), (b.step, b.loss.to_bits()));
            assert_eq!(a.grad_norm.to_bits(), b.grad_norm.to_bits());
            assert_eq!(bits(&values(&plain)), bits(&values(&cancelled)));
        }
    }
}

#[test]
fn a_teacher_goes_on_where_it_was() {
    // Whose kernel a product takes may depend on the number of rows that are read at a time.
    let options = ModelOptions::default().kernels(Kernels::Ggml);
    let model = Model::open(format!("{MODELS}/tinylm-q8_0.gguf"), &options).unwrap();
    let mut o = TrainOptions::new(AdapterKind::Prefix);
    o.length = Some(LENGTH);
    o.init = Some(Init::Random);
    o.batch = 2;
    o.steps = Some(2);
    o.threads = Some(1);
    o.loss = Objective::Distill {
        context: "\"Arr, me hearties!\"\n".to_owned(),
        top_k: 20,
    };
    let rows = corpus(&model);
    let trainer = |o: &TrainOptions| {
        let (train, valid) = (rows[..3].to_vec(), rows[3..].to_vec());
        Trainer::new(&model, o.clone(), train, valid).unwrap()
    };
    let [mut plain, mut stopped] = [trainer(&o), trainer(&o)];
    assert_eq!(stopped.untaught(), 4);
    // A graph for each set.
    stopped.teach().unwrap();
    assert_eq!(stopped.untaught(), 1);
    let token = stopped.cancel_token();
    token.cancel();
    for e in [
        stopped.teach().unwrap_err(),
        stopped.step().unwrap_err(),
        stopped.valid_loss().unwrap_err(),
    ] {
        assert!(matches!(e, Error::Train(TrainError::Cancelled)));
    }
    assert_eq!(stopped.untaught(), 1);
    token.reset();
    for _ in 0..2 {
        let [a, b] = [&mut plain, &mut stopped].map(|t| t.step().unwrap().unwrap());
        assert_eq!(a.loss.to_bits(), b.loss.to_bits());
        let valid = [a, b].map(|report| report.valid_loss.unwrap().to_bits());
        assert_eq!(valid[0], valid[1]);
        assert_eq!(stopped.untaught(), 0);
    }
    assert_eq!(bits(&values(&plain)), bits(&values(&stopped)));
    // There is nothing left to say.
    stopped.teach().unwrap();

    // Without memory for several rows it reads one at a time.
    o.memory = Some(0);
    let mut poor = trainer(&o);
    let left = (0..4).map(|_| {
        poor.teach().unwrap();
        poor.untaught()
    });
    assert_eq!(left.collect::<Vec<_>>(), [3, 2, 1, 0]);
    o.memory = None;
    let [rich, poor] = [trainer(&o), poor].map(|mut t| t.step().unwrap().unwrap().loss);
    assert!((rich - poor).abs() < 1e-5 * rich, "{rich} {poor}");
}

#[test]
fn a_gradient_changes_nothing() {
    let fixture = Fixture::new(Variant::Llama);
    let mut o = options(AdapterKind::PTuning);
    o.reparam = Some(Reparam::Mlp);
    o.dropout = 0.2;
    let [mut plain, mut looked] = [o.clone(), o].map(|o| fixture.trainer(o, &batch()));
    for _ in 0..3 {
        let once = gradient(&mut looked, &batch());
        let twice = gradient(&mut looked, &batch());
        assert_eq!(once.0.to_bits(), twice.0.to_bits());
        assert_eq!(bits(&once.1), bits(&twice.1));
        let (a, b) = (
            plain.step().unwrap().unwrap(),
            looked.step().unwrap().unwrap(),
        );
        assert_eq!(a.loss.to_bits(), b.loss.to_bits());
        assert_eq!(bits(&values(&plain)), bits(&values(&looked)));
    }
}

#[test]
fn rows_are_cut_at_the_longest_length() {
    const MAX: usize = 20;
    let fixture = Fixture::new(Variant::Llama);
    // Virtual tokens count too, wherever they are.
    let cut = |row: &Example| {
        let mut row = row.clone();
        row.then.truncate(MAX - LENGTH - row.given.len());
        row
    };
    for method in METHODS {
        let mut o = options(method);
        o.max_len = Some(MAX);
        let rows = [example(1, 4, 30), example(2, 10, 5), example(3, 10, 6)];
        let mut limited = fixture.trainer(o, &rows);
        assert_eq!(limited.summary().cut_rows, 2, "{method}");
        let mut free = fixture.trainer(options(method), &rows);
        let found = gradient(&mut limited, &rows);
        let expected = gradient(&mut free, &rows.each_ref().map(cut));
        assert_eq!(found.0.to_bits(), expected.0.to_bits(), "{method}");
        assert_eq!(bits(&found.1), bits(&expected.1), "{method}");
    }
}
