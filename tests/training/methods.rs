//! What is trained and towards what: every method, encoder and start; distillation; runs that fail.

use crate::{Fixture, LENGTH, METHODS, MODELS, batch, corpus, example, model, options, values};
use ggraft::adapter::{Adapter, AdapterKind, Payload, Precision, Template};
use ggraft::infer::{ExistingText, FlashAttention, KvType};
use ggraft::train::data::Example;
use ggraft::train::{
    Finish, Init, Objective, OptimizerKind, Reparam, Schedule, TrainError, TrainOptions, Trainer,
};
use ggraft::{Error, Kernels, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::fixture::{Variant, expert_variants};

fn loss(trainer: &mut Trainer, rows: &[Example]) -> f64 {
    trainer.gradient(rows).unwrap().0
}

/// Every method with every encoder that it can have.
const ENCODERS: [(AdapterKind, Reparam); 6] = [
    (AdapterKind::Prefix, Reparam::None),
    (AdapterKind::Prefix, Reparam::Mlp),
    (AdapterKind::Prompt, Reparam::None),
    (AdapterKind::PTuning, Reparam::None),
    (AdapterKind::PTuning, Reparam::Mlp),
    (AdapterKind::PTuning, Reparam::Lstm),
];

/// All values of an adapter.
fn rows_of(adapter: &Adapter) -> Vec<f32> {
    match adapter.payload() {
        Payload::VirtualTokens(rows) => rows.to_f32(),
        Payload::Prefix { layers } => {
            let pairs = layers.iter().flat_map(|l| [&l.k, &l.v]);
            pairs.flat_map(|rows| rows.to_f32()).collect()
        }
    }
}

/// Five steps with everything that is not given left at its default.
fn five_steps(model: &Model, mut o: TrainOptions) -> (f64, f64, Adapter) {
    let rows = corpus(model)[2..3].to_vec();
    o.batch = rows.len();
    o.steps = Some(5);
    o.threads = Some(1);
    o.length = Some(LENGTH);
    let mut trainer = Trainer::new(model, o, rows.clone(), Vec::new()).unwrap();
    let before = loss(&mut trainer, &rows);
    while trainer.step().unwrap().is_some() {}
    assert_eq!(trainer.finished(), Some(Finish::Steps));
    let after = loss(&mut trainer, &rows);
    (before, after, trainer.adapter().unwrap())
}

#[test]
fn every_method_encoder_and_start_learns() {
    use AdapterKind::Prefix;
    // Rounding of trained rows becomes steps of quantized activations, which are 64 times smaller in our own kernels than in ggml's.
    let own = ModelOptions::default().kernels(Kernels::Own);
    let model = Model::open(format!("{MODELS}/tinylm-q8_0.gguf"), &own).unwrap();
    let mut n = 0;
    for (method, reparam) in ENCODERS {
        let with = |init: Init| {
            let mut o = TrainOptions::new(method);
            o.reparam = Some(reparam);
            o.init = Some(init);
            o
        };
        let mut inits = vec![
            Init::Random,
            Init::Text("\"Arr, me hearties!\"".to_owned()),
            Init::Prompts,
        ];
        if reparam == Reparam::None {
            inits.push(Init::Zeros);
        }
        inits.push(if method == Prefix {
            Init::Mean
        } else {
            Init::Vocab
        });
        let mut last = None;
        for init in inits {
            let what = format!("{method}, {reparam:?}, {init:?}");
            let (before, after, adapter) = five_steps(&model, with(init));
            assert!(after < before, "{what}: {before} -> {after}");
            assert_eq!((adapter.kind(), adapter.length()), (method, LENGTH));
            last = Some((after, adapter));
            n += 1;
        }
        // A trained adapter goes on where it was; little is left to learn.
        let (ended, adapter) = last.expect("several starts");
        let trained = rows_of(&adapter);
        let mut o = with(Init::Adapter(adapter));
        o.lr = Some(0.1 * o.default_lr());
        o.length = Some(LENGTH);
        let rows = corpus(&model)[2..3].to_vec();
        let start = Trainer::new(&model, o.clone(), rows, Vec::new()).unwrap();
        // An encoder reaches the rows up to rounding.
        for (got, want) in rows_of(&start.adapter().unwrap()).iter().zip(&trained) {
            assert!(
                (got - want).abs() <= 1e-6 * (1.0 + want.abs()),
                "{got} {want}"
            );
        }
        let (before, after, _) = five_steps(&model, o);
        assert!((before - ended).abs() < 2e-3 * ended, "{before} {ended}");
        assert!(after < before, "{method}, {reparam:?}: {before} -> {after}");
        n += 1;
    }
    assert_eq!(n, 6 + 5 + 6 + 6 + 5 + 5);
}

/// The mean loss of a row's targets in a session under `adapter`.
fn loss_in_a_session(model: &Model, adapter: &Adapter, row: &Example) -> f64 {
    let session = SessionOptions::default()
        .n_ctx(64)
        .n_threads(1)
        .kv_type(KvType::F32)
        .flash_attention(FlashAttention::Off);
    let mut session = Session::new(model, &session).unwrap();
    session.attach(adapter, ExistingText::Drop).unwrap();
    let mut ids = row.given.clone();
    ids.extend(row.then.iter().map(|t| t.0));
    let mut logits = Vec::new();
    session
        .feed_with_logits(&ids, |_, l| logits.push(l.to_vec()))
        .unwrap();
    let mut losses = Vec::new();
    for (i, &(id, counts)) in row.then.iter().enumerate() {
        if counts {
            let l = &logits[row.given.len() + i - 1];
            let sum: f64 = l.iter().map(|&x| f64::from(x).exp()).sum();
            losses.push(sum.ln() - f64::from(l[id as usize]));
        }
    }
    losses.iter().sum::<f64>() / losses.len() as f64
}

/// Adapters of mixtures of experts learn, and a session makes of them what training did.
#[test]
fn adapters_of_mixtures_of_experts_learn() {
    let mut n = 0;
    for variant in expert_variants() {
        let fixture = Fixture::new(variant);
        for method in METHODS {
            let mut trainer = fixture.trainer(options(method), &batch());
            let before = loss(&mut trainer, &batch());
            for _ in 0..5 {
                trainer.step().unwrap().unwrap();
            }
            let after = loss(&mut trainer, &batch());
            let what = format!("{} {method}", variant.name());
            assert!(after < before, "{what}: {before} -> {after}");
            let file = trainer.adapter().unwrap().to_gguf(Precision::F32);
            let adapter = Adapter::from_gguf(&file).unwrap();
            let row = &batch()[0];
            let one = loss(&mut trainer, std::slice::from_ref(row));
            let mean = loss_in_a_session(&fixture.model, &adapter, row);
            assert!((mean - one).abs() < 1e-5 * one, "{what}: {mean} {one}");
            n += 1;
        }
    }
    assert!(n >= 12, "{n}");
}

/// Rows of each layer are as wide as its heads, wherever they come from, and a session makes of them what training did.
#[test]
fn prefixes_of_uneven_layers_start_anywhere() {
    let fixture = Fixture::new(Variant::Deci);
    let shape = fixture.model.shape();
    assert_eq!(shape.n_head_kv.uniform(), None);
    for init in [
        Init::Random,
        Init::Zeros,
        Init::Prompts,
        Init::Text("Yes".to_owned()),
        Init::Mean,
    ] {
        let mut o = options(AdapterKind::Prefix);
        o.init = Some(init.clone());
        let mut trainer = fixture.trainer(o, &batch());
        let before = loss(&mut trainer, &batch());
        for _ in 0..5 {
            trainer.step().unwrap().unwrap();
        }
        let after = loss(&mut trainer, &batch());
        assert!(after < before, "{init:?}: {before} -> {after}");
        let file = trainer.adapter().unwrap().to_gguf(Precision::F32);
        let adapter = Adapter::from_gguf(&file).unwrap();
        let Payload::Prefix { layers } = adapter.payload() else {
            panic!("a prefix")
        };
        for (il, layer) in layers.iter().enumerate() {
            assert_eq!(layer.k.width(), shape.kv_width(il));
        }

        let row = &batch()[0];
        let one = loss(&mut trainer, std::slice::from_ref(row));
        let mean = loss_in_a_session(&fixture.model, &adapter, row);
        assert!((mean - one).abs() < 1e-5 * one, "{init:?}: {mean} {one}");
    }
}

#[test]
fn every_optimizer_and_schedule_learns() {
    let model = model("tinylm-q8_0");
    for optimizer in [
        OptimizerKind::AdamW,
        OptimizerKind::Adafactor,
        OptimizerKind::Sgd,
    ] {
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            let mut o = TrainOptions::new(AdapterKind::Prompt);
            o.optimizer = optimizer;
            o.schedule = schedule;
            let (before, after, _) = five_steps(&model, o);
            assert!(
                after < before,
                "{optimizer:?} {schedule:?}: {before} -> {after}"
            );
        }
    }
}

