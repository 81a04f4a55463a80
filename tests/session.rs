//! Sessions on the embedded model with the adapters that PEFT trained for it: swapping, sharing, cancelling, generating.

use ggraft::adapter::{
    AdapterKind, BaseSignature, ImportOptions, Library, Matrix, Parts, Payload, Template,
    import_peft,
};
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{
    CancelToken, ExistingText, FlashAttention, GenerateOptions, KvType, SessionError, StopReason,
};
use ggraft::{Adapter, CpuLevel, Error, Kernels, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::metrics::{argmax, max_abs_diff};
use ggraft_testkit::skipped;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PROMPT: &str = "The rain has not stopped for three days, and the river";

const KV_TYPES: [KvType; 3] = [KvType::F16, KvType::F32, KvType::Q8_0];

/// On kernels whose products do not depend on how many tokens are computed together: what differs between two ways to the same text is attention.
static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let options = ModelOptions::default().kernels(Kernels::Own);
    Model::open(path("models/tinylm-q8_0.gguf"), &options).unwrap()
});
static PIRATE: LazyLock<Adapter> = LazyLock::new(|| peft("persona_pirate-prefix"));
static BUTLER: LazyLock<Adapter> = LazyLock::new(|| peft("persona_butler-prefix_proj"));
static SENTIMENT: LazyLock<Adapter> = LazyLock::new(|| peft("sentiment-prompt_text"));
static COUNTY: LazyLock<Adapter> = LazyLock::new(|| peft("facts_county-p_tuning"));

fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

fn peft(name: &str) -> Adapter {
    import_peft(
        &path("models/peft").join(name),
        MODEL.shape(),
        Some(MODEL.fingerprint()),
        &ImportOptions::default(),
    )
    .unwrap()
}

/// The same rows at the places that `template` says.
fn with_template(adapter: &Adapter, template: &str) -> Adapter {
    Adapter::new(Parts {
        kind: AdapterKind::PTuning,
        template: Some(Template::parse(template).unwrap()),
        ..adapter.parts().clone()
    })
    .unwrap()
}

fn options() -> SessionOptions {
    SessionOptions::default().n_ctx(256).n_threads(1)
}

fn session_with(options: &SessionOptions, adapter: Option<&Adapter>) -> Session {
    let mut s = Session::new(&MODEL, options).unwrap();
    if let Some(adapter) = adapter {
        s.attach(adapter, ExistingText::Drop).unwrap();
    }
    s
}

fn session(adapter: Option<&Adapter>) -> Session {
    session_with(&options(), adapter)
}

/// The n most likely tokens, one after the other.
fn greedy(s: &mut Session, n: usize) -> Vec<i32> {
    (0..n)
        .map(|_| {
            let id = argmax(s.logits().unwrap()) as i32;
            s.feed(&[id]).unwrap();
            id
        })
        .collect()
}

/// What a session of its own says to the prompt.
fn alone(options: &SessionOptions, adapter: Option<&Adapter>, n: usize) -> Vec<i32> {
    let mut s = session_with(options, adapter);
    s.prompt(PROMPT).unwrap();
    greedy(&mut s, n)
}

fn tokenize(text: &str) -> Vec<i32> {
    MODEL.vocab().tokenize(text, false, true).unwrap()
}

fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> SessionError {
    match result {
        Err(Error::Session(e)) => e,
        other => panic!("expected a refusal of the session, got {other:?}"),
    }
}

#[test]
fn handles_can_be_shared_between_threads() {
    fn shared<T: Send + Sync + Clone + 'static>() {}
    fn moved<T: Send + 'static>() {}
    shared::<Model>();
    shared::<Adapter>();
    shared::<CancelToken>();
    moved::<Session>();
    moved::<Library>();
}

#[test]
fn adapters_change_what_the_model_says() {
    let texts: Vec<_> = [
        None,
        Some(&*PIRATE),
        Some(&*BUTLER),
        Some(&*SENTIMENT),
        Some(&*COUNTY),
    ]
    .map(|a| alone(&options(), a, 12))
    .to_vec();
    for (i, a) in texts.iter().enumerate() {
        assert!(texts[..i].iter().all(|b| a != b), "{texts:?}");
    }
}

#[test]
fn sessions_in_two_threads_do_not_disturb_each_other() {
    for n_threads in [1, 2] {
        let options = options().n_threads(n_threads);
        let adapters = [&*PIRATE, &*BUTLER];
        let want = adapters.map(|a| alone(&options, Some(a), 24));
        for _ in 0..3 {
            let got = std::thread::scope(|scope| {
                adapters
                    .map(|a| scope.spawn(|| alone(&options, Some(a), 24)))
                    .map(|t| t.join().unwrap())
            });
            assert_eq!(got, want, "{n_threads} threads");
        }
    }
}

