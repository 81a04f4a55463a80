//! Text that is taken back: what is left is what it would be had nothing else ever been there.

use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{FlashAttention, GenerateOptions, KvType, SessionError};
use ggraft::{Adapter, CpuLevel, Kernels, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::bases::{self, Base, Random, session, session_options};
use ggraft_testkit::metrics::{argmax, max_abs_diff};
use ggraft_testkit::{adapters, skipped};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::LazyLock;

/// Products of ours do not depend on how many tokens are computed together.
static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tinylm-q8_0.gguf");
    Model::open(path, &own()).unwrap()
});

const PROMPT: &str = "The rain has not stopped for three days.";

fn own() -> ModelOptions {
    ModelOptions::default().kernels(Kernels::Own)
}

fn bases() -> Vec<Base> {
    bases::bases(tempfile::tempdir().unwrap().path(), &own())
}

fn options() -> SessionOptions {
    SessionOptions::default().n_ctx(256).n_threads(1)
}

fn greedy(n: usize) -> GenerateOptions {
    let mut options = GenerateOptions::default().max_tokens(n);
    options.sampler = SamplerParams::greedy();
    options.ignore_eog = true;
    options
}

fn generate(s: &mut Session, n: usize) -> Vec<i32> {
    let out = s.generate(&greedy(n), |_| ControlFlow::Continue(()));
    out.unwrap().tokens
}

/// What rounding may change where kernels are not ours; another text changes more.
const ROUNDING: f32 = 1e-3;

/// The same bits, where kernels are ours; the same but for rounding elsewhere.
fn assert_same(a: &[f32], b: &[f32], bits: bool, what: &str) {
    assert!(!a.is_empty() && a.iter().all(|x| x.is_finite()), "{what}");
    let limit = if bits { 0.0 } else { ROUNDING };
    let diff = max_abs_diff(a, b);
    assert!(diff <= limit, "{what}: {diff}");
}

/// Attention and products of ours, whose bits do not depend on how a text is cut.
fn has_own_kernels() -> bool {
    cfg!(target_arch = "aarch64") || CpuLevel::current().unwrap() >= CpuLevel::Avx2
}

/// What a session was given: prompts and other tokens.
#[derive(Clone, Debug, Default)]
struct Script(Vec<(bool, Vec<i32>)>);

impl Script {
    fn add(&mut self, prompt: bool, tokens: &[i32]) {
        match self.0.last_mut() {
            Some((false, last)) if !prompt => last.extend(tokens),
            _ => self.0.push((prompt, tokens.to_vec())),
        }
    }

    fn len(&self) -> usize {
        self.0.iter().map(|(_, tokens)| tokens.len()).sum()
    }

    /// The first `n` tokens of it.
    fn cut(&self, n: usize) -> Self {
        let mut out = Self::default();
        let mut left = n;
        for (prompt, tokens) in &self.0 {
            let taken = left.min(tokens.len());
            if taken > 0 {
                out.add(*prompt, &tokens[..taken]);
            }
            left -= taken;
        }
        out
    }

    fn give(&self, s: &mut Session) {
        for (prompt, tokens) in &self.0 {
            match prompt {
                true => s.prompt_tokens(tokens).unwrap(),
                false => s.feed(tokens).unwrap(),
            }
        }
    }
}

/// Texts that grow and are cut at random, beside sessions that are given what is left.
fn cuts(base: &Base, options: &SessionOptions, adapter: Option<&Adapter>, seed: u64) -> usize {
    let mut random = Random::new(seed);
    let r = &mut random;
    let mut s = session(&base.model, options, adapter);
    let mut script = Script::default();
    let what = |script: &Script| format!("{}, {options:?}, {adapter:?}: {script:?}", base.name);
    let bits = has_own_kernels() && options.flash_attention == FlashAttention::On;
    let most = s.n_ctx() - 20;
    for _ in 0..6 {
        let more = 1 + r.below(90);
        let more = more.min(most.saturating_sub(script.len()));
        if more > 0 {
            match r.below(3) {
                0 => {
                    let tokens = r.tokens(&base.model, more);
                    s.prompt_tokens(&tokens).unwrap();
                    script.add(true, &tokens);
                }
                1 if !script.0.is_empty() => {
                    let tokens = generate(&mut s, more.min(9));
                    script.add(false, &tokens);
                }
                _ => {
                    let tokens = r.tokens(&base.model, more);
                    s.feed(&tokens).unwrap();
                    script.add(false, &tokens);
                }
            }
        }
        // Also twice, and by one token.
        for _ in 0..1 + r.below(2) {
            let n = match r.below(3) {
                0 => script.len().saturating_sub(1),
                _ => r.below(script.len() + 1),
            };
            script = script.cut(n);
            s.truncate(n).unwrap();
        }
        let mut control = session(&base.model, options, adapter);
        script.give(&mut control);
        assert_eq!(s.tokens(), control.tokens(), "{}", what(&script));
        assert_eq!(s.n_past(), control.n_past(), "{}", what(&script));
        match (script.0.is_empty(), r.below(2)) {
            (true, _) => assert!(matches!(s.logits(), Err(SessionError::NoLogits))),
            (false, 0) => assert_same(
                s.logits().unwrap(),
                control.logits().unwrap(),
                bits,
                &what(&script),
            ),
            _ => {
                // What follows it, without a look at the logits.
                let more = r.tokens(&base.model, 3);
                s.feed(&more).unwrap();
                control.feed(&more).unwrap();
                script.add(false, &more);
                assert_same(
                    s.logits().unwrap(),
                    control.logits().unwrap(),
                    bits,
                    &what(&script),
                );
            }
        }
    }
    script.len()
}

