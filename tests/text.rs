//! The vocabulary over real and damaged files: parity with libllama's own loading, refusals by cause, mutations.

use ggml_sys as sys;
use ggraft::file::gguf::{Gguf, GgufError};
use ggraft::file::gguf_write::{GgufWriter, MetaValue};
use ggraft::model::vocab::{Vocab, VocabError};
use std::ffi::CString;

/// A llama of 19 K random weights with a byte-level BPE vocabulary of 288 tokens and 10 merges.
const TINY: &[u8] = include_bytes!("data/bad/control.gguf");
/// Where its tensor descriptions begin.
const TINY_METADATA_END: usize = 5402;

const TEXTS: [&str; 8] = [
    "",
    " ",
    "the man in the rain, there and then",
    "  two  spaces\n\n\tand a tab\r\n",
    "naïve façade – 日本語 🙂 \u{301}e",
    "don't we'll I'M 12345 3.14 !!! ???",
    "a\0b\0",
    "<|bos|>the<|eos|>",
];

fn load(bytes: &[u8]) -> Result<Vocab, VocabError> {
    Vocab::load(&Gguf::parse(bytes)?, bytes)
}

fn tiny() -> Vocab {
    load(TINY).unwrap()
}

/// The metadata of a file with a tokenizer, to be varied.
struct Spec {
    keys: Vec<(&'static str, MetaValue)>,
}

impl Spec {
    /// Byte-level BPE: the 256 byte tokens and a few more.
    fn bpe() -> Self {
        let bytes = (b'!'..=b'~')
            .chain(0xA1..=0xAC)
            .chain(0xAE..=0xFF)
            .map(char::from);
        let mut tokens: Vec<String> = bytes
            .chain('\u{100}'..='\u{143}')
            .map(String::from)
            .collect();
        assert_eq!(tokens.len(), 256);
        tokens.extend(["th", "the", "<s>", "</s>"].map(String::from));
        let types = (0..260).map(|i| if i < 258 { 1 } else { 3 }).collect();
        Self {
            keys: vec![
                ("general.architecture", MetaValue::String("llama".into())),
                ("tokenizer.ggml.model", MetaValue::String("gpt2".into())),
                ("tokenizer.ggml.pre", MetaValue::String("gpt-2".into())),
                ("tokenizer.ggml.tokens", MetaValue::Strings(tokens)),
                ("tokenizer.ggml.token_type", MetaValue::I32s(types)),
                (
                    "tokenizer.ggml.merges",
                    MetaValue::Strings(vec!["t h".into(), "th e".into()]),
                ),
                ("tokenizer.ggml.bos_token_id", MetaValue::U32(258)),
                ("tokenizer.ggml.eos_token_id", MetaValue::U32(259)),
            ],
        }
    }

    /// SentencePiece BPE: three special tokens, 256 byte tokens, a few pieces.
    fn spm() -> Self {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
        tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
        let pieces = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "日"];
        tokens.extend(pieces.map(String::from));
        let n = tokens.len();
        let types = (0..n).map(|i| {
            [2, 3, 3]
                .get(i)
                .copied()
                .unwrap_or(if i < 259 { 6 } else { 1 })
        });
        Self {
            keys: vec![
                ("general.architecture", MetaValue::String("llama".into())),
                ("tokenizer.ggml.model", MetaValue::String("llama".into())),
                ("tokenizer.ggml.tokens", MetaValue::Strings(tokens)),
                (
                    "tokenizer.ggml.scores",
                    MetaValue::F32s((0..n).map(|i| i as f32 - 300.0).collect()),
                ),
                (
                    "tokenizer.ggml.token_type",
                    MetaValue::I32s(types.collect()),
                ),
                ("tokenizer.ggml.bos_token_id", MetaValue::U32(1)),
                ("tokenizer.ggml.eos_token_id", MetaValue::U32(2)),
            ],
        }
    }

    fn set(mut self, key: &'static str, value: MetaValue) -> Self {
        match self.keys.iter_mut().find(|(k, _)| *k == key) {
            Some(entry) => entry.1 = value,
            None => self.keys.push((key, value)),
        }
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.keys.retain(|(k, _)| *k != key);
        self
    }