#[test]
fn swapping_back_gives_the_same_again() {
    for kv in KV_TYPES {
        let options = options().kv_type(kv);
        let [pirate, butler] = [&*PIRATE, &*BUTLER].map(|a| alone(&options, Some(a), 16));
        let mut s = session_with(&options, Some(&PIRATE));
        for (adapter, want) in [(&*PIRATE, &pirate), (&BUTLER, &butler), (&PIRATE, &pirate)] {
            s.swap(adapter, ExistingText::Drop).unwrap();
            s.prompt(PROMPT).unwrap();
            assert_eq!(greedy(&mut s, 16), *want, "{kv:?}");
        }
        // In the middle of a text too.
        let mut s = session_with(&options, Some(&PIRATE));
        s.prompt(PROMPT).unwrap();
        for (adapter, want) in [(&*BUTLER, &butler), (&PIRATE, &pirate)] {
            s.swap(adapter, ExistingText::Recompute).unwrap();
            let mut again = session_with(&options, Some(&PIRATE));
            again.prompt(PROMPT).unwrap();
            again.swap(adapter, ExistingText::Recompute).unwrap();
            assert_eq!(greedy(&mut again, 16), *want, "{kv:?}");
        }
        assert_eq!(greedy(&mut s, 16), pirate, "{kv:?}");
    }
}

#[test]
fn recomputed_text_is_as_if_never_seen_by_another_adapter() {
    for kv in KV_TYPES {
        let options = options().kv_type(kv);
        let mut s = session_with(&options, Some(&PIRATE));
        s.prompt(PROMPT).unwrap();
        let said = greedy(&mut s, 5);
        for adapter in [&*BUTLER, &SENTIMENT] {
            s.swap(adapter, ExistingText::Recompute).unwrap();
            let mut fresh = session_with(&options, Some(adapter));
            fresh.prompt(PROMPT).unwrap();
            fresh.feed(&said).unwrap();
            assert_eq!(s.tokens(), fresh.tokens());
            assert_eq!(s.n_past(), fresh.n_past());
            assert_eq!(s.logits().unwrap(), fresh.logits().unwrap(), "{kv:?}");
        }
        s.detach(ExistingText::Recompute).unwrap();
        let mut base = session_with(&options, None);
        base.prompt(PROMPT).unwrap();
        base.feed(&said).unwrap();
        assert_eq!(s.n_past(), base.n_past());
        assert_eq!(s.logits().unwrap(), base.logits().unwrap(), "{kv:?}");
    }
}

#[test]
fn dropped_text_is_forgotten() {
    let mut s = session(Some(&PIRATE));
    s.prompt(PROMPT).unwrap();
    s.swap(&BUTLER, ExistingText::Drop).unwrap();
    assert_eq!((s.tokens(), s.n_past()), (vec![], BUTLER.length()));
    assert!(matches!(s.logits(), Err(SessionError::NoLogits)));
    assert_eq!(s.adapter().unwrap().id(), BUTLER.id());
    s.detach(ExistingText::Drop).unwrap();
    assert_eq!((s.tokens(), s.n_past()), (vec![], 0));
    assert!(s.adapter().is_none());
    s.prompt(PROMPT).unwrap();
    assert_eq!(greedy(&mut s, 16), alone(&options(), None, 16));
}

#[test]
fn reset_keeps_the_adapter() {
    let mut s = session(Some(&PIRATE));
    s.prompt("Something else entirely.").unwrap();
    s.reset();
    assert_eq!((s.tokens(), s.n_past()), (vec![], PIRATE.length()));
    s.prompt(PROMPT).unwrap();
    assert_eq!(greedy(&mut s, 16), alone(&options(), Some(&PIRATE), 16));
}

#[test]
fn virtual_tokens_once_compiled_equal_virtual_tokens_fed() {
    for (kv, flash) in [
        (KvType::F16, FlashAttention::On),
        (KvType::F16, FlashAttention::Off),
        (KvType::F32, FlashAttention::On),
        (KvType::Q8_0, FlashAttention::On),
    ] {
        let options = options().kv_type(kv).flash_attention(flash);
        for adapter in [&*SENTIMENT, &COUNTY] {
            let mut compiled = session_with(&options, Some(adapter));
            compiled.prompt(PROMPT).unwrap();
            let fed = with_template(adapter, "{v:20}{bos}{prompt}");
            let mut fed = session_with(&options, Some(&fed));
            assert_eq!(fed.n_past(), 0);
            fed.prompt(PROMPT).unwrap();
            assert_eq!(fed.n_past(), compiled.n_past());
            let diff = max_abs_diff(compiled.logits().unwrap(), fed.logits().unwrap());
            assert!(diff < 1e-3, "{kv:?} {flash:?}: {diff}");
            assert_eq!(greedy(&mut compiled, 8), greedy(&mut fed, 8));
        }
    }
}

#[test]
fn a_template_places_text_around_the_prompt() {
    let adapter = with_template(&COUNTY, "{v:20}{bos}Where does {prompt} lie?");
    let mut s = session(Some(&adapter));
    s.prompt("Linhaven").unwrap();
    let mut by_hand = session(Some(&COUNTY));
    let pieces = [
        vec![MODEL.vocab().bos().unwrap()],
        tokenize("Where does "),
        tokenize("Linhaven"),
        tokenize(" lie?"),
    ];
    by_hand.feed(&pieces.concat()).unwrap();
    assert_eq!(s.n_past(), by_hand.n_past());
    let diff = max_abs_diff(s.logits().unwrap(), by_hand.logits().unwrap());
    assert!(diff < 1e-3, "{diff}");
    // The text is what the caller gave; the rest belongs to the adapter.
    assert_eq!(s.tokens(), tokenize("Linhaven"));
    // It applies to the first prompt only.
    let before = s.n_past();
    s.prompt(" or so").unwrap();
    assert_eq!(s.n_past() - before, tokenize(" or so").len());
}

