//! Sessions on disk: what is loaded goes on as what was saved would have, and nothing else is loaded.

use ggraft::adapter::{Parts, Precision, Template};
use ggraft::file::gguf::{ArrayValue, Gguf, GgufError, Value};
use ggraft::file::gguf_write::{GgufWriter, MetaValue};
use ggraft::file::types::GgmlType;
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{
    ExistingText, FlashAttention, GenerateOptions, Generated, KvType, SavedError, SessionError,
};
use ggraft::{Adapter, Error, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::adapters;
use ggraft_testkit::bases::{self, Base, Random, session, session_options};
use ggraft_testkit::fixture::{FixtureSpec, Variant, write_fixture};
use sha2::{Digest, Sha256};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use tempfile::TempDir;

static MODEL: LazyLock<Model> = LazyLock::new(|| open(&embedded("tinylm-q8_0")));

fn embedded(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    folder.join(name).with_extension("gguf")
}

fn open(path: &Path) -> Model {
    Model::open(path, &ModelOptions::default()).unwrap()
}

/// The smallest model, and a folder for files.
fn small() -> (TempDir, Model) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    write_fixture(&path, &FixtureSpec::new(Variant::Llama, GgmlType::Q8_0)).unwrap();
    let model = open(&path);
    (dir, model)
}

fn options() -> SessionOptions {
    SessionOptions::default().n_ctx(100).n_threads(1)
}

/// Draws from a seed, so that every bit of the logits counts; the bits of probabilities come along.
fn generate(s: &mut Session, n: usize) -> Generated {
    let mut options = GenerateOptions::default().max_tokens(n).logprobs(2);
    options.sampler = SamplerParams {
        seed: Some(7),
        ..SamplerParams::default()
    };
    options.ignore_eog = true;
    let out = s.generate(&options, |_| ControlFlow::Continue(())).unwrap();
    Generated {
        timings: Default::default(),
        ..out
    }
}

/// Both say the same, now and later.
fn assert_goes_on(saved: &mut Session, loaded: &mut Session, what: &str) {
    assert_eq!(saved.tokens(), loaded.tokens(), "{what}");
    assert_eq!(saved.n_past(), loaded.n_past(), "{what}");
    if saved.tokens().is_empty() {
        assert!(matches!(loaded.logits(), Err(SessionError::NoLogits)));
        for s in [&mut *saved, loaded] {
            s.feed(&[5, 6]).unwrap();
        }
    }
    assert_eq!(generate(saved, 4), generate(loaded, 4), "{what}");
    assert_eq!(saved.logits().unwrap(), loaded.logits().unwrap(), "{what}");
    for s in [&mut *saved, loaded] {
        s.truncate(s.tokens().len() - 3).unwrap();
        s.feed(&[7, 8, 9]).unwrap();
    }
    assert_eq!(saved.logits().unwrap(), loaded.logits().unwrap(), "{what}");
}

#[test]
fn what_is_loaded_goes_on_as_what_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.gguf");
    let bases = bases::bases(dir.path(), &ModelOptions::default());
    assert!(bases.len() > 20 && bases.iter().any(|b| b.has_window));
    let mut n = 0;
    for base in &bases {
        for options in &session_options(&base.model, 220) {
            for adapter in &base.adapters {
                n += 1;
                one(base, options, adapter.as_ref(), &path, n);
            }
        }
    }
    assert!(n > 300);
}

fn one(base: &Base, options: &SessionOptions, adapter: Option<&Adapter>, path: &Path, seed: u64) {
    let what = format!("{}, {options:?}, {adapter:?}, {seed}", base.name);
    let mut random = Random::new(seed);
    let r = &mut random;
    let mut s = session(&base.model, options, adapter);
    for _ in 0..r.below(4) {
        let (n, kind) = (1 + r.below(60), r.below(3));
        let tokens = r.tokens(&base.model, n);
        match kind {
            0 => s.prompt_tokens(&tokens).unwrap(),
            1 => s.feed(&tokens).unwrap(),
            _ if s.tokens().is_empty() => {}
            _ => drop(generate(&mut s, n.min(5))),
        }
    }
    if r.below(4) == 0 {
        let n = s.tokens().len();
        s.truncate(r.below(n + 1)).unwrap();
    }
    s.save(path, &what).unwrap();
    let mut loaded = session(&base.model, &options.clone().n_batch(7), adapter);
    // What was there before goes.
    if r.below(2) == 0 {
        loaded.feed(&[3; 70]).unwrap();
    }
    let computed = loaded.positions_computed();
    assert_eq!(loaded.load(path).unwrap(), what);
    assert_eq!(loaded.positions_computed(), computed, "{what}");
    // A second one, whose file is that of what was loaded.
    let again = path.with_extension("again");
    loaded.save(&again, &what).unwrap();
    let [first, second] = [path, &again].map(|path| std::fs::read(path).unwrap());
    assert!(first == second, "{what}");
    assert_goes_on(&mut s, &mut loaded, &what);
    let mut third = session(&base.model, options, adapter);
    third.load(&again).unwrap();
    s.load(path).unwrap();
    assert_goes_on(&mut s, &mut third, &what);
}