    /// Changes the strings of a list.
    fn strings(mut self, key: &str, change: impl FnOnce(&mut Vec<String>)) -> Self {
        match self.keys.iter_mut().find(|(k, _)| *k == key) {
            Some((_, MetaValue::Strings(list))) => change(list),
            _ => panic!("no such list: {key}"),
        }
        self
    }

    fn bytes(self) -> Vec<u8> {
        let mut w = GgufWriter::new();
        for (key, value) in self.keys {
            w.set(key, value);
        }
        w.to_bytes(|_, _| {})
    }

    fn load(self) -> Result<Vocab, VocabError> {
        load(&self.bytes())
    }
}

/// libllama loading the same file by itself.
struct Oracle(*mut sys::llama_model);

impl Oracle {
    fn load(bytes: &[u8]) -> Self {
        // Silences libllama and starts its backends.
        tiny();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let path = CString::new(file.path().to_str().unwrap()).unwrap();
        // SAFETY: a valid path and default parameters.
        let model = unsafe {
            let mut params = sys::llama_model_default_params();
            params.vocab_only = true;
            sys::llama_model_load_from_file(path.as_ptr(), params)
        };
        assert!(!model.is_null());
        Self(model)
    }

    fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the model lives as long as `self`.
        unsafe { sys::llama_model_get_vocab(self.0) }
    }

    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<i32> {
        let mut ids = vec![0; 4 * text.len() + 16];
        // SAFETY: text and buffer are passed with their lengths.
        let n = unsafe {
            sys::llama_tokenize(
                self.vocab(),
                text.as_ptr().cast(),
                text.len() as i32,
                ids.as_mut_ptr(),
                ids.len() as i32,
                add_special,
                parse_special,
            )
        };
        ids.truncate(usize::try_from(n).unwrap());
        ids
    }

    fn piece(&self, id: i32, special: bool) -> Vec<u8> {
        let mut out = vec![0u8; 4096];
        // SAFETY: the id is valid, the buffer is passed with its length.
        let n = unsafe {
            sys::llama_token_to_piece(
                self.vocab(),
                id,
                out.as_mut_ptr().cast(),
                out.len() as i32,
                0,
                special,
            )
        };
        out.truncate(usize::try_from(n).unwrap());
        out
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        // SAFETY: made by `llama_model_load_from_file`, freed once.
        unsafe { sys::llama_model_free(self.0) };
    }
}

#[test]
fn equals_libllama_reading_the_file_itself() {
    let phi3 = Spec::spm()
        .set("general.name", MetaValue::String("My Phi-3 mini".into()))
        .strings("tokenizer.ggml.tokens", |t| {
            t[270 - 4] = "<|endoftext|>".into()
        });
    for file in [
        TINY.to_vec(),
        Spec::bpe().bytes(),
        Spec::bpe()
            .set("tokenizer.ggml.pre", MetaValue::String("llama-bpe".into()))
            .bytes(),
        Spec::bpe()
            .set("tokenizer.ggml.add_eos_token", MetaValue::Bool(true))
            .bytes(),
        Spec::bpe()
            .without("tokenizer.ggml.pre")
            .without("tokenizer.ggml.bos_token_id")
            .bytes(),
        Spec::spm().bytes(),
        Spec::spm()
            .set("tokenizer.ggml.add_space_prefix", MetaValue::Bool(false))
            .bytes(),
        Spec::spm().without("tokenizer.ggml.scores").bytes(),
        phi3.bytes(),
    ] {
        let ours = load(&file).unwrap();
        let oracle = Oracle::load(&file);
        let v = oracle.vocab();
        // SAFETY: the oracle lives, all ids are valid.
        unsafe {
            assert_eq!(ours.n_tokens() as i32, sys::llama_vocab_n_tokens(v));
            assert_eq!(ours.bos().unwrap_or(-1), sys::llama_vocab_bos(v));
            assert_eq!(ours.eos().unwrap_or(-1), sys::llama_vocab_eos(v));
            assert_eq!(ours.eot().unwrap_or(-1), sys::llama_vocab_eot(v));
            assert_eq!(ours.add_bos(), sys::llama_vocab_get_add_bos(v));
            assert_eq!(ours.add_eos(), sys::llama_vocab_get_add_eos(v));
            for id in 0..ours.n_tokens() as i32 {
                assert_eq!(ours.is_eog(id), sys::llama_vocab_is_eog(v, id));
            }
        }
        for id in 0..ours.n_tokens() as i32 {
            for special in [false, true] {
                assert_eq!(
                    ours.token_bytes(id, special),
                    oracle.piece(id, special),
                    "token {id}"
                );
            }
        }
        for text in TEXTS {
            for (add, parse) in [(false, false), (true, false), (false, true), (true, true)] {
                assert_eq!(
                    ours.tokenize(text, add, parse).unwrap(),
                    oracle.tokenize(text, add, parse),
                    "{text:?}"
                );
            }
        }
    }
}