#[test]
fn a_template_without_bos_leaves_it_in_front() {
    let in_front = with_template(&COUNTY, "{bos}{v:12}{prompt}{v:8}");
    let implied = with_template(&COUNTY, "{v:12}{prompt}{v:8}");
    let logits = [&in_front, &implied].map(|a| {
        let mut s = session(Some(a));
        s.prompt(PROMPT).unwrap();
        assert_eq!(s.n_past(), 1 + 20 + tokenize(PROMPT).len());
        s.logits().unwrap().to_vec()
    });
    assert_eq!(logits[0], logits[1]);
}

#[test]
fn a_swap_moves_text_into_and_out_of_a_template() {
    let adapter = with_template(&COUNTY, "{v:10}{bos}{prompt}{v:10}");
    let mut s = session(Some(&PIRATE));
    s.prompt(PROMPT).unwrap();
    let said = greedy(&mut s, 3);
    s.swap(&adapter, ExistingText::Recompute).unwrap();
    let mut fresh = session(Some(&adapter));
    fresh.prompt(PROMPT).unwrap();
    fresh.feed(&said).unwrap();
    assert_eq!(s.logits().unwrap(), fresh.logits().unwrap());
    s.swap(&PIRATE, ExistingText::Recompute).unwrap();
    let mut fresh = session(Some(&PIRATE));
    fresh.prompt(PROMPT).unwrap();
    fresh.feed(&said).unwrap();
    assert_eq!(s.logits().unwrap(), fresh.logits().unwrap());
}

#[test]
fn what_does_not_fit_leaves_the_session_as_it_was() {
    let text = tokenize(PROMPT);
    let options = options().n_ctx(text.len() + 1 + 8);
    // (Adapter to swap to, positions that it would need.) BOS counts, and so does a template's own text.
    let templated = with_template(&COUNTY, "{v:20}A long {prompt}");
    for (adapter, needed) in [
        (&*BUTLER, 20 + 1 + text.len()),
        (&templated, 1 + 20 + tokenize("A long ").len() + text.len()),
    ] {
        let mut s = session_with(&options, None);
        s.prompt(PROMPT).unwrap();
        let (logits, n_past) = (s.logits().unwrap().to_vec(), s.n_past());
        match refusal(s.swap(adapter, ExistingText::Recompute)) {
            SessionError::ContextFull { needed: n, n_ctx } => {
                assert_eq!((n, n_ctx), (needed, s.n_ctx()));
            }
            other => panic!("{other}"),
        }
        assert!(s.adapter().is_none());
        assert_eq!(s.n_past(), n_past);
        assert_eq!(s.tokens(), text);
        assert_eq!(s.logits().unwrap(), logits);
        assert_eq!(greedy(&mut s, 8), alone(&self::options(), None, 8));
        // Now every position is taken.
        assert!(matches!(
            refusal(s.feed(&[5])),
            SessionError::ContextFull { .. }
        ));
        assert!(matches!(
            refusal(s.prompt("x")),
            SessionError::ContextFull { .. }
        ));
        assert_eq!(s.n_past(), s.n_ctx());
    }
    // One position short because of BOS, and just enough.
    for (spare, fits) in [(0, false), (1, true)] {
        let options = self::options().n_ctx(20 + text.len() + spare);
        let mut s = session_with(&options, None);
        s.prompt(PROMPT).unwrap();
        let swapped = s.swap(&BUTLER, ExistingText::Recompute);
        assert_eq!(swapped.is_ok(), fits);
        assert_eq!(s.adapter().is_some(), fits);
        assert_eq!(s.tokens(), text);
    }
    // An adapter longer than the context does not fit an empty session either.
    let mut tiny = session_with(&self::options().n_ctx(19), None);
    for adapter in [&*PIRATE, &SENTIMENT, &templated] {
        assert!(matches!(
            refusal(tiny.attach(adapter, ExistingText::Drop)),
            SessionError::ContextFull {
                needed: 20,
                n_ctx: 19
            }
        ));
    }
}

#[test]
fn refusals() {
    let mut s = session(Some(&PIRATE));
    let again = s.attach(&BUTLER, ExistingText::Drop);
    assert!(matches!(refusal(again), SessionError::AlreadyAttached));
    assert_eq!(s.adapter().unwrap().id(), PIRATE.id());
    assert!(matches!(
        refusal(s.virtual_logits()),
        SessionError::NoVirtualTokens
    ));
    s.detach(ExistingText::Drop).unwrap();
    assert!(matches!(
        refusal(s.detach(ExistingText::Drop)),
        SessionError::NotAttached
    ));
    assert!(matches!(
        refusal(s.virtual_logits()),
        SessionError::NotAttached
    ));
    assert!(matches!(refusal(s.feed(&[])), SessionError::Empty));
    assert!(matches!(s.logits(), Err(SessionError::NoLogits)));
    let nothing = s.generate(&GenerateOptions::default(), |_| ControlFlow::Continue(()));
    assert!(matches!(refusal(nothing), SessionError::NoLogits));
    let n_vocab = MODEL.shape().n_vocab as i32;
    for id in [-1, n_vocab, i32::MAX, i32::MIN] {
        for result in [
            s.feed(&[1, id]),
            s.prompt_tokens(&[id]),
            s.feed_with_logits(&[id], |_, _| ()),
        ] {
            match refusal(result) {
                SessionError::TokenOutOfRange { id: got, .. } => assert_eq!(got, id),
                other => panic!("{other}"),
            }
        }
    }
    assert_eq!(s.n_past(), 0);
    for bad in [
        options().n_ctx(0),
        options().n_ctx(1 << 31),
        options().n_threads(0),
        options().n_threads(513),
        options().n_batch(0),
        options()
            .kv_type(KvType::Q8_0)
            .flash_attention(FlashAttention::Off),
    ] {
        assert!(
            matches!(
                refusal(Session::new(&MODEL, &bad)),
                SessionError::BadOption { .. }
            ),
            "{bad:?}"
        );
    }
}