#[test]
fn a_template_places_virtual_tokens() {
    let model = model("tinylm-q8_0");
    let mut o = TrainOptions::new(AdapterKind::PTuning);
    o.template = Some(Template::parse("{v:2}{prompt}Pirate: {v:3}").unwrap());
    let (before, after, adapter) = five_steps(&model, o.clone());
    assert!(after < before, "{before} -> {after}");
    assert_eq!(adapter.template(), o.template.as_ref());
    // In front of the whole text is where they stand without a template.
    let fixture = Fixture::new(Variant::Llama);
    let mut front = options(AdapterKind::PTuning);
    front.template = Some(Template::parse("{v:5}{prompt}").unwrap());
    let mut prompt = fixture.trainer(options(AdapterKind::Prompt), &batch());
    let mut front = fixture.trainer(front, &batch());
    assert_eq!(values(&prompt), values(&front));
    let (a, b) = (prompt.gradient(&batch()), front.gradient(&batch()));
    assert_eq!(a.unwrap(), b.unwrap());
}

/// Rows that a teacher reads behind a context.
fn questions() -> Vec<Example> {
    (1..5).map(|i| example(i, 3, 6)).collect()
}

#[test]
fn an_adapter_that_stands_for_the_context_has_nothing_to_distill() {
    // Bytes, and the fixtures' BOS, which the base's own text begins with only if it is named.
    const CONTEXT: &str = "Yes";
    let fixture = Fixture::new(Variant::Gemma2);
    for method in METHODS {
        let distilled = |init: Init| {
            let mut o = options(method);
            o.length = Some(CONTEXT.len());
            o.init = Some(init);
            o.loss = Objective::Distill {
                context: CONTEXT.to_owned(),
                top_k: fixture.model.shape().n_vocab,
            };
            let mut trainer = fixture.trainer(o, &questions());
            let report = trainer.step().unwrap().unwrap();
            (report.loss, report.grad_norm)
        };
        let (same, at_rest) = distilled(Init::Text(CONTEXT.to_owned()));
        let (other, moving) = distilled(Init::Random);
        // What remains is the entropy of the teacher's predictions.
        assert!(same < other, "{method}: {same} {other}");
        assert!(
            at_rest < 1e-4 * moving,
            "{method}: gradient {at_rest} at the teacher's predictions, {moving} elsewhere"
        );
    }
}