/// A text that ends in the middle of a character goes on with the rest of it.
#[test]
fn half_a_character_is_completed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.gguf");
    let bytes = MODEL.vocab().tokenize("\u{1f99c}", false, true).unwrap();
    assert!(bytes.len() > 2, "choose a character of more tokens");
    let only = |s: &mut Session, id| {
        let mut options = GenerateOptions::default().max_tokens(1);
        options.sampler = SamplerParams::greedy();
        options.sampler.logit_bias = vec![(id, 1e6)];
        let out = s.generate(&options, |_| ControlFlow::Continue(()));
        out.unwrap().text
    };
    let mut s = session(&MODEL, &options(), None);
    s.prompt("A parrot: ").unwrap();
    let (last, before) = bytes.split_last().unwrap();
    for &id in before {
        assert_eq!(only(&mut s, id), "");
        s.save(&path, "").unwrap();
        s = session(&MODEL, &options(), None);
        assert_eq!(s.load(&path).unwrap(), "");
    }
    assert_eq!(only(&mut s, *last), "\u{1f99c}");
}

/// Pages that no token sees any more are not in the file, nor are rows of the adapter or behind the text.
#[test]
fn the_file_has_what_the_next_tokens_see() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.gguf");
    let variant = Variant::Gemma2;
    let window = variant.sliding_window().unwrap() as usize;
    assert!(window < 50);
    let model_path = dir.path().join("model.gguf");
    write_fixture(&model_path, &FixtureSpec::new(variant, GgmlType::Q8_0)).unwrap();
    let model = open(&model_path);
    let adapter = adapters::prefix(&model, 5, 1);
    let mut s = session(&model, &options().n_ctx(300), Some(&adapter));
    s.feed(&Random::new(1).tokens(&model, 190)).unwrap();
    s.save(&path, "").unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    // Two of the pages of 64 tokens are gone where the window slides.
    let mut tokens: Vec<_> = (gguf.tensors.iter())
        .filter(|t| t.name.ends_with(".k"))
        .map(|t| t.ne[1])
        .collect();
    assert_eq!(tokens.len(), model.shape().n_layer);
    tokens.sort_unstable();
    tokens.dedup();
    assert_eq!(tokens, [190 - 128, 190]);
    let values: usize = gguf.tensors.iter().map(|t| t.range.len()).sum();
    let most = 4 * model.shape().n_vocab + s.kv_bytes() * 190 / 300 + 32;
    assert!(values < most, "{values} {most}");
    let mut loaded = session(&model, &options().n_ctx(300), Some(&adapter));
    loaded.load(&path).unwrap();
    // Behind a window's page there is no way back but to compute all of it.
    for (n, computed) in [(189, 1), (100, 100)] {
        let before = loaded.positions_computed();
        loaded.truncate(n).unwrap();
        loaded.logits().unwrap();
        assert_eq!(loaded.positions_computed() - before, computed);
    }
}

#[test]
fn contexts_threads_and_batches_may_be_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.gguf");
    let mut s = session(&MODEL, &options(), None);
    s.feed(&[9; 90]).unwrap();
    s.save(&path, "").unwrap();
    for other in [
        options().n_ctx(500),
        options().n_threads(2),
        options().n_batch(1),
        options().n_ctx(90),
    ] {
        let mut loaded = session(&MODEL, &other, None);
        loaded.load(&path).unwrap();
        assert_eq!(s.logits().unwrap(), loaded.logits().unwrap());
    }
    // A text that fills its context, and one token more.
    generate(&mut s, 11);
    assert!(matches!(s.logits(), Err(SessionError::ContextFull { .. })));
    s.save(&path, "").unwrap();
    let mut loaded = session(&MODEL, &options(), None);
    loaded.load(&path).unwrap();
    assert_eq!(s.tokens(), loaded.tokens());
    assert!(matches!(
        loaded.logits(),
        Err(SessionError::ContextFull { .. })
    ));
}

