//! Adapters in contexts of libllama's, as an application would attach them, against our own sessions.

use ggraft::adapter::ControlVector;
use ggraft::file::types::GgmlType;
use ggraft::host::{Api, Host, HostError, LlamaOptions, Piece};
use ggraft::infer::{FlashAttention, KvType};
use ggraft::model::{Base, BaseShape};
use ggraft::{Adapter, Error, Kernels, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::bases::{self, Random, bases};
use ggraft_testkit::fixture::write_twins;
use ggraft_testkit::metrics::nmse;
use ggraft_testkit::oracle::{self, Llama};
use ggraft_testkit::{adapters, oracle::Options};
use std::path::Path;
use std::rc::Rc;

const MODEL: &str = "models/tinylm-q8_0.gguf";
/// Positions: libllama takes multiples of 256 only, and rotates by the number that it has.
const N_CTX: usize = 256;

/// How a context keeps keys and values, and how far its logits may be from those of a session: sums of rounded values are not in the same order.
#[derive(Clone, Copy, Debug)]
struct Cache {
    ty: GgmlType,
    flash: bool,
    session: KvType,
    most: f64,
}

const CACHES: [Cache; 4] = [
    cache(GgmlType::F32, false, KvType::F32, 1e-6),
    cache(GgmlType::F16, false, KvType::F16, 1e-6),
    cache(GgmlType::F16, true, KvType::F16, 1e-6),
    cache(GgmlType::Q8_0, true, KvType::Q8_0, 1e-3),
];

const fn cache(ty: GgmlType, flash: bool, session: KvType, most: f64) -> Cache {
    Cache {
        ty,
        flash,
        session,
        most,
    }
}

impl Cache {
    fn options(self) -> Options {
        Options {
            n_ctx: N_CTX,
            kv_type: self.ty,
            flash_attention: Some(self.flash),
            ..Options::default()
        }
    }

    fn session(self, model: &Model, adapter: Option<&Adapter>) -> Session {
        let flash = match self.flash {
            true => FlashAttention::On,
            false => FlashAttention::Off,
        };
        let options = SessionOptions::default()
            .n_ctx(N_CTX)
            .n_threads(1)
            .kv_type(self.session)
            .flash_attention(flash);
        bases::session(model, &options, adapter)
    }
}

fn model_options() -> ModelOptions {
    // Logits are libllama's, bit for bit.
    ModelOptions::default().kernels(Kernels::Ggml)
}

fn at(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn host(llama: &Llama, model: &Model) -> Host {
    let base = Base::open(model.path()).unwrap();
    // SAFETY: the context lives as long as `llama`, which no test drops before its host's last call, and nobody else uses it during one.
    unsafe { Host::new(Api::linked(), llama.context(), base, 0).unwrap() }
}

/// Logits of `tokens` behind what a session has.
fn logits(session: &mut Session, tokens: &[i32]) -> Vec<f32> {
    session.feed(tokens).unwrap();
    session.logits().unwrap().to_vec()
}

#[track_caller]
fn why(outcome: ggraft::Result<impl Sized>) -> HostError {
    match outcome {
        Err(Error::Host(e)) => e,
        Err(e) => panic!("{e}"),
        Ok(_) => panic!("it should have been refused"),
    }
}

#[test]
fn a_base_is_read_as_the_model_is() {
    let dir = tempfile::tempdir().unwrap();
    let bases = bases(dir.path(), &model_options());
    assert!(bases.len() > 20);
    for base in &bases {
        let file = Base::open(base.model.path()).unwrap();
        assert_eq!(file.shape(), base.model.shape(), "{}", base.name);
        assert_eq!(
            file.fingerprint(),
            base.model.fingerprint(),
            "{}",
            base.name
        );
    }
    let e = Base::open(at("models/adapters/pirate.gguf")).unwrap_err();
    assert!(e.to_string().contains("not a model"), "{e}");
}

#[test]
fn a_context_says_what_a_session_says() {
    let dir = tempfile::tempdir().unwrap();
    let (mut compared, mut farthest) = (0, [0.0f64; CACHES.len()]);
    for base in &bases(dir.path(), &model_options()) {
        let path = base.model.path();
        let loaded = Rc::new(oracle::Model::load(path, false).unwrap());
        let prompt = Random::new(7).tokens(&base.model, 20);
        for (i, &cache) in CACHES.iter().enumerate() {
            for swa_full in [true, false] {
                if !swa_full && !base.has_window {
                    continue;
                }
                let options = Options {
                    swa_full,
                    ..cache.options()
                };
                let Ok(mut llama) = Llama::new(loaded.clone(), &options) else {
                    // Heads that are no whole blocks have no quantized cache.
                    assert!(cache.ty.is_quantized(), "{} {cache:?}", base.name);
                    continue;
                };
                let mut host = host(&llama, &base.model);
                for adapter in base.adapters.iter().flatten() {
                    let mut session = cache.session(&base.model, Some(adapter));
                    let want = match adapter.template() {
                        Some(_) => {
                            session.prompt_tokens(&prompt).unwrap();
                            session.logits().unwrap().to_vec()
                        }
                        None => logits(&mut session, &prompt),
                    };
                    let got = if adapter.template().is_some() {
                        host.detach(0).unwrap();
                        let n = host.prompt(adapter, &prompt, 0).unwrap();
                        assert_eq!(n, session.n_past());
                        llama.go_on_at(n);
                        llama.last_logits().to_vec()
                    } else {
                        host.detach(0).unwrap();
                        let graft = host.prepare(adapter, 0).unwrap();
                        let n = host.attach(&graft, 0).unwrap();
                        assert_eq!(n, adapter.length());
                        llama.go_on_at(n);
                        llama.prefill(&prompt).unwrap().to_vec()
                    };
                    // And a token behind it.
                    let far = [
                        nmse(&got, &want),
                        nmse(llama.step(65).unwrap(), &logits(&mut session, &[65])),
                    ];
                    let far = far[0].max(far[1]);
                    farthest[i] = farthest[i].max(far);
                    assert!(
                        far <= cache.most,
                        "{} {:?} {cache:?} swa_full {swa_full}: NMSE {far:.2e}",
                        base.name,
                        adapter.kind()
                    );
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 300, "{compared}");
    eprintln!("{compared} compared, farthest {farthest:?}");
}

/// The adapters of tinylm, its contexts of several sequences, in one cache and in one for each.
fn each_way(mut check: impl FnMut(&Model, Llama, bool)) {
    let model = Model::open(at(MODEL), &model_options()).unwrap();
    let loaded = Rc::new(oracle::Model::load(model.path(), false).unwrap());
    for kv_unified in [false, true] {
        let options = Options {
            n_ctx: 1024,
            n_sequences: 4,
            kv_unified,
            kv_type: GgmlType::F16,
            flash_attention: Some(true),
            ..Options::default()
        };
        let llama = Llama::new(loaded.clone(), &options).unwrap();
        check(&model, llama, kv_unified);
    }
}

fn personas() -> [Adapter; 2] {
    ["pirate", "butler"].map(|name| load(&format!("models/adapters/{name}.gguf")))
}

fn load(path: &str) -> Adapter {
    Adapter::load(&at(path)).unwrap()
}

#[test]
fn sequences_of_one_batch_have_adapters_of_their_own() {
    let [pirate, butler] = personas();
    each_way(|model, mut llama, kv_unified| {
        let mut host = host(&llama, model);
        let text = model
            .vocab()
            .tokenize("The rain has not", false, false)
            .unwrap();
        assert!(text.len() > 3);
        // Sequence 3 stays without an adapter.
        let mut starts = [0; 4];
        for (seq, adapter) in [(0, &pirate), (1, &butler), (2, &pirate)] {
            let graft = host.prepare(adapter, seq).unwrap();
            assert_eq!(graft.length(), adapter.length());
            starts[seq as usize] = host.attach(&graft, seq).unwrap();
        }
        let batch: Vec<_> = (0..4)
            .flat_map(|seq| {
                let of_seq = text.iter().enumerate();
                of_seq.map(move |(i, &id)| (seq, starts[seq] + i, id))
            })
            .collect();
        let mut got = Vec::new();
        llama
            .step_sequences(&batch, |row| got.push(row.to_vec()))
            .unwrap();
        assert_eq!(got.len(), 4);
        for (seq, adapter) in [Some(&pirate), Some(&butler), Some(&pirate), None]
            .into_iter()
            .enumerate()
        {
            let mut session = Cache { ..CACHES[2] }.session(model, adapter);
            let far = nmse(&got[seq], &logits(&mut session, &text));
            assert!(far <= 1e-6, "{kv_unified} {seq}: {far:.2e}");
        }
        assert!(nmse(&got[0], &got[1]) > 1e-3 && nmse(&got[0], &got[3]) > 1e-3);
    });
}

#[test]
fn adapters_are_swapped_copied_and_taken_out() {
    let [pirate, butler] = personas();
    each_way(|model, mut llama, kv_unified| {
        let mut host = host(&llama, model);
        let text = model
            .vocab()
            .tokenize("Yesterday it was", false, false)
            .unwrap();
        let alone = |adapter: Option<&Adapter>| {
            let mut session = CACHES[2].session(model, adapter);
            logits(&mut session, &text)
        };
        let [one, other] = [&pirate, &butler].map(|a| host.prepare(a, 0).unwrap());
        let decode = |llama: &mut Llama, seq: usize, at: usize| {
            let tokens = text.iter().enumerate().map(|(i, &id)| (seq, at + i, id));
            let mut out = Vec::new();
            llama
                .step_sequences(&tokens.collect::<Vec<_>>(), |row| out = row.to_vec())
                .unwrap();
            out
        };
        let near = |got: &[f32], adapter: Option<&Adapter>| {
            let far = nmse(got, &alone(adapter));
            assert!(far <= 1e-6, "{kv_unified}: {far:.2e}");
        };
        let n = host.attach(&one, 1).unwrap();
        near(&decode(&mut llama, 1, n), Some(&pirate));
        // A text is not lost by accident.
        let refused = why(host.attach(&other, 1));
        let last = (n + text.len() - 1) as i32;
        assert_eq!(refused, HostError::NotEmpty { seq: 1, last });
        // Swapped, without its text and with it.
        let n = host.swap(&other, 1).unwrap();
        near(&decode(&mut llama, 1, n), Some(&butler));
        let n = host.swap_and_recompute(&one, 1, &text).unwrap();
        assert_eq!(n, pirate.length() + text.len());
        near(llama.last_logits(), Some(&pirate));
        // A copy does not need what it is of.
        host.swap(&one, 1).unwrap();
        host.copy(1, 2).unwrap();
        near(&decode(&mut llama, 2, n - text.len()), Some(&pirate));
        let refused = why(host.copy(1, 2));
        assert!(matches!(refused, HostError::NotEmpty { seq: 2, .. }));
        host.detach(1).unwrap();
        near(&decode(&mut llama, 1, 0), None);
        host.detach(1).unwrap();
        host.attach(&other, 1).unwrap();
        let next = decode(&mut llama, 2, n);
        let mut session = CACHES[2].session(model, Some(&pirate));
        logits(&mut session, &text);
        let far = nmse(&next, &logits(&mut session, &text));
        assert!(far <= 1e-6, "{far:.2e}");
    });
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let pirate = load("models/adapters/pirate.gguf");
    each_way(|model, mut llama, kv_unified| {
        let new = |path: &Path, ctx, seq| {
            let base = Base::open(path).unwrap();
            // SAFETY: as in `host`.
            unsafe { Host::new(Api::linked(), ctx, base, seq) }
        };
        let ctx = llama.context();
        assert_eq!(
            why(new(model.path(), std::ptr::null_mut(), 0)),
            HostError::NoContext
        );
        for seq in [-1, 4, i32::MAX, i32::MIN] {
            let e = why(new(model.path(), ctx, seq));
            assert_eq!(e, HostError::SequenceRange { seq, n: 4 });
        }
        // Another base.
        let dir = tempfile::tempdir().unwrap();
        let bases = bases(dir.path(), &model_options());
        for base in &bases {
            let e = why(new(base.model.path(), ctx, 0));
            assert!(
                matches!(e, HostError::OtherBase { .. }),
                "{}: {e}",
                base.name
            );
        }
        // A sequence that has a text.
        llama
            .step_sequences(&[(3, 0, 65), (3, 1, 66)], |_| {})
            .unwrap();
        let e = why(new(model.path(), ctx, 3));
        assert_eq!(e, HostError::NotEmpty { seq: 3, last: 1 });

        let mut host = new(model.path(), ctx, 0).unwrap();
        let foreign = bases[0].adapters[1].as_ref().unwrap();
        assert!(matches!(host.prepare(foreign, 0), Err(Error::Adapter(_))));
        assert!(matches!(
            host.compose(foreign, &[1]),
            Err(Error::Adapter(_))
        ));
        let long = adapters::prefix(model, 1025, 1);
        let e = why(host.prepare(&long, 0));
        assert_eq!(
            e,
            HostError::NoRoom {
                rows: 1025,
                n_ctx: 1024
            }
        );
        let placed = adapters::p_tuning(model, "{v:2}{prompt}", 2, 1);
        assert_eq!(why(host.prepare(&placed, 0)), HostError::Template);
        assert_eq!(why(host.compose(&pirate, &[1])), HostError::NoVirtualTokens);
        let tokens = adapters::prompt(model, 4, 1);
        let e = why(host.prepare(&tokens, 3));
        assert_eq!(e, HostError::NotEmpty { seq: 3, last: 1 });

        // More than one sequence has, or than what others leave.
        let long = adapters::prefix(model, 1000, 1);
        let graft = host.prepare(&long, 0).unwrap();
        let expected = HostError::NoRoom {
            rows: 1000,
            n_ctx: 1024,
        };
        if kv_unified {
            host.attach(&graft, 0).unwrap();
            assert_eq!(why(host.attach(&graft, 1)), expected);
            host.detach(0).unwrap();
            // The one that failed is empty.
            host.attach(&graft, 1).unwrap();
            host.detach(1).unwrap();
        } else {
            assert_eq!(why(host.attach(&graft, 0)), expected);
        }
        // Another context's rows.
        let mut second = new(model.path(), ctx, 0).unwrap();
        assert_eq!(why(second.attach(&graft, 0)), HostError::OtherHost);
        let e = why(host.decode(&[Piece::Tokens(vec![1; 1100])], 0, 0));
        assert!(matches!(e, HostError::Decode { code: 1, .. }), "{e}");
        host.detach(0).unwrap();

        // The text that was there is as it was.
        let mut got = Vec::new();
        llama
            .step_sequences(&[(3, 2, 67)], |row| got = row.to_vec())
            .unwrap();
        let mut session = CACHES[2].session(model, None);
        assert!(nmse(&got, &logits(&mut session, &[65, 66, 67])) <= 1e-6);
        // A context that is freed first: a host that is dropped afterwards does not touch it.
        drop(llama);
        drop((host, second));
    });
}

/// A prefix of the rows that a context computed of a text, in place of the text.
#[test]
fn rows_in_every_type_of_cache_are_what_the_context_would_write() {
    let model = Model::open(at(MODEL), &model_options()).unwrap();
    let loaded = Rc::new(oracle::Model::load(model.path(), false).unwrap());
    let (text, next) = (Random::new(3).tokens(&model, 40), [65, 66, 67]);
    let exact = Options {
        n_ctx: N_CTX,
        ..Options::default()
    };
    let mut exact = Llama::new(loaded.clone(), &exact).unwrap();
    exact.prefill(&text).unwrap();
    let layers = exact.kv_rows().unwrap();
    let want = exact.prefill(&next).unwrap().to_vec();
    let rows = adapters::of_rows(&model, layers.into_iter().map(|l| (l.k, l.v)));
    use GgmlType::*;
    for ty in [F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0] {
        for flash in [true, false] {
            let options = Options {
                n_ctx: N_CTX,
                kv_type: ty,
                flash_attention: Some(flash),
                ..Options::default()
            };
            let Ok(mut llama) = Llama::new(loaded.clone(), &options) else {
                assert!(ty.is_quantized() && !flash, "{ty}");
                continue;
            };
            llama.prefill(&text).unwrap();
            let own = nmse(llama.prefill(&next).unwrap(), &want);
            llama.clear();
            let mut host = host(&llama, &model);
            let graft = host.prepare(&rows, 0).unwrap();
            llama.go_on_at(host.attach(&graft, 0).unwrap());
            let far = nmse(llama.prefill(&next).unwrap(), &want);
            // Each rounds in places of its own; rows of another form are beside the point altogether.
            assert!(
                far <= 4.0 * own + 1e-9,
                "{ty} {flash}: {far:.2e}, own {own:.2e}"
            );
        }
    }
}

/// An architecture that our decoder does not know, and llama's under its own name, which computes the same.
#[test]
fn architectures_of_libllamas_own_take_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let [at_known, at_foreign] = write_twins(dir.path()).unwrap();
    let model = Model::open(&at_known, &model_options()).unwrap();
    let e = Model::open(&at_foreign, &model_options()).unwrap_err();
    assert!(
        e.to_string()
            .contains("unsupported architecture 'internlm2'"),
        "{e}"
    );

    let base = Base::open(&at_foreign).unwrap();
    assert_eq!(base.shape().architecture, "internlm2");
    let same = BaseShape {
        architecture: "llama".to_owned(),
        ..base.shape().clone()
    };
    assert_eq!(same, *model.shape());
    assert_ne!(base.fingerprint(), model.fingerprint());
    // The same rows, for the other base.
    let of_foreign = |adapter: &Adapter| {
        let mut parts = adapter.parts().clone();
        parts.base.architecture = "internlm2".to_owned();
        parts.fingerprint = Some(base.fingerprint());
        Adapter::new(parts).unwrap()
    };
    let prompt = Random::new(9).tokens(&model, 12);
    let mut llama = Llama::load(&at_foreign, &CACHES[0].options()).unwrap();
    // SAFETY: as in `host`.
    let host = unsafe { Host::new(Api::linked(), llama.context(), base.clone(), 0) };
    let mut host = host.unwrap();
    for adapter in [
        adapters::prefix(&model, 5, 1),
        adapters::prompt(&model, 4, 2),
    ] {
        host.detach(0).unwrap();
        let graft = host.prepare(&of_foreign(&adapter), 0).unwrap();
        llama.go_on_at(host.attach(&graft, 0).unwrap());
        let mut session = CACHES[0].session(&model, Some(&adapter));
        let far = nmse(
            llama.prefill(&prompt).unwrap(),
            &logits(&mut session, &prompt),
        );
        assert!(far <= 1e-6, "{:?}: {far:.2e}", adapter.kind());
        assert!(matches!(host.prepare(&adapter, 1), Err(Error::Adapter(_))));
    }
}

#[test]
fn a_file_restores_a_slot() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pirate.slot");
    let (pirate, token) = (load("models/adapters/pirate.gguf"), 300);
    let model = Model::open(at(MODEL), &model_options()).unwrap();
    let text = model
        .vocab()
        .tokenize("The rain has not", false, false)
        .unwrap();
    for flash in [true, false] {
        let mut options = LlamaOptions::default();
        options.n_ctx = N_CTX;
        options.n_threads = Some(1);
        options.flash_attention = Some(flash);
        let mut own = ggraft::host::Llama::open(model.path(), &options).unwrap();
        let graft = own.host().prepare(&pirate, 0).unwrap();
        graft.save_slot(&path, token).unwrap();
        // An application that knows nothing of adapters.
        let cache = if flash { CACHES[2] } else { CACHES[1] };
        let mut llama = Llama::load(model.path(), &cache.options()).unwrap();
        let tokens = llama.load_slot(&path).unwrap();
        assert_eq!(tokens, vec![token; pirate.length()]);
        let mut session = cache.session(&model, Some(&pirate));
        let far = nmse(llama.prefill(&text).unwrap(), &logits(&mut session, &text));
        assert!(far <= 1e-6, "{far:.2e}");
        // One that keeps values in another way refuses it.
        let other = if flash { CACHES[1] } else { CACHES[2] };
        let mut llama = Llama::load(model.path(), &other.options()).unwrap();
        assert!(llama.load_slot(&path).is_err());
    }
    let e = ggraft::host::Llama::open(at("models/adapters/pirate.gguf"), &LlamaOptions::default());
    assert!(e.unwrap_err().to_string().contains("not a model"));
}

#[test]
fn the_command_writes_slots() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("a.slot");
    let adapter = "models/adapters/pirate.gguf";
    let run = |more: &[&str]| {
        let mut args = vec!["export", "--slot", adapter, "-m", MODEL, "-o"];
        args.push(out.to_str().unwrap());
        args.extend(more);
        let exe = env!("CARGO_BIN_EXE_ggraft");
        let mut command = ggraft_testkit::command::command(exe, &args);
        command.current_dir(at("")).output().unwrap()
    };
    let said = |more: &[&str]| {
        let output = run(more);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{more:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    };
    let n = load(adapter).length();
    let options = |ty| Options {
        n_ctx: N_CTX,
        kv_type: ty,
        flash_attention: Some(true),
        ..Options::default()
    };
    // The vocabulary's last token, and BOS behind them.
    let text = said(&[]);
    assert!(text.contains(&format!("{n} times 3071")), "{text}");
    assert!(text.contains("3071, 0, \"Your text\"]}"), "{text}");
    let mut llama = Llama::load(&at(MODEL), &options(GgmlType::F16)).unwrap();
    assert_eq!(llama.load_slot(&out).unwrap(), vec![3071; n]);
    let quantized = [
        "--cache-type-k",
        "q8_0",
        "--cache-type-v",
        "q8_0",
        "--placeholder",
        "7",
    ];
    said(&quantized);
    assert!(llama.load_slot(&out).is_err());
    let mut llama = Llama::load(&at(MODEL), &options(GgmlType::Q8_0)).unwrap();
    assert_eq!(llama.load_slot(&out).unwrap(), vec![7; n]);
    // A server with a cache for each of its slots.
    said(&["--parallel", "3"]);
    let several = Options {
        n_sequences: 3,
        n_ctx: 3 * N_CTX,
        ..options(GgmlType::F16)
    };
    let mut llama = Llama::load(&at(MODEL), &several).unwrap();
    assert_eq!(llama.load_slot(&out).unwrap().len(), n);

    for (more, status, expected) in [
        (&["--placeholder", "3072"][..], 2, "tokens 0 to 3071"),
        (&["--placeholder", "-1"], 2, "tokens 0 to 3071"),
        (
            &["--cache-type-k", "q4_k"],
            2,
            "one of f16, f32, bf16, q8_0",
        ),
        (&["--flash-attn", "maybe"], 2, "on or off"),
        (&["--overwrite"], 2, "cannot be used with"),
    ] {
        let output = run(more);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{more:?}: {stderr}");
        assert!(stderr.contains(expected), "{more:?}: {stderr}");
    }
}

#[test]
fn a_function_that_is_not_found_is_named() {
    assert!(Api::NAMES.len() > 20 && Api::NAMES.contains(&"llama_decode"));
    for missing in Api::NAMES {
        let find = |name: &std::ffi::CStr| match name.to_str() == Ok(missing) {
            true => std::ptr::null(),
            false => std::ptr::dangling(),
        };
        // SAFETY: what it returns is not called.
        let e = unsafe { Api::find(find) }.unwrap_err();
        assert_eq!(e, HostError::MissingFunction { name: missing });
    }
}

#[test]
fn a_control_vector_steers_a_context() {
    let model = Model::open(at(MODEL), &model_options()).unwrap();
    let mut llama = Llama::load(&at(MODEL), &CACHES[0].options()).unwrap();
    let mut host = host(&llama, &model);
    let (d, n_layer) = (model.shape().n_embd, model.shape().n_layer);
    let prompt = Random::new(3).tokens(&model, 10);
    let mut said = |host: &mut Host| {
        host.detach(0).unwrap();
        llama.go_on_at(0);
        llama.prefill(&prompt).unwrap().to_vec()
    };
    let vector = |layers: &[usize], x: f32| {
        let directions = layers.iter().map(|&il| (il, vec![x; d]));
        ControlVector::new(directions.collect(), Some("llama".to_owned())).unwrap()
    };
    let plain = said(&mut host);
    host.steer(Some(&vector(&[1, 2], 0.0)), 1..=99).unwrap();
    assert_eq!(said(&mut host), plain);
    let two = vector(&[1, 2], 0.5);
    host.steer(Some(&two), 1..=99).unwrap();
    let both = said(&mut host);
    host.steer(Some(&two), 2..=2).unwrap();
    let one = said(&mut host);
    assert!(nmse(&both, &plain) > 1e-4 && nmse(&one, &plain) > 1e-4 && nmse(&one, &both) > 1e-4);
    // What is left of both is the other.
    host.steer(Some(&vector(&[2], 0.5)), 1..=99).unwrap();
    assert_eq!(said(&mut host), one);

    let refused =
        |host: &mut Host, vector: &ControlVector, layers| why(host.steer(Some(vector), layers));
    let narrow = ControlVector::new([(1, vec![1.0])].into(), None).unwrap();
    let e = refused(&mut host, &narrow, 1..=99);
    assert!(matches!(e, HostError::ControlWidth { .. }), "{e}");
    for (vector, layers) in [
        (vector(&[n_layer], 1.0), 1..=99),
        (vector(&[1], 1.0), 2..=99),
        (vector(&[1], 1.0), 99..=100),
    ] {
        let e = refused(&mut host, &vector, layers);
        assert!(matches!(e, HostError::ControlLayers { .. }), "{e}");
    }
    // It is steered as before.
    assert_eq!(said(&mut host), one);
    host.steer(None, 0..=0).unwrap();
    assert_eq!(said(&mut host), plain);
}