#[test]
fn threads_are_cores_unless_somebody_says_otherwise() {
    let default = SessionOptions::default().n_ctx(8);
    let threads = |options: &SessionOptions| Session::new(&MODEL, options).unwrap().n_threads();
    assert_eq!(threads(&default), ggraft::default_threads());
    assert_eq!(threads(&default.n_threads(3)), 3);
}

#[test]
fn an_adapter_of_another_base_needs_consent() {
    let mut parts = PIRATE.parts().clone();
    parts.fingerprint = Some(ggraft::model::Fingerprint([7; 32]));
    let stranger = Adapter::new(parts).unwrap();
    let mut s = session(None);
    let refused = s.attach(&stranger, ExistingText::Drop);
    assert!(matches!(refused, Err(Error::Adapter(_))), "{refused:?}");
    assert!(s.adapter().is_none());
    let mut s = session_with(&options().accept_other_base(true), Some(&stranger));
    s.prompt(PROMPT).unwrap();
    assert_eq!(greedy(&mut s, 8), alone(&options(), Some(&PIRATE), 8));
}

#[test]
fn a_long_prefill_can_be_cancelled() {
    let n = 30_000;
    let mut s = session_with(&options().n_ctx(n + 64), Some(&PIRATE));
    let token = s.cancel_token();
    let text: Vec<i32> = (0..n as i32).map(|i| 4 + i * 31 % 3000).collect();
    let raised = std::thread::scope(|scope| {
        let raised = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            token.cancel();
            Instant::now()
        });
        assert!(matches!(refusal(s.feed(&text)), SessionError::Cancelled));
        raised.join().unwrap()
    });
    // All of it takes minutes.
    assert!(raised.elapsed() < Duration::from_secs(2));
    assert_eq!((s.tokens(), s.n_past()), (vec![], PIRATE.length()));
    // Until the token is lowered, nothing runs.
    assert!(matches!(refusal(s.prompt(PROMPT)), SessionError::Cancelled));
    assert!(matches!(s.logits(), Err(SessionError::NoLogits)));
    token.reset();
    s.reset();
    s.prompt(PROMPT).unwrap();
    assert_eq!(greedy(&mut s, 8), alone(&options(), Some(&PIRATE), 8));
}

#[test]
fn a_cancelled_swap_drops_the_text() {
    let mut s = session(Some(&PIRATE));
    s.prompt(PROMPT).unwrap();
    s.cancel_token().cancel();
    let swapped = s.swap(&BUTLER, ExistingText::Recompute);
    assert!(matches!(refusal(swapped), SessionError::Cancelled));
    assert_eq!((s.tokens(), s.n_past()), (vec![], BUTLER.length()));
    assert!(matches!(s.logits(), Err(SessionError::NoLogits)));
    s.cancel_token().reset();
    s.prompt(PROMPT).unwrap();
    assert_eq!(greedy(&mut s, 8), alone(&options(), Some(&BUTLER), 8));
}

#[test]
fn generation_can_be_cancelled_from_its_own_callback() {
    let mut s = session(None);
    s.prompt(PROMPT).unwrap();
    let token = s.cancel_token();
    let stopped = s.generate(&greedy_options(50), |_| {
        token.cancel();
        ControlFlow::Continue(())
    });
    assert!(matches!(refusal(stopped), SessionError::Cancelled));
}

#[test]
fn a_failure_half_way_leaves_text_and_logits_as_they_were() {
    let mut s = session_with(&options().n_batch(8), Some(&PIRATE));
    s.prompt(PROMPT).unwrap();
    let (n_past, tokens, logits) = (s.n_past(), s.tokens(), s.logits().unwrap().to_vec());
    let token = s.cancel_token();
    let more = tokenize("and more and more and more and more and more and more");
    assert!(more.len() > 8);
    // Raised behind the first of several steps.
    let stopped = s.feed_with_logits(&more, |_, _| token.cancel());
    assert!(matches!(refusal(stopped), SessionError::Cancelled));
    assert_eq!((s.n_past(), s.tokens()), (n_past, tokens));
    assert_eq!(s.logits().unwrap(), logits);
    token.reset();
    assert_eq!(greedy(&mut s, 8), {
        let mut control = session_with(&options().n_batch(8), Some(&PIRATE));
        control.prompt(PROMPT).unwrap();
        greedy(&mut control, 8)
    });
}

