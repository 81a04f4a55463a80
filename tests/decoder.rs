//! Models that libllama's decoder computes: the same sessions, engines and adapters, and the same texts, as with our own.

use ggraft::adapter::{AdapterKind, Parts};
use ggraft::host::HostError;
use ggraft::infer::engine::{EngineOptions, Event, Request, Scheduler};
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{
    Combine, Ensemble, ExistingText, FlashAttention, GenerateOptions, Generated, KvType,
    SessionError,
};
use ggraft::model::{Base, DecoderChoice, ModelError};
use ggraft::train::data::Dataset;
use ggraft::train::{TrainOptions, Trainer};
use ggraft::{Adapter, Error, Kernels, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::adapters;
use ggraft_testkit::bases::{Random, bases, session};
use ggraft_testkit::fixture::write_twins;
use ggraft_testkit::metrics::nmse;
use ggraft_testkit::recurrent::write_mamba;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

fn by(decoder: DecoderChoice) -> ModelOptions {
    // Logits of our own are libllama's then, bit for bit.
    let options = ModelOptions::default().kernels(Kernels::Ggml);
    options.decoder(decoder)
}

/// In which libllama's sums hardly depend on what else is in its cache.
fn options() -> SessionOptions {
    let options = SessionOptions::default().n_ctx(160).n_threads(1);
    options
        .kv_type(KvType::F32)
        .flash_attention(FlashAttention::Off)
}

fn greedy(n: usize) -> GenerateOptions {
    let mut options = GenerateOptions::default().sampler(SamplerParams::greedy());
    options.max_tokens = Some(n);
    options.ignore_eog = true;
    options
}

fn generate(session: &mut Session, n: usize) -> Generated {
    let out = session.generate(&greedy(n), |_| ControlFlow::Continue(()));
    out.unwrap()
}

fn logits(session: &mut Session) -> Vec<f32> {
    session.logits().unwrap().to_vec()
}

/// How far the logits of two sessions are apart.
#[track_caller]
fn assert_near(got: &mut Session, want: &mut Session, most: f64, what: &str) {
    assert_eq!(got.n_past(), want.n_past(), "{what}");
    let far = nmse(&logits(got), &logits(want));
    assert!(far <= most, "{what}: {far:.2e}");
}

#[test]
fn sessions_say_what_sessions_of_our_own_say() {
    let dir = tempfile::tempdir().unwrap();
    let mut compared = 0;
    for base in &bases(dir.path(), &by(DecoderChoice::Own)) {
        assert!(base.model.is_native());
        let model = Model::open(base.model.path(), &by(DecoderChoice::Llama)).unwrap();
        assert!(!model.is_native());
        assert_eq!(model.shape(), base.model.shape());
        assert_eq!(model.fingerprint(), base.model.fingerprint());
        assert_eq!(model.n_ctx_train(), base.model.n_ctx_train());
        let mut random = Random::new(5);
        for (ty, flash, most) in [
            (KvType::F32, FlashAttention::Off, 1e-6),
            // libllama sums values of F16 in F16, in the order in which they lie in its cache.
            (KvType::F16, FlashAttention::On, 1e-3),
        ] {
            let n_ctx = 160.min(model.n_ctx_train());
            let options = options().n_ctx(n_ctx).kv_type(ty).flash_attention(flash);
            // Longer than the windows of layers that have some.
            let prompt = random.tokens(&model, n_ctx - 60);
            for adapter in &base.adapters {
                let mut sessions =
                    [&model, &base.model].map(|model| session(model, &options, adapter.as_ref()));
                let [got, want] = &mut sessions;
                let what = format!(
                    "{} {ty:?} {:?}",
                    base.name,
                    adapter.as_ref().map(|a| a.kind())
                );
                for s in [&mut *got, &mut *want] {
                    s.prompt_tokens(&prompt).unwrap();
                }
                assert_near(got, want, most, &what);
                for &id in &prompt[..3] {
                    got.feed(&[id]).unwrap();
                    want.feed(&[id]).unwrap();
                }
                assert_near(got, want, most, &what);
                // Text taken back, and another end of it.
                for s in [&mut *got, &mut *want] {
                    s.truncate(prompt.len() - 7).unwrap();
                    s.feed(&prompt[..2]).unwrap();
                }
                assert_near(got, want, most, &format!("{what}, cut"));
                // The next adapter, with the text recomputed, and none.
                let other = base.adapters[1].as_ref().unwrap();
                for s in [&mut *got, &mut *want] {
                    s.swap(other, ExistingText::Recompute).unwrap();
                }
                assert_near(got, want, most, &format!("{what}, swapped"));
                for s in [&mut *got, &mut *want] {
                    s.detach(ExistingText::Recompute).unwrap();
                }
                assert_near(got, want, most, &format!("{what}, detached"));
                compared += 5;
            }
        }
    }
    assert!(compared > 1000, "{compared}");
}

/// A model that only libllama knows, one of ours with the same weights, and adapters for both.
fn foreign(dir: &Path) -> (Model, Model, Vec<(Adapter, Adapter)>) {
    let paths = write_twins(dir).unwrap();
    let known = Model::open(&paths[0], &by(DecoderChoice::Own)).unwrap();
    let foreign = Model::open(&paths[1], &by(DecoderChoice::Auto)).unwrap();
    let pairs = [
        adapters::prefix(&known, 5, 1),
        adapters::prompt(&known, 4, 2),
        adapters::p_tuning(&known, "{v:2}{bos}{prompt}{v:3}", 5, 3),
    ]
    .map(|adapter| (of(&adapter, &foreign), adapter));
    (foreign, known, pairs.into())
}

/// The same rows, for another base.
fn of(adapter: &Adapter, model: &Model) -> Adapter {
    let mut parts: Parts = adapter.parts().clone();
    parts.base.architecture = model.shape().architecture.clone();
    parts.fingerprint = Some(model.fingerprint());
    Adapter::new(parts).unwrap()
}

#[test]
fn architectures_that_we_do_not_know_run_if_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (foreign, known, adapters) = foreign(dir.path());
    assert!(!foreign.is_native() && known.is_native());
    let e = Model::open(foreign.path(), &by(DecoderChoice::Own)).unwrap_err();
    let e = e.to_string();
    assert!(e.contains("unsupported architecture 'internlm2'"), "{e}");
    // What is known is ours.
    let auto = Model::open(known.path(), &by(DecoderChoice::Auto)).unwrap();
    assert!(auto.is_native());

    let prompt = Random::new(9).tokens(&known, 40);
    for (theirs, ours) in &adapters {
        let mut got = session(&foreign, &options(), Some(theirs));
        let mut want = session(&known, &options(), Some(ours));
        got.prompt_tokens(&prompt).unwrap();
        want.prompt_tokens(&prompt).unwrap();
        assert_near(&mut got, &mut want, 1e-6, "prompt");
        assert_eq!(
            generate(&mut got, 12).tokens,
            generate(&mut want, 12).tokens
        );
        if ours.template().is_none() && ours.kind() != AdapterKind::Prefix {
            let far = nmse(
                &got.virtual_logits().unwrap(),
                &want.virtual_logits().unwrap(),
            );
            assert!(far <= 1e-6, "{far:.2e}");
        }
        // Of another base.
        let mut session = Session::new(&foreign, &options()).unwrap();
        let e = session.attach(ours, ExistingText::Drop).unwrap_err();
        assert!(matches!(e, Error::Adapter(_)), "{e}");
        let force = options().accept_other_base(true);
        let mut forced = Session::new(&known, &force).unwrap();
        forced.attach(ours, ExistingText::Drop).unwrap();
    }

    // Training needs a backward pass.
    let rows = Dataset::from_reader(&br#"{"prompt": "a", "completion": "b"}"#[..], "rows").unwrap();
    let rows = rows.examples(&foreign).unwrap();
    let e = Trainer::new(
        &foreign,
        TrainOptions::new(AdapterKind::Prompt),
        rows,
        Vec::new(),
    );
    let e = e.map(drop).unwrap_err();
    let Error::Model { source, .. } = e else {
        panic!("{e}")
    };
    assert!(matches!(source, ModelError::NoBackward), "{source}");
}

/// All answers of a scheduler, in the order of requests.
fn answers(scheduler: &mut Scheduler, requests: Vec<Request>) -> Vec<Generated> {
    let ids: Vec<_> = (requests.into_iter())
        .map(|request| scheduler.submit(request).unwrap())
        .collect();
    let mut done = HashMap::new();
    while !scheduler.is_idle() {
        for (id, event) in scheduler.step() {
            match event {
                Event::Done(out) => drop(done.insert(id, out)),
                Event::Failed(e) => panic!("{e}"),
                _ => {}
            }
        }
    }
    ids.iter().map(|id| done.remove(id).unwrap()).collect()
}

#[test]
fn engines_serve_many_texts_with_adapters_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let (foreign, _, adapters) = foreign(dir.path());
    let mut random = Random::new(3);
    let members: Vec<Option<Adapter>> = (adapters.iter())
        .map(|(theirs, _)| Some(theirs.clone()))
        .chain([None])
        .collect();
    let asked: Vec<(Option<Adapter>, Vec<i32>)> = (0..9)
        .map(|i| {
            let n = 1 + random.below(60);
            (
                members[i % members.len()].clone(),
                random.tokens(&foreign, n),
            )
        })
        .collect();
    let alone: Vec<_> = (asked.iter())
        .map(|(adapter, prompt)| {
            let mut session = session(&foreign, &options(), adapter.as_ref());
            session.prompt_tokens(prompt).unwrap();
            generate(&mut session, 10).tokens
        })
        .collect();
    let room = |texts: usize| {
        Some(texts * 128 * Scheduler::new(&foreign, &engine()).unwrap().page_bytes() / 64)
    };
    fn engine() -> EngineOptions {
        let mut engine = EngineOptions::from(&options());
        engine.max_running = 6;
        engine
    }
    for kv_bytes in [None, room(2)] {
        let mut engine = engine();
        engine.kv_bytes = kv_bytes;
        let mut scheduler = Scheduler::new(&foreign, &engine).unwrap();
        let requests = asked.iter().map(|(adapter, prompt)| {
            let request = Request::tokens(prompt.clone()).generate(greedy(10));
            request.ensemble(&Ensemble::of_one(adapter.clone()))
        });
        let together = answers(&mut scheduler, requests.collect());
        let together: Vec<_> = together.into_iter().map(|out| out.tokens).collect();
        assert_eq!(together, alone, "{kv_bytes:?}");
        assert_eq!(scheduler.kv_bytes(), 0);
    }
    // An ensemble of one adapter twice says what it says alone, and of all of them something.
    let mut scheduler = Scheduler::new(&foreign, &engine()).unwrap();
    let twice = Ensemble::new(
        vec![members[0].clone(), members[0].clone()],
        Combine::MeanProb,
    )
    .unwrap();
    let all = Ensemble::new(members.clone(), Combine::Product).unwrap();
    let prompt = &asked[0].1;
    let requests = [twice, all].map(|ensemble| {
        let request = Request::tokens(prompt.clone()).generate(greedy(10));
        request.ensemble(&ensemble)
    });
    let both = answers(&mut scheduler, requests.into());
    assert_eq!(both[0].tokens, alone[0]);
    assert_eq!(both[1].tokens.len(), 10);
    // libllama has no more sequences.
    let mut many = engine();
    many.max_running = 255;
    let e = Scheduler::new(&foreign, &many).unwrap_err().to_string();
    assert!(e.contains("at most 254"), "{e}");
}