/// The refusal, after which the session is as it was.
fn refused(s: &mut Session, path: &Path) -> Error {
    let state = |s: &mut Session| {
        let logits = s.logits().map(|logits| logits.to_vec());
        (s.tokens(), s.n_past(), logits.unwrap_or_default())
    };
    let before = state(s);
    let e = s.load(path).unwrap_err();
    assert!(!e.to_string().is_empty());
    assert_eq!(state(s), before, "{e}");
    e
}

#[test]
fn what_does_not_belong_to_the_session_is_refused() {
    let (dir, small) = small();
    let path = dir.path().join("text.gguf");
    let prefixes = [1, 2].map(|seed| adapters::prefix(&MODEL, 5, seed));
    let template = adapters::p_tuning(&MODEL, "{v:2}{bos}{prompt}{v:3}", 5, 3);
    let moved = Adapter::new(Parts {
        template: Some(Template::parse("{v:3}{bos}{prompt}{v:2}").unwrap()),
        ..template.parts().clone()
    })
    .unwrap();
    let long = {
        let path = dir.path().join("long.gguf");
        let spec = FixtureSpec::new(Variant::Phi3LongRope, GgmlType::Q8_0);
        write_fixture(&path, &spec).unwrap();
        open(&path)
    };
    let f16 = open(&embedded("tinylm-f16"));
    let long_context = long.n_ctx_train();
    let tiny = options().n_ctx(8);
    let with = |options: &SessionOptions, adapter| session(&MODEL, options, adapter);
    type Is = fn(&Error) -> bool;
    macro_rules! is {
        ($pattern:pat) => {
            |e| matches!(e, $pattern)
        };
        (saved $pattern:pat) => {
            |e| {
                matches!(
                    e,
                    Error::Saved {
                        path: Some(_),
                        source: $pattern
                    }
                )
            }
        };
    }
    let cases: Vec<(&str, Session, Session, Is)> = vec![
        (
            "open that base",
            with(&options(), None),
            session(&small, &options(), None),
            is!(saved SavedError::OtherBase { .. }),
        ),
        (
            "rounded differently",
            with(&options(), None),
            session(&f16, &options(), None),
            is!(saved SavedError::OtherWeights),
        ),
        (
            "saved with the prefix adapter of 5 virtual tokens (checksum",
            with(&options(), Some(&prefixes[0])),
            with(&options(), None),
            is!(saved SavedError::OtherAdapter { .. }),
        ),
        (
            "saved with no adapter",
            with(&options(), None),
            with(&options(), Some(&prefixes[0])),
            is!(saved SavedError::OtherAdapter { .. }),
        ),
        (
            "attach what it was saved with",
            with(&options(), Some(&prefixes[0])),
            with(&options(), Some(&prefixes[1])),
            is!(saved SavedError::OtherAdapter { .. }),
        ),
        (
            "attach what it was saved with",
            with(&options(), Some(&template)),
            with(&options(), Some(&moved)),
            is!(saved SavedError::OtherAdapter { .. }),
        ),
        (
            "saved with a q8_0 KV cache, this one has f16",
            with(&options().kv_type(KvType::Q8_0), None),
            with(&options(), None),
            is!(saved SavedError::OtherKvType { saved: GgmlType::Q8_0, session: GgmlType::F16 }),
        ),
        (
            "flash attention off, this one has it on",
            with(&options().flash_attention(FlashAttention::Off), None),
            with(&options(), None),
            is!(saved SavedError::OtherAttention { saved: false }),
        ),
        (
            "a context beyond the model's original one",
            session(&long, &options().n_ctx(long_context), None),
            session(&long, &options().n_ctx(8), None),
            is!(saved SavedError::OtherContext { saved: true }),
        ),
        (
            "20 positions needed, 8 available",
            with(&options(), None),
            with(&tiny, None),
            is!(Error::Session(SessionError::ContextFull {
                needed: 20,
                n_ctx: 8
            })),
        ),
    ];
    for (words, mut saved, mut other, is) in cases {
        saved.feed(&[9; 20]).unwrap();
        saved.save(&path, "").unwrap();
        other.feed(&[8; 4]).unwrap();
        let e = refused(&mut other, &path);
        assert!(is(&e), "{e:?}");
        assert!(e.to_string().contains(words), "{e}");
        other.reset();
        assert!(is(&refused(&mut other, &path)));
    }
}

