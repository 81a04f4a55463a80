//! Runs that cannot begin.

use crate::{Fixture, LENGTH, batch, example, options};
use ggraft::Error;
use ggraft::adapter::{AdapterKind, Template};
use ggraft::train::data::Example;
use ggraft::train::{Init, Objective, Reparam, StateError, TrainError, TrainOptions, Trainer};
use ggraft_testkit::fixture::Variant;

fn refused(
    fixture: &Fixture,
    options: TrainOptions,
    train: Vec<Example>,
    valid: Vec<Example>,
) -> TrainError {
    match Trainer::new(&fixture.model, options, train, valid) {
        Err(Error::Train(e)) => e,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("nothing was refused"),
    }
}

fn distill(top_k: usize) -> Objective {
    Objective::Distill {
        context: "a".to_owned(),
        top_k,
    }
}

#[test]
fn options_out_of_range() {
    type Change = fn(&mut TrainOptions);
    let fixture = Fixture::new(Variant::Llama);
    let cases: &[(&str, Change)] = &[
        ("batch", |o| o.batch = 0),
        ("accum", |o| o.accum = 0),
        ("steps", |o| o.steps = Some(0)),
        ("epochs", |o| o.epochs = Some(0.0)),
        ("epochs", |o| o.epochs = Some(f64::NAN)),
        ("learning rate", |o| o.lr = Some(0.0)),
        ("learning rate", |o| o.lr = Some(-1.0)),
        ("learning rate", |o| o.lr = Some(f64::INFINITY)),
        ("weight decay", |o| o.weight_decay = Some(-0.1)),
        ("weight decay", |o| o.weight_decay = Some(f64::NAN)),
        ("clip", |o| o.clip = -1.0),
        ("clip", |o| o.clip = f64::NAN),
        ("label smoothing", |o| o.label_smoothing = 1.0),
        ("label smoothing", |o| o.label_smoothing = -0.1),
        ("label smoothing", |o| o.label_smoothing = f32::NAN),
        ("dropout", |o| o.dropout = 1.0),
        ("dropout", |o| o.dropout = -0.1),
        ("evaluation interval", |o| o.eval_every = Some(0)),
        ("patience", |o| o.patience = Some(0)),
        ("hidden width", |o| o.hidden = Some(0)),
        ("LSTM layers", |o| o.lstm_layers = 0),
        ("threads", |o| o.threads = Some(0)),
        ("top k", |o| o.loss = distill(0)),
        ("length", |o| o.length = Some(0)),
        ("length", |o| o.length = Some(65_537)),
        ("length", |o| {
            o.method = AdapterKind::PTuning;
            o.template = Some(Template::parse("{v:3}{prompt}").unwrap());
        }),
        ("number of frozen rows", |o| o.freeze_first = LENGTH),
    ];
    for (name, change) in cases {
        let mut o = options(AdapterKind::Prefix);
        change(&mut o);
        match refused(&fixture, o, batch(), Vec::new()) {
            TrainError::Option { option, .. } => assert_eq!(option, *name),
            other => panic!("{name}: {other}"),
        }
    }
}

#[test]
fn options_that_exclude_each_other() {
    use AdapterKind::{PTuning, Prefix, Prompt};
    type Change = fn(&mut TrainOptions);
    let fixture = Fixture::new(Variant::Llama);
    let template = |o: &mut TrainOptions| {
        o.template = Some(Template::parse("{v:5}{prompt}").unwrap());
    };
    let cases: &[(AdapterKind, &str, &str, Change)] = &[
        (Prompt, "an encoder", "method prompt", |o| {
            o.reparam = Some(Reparam::Mlp);
        }),
        (Prompt, "an encoder", "method prompt", |o| {
            o.reparam = Some(Reparam::Lstm);
        }),
        (Prefix, "an LSTM", "method prefix", |o| {
            o.reparam = Some(Reparam::Lstm);
        }),
        (Prefix, "a template", "method prefix", template),
        (Prompt, "a template", "method prompt", template),
        (Prompt, "frozen rows", "method prompt", |o| {
            o.freeze_first = 1
        }),
        (PTuning, "frozen rows", "method p_tuning", |o| {
            o.freeze_first = 1
        }),
        (Prefix, "frozen rows", "an encoder", |o| {
            o.freeze_first = 1;
            o.reparam = Some(Reparam::Mlp);
        }),
        (
            Prefix,
            "initial rows from the vocabulary",
            "method prefix",
            |o| {
                o.init = Some(Init::Vocab);
            },
        ),
        (
            Prompt,
            "initial rows at the mean key",
            "method prompt",
            |o| {
                o.init = Some(Init::Mean);
            },
        ),
        (PTuning, "initial zeros", "an encoder", |o| {
            o.init = Some(Init::Zeros);
            o.reparam = Some(Reparam::Mlp);
        }),
    ];
    for &(method, one, other, change) in cases {
        let mut o = options(method);
        change(&mut o);
        match refused(&fixture, o, batch(), Vec::new()) {
            TrainError::Conflict { first, second, .. } => {
                assert_eq!((first.as_str(), second.as_str()), (one, other));
            }
            e => panic!("{one}, {other}: {e}"),
        }
    }
}