#[test]
fn what_is_left_is_what_it_would_be_without_the_rest() {
    if !has_own_kernels() {
        skipped("equal bits of texts that were cut (needs AVX2)");
    }
    let bases = bases();
    assert!(bases.len() > 20 && bases.iter().any(|b| b.has_window));
    let (mut n, mut tokens) = (0, 0);
    for base in &bases {
        let options = session_options(&base.model, 220);
        assert!(options.len() >= 3, "{}", base.name);
        for options in &options {
            for adapter in &base.adapters {
                n += 1;
                tokens += cuts(base, options, adapter.as_ref(), n);
            }
        }
    }
    assert!(n > 300 && tokens as u64 > 10 * n, "{n} {tokens}");
}

/// What is no rounding exceeds its limit: one token, or one position, too many or too few.
#[test]
fn other_texts_differ_by_more_than_rounding() {
    for base in bases() {
        let options = session_options(&base.model, 60).swap_remove(1);
        assert_eq!(options.flash_attention, FlashAttention::Off);
        let text = Random::new(1).tokens(&base.model, 20);
        let logits = |text: &[i32]| {
            let mut s = session(&base.model, &options, None);
            s.feed(text).unwrap();
            s.logits().unwrap().to_vec()
        };
        let own = logits(&text);
        let mut changed = text.clone();
        changed[18] = (changed[18] + 1) % 100;
        for other in [
            &changed[..],
            &text[..19],
            &[&text[..], &text[19..]].concat(),
        ] {
            let diff = max_abs_diff(&own, &logits(other));
            assert!(diff > 10.0 * ROUNDING, "{}: {diff}", base.name);
        }
    }
}

#[test]
fn only_the_last_token_is_computed_again() {
    for kv in [KvType::F16, KvType::F32, KvType::Q8_0] {
        let options = options().kv_type(kv);
        let prefix = adapters::prefix(&MODEL, 20, 1);
        for adapter in [None, Some(&prefix)] {
            let mut s = session(&MODEL, &options, adapter);
            s.prompt(PROMPT).unwrap();
            let n_prompt = s.tokens().len();
            s.feed(&[5; 100]).unwrap();
            let before = s.positions_computed();
            s.truncate(n_prompt + 3).unwrap();
            assert_eq!(s.positions_computed(), before);
            s.logits().unwrap();
            assert_eq!(s.positions_computed(), before + 1);
            s.truncate(n_prompt - 1).unwrap();
            s.feed(&[7, 8]).unwrap();
            assert_eq!(s.positions_computed(), before + 1 + 3);

            // Of what was generated the last token was not computed, and the logits in front of it are there.
            generate(&mut s, 4);
            let n = s.tokens().len();
            let before = s.positions_computed();
            s.truncate(n - 1).unwrap();
            let logits = s.logits().unwrap().to_vec();
            assert_eq!(s.positions_computed(), before);
            let tokens = s.tokens();
            assert_eq!(tokens.len(), n - 1);
            let mut control = session(&MODEL, &options, adapter);
            control.prompt_tokens(&tokens[..n_prompt - 1]).unwrap();
            control.feed(&tokens[n_prompt - 1..]).unwrap();
            assert_same(&logits, control.logits().unwrap(), has_own_kernels(), "");
            // They are known no more when text was taken back in front of them.
            s.truncate(n - 2).unwrap();
            s.truncate(n - 3).unwrap();
            let mut control = session(&MODEL, &options, adapter);
            control.prompt_tokens(&tokens[..n_prompt - 1]).unwrap();
            control.feed(&tokens[n_prompt - 1..n - 3]).unwrap();
            let logits = s.logits().unwrap();
            assert_same(logits, control.logits().unwrap(), has_own_kernels(), "");
        }
    }
}