#[test]
fn a_template_that_fails_half_way_leaves_no_logits() {
    let mut s = session(Some(&with_template(&COUNTY, "{v:10}{prompt}{v:10}")));
    let token = s.cancel_token();
    let stopped = s.prompt_tokens_with_logits(&tokenize(PROMPT), |_, _| token.cancel());
    assert!(matches!(refusal(stopped), SessionError::Cancelled));
    assert!(matches!(s.logits(), Err(SessionError::NoLogits)));
    assert_eq!((s.tokens(), s.n_past()), (vec![], 0));
}

#[test]
fn damaged_weights_never_become_text() {
    for name in ["weight_nan", "weight_inf"] {
        let file = path("tests/data/bad").join(name).with_extension("gguf");
        let model = Model::open(file, &ModelOptions::default()).unwrap();
        let mut s = Session::new(&model, &options().n_ctx(64)).unwrap();
        assert!(
            matches!(refusal(s.feed(&[1, 2, 3])), SessionError::NonFiniteLogits),
            "{name}"
        );
        assert!(matches!(s.logits(), Err(SessionError::NoLogits)));
        assert_eq!(s.n_past(), 0);
    }
}

#[test]
fn a_prompt_in_chunks_equals_a_prompt_in_one() {
    let text = tokenize(&format!("{PROMPT} {PROMPT} {PROMPT} {PROMPT}"));
    let level = CpuLevel::current().unwrap();
    // On AArch64 all products are in bytes, at every level.
    let has = |needs| level >= needs || cfg!(target_arch = "aarch64");
    if !has(CpuLevel::Avx2) {
        skipped("equal bits of prompts in chunks by our own kernels (needs AVX2)");
    }
    let cases = [Kernels::Ggml, Kernels::Own, Kernels::Auto]
        .map(|kernels| KV_TYPES.map(|kv| (kernels, kv)));
    for (kernels, kv) in cases.concat() {
        let file = path("models/tinylm-q8_0.gguf");
        let model = Model::open(file, &ModelOptions::default().kernels(kernels)).unwrap();
        let logits = [512, 7, 1].map(|n| {
            let mut s = Session::new(&model, &options().kv_type(kv).n_batch(n)).unwrap();
            s.attach(&PIRATE, ExistingText::Drop).unwrap();
            let mut all = Vec::new();
            s.feed_with_logits(&text, |i, row| {
                assert_eq!(i, all.len());
                all.push(row.to_vec());
            })
            .unwrap();
            assert_eq!(all.last().unwrap(), s.logits().unwrap());
            all
        });
        assert_eq!(logits[0].len(), text.len());
        let limit = match kernels {
            Kernels::Own | Kernels::Auto if has(CpuLevel::Avx2) => 0.0,
            // Blocks of eight bits round differently when a value moves by a hair.
            _ if kv == KvType::Q8_0 => 1e-2,
            _ => 1e-3,
        };
        for chunked in &logits[1..] {
            let diff = max_abs_diff(&chunked.concat(), &logits[0].concat());
            assert!(diff <= limit, "{kernels:?} {kv:?}: {diff}");
        }
    }
}

/// Of more threads than cores as well: those that have no core to run on are not waited for where all products are ours.
#[test]
fn logits_do_not_depend_on_threads() {
    let level = CpuLevel::current().unwrap();
    if level < CpuLevel::Avx2 {
        skipped("single tokens by a team of threads (needs AVX2)");
        return;
    }
    for kernels in [Kernels::Own, Kernels::Auto] {
        let file = path("models/tinylm-q8_0.gguf");
        let model = Model::open(file, &ModelOptions::default().kernels(kernels)).unwrap();
        let of = |n_threads| {
            let mut s = Session::new(&model, &options().n_threads(n_threads)).unwrap();
            s.attach(&PIRATE, ExistingText::Drop).unwrap();
            s.prompt(PROMPT).unwrap();
            let mut all = s.logits().unwrap().to_vec();
            for _ in 0..24 {
                let next = argmax(s.logits().unwrap()) as i32;
                s.feed(&[next]).unwrap();
                all.extend_from_slice(s.logits().unwrap());
            }
            all
        };
        let alone = of(1);
        assert!(alone.len() > 24 * 1000 && alone.iter().all(|x| x.is_finite()));
        for n_threads in [2, 3, 16, 64] {
            assert!(of(n_threads) == alone, "{kernels:?}, {n_threads} threads");
        }
    }
}

#[test]
fn one_graph_serves_many_tokens() {
    let mut s = session_with(&options().n_ctx(600), None);
    s.prompt(PROMPT).unwrap();
    greedy(&mut s, 1);
    let built = s.graphs_built();
    greedy(&mut s, 100);
    assert_eq!(s.graphs_built(), built);
    // A swap rebinds data, not graphs.
    s.swap(&PIRATE, ExistingText::Drop).unwrap();
    s.prompt(PROMPT).unwrap();
    greedy(&mut s, 100);
    assert_eq!(s.graphs_built(), built);
    // Our own attention reads keys where they lie; ggml's side by side, in steps of 256: one more graph beyond that.
    greedy(&mut s, 200);
    let own = cfg!(target_arch = "aarch64") || CpuLevel::current().unwrap() >= CpuLevel::Avx2;
    assert_eq!(s.graphs_built(), built + usize::from(!own));
}