#[test]
fn tokens_out_of_range() {
    let fixture = Fixture::new(Variant::Llama);
    let n_vocab = fixture.model.shape().n_vocab;
    for wrong in [-1, n_vocab as i32, i32::MAX] {
        for (i, set) in ["training set", "validation set"].into_iter().enumerate() {
            for given in [true, false] {
                let mut sets = [batch(), batch()];
                if given {
                    sets[i][2].given[1] = wrong;
                } else {
                    sets[i][2].then[1].0 = wrong;
                }
                let [train, valid] = sets;
                match refused(&fixture, options(AdapterKind::Prompt), train, valid) {
                    TrainError::Token {
                        set: s,
                        row,
                        token,
                        n_vocab: v,
                    } => assert_eq!((s, row, token, v), (set, 3, wrong, n_vocab)),
                    e => panic!("{wrong}: {e}"),
                }
            }
        }
    }
}

#[test]
fn nothing_to_learn() {
    let fixture = Fixture::new(Variant::Llama);
    let mut silent = batch();
    for row in &mut silent {
        row.then.iter_mut().for_each(|t| t.1 = false);
    }
    let o = || options(AdapterKind::Prompt);
    for (set, train, valid) in [
        ("training set", silent.clone(), Vec::new()),
        ("validation set", batch(), silent),
    ] {
        match refused(&fixture, o(), train, valid) {
            TrainError::NothingToLearn {
                set: s, max_len, ..
            } => {
                assert_eq!((s, max_len), (set, fixture.model.n_ctx_train()));
            }
            e => panic!("{e}"),
        }
    }
    // All that counts lies behind the cut.
    let mut o = o();
    o.max_len = Some(LENGTH + 3);
    let found = refused(&fixture, o.clone(), vec![example(1, 6, 5)], Vec::new());
    assert!(matches!(
        found,
        TrainError::NothingToLearn { max_len: 8, .. }
    ));
    // Virtual tokens alone are no rows.
    o.max_len = Some(LENGTH);
    let found = refused(&fixture, o, batch(), Vec::new());
    assert!(matches!(
        found,
        TrainError::Option {
            option: "longest row",
            ..
        }
    ));
}

#[test]
fn a_start_from_something_else() {
    let fixture = Fixture::new(Variant::Llama);
    let mut trained = fixture.trainer(options(AdapterKind::Prefix), &batch());
    trained.step().unwrap();
    let adapter = trained.adapter().unwrap();
    let from = |method, length| {
        let mut o = options(method);
        o.init = Some(Init::Adapter(adapter.clone()));
        o.length = Some(length);
        refused(&fixture, o, batch(), Vec::new())
    };
    for found in [
        from(AdapterKind::Prompt, LENGTH),
        from(AdapterKind::Prefix, LENGTH + 1),
    ] {
        assert!(matches!(found, TrainError::InitAdapter { .. }), "{found}");
    }
    let mut o = options(AdapterKind::Prompt);
    o.init = Some(Init::Text(String::new()));
    let found = refused(&fixture, o, batch(), Vec::new());
    assert!(matches!(found, TrainError::EmptyInit), "{found}");
    // An adapter of another base.
    let other = Fixture::new(Variant::Qwen3);
    let mut o = options(AdapterKind::Prefix);
    o.init = Some(Init::Adapter(adapter));
    let found = Trainer::new(&other.model, o, batch(), Vec::new());
    assert!(matches!(found.err(), Some(Error::Adapter(_))));
}

#[test]
fn parameters_that_are_not_there() {
    let fixture = Fixture::new(Variant::Llama);
    let mut trainer = fixture.trainer(options(AdapterKind::Prompt), &batch());
    let found = trainer.set_parameter("transform.0.weight", &[0.0]);
    assert!(matches!(
        found,
        Err(TrainError::State(StateError::Unexpected { tensor })) if tensor == "transform.0.weight"
    ));
    let found = trainer.set_parameter("prompt_embeddings", &[0.0; 3]);
    assert!(matches!(
        found,
        Err(TrainError::State(StateError::Shape { got, .. })) if got == [3]
    ));
}

#[test]
fn nothing_at_all() {
    let fixture = Fixture::new(Variant::Gpt2);
    for init in [Init::Random, Init::Prompts, Init::Text("a".to_owned())] {
        let mut o = options(AdapterKind::Prefix);
        o.init = Some(init);
        let found = refused(&fixture, o.clone(), Vec::new(), Vec::new());
        assert!(matches!(
            found,
            TrainError::NothingToLearn {
                set: "training set",
                ..
            }
        ));
        // More than the model has positions for.
        o.length = Some(300);
        let found = refused(&fixture, o, batch(), Vec::new());
        assert!(matches!(
            found,
            TrainError::Option {
                option: "length",
                ..
            }
        ));
    }
}

#[test]
fn a_context_that_the_model_cannot_read() {
    let fixture = Fixture::new(Variant::Gpt2);
    let n_ctx = fixture.model.n_ctx_train();
    let o = |context: usize| {
        let mut o = options(AdapterKind::Prompt);
        o.loss = Objective::Distill {
            context: "a".repeat(context),
            top_k: 4,
        };
        o
    };
    match refused(&fixture, o(n_ctx), batch(), Vec::new()) {
        TrainError::Option { option, value, .. } => {
            assert_eq!(option, "context to distill");
            assert_eq!(value, format!("{n_ctx} tokens long"));
        }
        e => panic!("{e}"),
    }
    // Rows that are too long are cut for both.
    let mut short = o(n_ctx - 40);
    short.max_len = Some(40);
    let mut trainer = fixture.trainer(short, &[example(1, 10, 2 * n_ctx)]);
    trainer.step().unwrap().unwrap();
    assert_eq!(trainer.summary().cut_rows, 1);
}