#[test]
fn what_a_template_puts_behind_the_prompt_is_computed_anew() {
    let bos = usize::from(MODEL.vocab().leading_bos().is_some());
    let behind = MODEL.vocab().tokenize("?", false, true).unwrap().len();
    // (Template, its virtual tokens and its text behind the prompt.)
    for (template, virtual_behind, text_behind) in [
        ("{v:4}{bos}{prompt}", 0, 0),
        ("{v:2}{bos}{prompt}{v:2}", 2, 0),
        ("{v:2}{bos}{prompt}{v:2}?", 2, behind),
        ("{v:4}{bos}{prompt}?", 0, behind),
    ] {
        let adapter = adapters::p_tuning(&MODEL, template, 4, 1);
        let given = || {
            let mut s = session(&MODEL, &options(), Some(&adapter));
            s.prompt_tokens(&[10, 11, 12, 13]).unwrap();
            assert_eq!(s.n_past(), 4 + bos + 4 + text_behind);
            s.feed(&[14, 15]).unwrap();
            s
        };
        // (Tokens that stay, positions that are computed for the logits.)
        let cut_inside = (virtual_behind + text_behind).max(1);
        for (n, computed) in [(5, 1), (4, 1), (3, cut_inside), (1, cut_inside)] {
            let mut s = given();
            let before = s.positions_computed();
            s.truncate(n).unwrap();
            let mut control = session(&MODEL, &options(), Some(&adapter));
            control
                .prompt_tokens(&[10, 11, 12, 13][..n.min(4)])
                .unwrap();
            if n == 5 {
                control.feed(&[14]).unwrap();
            }
            assert_eq!(s.n_past(), control.n_past(), "{template} {n}");
            let logits = s.logits().unwrap().to_vec();
            assert_eq!(s.positions_computed() - before, computed, "{template} {n}");
            let what = format!("{template} {n}");
            assert_same(&logits, control.logits().unwrap(), has_own_kernels(), &what);
            assert_eq!(generate(&mut s, 5), generate(&mut control, 5));
        }
    }
}

#[test]
fn keys_that_a_window_gave_back_are_computed_again() {
    let bases = bases();
    let mut n = 0;
    for base in bases.iter().filter(|base| base.has_window) {
        let options = session_options(&base.model, 220).swap_remove(0);
        let text = Random::new(1).tokens(&base.model, 150);
        let mut s = session(&base.model, &options, None);
        s.feed(&text).unwrap();
        let before = s.positions_computed();
        // The window's page is there.
        s.truncate(145).unwrap();
        s.logits().unwrap();
        assert_eq!(s.positions_computed() - before, 1, "{}", base.name);
        // It is not.
        let before = s.positions_computed();
        s.truncate(100).unwrap();
        s.logits().unwrap();
        assert_eq!(s.positions_computed() - before, 100, "{}", base.name);
        n += 1;
    }
    assert!(n > 2);
}

#[test]
fn as_many_tokens_as_there_are_and_none() {
    let mut s = session(&MODEL, &options(), None);
    s.truncate(0).unwrap();
    s.truncate(7).unwrap();
    s.prompt(PROMPT).unwrap();
    generate(&mut s, 3);
    let (tokens, n_past, computed) = (s.tokens(), s.n_past(), s.positions_computed());
    for n in [tokens.len(), tokens.len() + 1, usize::MAX] {
        s.truncate(n).unwrap();
        assert_eq!((s.tokens(), s.n_past()), (tokens.clone(), n_past));
    }
    s.logits().unwrap();
    // The sampled token that was not computed yet.
    assert_eq!(s.positions_computed(), computed + 1);
    s.truncate(0).unwrap();
    assert_eq!((s.tokens(), s.n_past()), (vec![], 0));
    assert!(matches!(s.logits(), Err(SessionError::NoLogits)));
    // What begins a text is no token of it, and goes with the last one.
    s.prompt("").unwrap();
    assert_eq!((s.tokens(), s.n_past()), (vec![], 1));
    s.truncate(1).unwrap();
    assert_eq!(s.n_past(), 1);
    s.feed(&[5, 6]).unwrap();
    s.truncate(1).unwrap();
    assert_eq!((s.tokens(), s.n_past()), (vec![5], 2));
    s.truncate(0).unwrap();
    assert_eq!(s.n_past(), 0);
    s.prompt("").unwrap();
    s.truncate(0).unwrap();
    assert_eq!(s.n_past(), 0);
    // A text that begins anew has its beginning.
    s.prompt(PROMPT).unwrap();
    let mut control = session(&MODEL, &options(), None);
    control.prompt(PROMPT).unwrap();
    assert_eq!(s.n_past(), control.n_past());
    assert_eq!(s.logits().unwrap(), control.logits().unwrap());
}