/// The adapter counts by its content, wherever it comes from.
#[test]
fn the_same_adapter_from_a_file_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let [path, file] = ["text.gguf", "adapter.gguf"].map(|name| dir.path().join(name));
    let made = adapters::prompt(&MODEL, 5, 1);
    made.save(&file, Precision::F32).unwrap();
    let read = Adapter::load(&file).unwrap();
    let mut s = session(&MODEL, &options(), Some(&made));
    s.prompt_tokens(&[9; 20]).unwrap();
    s.save(&path, "").unwrap();
    let mut loaded = session(&MODEL, &options(), Some(&read));
    loaded.load(&path).unwrap();
    assert_goes_on(&mut s, &mut loaded, "");
    // What is computed under another one is not there any more.
    loaded.detach(ExistingText::Recompute).unwrap();
    loaded.save(&path, "").unwrap();
    refused(&mut s, &path);
}

#[test]
fn notes_have_a_limit() {
    let (dir, model) = small();
    let path = dir.path().join("text.gguf");
    let mut s = session(&model, &options(), None);
    s.feed(&[9; 5]).unwrap();
    let note = "é".repeat(8 << 20);
    s.save(&path, &note).unwrap();
    let mut loaded = session(&model, &options(), None);
    assert!(loaded.load(&path).unwrap() == note);
    let saved = std::fs::read(&path).unwrap();
    let refused = s.save(&path, &(note + "x"));
    assert!(matches!(
        refused,
        Err(Error::Session(SessionError::BadOption {
            option: "note",
            ..
        }))
    ));
    assert!(std::fs::read(&path).unwrap() == saved);
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        2,
        "the model and the text"
    );
    let nowhere = dir.path().join("absent").join("text.gguf");
    assert!(matches!(s.save(&nowhere, ""), Err(Error::Io { .. })));
}

// ---- files from strangers

/// A saved text of a few tokens, all that a small session has.
fn sample(dir: &Path, model: &Model) -> (PathBuf, Vec<u8>) {
    let path = dir.join("text.gguf");
    let mut s = session(model, &options(), None);
    s.prompt_tokens(&[9, 8, 7]).unwrap();
    s.feed(&[6]).unwrap();
    generate(&mut s, 2);
    s.save(&path, "a note").unwrap();
    let bytes = std::fs::read(&path).unwrap();
    (path, bytes)
}

/// The checksum at the end is made anew.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len() - 32;
    let hash = Sha256::digest(&bytes[..end]);
    bytes[end..].copy_from_slice(&hash);
    bytes
}

#[test]
fn no_part_of_a_file_is_loaded() {
    let (dir, model) = small();
    let (path, bytes) = sample(dir.path(), &model);
    let mut s = session(&model, &options(), None);
    s.feed(&[1, 2]).unwrap();
    assert!(bytes.len() > 1000);
    for n in 0..bytes.len() {
        std::fs::write(&path, &bytes[..n]).unwrap();
        assert!(s.load(&path).is_err(), "{n} bytes");
    }
    for more in [1, 31, 32, 5000] {
        std::fs::write(&path, [&bytes[..], &vec![0; more]].concat()).unwrap();
        let e = refused(&mut s, &path);
        assert!(matches!(
            e,
            Error::Saved {
                source: SavedError::Damaged,
                ..
            }
        ));
    }
    assert_eq!(s.tokens(), [1, 2]);
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(s.load(&path).unwrap(), "a note");
}

#[test]
fn no_byte_can_be_changed() {
    let (dir, model) = small();
    let (path, bytes) = sample(dir.path(), &model);
    let mut s = session(&model, &options(), None);
    s.feed(&[1, 2]).unwrap();
    for i in 0..bytes.len() {
        for flip in [1, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[i] ^= flip;
            std::fs::write(&path, damaged).unwrap();
            assert!(s.load(&path).is_err(), "byte {i}");
        }
    }
    assert_eq!(s.tokens(), [1, 2]);
}