#[test]
fn distillation_learns_what_the_context_does() {
    let model = model("tinylm-q8_0");
    for (method, top_k, context) in [
        (AdapterKind::Prefix, 20, "\"Arr, me hearties!\"\n"),
        (AdapterKind::Prompt, 1, "\"Arr, me hearties!\"\n"),
        (AdapterKind::Prefix, 3072, ""),
    ] {
        let rows = corpus(&model)[..2].to_vec();
        let mut o = TrainOptions::new(method);
        o.length = Some(LENGTH);
        o.init = Some(Init::Random);
        o.batch = rows.len();
        o.steps = Some(8);
        o.schedule = Schedule::Constant;
        o.threads = Some(1);
        o.loss = Objective::Distill {
            context: context.to_owned(),
            top_k,
        };
        let mut trainer = Trainer::new(&model, o, rows, Vec::new()).unwrap();
        let losses: Vec<f64> = trainer.reports().map(|r| r.unwrap().loss).collect();
        assert!(
            losses[7] < losses[0],
            "{method}, {top_k}, {context:?}: {losses:?}"
        );
    }
}

#[test]
fn a_run_that_diverges_keeps_its_last_good_rows() {
    let fixture = Fixture::new(Variant::Llama);
    for method in METHODS {
        let mut o = options(method);
        // Beyond F32. With 1e30 the norms of the base still make a finite loss of whatever rows.
        o.lr = Some(1e39);
        let mut trainer = fixture.trainer(o, &batch());
        let mut taken = 0;
        let stopped = loop {
            match trainer.step() {
                Ok(report) => assert!(report.is_some()),
                Err(e) => break e,
            }
            taken += 1;
        };
        assert!(
            matches!(stopped, Error::Train(TrainError::NonFinite { step, .. }) if step == taken + 1),
            "{method}: {stopped}"
        );
        assert!(trainer.step().unwrap().is_none());
        assert!(trainer.reports().next().is_none());
        let adapter = trainer.adapter().unwrap();
        let file = adapter.to_gguf(Precision::F32);
        let again = Adapter::from_gguf(&file).unwrap();
        let finite = |values: Vec<f32>| values.iter().all(|x| x.is_finite());
        assert!(match again.payload() {
            Payload::VirtualTokens(rows) => finite(rows.to_f32()),
            Payload::Prefix { layers } => layers
                .iter()
                .all(|l| finite(l.k.to_f32()) && finite(l.v.to_f32())),
        });
    }
}