#[test]
fn a_cancelled_step_is_as_if_it_had_not_been() {
    let dir = tempfile::tempdir().unwrap();
    let (foreign, _, adapters) = foreign(dir.path());
    let prompt = Random::new(2).tokens(&foreign, 30);
    let mut whole = session(&foreign, &options(), Some(&adapters[0].0));
    let mut broken = session(&foreign, &options(), Some(&adapters[0].0));
    whole.prompt_tokens(&prompt).unwrap();
    broken.prompt_tokens(&prompt).unwrap();
    let token = broken.cancel_token();
    token.cancel();
    for _ in 0..2 {
        let e = broken.feed(&prompt).unwrap_err();
        assert!(matches!(e, Error::Session(SessionError::Cancelled)), "{e}");
    }
    token.reset();
    whole.feed(&prompt[..5]).unwrap();
    broken.feed(&prompt[..5]).unwrap();
    assert_eq!(logits(&mut whole), logits(&mut broken));
    // More than there is room for.
    let e = broken.feed(&[1; 200]).unwrap_err();
    assert!(
        matches!(e, Error::Session(SessionError::ContextFull { .. })),
        "{e}"
    );
}

#[test]
fn a_saved_text_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (foreign, known, adapters) = foreign(dir.path());
    let path = dir.path().join("text.gguf");
    for (theirs, ours) in &adapters {
        let mut first = session(&foreign, &options(), Some(theirs));
        first
            .prompt_tokens(&Random::new(4).tokens(&foreign, 20))
            .unwrap();
        generate(&mut first, 5);
        first.save(&path, "a note").unwrap();
        let mut second = session(&foreign, &options(), Some(theirs));
        assert_eq!(second.load(&path).unwrap(), "a note");
        assert_eq!(first.tokens(), second.tokens());
        let far = nmse(&logits(&mut second), &logits(&mut first));
        assert!(far <= 1e-6, "{far:.2e}");
        assert_eq!(
            generate(&mut first, 8).tokens,
            generate(&mut second, 8).tokens
        );
        // Of another model's.
        let mut other = session(&known, &options(), Some(ours));
        assert!(matches!(other.load(&path), Err(Error::Saved { .. })));
    }
}