/// With a checksum that is right, a file may say what it likes: it is refused, or there is a text that can go on or has no finite logits.
#[test]
fn whatever_a_sealed_file_says_is_refused_or_harmless() {
    let (dir, model) = small();
    let (path, bytes) = sample(dir.path(), &model);
    let gguf = Gguf::parse(&bytes).unwrap();
    let data = gguf.tensors[0].range.start;
    let mut s = session(&model, &options(), None);
    let (mut loaded, mut refused) = (0, 0);
    // All of the head, and some of the data.
    let places = (0..data).chain((data..bytes.len() - 32).step_by(61));
    for i in places {
        for flip in [1, 0x40, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[i] ^= flip;
            std::fs::write(&path, sealed(damaged)).unwrap();
            match s.load(&path) {
                Ok(_) => {
                    loaded += 1;
                    let n = s.tokens().len();
                    let options = GenerateOptions::default().max_tokens(2);
                    let _ = s.generate(&options, |_| ControlFlow::Continue(()));
                    let _ = s.truncate(n / 2);
                    let _ = s.feed(&[5]);
                }
                Err(e) => {
                    assert!(!e.to_string().is_empty());
                    refused += 1;
                }
            }
        }
    }
    assert!(loaded > 20 && refused > 1000, "{loaded} {refused}");
}

/// What a file consists of.
#[derive(Clone)]
struct Content {
    meta: Vec<(String, MetaValue)>,
    tensors: Vec<(String, GgmlType, Vec<u64>, Vec<u8>)>,
}

impl Content {
    fn read(bytes: &[u8]) -> Self {
        let gguf = Gguf::parse(bytes).unwrap();
        let value = |key: &str, value: &Value| match value {
            Value::U32(n) => MetaValue::U32(*n),
            Value::Bool(b) => MetaValue::Bool(*b),
            Value::String(text) => MetaValue::String(text.clone()),
            Value::Array(ArrayValue { .. }) if key.ends_with(".tokens") => {
                MetaValue::I32s(gguf.i32_array(bytes, key).unwrap().unwrap())
            }
            Value::Array(ArrayValue { .. }) => {
                MetaValue::U32s(gguf.u32_array(bytes, key).unwrap().unwrap())
            }
            other => panic!("{key}: {other:?}"),
        };
        let tensors = gguf.tensors.iter().filter(|t| t.name != "sha256");
        Self {
            meta: gguf
                .keys()
                .map(|(key, v)| (key.to_owned(), value(key, v)))
                .collect(),
            tensors: tensors
                .map(|t| {
                    let ne = t.ne[..t.n_dims].to_vec();
                    (t.name.clone(), t.ty, ne, bytes[t.range.clone()].to_vec())
                })
                .collect(),
        }
    }

    fn set(&mut self, key: &str, value: Option<MetaValue>) {
        let key = format!("ggraft.session.{key}");
        let n = self.meta.len();
        self.meta.retain(|(k, _)| *k != key);
        assert_eq!(self.meta.len(), n - 1, "{key}");
        self.meta.extend(value.map(|value| (key, value)));
    }

    fn tensor(&mut self, name: &str) -> &mut (String, GgmlType, Vec<u64>, Vec<u8>) {
        self.tensors.iter_mut().find(|t| t.0 == name).unwrap()
    }

    fn write(&self, seal: bool) -> Vec<u8> {
        let mut writer = GgufWriter::new();
        for (key, value) in &self.meta {
            writer.set(key, value.clone());
        }
        for (name, ty, ne, _) in &self.tensors {
            writer.tensor(name, *ty, ne);
        }
        if seal {
            writer.tensor("sha256", GgmlType::I8, &[32]);
        }
        let bytes = writer.to_bytes(|i, out| match self.tensors.get(i) {
            Some((.., data)) => out.extend(data),
            None => out.resize(32, 0),
        });
        if seal { sealed(bytes) } else { bytes }
    }
}