#[test]
fn ids_of_the_tiny_vocabulary() {
    let v = tiny();
    assert_eq!(
        (v.n_tokens(), v.bos(), v.eos(), v.eot()),
        (288, Some(256), Some(257), None)
    );
    assert!(v.is_eog(257) && !v.is_eog(256) && !v.is_eog(-1) && !v.is_eog(i32::MAX));
    assert!(!v.add_bos() && !v.add_eos());
    assert_eq!(v.tokenize(" the", false, false).unwrap(), [258, 259]);
    assert_eq!(
        v.tokenize("<|bos|> in", true, true).unwrap(),
        [256, 32, 260]
    );
    assert_ne!(v.tokenize("<|bos|>", true, false).unwrap(), [256]);
    assert_eq!(v.token_text(258).as_deref(), Some("Ġt"));
    assert_eq!(v.token_bytes(258, false), b" t");
    assert_eq!(v.token_bytes(256, false), b"");
    assert_eq!(v.token_bytes(256, true), b"<|bos|>");
    for id in [-1, 288, i32::MIN, i32::MAX] {
        assert_eq!(v.token_bytes(id, true), b"");
        assert_eq!(v.token_text(id), None);
    }
    assert_eq!(v.detokenize(&[256, 258, 259, 0xE2, 257]), " the\u{fffd}");
}

#[test]
fn text_survives_the_round_trip() {
    let all: String = ('\0'..='\u{FFFF}')
        .step_by(7)
        .chain(['🙂', '\u{10FFFF}'])
        .collect();
    for v in [tiny(), Spec::bpe().load().unwrap()] {
        for text in TEXTS.into_iter().chain([all.as_str()]) {
            assert_eq!(v.detokenize(&v.tokenize(text, false, false).unwrap()), text);
        }
    }
    let v = Spec::spm().load().unwrap();
    for text in TEXTS.into_iter().skip(1) {
        let ids = v.tokenize(text, true, false).unwrap();
        assert_eq!(ids[0], 1);
        // SentencePiece puts a space in front.
        assert_eq!(v.detokenize(&ids), format!(" {text}"));
    }
}

#[test]
fn megabytes_of_text_are_one_text() {
    let v = tiny();
    let text = "the man in the rain 日本 ".repeat(3 << 20 >> 5);
    let ids = v.tokenize(&text, false, false).unwrap();
    assert!(ids.len() > 1 << 20);
    assert_eq!(v.detokenize(&ids), text);
}

#[test]
fn threads_share_a_vocabulary() {
    fn assert_shared<T: Send + Sync>(_: &T) {}
    let v = tiny();
    assert_shared(&v);
    let alone: Vec<_> = TEXTS
        .iter()
        .map(|t| v.tokenize(t, true, true).unwrap())
        .collect();
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                for _ in 0..200 {
                    for (text, ids) in TEXTS.iter().zip(&alone) {
                        assert_eq!(&v.tokenize(text, true, true).unwrap(), ids);
                    }
                }
            });
        }
    });
}