/// On a base that does not round its activations the loss goes on where it was, through every encoder.
#[test]
fn a_trained_adapter_goes_on_where_it_was() {
    // The second one's layers differ in their heads.
    let fixtures = [Variant::Llama, Variant::Deci].map(Fixture::new);
    for (fixture, (method, reparam)) in fixtures.iter().flat_map(|f| ENCODERS.map(|e| (f, e))) {
        let mut o = options(method);
        o.reparam = Some(reparam);
        o.steps = Some(5);
        let mut first = fixture.trainer(o.clone(), &batch());
        while first.step().unwrap().is_some() {}
        let ended = loss(&mut first, &batch());
        o.init = Some(Init::Adapter(first.adapter().unwrap()));
        let again = loss(&mut fixture.trainer(o, &batch()), &batch());
        assert!(
            (again - ended).abs() < 1e-6 * ended,
            "{method}, {reparam:?}: {ended} -> {again}"
        );
    }
}

/// What pulls at the rows when nothing is said: by method, encoder and passes over the data.
#[test]
fn default_weight_decays() {
    let model = model("tinylm-q8_0");
    let rows = corpus(&model)[..2].to_vec();
    // Each step reads both rows twice.
    let ended = |method, reparam, steps, loss: &Objective, weight_decay| {
        let mut o = TrainOptions::new(method);
        (o.length, o.threads, o.reparam, o.batch) = (Some(2), Some(1), Some(reparam), 4);
        (o.steps, o.loss, o.lr, o.weight_decay) =
            (Some(steps), loss.clone(), Some(0.1), weight_decay);
        let mut trainer = Trainer::new(&model, o, rows.clone(), Vec::new()).unwrap();
        while trainer.step().unwrap().is_some() {}
        rows_of(&trainer.adapter().unwrap())
    };
    let plain = Objective::Completion;
    let distill = Objective::Distill {
        context: "Arr, matey!".to_owned(),
        top_k: 4,
    };
    let (prefix, prompt, p_tuning) = (
        AdapterKind::Prefix,
        AdapterKind::Prompt,
        AdapterKind::PTuning,
    );
    for (method, reparam, steps, loss, expected) in [
        (prefix, Reparam::None, 3, &plain, 0.0),
        (prefix, Reparam::None, 4, &plain, 0.1),
        (prefix, Reparam::None, 4, &distill, 0.0),
        (prefix, Reparam::Mlp, 3, &plain, 0.2),
        (prefix, Reparam::Mlp, 4, &plain, 0.2),
        (prompt, Reparam::None, 3, &plain, 0.0),
        (prompt, Reparam::None, 4, &plain, 0.3),
        (p_tuning, Reparam::None, 4, &plain, 0.3),
        (p_tuning, Reparam::Mlp, 4, &plain, 0.0),
    ] {
        let of = |decay| ended(method, reparam, steps, loss, decay);
        assert_eq!(
            of(None),
            of(Some(expected)),
            "{method}, {reparam:?}, {steps} steps"
        );
    }
    assert_ne!(
        ended(prefix, Reparam::None, 4, &plain, Some(0.1)),
        ended(prefix, Reparam::None, 4, &plain, Some(0.0))
    );
    // However slowly the rows of a prefix are trained, nothing keeps them small.
    assert_eq!(
        TrainOptions::new(prefix).default_weight_decay(1e-3, 8.0),
        0.1
    );
}