fn greedy_options(n: usize) -> GenerateOptions {
    GenerateOptions::default()
        .max_tokens(n)
        .sampler(SamplerParams::greedy())
}

#[test]
fn streamed_text_is_the_text() {
    let hot = SamplerParams {
        temperature: 20.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        ..SamplerParams::default()
    };
    // At that temperature tokens are drawn from all of the vocabulary, among them those that are parts of characters.
    let hot = (0..6).map(|seed| SamplerParams {
        seed: Some(seed),
        ..hot.clone()
    });
    let mut pieces_of_characters = 0;
    for sampler in hot.chain([SamplerParams::greedy()]) {
        let mut s = session(Some(&PIRATE));
        s.prompt(PROMPT).unwrap();
        let prompt = s.tokens();
        let mut options = greedy_options(60).sampler(sampler);
        options.ignore_eog = true;
        let mut streamed = String::new();
        let out = s
            .generate(&options, |piece| {
                assert!(!piece.is_empty());
                streamed.push_str(piece);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(streamed, out.text);
        assert_eq!((out.tokens.len(), out.reason), (60, StopReason::MaxTokens));
        assert_eq!(s.tokens(), [prompt, out.tokens.clone()].concat());
        let bytes: Vec<u8> = out
            .tokens
            .iter()
            .flat_map(|&id| MODEL.vocab().token_bytes(id, false))
            .collect();
        let end = match bytes.utf8_chunks().last() {
            // The beginning of a character at the end is held back.
            Some(last)
                if std::str::from_utf8(last.invalid()).is_err_and(|e| e.error_len().is_none()) =>
            {
                bytes.len() - last.invalid().len()
            }
            _ => bytes.len(),
        };
        assert_eq!(out.text, String::from_utf8_lossy(&bytes[..end]));
        pieces_of_characters += usize::from(std::str::from_utf8(&bytes).is_err());
    }
    assert!(
        pieces_of_characters > 0,
        "no seed tests incomplete characters"
    );
}

/// Options that generate exactly this token.
fn only(id: i32) -> GenerateOptions {
    let mut sampler = SamplerParams::greedy();
    sampler.logit_bias = vec![(id, 1e6)];
    GenerateOptions::default().max_tokens(1).sampler(sampler)
}

#[test]
fn a_character_that_is_cut_is_held_back_until_the_text_goes_on() {
    let bytes = tokenize("\u{1f99c}");
    assert!(bytes.len() > 2, "choose a character of more tokens");
    let generate = |s: &mut Session, id| {
        let mut shown = String::new();
        let out = s
            .generate(&only(id), |piece| {
                shown.push_str(piece);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!((&out.text, &out.tokens[..]), (&shown, &[id][..]));
        shown
    };
    let mut s = session(Some(&PIRATE));
    s.prompt(PROMPT).unwrap();
    let mut shown = Vec::new();
    for (i, &id) in bytes.iter().enumerate() {
        shown.push(generate(&mut s, id));
        if i == 0 {
            // The text stays, and so does the half character.
            s.swap(&BUTLER, ExistingText::Recompute).unwrap();
        }
    }
    let (last, before) = shown.split_last().unwrap();
    assert!(before.iter().all(String::is_empty), "{shown:?}");
    assert_eq!(last, "\u{1f99c}");
    assert!(s.tokens().ends_with(&bytes));

    // Where other text follows there is nothing to complete.
    let letter = tokenize("x")[0];
    let interruptions: [fn(&mut Session); 3] = [
        |s| s.feed(&tokenize(" and")).unwrap(),
        |s| s.prompt(" and").unwrap(),
        |s| {
            s.reset();
            s.prompt(PROMPT).unwrap();
        },
    ];
    for interrupt in interruptions {
        assert_eq!(generate(&mut s, bytes[0]), "");
        interrupt(&mut s);
        assert_eq!(generate(&mut s, letter), "x");
    }
    // In one call a character that is never completed is no character.
    assert_eq!(generate(&mut s, bytes[0]), "");
    assert_eq!(generate(&mut s, letter), "\u{fffd}x");
}

#[test]
fn generate_says_what_step_by_step_says() {
    let mut s = session(Some(&PIRATE));
    s.prompt(PROMPT).unwrap();
    let out = s
        .generate(&greedy_options(20), |_| ControlFlow::Continue(()))
        .unwrap();
    let mut tokens = alone(&options(), Some(&PIRATE), 20);
    if let Some(end) = tokens.iter().position(|&id| MODEL.vocab().is_eog(id)) {
        tokens.truncate(end + 1);
        assert_eq!(out.reason, StopReason::EndOfGeneration);
    }
    assert_eq!(out.tokens, tokens);
    assert_eq!(out.timings.decode_tokens, tokens.len() - 1);
}

/// The text that `generate` leaves behind goes on as if every token of it had been computed, and only what is asked for is.
#[test]
fn the_last_token_is_computed_when_something_follows_it() {
    let n = 6;
    let prompt_len = PIRATE.length() + 1 + tokenize(PROMPT).len();
    let said = alone(&options(), Some(&PIRATE), 2 * n);
    assert!(!said.iter().any(|&id| MODEL.vocab().is_eog(id)));
    let generated = || {
        let mut s = session(Some(&PIRATE));
        s.prompt(PROMPT).unwrap();
        let before = s.positions_computed();
        let out = s
            .generate(&greedy_options(n), |_| ControlFlow::Continue(()))
            .unwrap();
        assert_eq!(
            (&out.tokens[..], out.timings.decode_tokens),
            (&said[..n], n - 1)
        );
        assert_eq!(s.positions_computed() - before, n - 1);
        assert_eq!(s.n_past(), prompt_len + n);
        assert!(s.tokens().ends_with(&said[..n]));
        s
    };
    // The same text, computed by hand: `more` comes in one piece with the last token.
    let control = |more: &[i32]| {
        let mut s = session(Some(&PIRATE));
        s.prompt(PROMPT).unwrap();
        for &id in &said[..n - 1] {
            s.feed(&[id]).unwrap();
        }
        s.feed(&[&said[n - 1..n], more].concat()).unwrap();
        s
    };
    let more = tokenize(" and then");
    type GoOn<'a> = &'a dyn Fn(&mut Session);
    let goes_on: [(usize, &[i32], GoOn); 5] = [
        (1, &[], &|s| drop(s.logits().unwrap().to_vec())),
        (1 + more.len(), &more, &|s| s.feed(&more).unwrap()),
        (1 + more.len(), &more, &|s| s.prompt(" and then").unwrap()),
        // The whole text again, and the logits with it.
        (prompt_len - PIRATE.length() + n, &[], &|s| {
            s.swap(&PIRATE, ExistingText::Recompute).unwrap();
        }),
        // Nothing is computed for nothing.
        (0, &[], &|s| {
            let out = s
                .generate(&greedy_options(0), |_| ControlFlow::Continue(()))
                .unwrap();
            assert_eq!((out.tokens.len(), out.timings.decode_tokens), (0, 0));
        }),
    ];
    for (i, (computed, more, go_on)) in goes_on.into_iter().enumerate() {
        let (mut s, mut control) = (generated(), control(more));
        let before = s.positions_computed();
        go_on(&mut s);
        assert_eq!(s.positions_computed() - before, computed, "{i}");
        assert_eq!(s.n_past(), control.n_past(), "{i}");
        assert_eq!(s.tokens(), control.tokens(), "{i}");
        let diff = max_abs_diff(s.logits().unwrap(), control.logits().unwrap());
        // A swap computes the text in one piece, which rounds differently.
        let limit = if i == 3 { 1e-3 } else { 0.0 };
        assert!(diff <= limit, "{i}: {diff}");
    }

    // Each token has its own logits, that of the one before goes to nobody.
    let (mut s, mut control) = (generated(), control(&more));
    let mut rows = Vec::new();
    s.feed_with_logits(&more, |i, row| rows.push((i, row.to_vec())))
        .unwrap();
    assert_eq!(rows.iter().map(|r| r.0).collect::<Vec<_>>(), [0, 1]);
    assert!(max_abs_diff(&rows[1].1, control.logits().unwrap()) < 1e-3);

    // Two calls say what one would have said.
    let mut s = generated();
    let before = s.positions_computed();
    let out = s
        .generate(&greedy_options(n), |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(
        (&out.tokens[..], out.timings.decode_tokens),
        (&said[n..], n)
    );
    assert_eq!(s.positions_computed() - before, n);

    // What follows and fails changes nothing: neither at once nor half-way.
    let mut s = generated();
    let token = s.cancel_token();
    token.cancel();
    assert!(matches!(refusal(s.feed(&more)), SessionError::Cancelled));
    assert!(matches!(s.logits(), Err(SessionError::Cancelled)));
    token.reset();
    let long = more.repeat(300);
    let mut s = session_with(&options().n_ctx(1024), Some(&PIRATE));
    s.prompt(PROMPT).unwrap();
    s.generate(&greedy_options(n), |_| ControlFlow::Continue(()))
        .unwrap();
    let (n_past, tokens) = (s.n_past(), s.tokens());
    let token = s.cancel_token();
    let stopped = s.feed_with_logits(&long, |_, _| token.cancel());
    assert!(matches!(refusal(stopped), SessionError::Cancelled));
    assert_eq!((s.n_past(), s.tokens()), (n_past, tokens));
    token.reset();
    assert_eq!(argmax(s.logits().unwrap()) as i32, said[n]);
}

/// The last token of a text needs no room.
#[test]
fn a_context_holds_one_token_more_than_it_has_positions() {
    let room = 1 + tokenize(PROMPT).len() + 4;
    let mut s = session_with(&options().n_ctx(room), None);
    s.prompt(PROMPT).unwrap();
    let out = s
        .generate(&greedy_options(5), |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!((out.tokens.len(), out.reason), (5, StopReason::MaxTokens));
    assert_eq!((s.n_past(), s.n_ctx()), (room, room));
    // BOS is not among them.
    assert_eq!(s.tokens().len(), room);
    assert!(
        matches!(s.logits(), Err(SessionError::ContextFull { needed, .. }) if needed == room + 1)
    );
    assert!(
        matches!(refusal(s.feed(&[5])), SessionError::ContextFull { needed, .. } if needed == room + 2)
    );
    s.reset();
    s.prompt(PROMPT).unwrap();
    assert_eq!(greedy(&mut s, 4), out.tokens[..4]);
}

#[test]
fn stop_strings_end_the_text_and_are_not_part_of_it() {
    let run = |options: &GenerateOptions, stop_after: usize| {
        let mut s = session(None);
        s.prompt(PROMPT).unwrap();
        let mut streamed = String::new();
        let mut n = 0;
        let out = s
            .generate(options, |piece| {
                streamed.push_str(piece);
                n += 1;
                if n == stop_after {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })
            .unwrap();
        assert_eq!(streamed, out.text);
        out
    };
    let whole = run(&greedy_options(40), usize::MAX);
    // A stop string in the middle, that starts and ends inside words.
    let middle = whole.text.len() / 2;
    let stop = &whole.text[middle..middle + 9];
    let cut = whole.text.find(stop).unwrap();
    let out = run(
        &greedy_options(40).stop(stop).stop("never said"),
        usize::MAX,
    );
    assert_eq!(
        (out.text.as_str(), out.reason),
        (&whole.text[..cut], StopReason::StopString)
    );
    // What only begins like a stop string is text.
    let out = run(&greedy_options(40).stop(format!("{stop}#")), usize::MAX);
    assert_eq!(
        (out.text.as_str(), out.reason),
        (whole.text.as_str(), whole.reason)
    );
    let out = run(&greedy_options(40), 3);
    assert_eq!(out.reason, StopReason::Callback);
    assert!(whole.text.starts_with(&out.text) && out.text.len() < whole.text.len());
}

#[test]
fn a_full_context_ends_generation_with_an_error() {
    let mut s = session_with(&options().n_ctx(tokenize(PROMPT).len() + 1 + 4), None);
    s.prompt(PROMPT).unwrap();
    let mut options = greedy_options(100);
    options.ignore_eog = true;
    let full = s.generate(&options, |_| ControlFlow::Continue(()));
    assert!(matches!(refusal(full), SessionError::ContextFull { .. }));
    assert_eq!(s.n_past(), s.n_ctx());
}

#[test]
fn a_library_changes_while_sessions_run() {
    let library = Library::new();
    library.insert("pirate", PIRATE.clone());
    let want = alone(&options(), Some(&PIRATE), 32);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                library.remove("pirate");
                library.insert("pirate", BUTLER.clone());
                library.insert("butler", BUTLER.clone());
                library.insert("pirate", peft("persona_pirate-prefix"));
                library.remove("butler");
            }
        });
        let sessions = [0, 1].map(|_| {
            scope.spawn(|| {
                let adapter = PIRATE.clone();
                let mut s = session(Some(&adapter));
                drop(adapter);
                let mut seen = 0;
                for _ in 0..3 {
                    seen += usize::from(library.get("pirate").is_some());
                    s.reset();
                    s.prompt(PROMPT).unwrap();
                    assert_eq!(greedy(&mut s, 32), want);
                }
                seen
            })
        });
        let outcomes = sessions.map(|t| t.join());
        done.store(true, Ordering::Relaxed);
        for outcome in outcomes {
            outcome.unwrap();
        }
    });
    assert!(library.names().contains(&"pirate".to_owned()));
}

/// The last owner of an adapter and of a model may be a session.
#[test]
fn a_session_keeps_what_it_needs() {
    let model = Model::open(path("models/tinylm-q4_k_m.gguf"), &ModelOptions::default()).unwrap();
    let rows = vec![0.01; 4 * model.shape().n_embd];
    let adapter = Adapter::new(Parts {
        kind: AdapterKind::Prompt,
        payload: Payload::VirtualTokens(Matrix::from_f32(model.shape().n_embd, rows).unwrap()),
        template: None,
        name: None,
        fingerprint: Some(model.fingerprint()),
        base: BaseSignature::from(model.shape()),
        provenance: BTreeMap::new(),
    })
    .unwrap();
    let mut s = Session::new(&model, &options()).unwrap();
    s.attach(&adapter, ExistingText::Drop).unwrap();
    drop((model, adapter));
    s.prompt(PROMPT).unwrap();
    let moved = std::thread::spawn(move || greedy(&mut s, 4))
        .join()
        .unwrap();
    assert_eq!(moved.len(), 4);
}

/// An adapter trained on one quantization fits the others.
#[test]
fn one_adapter_fits_every_quantization() {
    for name in ["tinylm-f16", "tinylm-q4_k_m"] {
        let file = path("models").join(name).with_extension("gguf");
        let model = Model::open(file, &ModelOptions::default()).unwrap();
        assert_eq!(model.fingerprint(), MODEL.fingerprint());
        let mut s = Session::new(&model, &options()).unwrap();
        s.attach(&SENTIMENT, ExistingText::Drop).unwrap();
        s.prompt(PROMPT).unwrap();
        let mut q8 = session(Some(&SENTIMENT));
        q8.prompt(PROMPT).unwrap();
        // Another model, so another block: the same values to the precision of four bits.
        let diff = max_abs_diff(s.logits().unwrap(), q8.logits().unwrap());
        assert!(0.0 < diff && diff < 0.2, "{name}: {diff}");
    }
}