#[test]
fn recurrent_models_take_virtual_tokens_and_no_prefixes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mamba.gguf");
    write_mamba(&path, 1).unwrap();
    let model = Model::open(&path, &by(DecoderChoice::Auto)).unwrap();
    assert!(!model.is_native());
    let prompt = Random::new(6).tokens(&model, 30);
    let soft = adapters::prompt(&model, 4, 2);
    for adapter in [None, Some(&soft)] {
        // Memory that does not go back is computed anew.
        let mut cut = session(&model, &options(), adapter);
        cut.prompt_tokens(&prompt).unwrap();
        let whole = logits(&mut cut);
        cut.truncate(20).unwrap();
        cut.feed(&prompt[20..]).unwrap();
        let far = nmse(&logits(&mut cut), &whole);
        assert!(far <= 1e-6, "{far:.2e}");
        // One by one, or all at once.
        let mut steps = session(&model, &options(), adapter);
        steps.prompt_tokens(&prompt[..1]).unwrap();
        prompt[1..]
            .iter()
            .for_each(|&id| steps.feed(&[id]).unwrap());
        let far = nmse(&logits(&mut steps), &whole);
        assert!(far <= 1e-6, "{far:.2e}");
        let mut scheduler = Scheduler::new(&model, &EngineOptions::from(&options())).unwrap();
        let request = || {
            let request = Request::tokens(prompt.clone()).generate(greedy(8));
            request.ensemble(&Ensemble::of_one(adapter.cloned()))
        };
        let out = answers(&mut scheduler, vec![request(), request(), request()]);
        let alone = generate(&mut cut, 8).tokens;
        assert!(out.iter().all(|out| out.tokens == alone));
    }
    // The adapter matters.
    let said = |adapter| {
        let mut session = session(&model, &options(), adapter);
        // What is far behind is forgotten.
        session.prompt_tokens(&prompt[..3]).unwrap();
        logits(&mut session)
    };
    assert!(nmse(&said(Some(&soft)), &said(None)) > 1e-4);

    let base = Base::open(&path).unwrap();
    assert_eq!(base.shape(), model.shape());
    let prefix = of(
        &adapters::prefix(
            &Model::open(
                Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tinylm-q8_0.gguf"),
                &ModelOptions::default(),
            )
            .unwrap(),
            4,
            1,
        ),
        &model,
    );
    let mut session = Session::new(&model, &options().accept_other_base(true)).unwrap();
    let e = session.attach(&prefix, ExistingText::Drop).unwrap_err();
    let refused = matches!(
        &e,
        Error::Adapter(_) | Error::Session(SessionError::Llama(HostError::Recurrent))
    );
    assert!(refused, "{e}");
    // The text is as it was.
    session.prompt_tokens(&prompt).unwrap();
}