/// Where a prefix starts that is not told.
#[test]
fn default_starts_of_prefixes() {
    let model = model("tinylm-q8_0");
    // 300 steps of 8 rows read 300 rows 8 times.
    let rows: Vec<_> = corpus(&model)[..2]
        .iter()
        .cycle()
        .take(301)
        .cloned()
        .collect();
    let start_with = |n: usize, change: &dyn Fn(&mut TrainOptions)| {
        let mut o = TrainOptions::new(AdapterKind::Prefix);
        (o.length, o.threads) = (Some(LENGTH), Some(1));
        change(&mut o);
        let trainer = Trainer::new(&model, o, rows[..n].to_vec(), Vec::new()).unwrap();
        rows_of(&trainer.adapter().unwrap())
    };
    let start = |change: &dyn Fn(&mut TrainOptions)| start_with(rows.len(), change);
    let from = |init: Init| start(&|o| o.init = Some(init.clone()));
    let (mean, prompts, random) = (from(Init::Mean), from(Init::Prompts), from(Init::Random));
    assert_ne!(mean, prompts);
    assert_eq!(start(&|_| ()), mean);
    assert_eq!(start(&|o| o.steps = Some(300)), mean);
    assert_eq!(start(&|o| o.steps = Some(299)), prompts);
    assert_eq!(start(&|o| o.epochs = Some(2.0)), prompts);
    assert_eq!(start_with(300, &|_| ()), random);
    assert_eq!(start_with(2, &|o| o.steps = Some(299)), prompts);
    assert_eq!(start(&|o| o.freeze_first = 1), prompts);
    let distill = |context: &str| {
        let context = context.to_owned();
        start(&|o| {
            o.loss = Objective::Distill {
                context: context.clone(),
                top_k: 4,
            }
        })
    };
    assert_eq!(
        distill("Arr, matey!"),
        from(Init::Text("Arr, matey!".to_owned()))
    );
    assert_eq!(distill(""), mean);
}

#[test]
fn mean_start_is_the_mean_key_and_next_to_no_value() {
    let model = model("tinylm-q8_0");
    let row = corpus(&model).remove(1);
    let start = |init: Init, length: usize, seed: u64| {
        let mut o = TrainOptions::new(AdapterKind::Prefix);
        (o.init, o.length, o.seed, o.threads) = (Some(init), Some(length), seed, Some(1));
        let trainer = Trainer::new(&model, o, vec![row.clone()], Vec::new()).unwrap();
        trainer.adapter().unwrap()
    };
    // What the base computes for the row, after its first token, the BOS.
    let tokens = 1 + row.given.len();
    let read = start(Init::Prompts, tokens, 1);
    let mean = start(Init::Mean, 400, 1);
    assert_eq!(rows_of(&mean), rows_of(&start(Init::Mean, 400, 1)));
    assert_ne!(rows_of(&mean), rows_of(&start(Init::Mean, 400, 2)));
    let (Payload::Prefix { layers: read }, Payload::Prefix { layers: mean }) =
        (read.payload(), mean.payload())
    else {
        panic!("two prefixes");
    };
    let column_means = |rows: &[f32], n: usize| -> Vec<f64> {
        let width = rows.len() / n;
        let mean = |c| {
            let column = rows.iter().skip(c).step_by(width);
            column.map(|&x| f64::from(x)).sum::<f64>() / n as f64
        };
        (0..width).map(mean).collect()
    };
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    for (read, mean) in read.iter().zip(mean) {
        let width = read.k.width();
        let behind_bos = |rows: Vec<f32>| column_means(&rows[width..], tokens - 1);
        let (k, v) = (behind_bos(read.k.to_f32()), behind_bos(read.v.to_f32()));
        let (got_k, got_v) = (mean.k.to_f32(), mean.v.to_f32());
        let (mean_k, mean_v) = (column_means(&got_k, 400), column_means(&got_v, 400));
        // The completion counts as well, and 400 rows of noise do not quite cancel out.
        let dot: f64 = k.iter().zip(&mean_k).map(|(a, b)| a * b).sum();
        assert!(dot > 0.9 * norm(&k) * norm(&mean_k));
        assert!(norm(&mean_v) < 0.05 * norm(&v));
        assert!(got_k[..width] != got_k[width..2 * width]);
        assert!(got_v.iter().any(|&x| x != 0.0));
    }
}