/// A text that fills its context has room again.
#[test]
fn room_is_given_back() {
    let mut s = session(&MODEL, &options().n_ctx(40), None);
    s.feed(&[9; 30]).unwrap();
    generate(&mut s, 11);
    assert!(matches!(
        s.logits(),
        Err(SessionError::ContextFull { needed: 41, .. })
    ));
    assert_eq!((s.tokens().len(), s.n_past()), (41, 40));
    s.truncate(40).unwrap();
    s.logits().unwrap();
    s.truncate(20).unwrap();
    assert_eq!(s.n_past(), 20);
    s.feed(&[9; 20]).unwrap();
    let mut control = session(&MODEL, &options().n_ctx(40), None);
    control.feed(&[9; 30]).unwrap();
    control.feed(&[9; 10]).unwrap();
    let logits = s.logits().unwrap();
    assert_same(logits, control.logits().unwrap(), has_own_kernels(), "");
}

#[test]
fn what_fails_leaves_the_session_as_it_was() {
    let windowed = bases().into_iter().find(|base| base.has_window);
    let windowed = windowed.unwrap().model;
    let template = adapters::p_tuning(&MODEL, "{v:2}{bos}{prompt}{v:2}", 4, 1);
    for (model, adapter) in [(&windowed, None), (&*MODEL, Some(&template))] {
        let given = || {
            let mut s = session(model, &options().n_ctx(200), adapter);
            s.prompt_tokens(&[9; 100]).unwrap();
            s.feed(&[10; 50]).unwrap();
            generate(&mut s, 3);
            s
        };
        let mut s = given();
        let cancel = s.cancel_token();
        cancel.cancel();
        let (tokens, n_past) = (s.tokens(), s.n_past());
        let stopped = s.truncate(60);
        assert!(matches!(
            stopped,
            Err(ggraft::Error::Session(SessionError::Cancelled))
        ));
        assert_eq!((s.tokens(), s.n_past()), (tokens, n_past));
        cancel.reset();
        let mut control = given();
        assert_eq!(s.logits().unwrap(), control.logits().unwrap());
        assert_eq!(generate(&mut s, 5), generate(&mut control, 5));
        s.truncate(60).unwrap();
        assert_eq!(s.tokens(), [9; 60]);
    }
}

/// What was swapped in, and what is swapped in later, has the text that is left.
#[test]
fn a_text_that_was_cut_can_be_computed_under_another_adapter() {
    let [a, b] = [1, 2].map(|seed| adapters::prefix(&MODEL, 7, seed));
    let mut s = session(&MODEL, &options(), Some(&a));
    s.prompt(PROMPT).unwrap();
    generate(&mut s, 9);
    let tokens = s.tokens();
    s.truncate(tokens.len() - 5).unwrap();
    s.swap(&b, ggraft::infer::ExistingText::Recompute).unwrap();
    let mut control = session(&MODEL, &options(), Some(&b));
    control.prompt(PROMPT).unwrap();
    control
        .feed(&tokens[control.tokens().len()..tokens.len() - 5])
        .unwrap();
    assert_eq!(s.tokens(), control.tokens());
    let logits = s.logits().unwrap().to_vec();
    assert_same(&logits, control.logits().unwrap(), has_own_kernels(), "");
    assert_eq!(argmax(&logits), argmax(control.logits().unwrap()));
}

/// With a step that fails behind the token that was not computed, its logits are not taken for those in front of it.
#[test]
fn logits_of_a_failed_step_are_nobodys() {
    let mut s = session(&MODEL, &options().n_batch(8), None);
    s.prompt(PROMPT).unwrap();
    generate(&mut s, 3);
    let token = s.cancel_token();
    let more = [11; 20];
    let stopped = s.feed_with_logits(&more, |_, _| token.cancel());
    assert!(stopped.is_err());
    token.reset();
    let tokens = s.tokens();
    s.truncate(tokens.len() - 1).unwrap();
    let mut control = session(&MODEL, &options(), None);
    control.prompt(PROMPT).unwrap();
    let n = control.tokens().len();
    control.feed(&tokens[n..tokens.len() - 1]).unwrap();
    let logits = s.logits().unwrap();
    assert_same(logits, control.logits().unwrap(), has_own_kernels(), "");
}
