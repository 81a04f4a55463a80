use super::check::{KEY_MERGES, KEY_MODEL, KEY_PRE, KEY_TOKENS, PRE_ITERATIVE, PRE_RECURSIVE};
use super::*;
use crate::file::gguf_write::{GgufWriter, MetaValue};

fn bpe(pre: &str) -> Vocab {
    let alphabet = ('!'..='~').chain('¡'..='¬').chain('®'..='\u{143}');
    let tokens: Vec<String> = alphabet.map(String::from).collect();
    let mut w = GgufWriter::new();
    w.set(KEY_MODEL, MetaValue::String("gpt2".into()))
        .set(KEY_PRE, MetaValue::String(pre.into()))
        .set(KEY_TOKENS, MetaValue::Strings(tokens))
        .set(KEY_MERGES, MetaValue::Strings(Vec::new()))
        .set("tokenizer.ggml.add_bos_token", MetaValue::Bool(false));
    let bytes = w.to_bytes(|_, _| {});
    Vocab::load(&Gguf::parse(&bytes).unwrap(), &bytes).unwrap()
}

/// Every accepted pre-tokenizer survives long runs of each kind of character on a small stack, and loses nothing:
/// without merges, each byte of the text is a token.
#[test]
fn pre_tokenizers_survive_long_runs() {
    let runs = [
        "a", "A", "é", "日", "1", "!", " ", "\n", "\u{85}", "\u{301}", "\0", "🙂", "aA", "'s",
        " a", "\r\n",
    ];
    for pre in PRE_ITERATIVE.iter().chain(PRE_RECURSIVE) {
        let vocab = bpe(pre);
        for run in runs {
            let text = run.repeat(20_000 / run.len());
            let ids = vocab.tokenize(&text, false, true).unwrap();
            assert_eq!(vocab.detokenize(&ids), text, "{pre}: {run:?}");
        }
    }
}

#[test]
fn a_run_is_a_word_with_the_space_around_it() {
    for (text, run) in [
        ("", 1),
        ("word", 5),
        (" a bcd\n\n e", 1 + 3 + 3),
        ("/\n/\n/", 1 + 1 + 5),
        // No-break and other rare spaces may belong to either.
        ("a\u{a0}b", 1 + 3 + 1),
        (" \u{85} \u{85} ", 1 + 1 + 5),
    ] {
        assert_eq!(longest_run(text), run, "{text:?}");
    }
}

#[test]
fn too_long_a_run_is_refused_where_it_would_recurse() {
    let text = "a".repeat(MAX_RUN);
    let refused = VocabError::RunTooLong {
        run: MAX_RUN + 1,
        max: MAX_RUN,
    };
    assert_eq!(bpe("tekken").tokenize(&text, false, false), Err(refused));
    let spaced = bpe("tekken").tokenize(&text.replace("aaaa", "aaa "), false, false);
    assert_eq!(spaced.unwrap().len(), MAX_RUN);
    assert_eq!(
        bpe("gpt-2").tokenize(&text, false, false).unwrap().len(),
        MAX_RUN
    );
}