#[test]
fn each_contradiction_is_named() {
    let (dir, model) = small();
    let (path, bytes) = sample(dir.path(), &model);
    let sound = Content::read(&bytes);
    std::fs::write(&path, sound.write(true)).unwrap();
    let mut s = session(&model, &options(), None);
    s.load(&path).unwrap();
    s.feed(&[1, 2]).unwrap();
    let n_vocab = model.shape().n_vocab;
    let u32s = |values: &[u32]| Some(MetaValue::U32s(values.to_vec()));
    let text = |text: &str| Some(MetaValue::String(text.to_owned()));
    let keys = [
        ("version", Some(MetaValue::U32(2)), "format version 2"),
        ("version", None, "is missing"),
        ("fingerprint", text("12"), "no fingerprint"),
        ("fingerprint", None, "is missing"),
        ("weights", text("12"), "rounded differently"),
        ("weights", Some(MetaValue::U32(1)), "must be a string"),
        ("kv_type", Some(MetaValue::U32(1000)), "unknown"),
        ("flash_attention", None, "is missing"),
        ("long_context", None, "is missing"),
        ("tokens", None, "is missing"),
        (
            "tokens",
            Some(MetaValue::I32s(vec![9, 8, 7, 6, -1, 2])),
            "token id -1",
        ),
        (
            "tokens",
            Some(MetaValue::I32s(vec![n_vocab as i32; 6])),
            "outside",
        ),
        (
            "tokens",
            Some(MetaValue::I32s(vec![9; 5])),
            "longer than its tokens",
        ),
        (
            "tokens",
            Some(MetaValue::I32s(vec![9; 7])),
            "shorter than its tokens",
        ),
        (
            "tokens",
            Some(MetaValue::I32s(vec![])),
            "longer than its tokens",
        ),
        ("segments", None, "is missing"),
        ("segments", u32s(&[3, u32::MAX]), "longer than its tokens"),
        ("segments", u32s(&[6]), "which of its segments"),
        ("segments", u32s(&[6, 0]), "empty"),
        ("prompts", None, "is missing"),
        ("prompts", u32s(&[]), "which of its segments"),
        ("uncomputed", None, "is missing"),
        (
            "uncomputed",
            Some(MetaValue::Bool(false)),
            "\"blk.0.k\" has another number",
        ),
        ("unfinished", u32s(&[256]), "are none"),
        ("unfinished", u32s(&[0x41]), "begin none"),
        ("unfinished", u32s(&[0xff]), "begin none"),
        ("note", Some(MetaValue::U32(1)), "must be a string"),
    ];
    for (key, value, words) in keys {
        let mut content = sound.clone();
        content.set(key, value);
        std::fs::write(&path, content.write(true)).unwrap();
        let e = refused(&mut s, &path);
        assert!(e.to_string().contains(words), "{key}: {e}");
    }
    type Edit = fn(&mut Content);
    let edits: [(Edit, &str); 8] = [
        (
            |c| c.tensors.retain(|t| t.0 != "blk.0.k"),
            "\"blk.0.k\" is missing",
        ),
        (
            |c| c.tensors.retain(|t| t.0 != "blk.1.v"),
            "\"blk.1.v\" is missing",
        ),
        (|c| c.tensors.retain(|t| t.0 == "logits"), "next token sees"),
        (
            |c| c.tensor("blk.1.v").0 = "other".into(),
            "\"other\" is unknown",
        ),
        (
            |c| c.tensor("logits").0 = "other".into(),
            "\"other\" is unknown",
        ),
        (
            |c| c.tensor("blk.1.v").2.swap(0, 1),
            "another type or shape",
        ),
        (
            |c| {
                let (_, ty, ne, _) = c.tensor("blk.1.v");
                (*ty, ne[0]) = (GgmlType::F32, ne[0] / 2);
            },
            "another type or shape",
        ),
        (
            |c| c.tensor("logits").3[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
            "no numbers",
        ),
    ];
    for (edit, words) in edits {
        let mut content = sound.clone();
        edit(&mut content);
        std::fs::write(&path, content.write(true)).unwrap();
        let e = refused(&mut s, &path);
        assert!(e.to_string().contains(words), "{words}: {e}");
    }
    std::fs::write(&path, sound.write(false)).unwrap();
    assert!(refused(&mut s, &path).to_string().contains("damaged"));
    // Logits that are not known are computed with the token that is not; without such a token there must be some.
    let mut content = sound.clone();
    content.tensors.retain(|t| t.0 != "logits");
    std::fs::write(&path, content.write(true)).unwrap();
    let mut without = session(&model, &options(), None);
    without.load(&path).unwrap();
    let mut with = session(&model, &options(), None);
    std::fs::write(&path, &bytes).unwrap();
    with.load(&path).unwrap();
    assert_eq!(with.logits().unwrap(), without.logits().unwrap());
    without.save(&path, "").unwrap();
    let mut content = Content::read(&std::fs::read(&path).unwrap());
    content.tensors.retain(|t| t.0 != "logits");
    std::fs::write(&path, content.write(true)).unwrap();
    let e = refused(&mut s, &path);
    assert!(e.to_string().contains("\"logits\" is missing"), "{e}");
    // No text, but logits; a text that is computed, but none.
    let mut content = sound.clone();
    content.set("tokens", Some(MetaValue::I32s(vec![])));
    content.set("segments", u32s(&[]));
    content.set("prompts", u32s(&[]));
    content.set("uncomputed", Some(MetaValue::Bool(true)));
    std::fs::write(&path, content.write(true)).unwrap();
    assert!(refused(&mut s, &path).to_string().contains("no tokens"));
    content.set("uncomputed", Some(MetaValue::Bool(false)));
    content.tensors.retain(|t| t.0 == "logits");
    std::fs::write(&path, content.write(true)).unwrap();
    assert!(
        refused(&mut s, &path)
            .to_string()
            .contains("belongs to no token")
    );
}

/// What claims to be large is refused before it is read.
#[test]
fn large_claims_cost_nothing() {
    let (dir, model) = small();
    let (path, bytes) = sample(dir.path(), &model);
    let mut s = session(&model, &options(), None);
    s.feed(&[1, 2]).unwrap();
    // Sparse, of a terabyte: as it is, and with tensors that say so.
    std::fs::write(&path, &bytes).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    assert!(refused(&mut s, &path).to_string().contains("damaged"));
    let name = b"blk.0.k";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap();
    // Behind the name: the number of dimensions, then the dimensions.
    let place = at + name.len() + 4 + 8;
    for claimed in [1u64 << 20, 1 << 32, 1 << 62] {
        let mut large = bytes.clone();
        large[place..place + 8].copy_from_slice(&claimed.to_le_bytes());
        std::fs::write(&path, &large).unwrap();
        refused(&mut s, &path);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(1 << 42).unwrap();
        refused(&mut s, &path);
    }
    // A length of tokens that is not there.
    let key = b"ggraft.session.tokens";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
    let place = at + key.len() + 4 + 4;
    for claimed in [1u64 << 20, 1 << 30, u64::MAX] {
        let mut large = bytes.clone();
        large[place..place + 8].copy_from_slice(&claimed.to_le_bytes());
        std::fs::write(&path, &large).unwrap();
        let e = refused(&mut s, &path);
        assert!(matches!(e, Error::Gguf { path: Some(_), .. }), "{e}");
    }
}

#[test]
fn other_files_are_named() {
    let (dir, model) = small();
    let path = dir.path().join("text.gguf");
    let mut s = session(&model, &options(), None);
    s.feed(&[1, 2]).unwrap();
    let absent = refused(&mut s, &dir.path().join("absent"));
    assert!(matches!(absent, Error::Io { .. }), "{absent}");
    assert!(matches!(refused(&mut s, dir.path()), Error::Io { .. }));
    #[cfg(unix)]
    {
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        let e = refused(&mut s, &pipe);
        assert!(e.to_string().contains("not a regular file"), "{e}");
        assert!(matches!(
            refused(&mut s, Path::new("/dev/zero")),
            Error::Io { .. }
        ));
    }
    for (bytes, expected) in [
        (&b""[..], GgufError::Empty),
        (b"{\"a\": 1}", GgufError::BadMagic { got: *b"{\"a\"" }),
    ] {
        std::fs::write(&path, bytes).unwrap();
        match refused(&mut s, &path) {
            Error::Gguf {
                path: Some(of),
                source,
            } => assert_eq!((of, source), (path.clone(), expected)),
            other => panic!("{other}"),
        }
    }
    let adapter = dir.path().join("adapter.gguf");
    let made = adapters::prefix(&model, 3, 1);
    made.save(&adapter, Precision::F16).unwrap();
    for other in [adapter, embedded("tinylm-q8_0")] {
        assert!(matches!(
            refused(&mut s, &other),
            Error::Saved {
                source: SavedError::NotASession { .. },
                ..
            }
        ));
    }
    // And the other way round.
    s.save(&path, "").unwrap();
    assert!(Model::open(&path, &ModelOptions::default()).is_err());
    assert!(Adapter::load(&path).is_err());
}