#[test]
fn a_model_without_tokenizer_has_ids_only() {
    for model in [None, Some("none"), Some("no_vocab")] {
        let mut spec = Spec::bpe()
            .set("llama.vocab_size", MetaValue::U32(77))
            .without("tokenizer.ggml.model");
        if let Some(model) = model {
            spec = spec.set("tokenizer.ggml.model", MetaValue::String(model.into()));
        }
        let v = spec.load().unwrap();
        assert_eq!(
            (v.n_tokens(), v.bos(), v.eos(), v.eot()),
            (77, None, None, None)
        );
        assert_eq!(v.tokenize("a", true, true), Err(VocabError::NoTokenizer));
        assert_eq!(v.token_bytes(5, true), b"");
        assert_eq!(v.token_text(5), None);
        assert!(!v.is_eog(5) && !v.add_bos());
    }
}

#[test]
fn minus_one_in_32_bits_means_no_such_token() {
    let v = Spec::bpe()
        .set("tokenizer.ggml.padding_token_id", MetaValue::U32(u32::MAX))
        .load()
        .unwrap();
    assert_eq!(v.bos(), Some(258));
}

/// `Err` with the given pattern.
macro_rules! refused {
    ($spec:expr, $pattern:pat $(if $guard:expr)?) => {
        match $spec.load() {
            Err($pattern) $(if $guard)? => {}
            other => panic!("expected {}, got {other:?}", stringify!($pattern)),
        }
    };
}