#[test]
fn a_run_with_dropout_that_fails_keeps_what_it_learned() {
    let fixture = Fixture::new(Variant::Llama);
    let mut o = options(AdapterKind::Prompt);
    o.dropout = 0.1;
    let mut trainer = fixture.trainer(o, &batch());
    let start = rows_of(&trainer.adapter().unwrap());
    trainer.step().unwrap();
    let learned = rows_of(&trainer.adapter().unwrap());
    assert_ne!(learned, start);
    trainer.step().unwrap();
    let [(name, (_, values))] = Vec::from_iter(trainer.parameters()).try_into().unwrap();
    trainer
        .set_parameter(&name, &vec![f32::NAN; values.len()])
        .unwrap();
    assert!(trainer.step().is_err());
    assert_eq!(trainer.finished(), Some(Finish::Failed));
    // The rows of the last finite loss, before its step and whole.
    assert_eq!(rows_of(&trainer.adapter().unwrap()), learned);
}

#[test]
fn the_best_step_is_kept_and_patience_ends_the_run() {
    let fixture = Fixture::new(Variant::Llama);
    let mut o = options(AdapterKind::Prefix);
    o.lr = Some(0.1);
    o.eval_every = Some(2);
    o.patience = Some(3);
    o.steps = Some(1000);
    // Random text cannot be predicted: what is learned of one half makes the other worse.
    let mut trainer = Trainer::new(&fixture.model, o, batch(), vec![example(20, 5, 20)]).unwrap();
    let reports: Vec<_> = trainer.reports().map(Result::unwrap).collect();
    assert_eq!(trainer.finished(), Some(Finish::EarlyStop));
    let evaluated: Vec<_> = reports.iter().filter(|r| r.valid_loss.is_some()).collect();
    assert!(evaluated.iter().all(|r| r.step % 2 == 0));
    let best = evaluated.iter().rev().find(|r| r.best).unwrap();
    let lowest = evaluated
        .iter()
        .filter_map(|r| r.valid_loss)
        .fold(f64::INFINITY, f64::min);
    assert_eq!(best.valid_loss, Some(lowest));
    assert_eq!(reports.len() as u64, best.step + 2 * 3);
    let summary = trainer.summary();
    assert_eq!(summary.best_step, Some(best.step));
    assert_eq!(summary.best_valid_loss, best.valid_loss);
    // The rows of that step, not the last ones.
    let mut o = options(AdapterKind::Prefix);
    o.init = Some(Init::Adapter(trainer.adapter().unwrap()));
    let mut again = Trainer::new(&fixture.model, o, batch(), vec![example(20, 5, 20)]).unwrap();
    let found = again.valid_loss().unwrap().unwrap();
    assert!((found - lowest).abs() < 1e-5 * lowest, "{found} {lowest}");
    assert_ne!(
        trainer.adapter().unwrap().to_gguf(Precision::F32),
        trainer.latest().unwrap().to_gguf(Precision::F32)
    );
}

#[test]
fn epochs_give_the_number_of_steps() {
    let fixture = Fixture::new(Variant::Llama);
    let steps = |epochs: f64, batch_size: usize| {
        let mut o = options(AdapterKind::Prompt);
        o.steps = None;
        o.epochs = Some(epochs);
        o.batch = batch_size;
        let mut trainer = fixture.trainer(o, &batch());
        let reports: Vec<_> = trainer.reports().map(Result::unwrap).collect();
        assert!(reports.iter().all(|r| r.steps == reports.len() as u64));
        reports.len()
    };
    assert_eq!(steps(2.0, 2), 4);
    assert_eq!(steps(1.5, 4), 2);
    assert_eq!(steps(0.01, 4), 1);
}