#[test]
fn each_cause_is_refused_by_name() {
    use MetaValue::*;
    use VocabError as E;
    const TOKENS: &str = "tokenizer.ggml.tokens";
    const TYPES: &str = "tokenizer.ggml.token_type";
    const SCORES: &str = "tokenizer.ggml.scores";
    const MERGES: &str = "tokenizer.ggml.merges";
    let bpe = Spec::bpe;
    let spm = Spec::spm;

    for kind in [
        "bert",
        "t5",
        "rwkv",
        "plamo2",
        "gemma4",
        "hybriddna",
        "whitespace",
        "test",
        "gpt3",
    ] {
        refused!(bpe().set("tokenizer.ggml.model", String(kind.into())), E::UnsupportedKind { kind: k } if k == kind);
    }
    for pre in [
        "gemma4",
        "whitespace",
        "mmbert",
        "kimi-k2",
        "superbpe",
        "gpt-2 ",
        "",
    ] {
        refused!(bpe().set("tokenizer.ggml.pre", String(pre.into())), E::UnsupportedPre { pre: p } if p == pre);
    }
    for key in [TOKENS, MERGES] {
        refused!(bpe().without(key), E::MissingKey { key: k } if k == key);
    }
    refused!(
        bpe().set(TOKENS, Strings(vec![])),
        E::MissingKey { key: TOKENS }
    );
    for (key, value) in [
        ("tokenizer.ggml.model", U32(1)),
        ("tokenizer.ggml.pre", Bool(true)),
        (TOKENS, U32(3)),
        (TOKENS, U32s(vec![1; 260])),
        (TYPES, F32s(vec![1.0; 260])),
        (TYPES, U32(1)),
        (SCORES, I32s(vec![1; 260])),
        (MERGES, String("a b".into())),
        ("tokenizer.ggml.bos_token_id", String("1".into())),
        ("tokenizer.ggml.add_bos_token", U32(1)),
        ("tokenizer.chat_template", U32(1)),
        ("general.name", U32(1)),
    ] {
        let was = format!("{key} {value:?}");
        match bpe().set(key, value).load() {
            Err(E::Gguf(GgufError::KeyType { .. } | GgufError::KeyElementType { .. })) => {}
            other => panic!("{was}: {other:?}"),
        }
    }
    refused!(
        bpe().set(TYPES, I32s(vec![1; 259])),
        E::ListLength {
            key: TYPES,
            expected: 260,
            got: 259
        }
    );
    refused!(
        spm().set(SCORES, F32s(vec![0.0; 268])),
        E::ListLength {
            key: SCORES,
            expected: 267,
            got: 268
        }
    );
    let mut scores = vec![0.0; 267];
    scores[7] = f32::NAN;
    refused!(
        spm().set(SCORES, F32s(scores)),
        E::ScoreNotANumber { id: 7 }
    );
    let mut types = vec![1; 260];
    types[9] = 7;
    refused!(
        bpe().set(TYPES, I32s(types.clone())),
        E::TokenType { id: 9, got: 7 }
    );
    types[9] = 6;
    refused!(
        bpe().set(TYPES, I32s(types)),
        E::MalformedByteToken { id: 9, .. }
    );
    refused!(
        spm().strings(TOKENS, |t| t[5] = "<0xZZ>".into()),
        E::MalformedByteToken { id: 5, .. }
    );

    refused!(
        bpe().strings(TOKENS, |t| t[9] = "the".into()),
        E::DuplicateToken {
            first: 9,
            second: 257,
            ..
        }
    );
    // What libllama makes of these equals another token: it names empty ones, and text ends at NUL.
    let named = bpe().strings(TOKENS, |t| {
        (t[9], t[11]) = (std::string::String::new(), "[EMPTY_9]".into())
    });
    refused!(
        named,
        E::DuplicateToken {
            first: 9,
            second: 11,
            ..
        }
    );
    refused!(
        bpe().strings(TOKENS, |t| t[9] = "the\0re".into()),
        E::DuplicateToken {
            first: 9,
            second: 257,
            ..
        }
    );

    for byte in [0, 0x41, 0xE2] {
        let id = 3 + usize::from(byte);
        let spec = spm()
            .strings(TOKENS, |t| t[id] = "<0xFF>x".into())
            .without(TYPES);
        refused!(spec, E::MissingByteToken { byte: b } if b == byte);
    }
    for merge in ["", " ", "ab", "a ", " a", "a\0 b"] {
        let spec = bpe().strings(MERGES, |m| m[1] = merge.into());
        refused!(spec, E::MalformedMerge { index: 1, text } if merge.starts_with(&text));
    }
    for key in [
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.middle_token_id",
    ] {
        refused!(bpe().set(key, U32(260)), E::SpecialToken { key: k, id: 260, n_tokens: 260 } if k == key);
    }
    // The default BOS and EOS of this kind, 11, lie outside of so small a vocabulary.
    let few = bpe()
        .set(TOKENS, Strings(vec!["a".into(), "b".into()]))
        .without(TYPES)
        .without("tokenizer.ggml.bos_token_id")
        .without("tokenizer.ggml.eos_token_id");
    let few_and = |key| {
        few.keys
            .iter()
            .cloned()
            .chain([(key, Bool(true))])
            .collect()
    };
    let (bos, eos) = (
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_eos_token",
    );
    refused!(
        Spec { keys: few_and(bos) },
        E::MissingSpecial { what: "BOS" }
    );
    refused!(
        Spec { keys: few_and(eos) },
        E::MissingSpecial { what: "EOS" }
    );

    let huge = bpe().strings(TOKENS, |t| t[9] = "日".repeat(8192));
    refused!(
        huge,
        E::TooLarge {
            key: TOKENS,
            unit: "bytes when decoded",
            ..
        }
    );
    let template = bpe().set("tokenizer.chat_template", String("x".repeat((4 << 20) + 1)));
    refused!(
        template,
        E::TooLarge {
            key: "tokenizer.chat_template",
            ..
        }
    );
}

#[test]
fn mutated_metadata_is_loaded_or_refused() {
    // xorshift32: the same mutations in every run.
    let mut state = 0x9E37_79B9_u32;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as usize
    };
    let (mut loaded, mut refused) = (0, 0);
    for round in 0..2000 {
        let mut bytes = TINY.to_vec();
        let at = random() % TINY_METADATA_END;
        let old = bytes[at];
        while bytes[at] == old {
            bytes[at] = random() as u8;
        }
        match load(&bytes) {
            Ok(v) => {
                loaded += 1;
                // The functions must survive what the gate has let pass.
                for text in TEXTS {
                    if let Ok(ids) = v.tokenize(text, true, true) {
                        v.detokenize(&ids);
                    }
                }
                for id in 0..v.n_tokens().min(1000) as i32 {
                    v.token_bytes(id, true);
                    v.token_text(id);
                }
            }
            Err(e) => {
                refused += 1;
                assert!(!e.to_string().is_empty(), "round {round}");
            }
        }
    }
    // Both kinds occur: most bytes belong to token texts, the rest to lengths, types and keys.
    assert!(
        loaded > 200 && refused > 200,
        "{loaded} loaded, {refused} refused"
    );
}
