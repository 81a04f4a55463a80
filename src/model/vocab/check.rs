//! What a file says of its tokenizer, checked before libllama sees it.

use super::VocabError;
use crate::file::gguf::Gguf;
use std::borrow::Cow;
use std::collections::HashMap;

/// Most tokens accepted. The largest vocabularies in use have 262 thousand.
const MAX_TOKENS: usize = 1 << 20;
/// Most merges accepted. The largest tokenizers in use have 0.6 million.
const MAX_MERGES: usize = 1 << 21;
/// Most bytes of all tokens, and of all merges, together: bounds what libllama allocates. Real ones stay below 8 MB.
const MAX_TEXT_BYTES: usize = 64 << 20;

pub(super) const KEY_MODEL: &str = "tokenizer.ggml.model";
pub(super) const KEY_PRE: &str = "tokenizer.ggml.pre";
pub(super) const KEY_TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const KEY_SCORES: &str = "tokenizer.ggml.scores";
pub(super) const KEY_TYPES: &str = "tokenizer.ggml.token_type";
pub(super) const KEY_MERGES: &str = "tokenizer.ggml.merges";

/// Keys that hold the id of a special token ("seperator" is how the format spells it).
const SPECIAL_KEYS: [&str; 17] = [
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.fim_pre_token_id",
    "tokenizer.ggml.fim_suf_token_id",
    "tokenizer.ggml.fim_mid_token_id",
    "tokenizer.ggml.fim_pad_token_id",
    "tokenizer.ggml.fim_rep_token_id",
    "tokenizer.ggml.fim_sep_token_id",
    "tokenizer.ggml.prefix_token_id",
    "tokenizer.ggml.suffix_token_id",
    "tokenizer.ggml.middle_token_id",
];
const FLAG_KEYS: [&str; 3] = [
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
];

/// Pre-tokenizers of byte-level BPE that libllama splits with loops of its own or with patterns of bounded length.
#[rustfmt::skip]
pub(super) const PRE_ITERATIVE: &[&str] = &[
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "mellum", "gigachat", "a.x-4.0",
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe",
    "chatglm-bpe", "glm4", "qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "qwen35", "grok-2",
    "starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b",
];
/// Pre-tokenizers that libllama runs through `std::regex`, which recurses for every character of a run.
#[rustfmt::skip]
pub(super) const PRE_RECURSIVE: &[&str] = &[
    "default", "tekken", "gpt-4o", "llama4", "kanana2", "falcon", "deepseek-llm", "deepseek-coder", "deepseek-v3",
    "poro-chat", "viking", "bloom", "gpt3-finnish", "seed-coder", "bailingmoe", "hunyuan-dense",
];

/// The rule that cuts text into words before byte-level BPE.
#[derive(Clone, Copy)]
pub(super) struct Pre {
    pub(super) name: &'static str,
    /// Its stack grows with the text.
    pub(super) recursive: bool,
}

/// What a file says of its tokenizer, checked: libllama accepts it without an abort.
pub(super) struct Tokenizer<'a> {
    pub(super) kind: &'static str,
    /// Only byte-level BPE has one.
    pub(super) pre: Option<Pre>,
    pub(super) tokens: Vec<Cow<'a, [u8]>>,
    pub(super) scores: Option<Vec<f32>>,
    pub(super) types: Option<Vec<i32>>,
    pub(super) merges: Vec<&'a [u8]>,
    pub(super) special: Vec<(&'static str, u32)>,
    pub(super) flags: Vec<(&'static str, bool)>,
    /// libllama strips spaces after the special tokens of Phi-3, which it recognises by the model's name.
    pub(super) phi3: bool,
}

/// Reads the tokenizer of `gguf`, which was parsed from `bytes`, and refuses all that libllama would abort on, throw
/// on or read out of bounds with. `Ok(None)`: the model has no tokenizer.
pub(super) fn validate_tokenizer<'a>(
    gguf: &Gguf,
    bytes: &'a [u8],
) -> Result<Option<Tokenizer<'a>>, VocabError> {
    let kind = match gguf.str(KEY_MODEL)? {
        None | Some("none" | "no_vocab") => return Ok(None),
        Some("gpt2") => "gpt2",
        Some("llama") => "llama",
        Some(other) => {
            return Err(VocabError::UnsupportedKind {
                kind: other.to_owned(),
            });
        }
    };
    let tokens = tokens(gguf, bytes)?;
    let n_tokens = tokens.len();

    // libllama reads the two lists up to the number of tokens.
    let scores = gguf.f32_array(bytes, KEY_SCORES)?;
    if let Some(scores) = &scores {
        expect_length(KEY_SCORES, scores.len(), n_tokens)?;
        // Scores order a heap, and NaN has no order.
        if let Some(id) = scores.iter().position(|s| s.is_nan()) {
            return Err(VocabError::ScoreNotANumber { id });
        }
    }
    let types = gguf.u32_array(bytes, KEY_TYPES)?;
    if let Some(types) = &types {
        expect_length(KEY_TYPES, types.len(), n_tokens)?;
        if let Some(id) = types.iter().position(|&t| t > TYPE_BYTE) {
            return Err(VocabError::TokenType {
                id,
                got: types[id].into(),
            });
        }
        // libllama cuts the digits out of the text of byte tokens without looking.
        for (id, _) in types.iter().enumerate().filter(|&(_, &t)| t == TYPE_BYTE) {
            if !is_byte_token(&tokens[id]) {
                return Err(VocabError::MalformedByteToken {
                    id,
                    text: lossy(&tokens[id]),
                });
            }
        }
    }

    let ids = ids_by_text(&tokens)?;
    let (pre, merges) = if kind == "gpt2" {
        expect_decodable(&tokens, types.as_deref())?;
        (Some(pre_tokenizer(gguf)?), merges(gguf, bytes)?)
    } else {
        expect_byte_tokens(&ids)?;
        (None, Vec::new())
    };

    let mut special = Vec::new();
    for key in SPECIAL_KEYS {
        match gguf.u32(key)? {
            // -1 in 32 bits: how some converters write "none".
            None | Some(u32::MAX) => {}
            Some(id) if (id as usize) < n_tokens => special.push((key, id)),
            Some(id) => return Err(VocabError::SpecialToken { key, id, n_tokens }),
        }
    }
    let mut flags = Vec::new();
    for key in FLAG_KEYS {
        flags.extend(gguf.bool(key)?.map(|on| (key, on)));
    }
    // For this name libllama looks four tokens up and throws if one is absent.
    let name = gguf
        .str("general.name")?
        .unwrap_or_default()
        .to_ascii_lowercase();
    let phi3 = (name.contains("phi-3") || name.contains("phi3"))
        && ["</s>", "<unk>", "<s>", "<|endoftext|>"]
            .iter()
            .all(|t| ids.contains_key(t.as_bytes()));

    Ok(Some(Tokenizer {
        kind,
        pre,
        tokens,
        scores,
        types: types.map(|t| t.into_iter().map(|t| t as i32).collect()),
        merges,
        special,
        flags,
        phi3,
    }))
}

/// LLAMA_TOKEN_TYPE_NORMAL of the file format.
const TYPE_NORMAL: u32 = 1;
/// LLAMA_TOKEN_TYPE_BYTE of the file format, the largest type.
const TYPE_BYTE: u32 = 6;

pub(super) fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

fn expect_length(key: &'static str, got: usize, expected: usize) -> Result<(), VocabError> {
    if got == expected {
        Ok(())
    } else {
        Err(VocabError::ListLength { key, expected, got })
    }
}

pub(super) fn at_most(
    key: &'static str,
    unit: &'static str,
    got: usize,
    max: usize,
) -> Result<(), VocabError> {
    if got <= max {
        Ok(())
    } else {
        Err(VocabError::TooLarge {
            key,
            unit,
            got,
            max,
        })
    }
}

/// The tokens as libllama will see them: cut at the first NUL, and with its names for empty ones.
fn tokens<'a>(gguf: &Gguf, bytes: &'a [u8]) -> Result<Vec<Cow<'a, [u8]>>, VocabError> {
    let tokens = gguf
        .str_array(bytes, KEY_TOKENS)?
        .ok_or(VocabError::MissingKey { key: KEY_TOKENS })?;
    if tokens.is_empty() {
        return Err(VocabError::MissingKey { key: KEY_TOKENS });
    }
    at_most(KEY_TOKENS, "tokens", tokens.len(), MAX_TOKENS)?;
    at_most(
        KEY_TOKENS,
        "bytes",
        tokens.iter().map(|t| t.len()).sum(),
        MAX_TEXT_BYTES,
    )?;
    let seen = |(id, token)| match until_nul(token) {
        b"" => Cow::Owned(format!("[EMPTY_{id}]").into_bytes()),
        token => Cow::Borrowed(token),
    };
    Ok(tokens.into_iter().enumerate().map(seen).collect())
}

fn until_nul(text: &[u8]) -> &[u8] {
    text.split(|&b| b == 0).next().unwrap_or_default()
}

/// The id of each token's text; libllama asserts that no two are equal.
fn ids_by_text<'a>(tokens: &'a [Cow<'_, [u8]>]) -> Result<HashMap<&'a [u8], usize>, VocabError> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (second, text) in tokens.iter().enumerate() {
        if let Some(first) = ids.insert(text.as_ref(), second) {
            return Err(VocabError::DuplicateToken {
                first,
                second,
                text: lossy(text),
            });
        }
    }
    Ok(ids)
}

fn is_byte_token(text: &[u8]) -> bool {
    matches!(text, [b'<', b'0', b'x', a, b, b'>'] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit())
}

/// SentencePiece looks a token up for each byte of an unknown character, and throws across C if there is none.
fn expect_byte_tokens(ids: &HashMap<&[u8], usize>) -> Result<(), VocabError> {
    // Valid UTF-8, and so every text that is ever tokenized, contains no other bytes.
    let mut possible = (0x00..=0xBF).chain(0xC2..=0xF4);
    // A token that is the bare byte serves as well, except for NUL, which ends it.
    let present = |&byte: &u8| {
        ids.contains_key(format!("<0x{byte:02X}>").as_bytes())
            || byte != 0 && ids.contains_key([byte].as_slice())
    };
    match possible.find(|byte| !present(byte)) {
        Some(byte) => Err(VocabError::MissingByteToken { byte }),
        None => Ok(()),
    }
}

fn pre_tokenizer(gguf: &Gguf) -> Result<Pre, VocabError> {
    // Files from before the key was introduced: libllama uses its default rule.
    let name = gguf.str(KEY_PRE)?.unwrap_or("default");
    let find = |names: &[&'static str]| names.iter().copied().find(|&n| n == name);
    if let Some(name) = find(PRE_ITERATIVE) {
        Ok(Pre {
            name,
            recursive: false,
        })
    } else if let Some(name) = find(PRE_RECURSIVE) {
        Ok(Pre {
            name,
            recursive: true,
        })
    } else {
        Err(VocabError::UnsupportedPre {
            pre: name.to_owned(),
        })
    }
}

fn merges<'a>(gguf: &Gguf, bytes: &'a [u8]) -> Result<Vec<&'a [u8]>, VocabError> {
    let mut merges = gguf
        .str_array(bytes, KEY_MERGES)?
        .ok_or(VocabError::MissingKey { key: KEY_MERGES })?;
    at_most(KEY_MERGES, "merges", merges.len(), MAX_MERGES)?;
    at_most(
        KEY_MERGES,
        "bytes",
        merges.iter().map(|m| m.len()).sum(),
        MAX_TEXT_BYTES,
    )?;
    for (index, merge) in merges.iter_mut().enumerate() {
        *merge = until_nul(merge);
        // The first part may itself begin with a space.
        let space = merge.iter().skip(1).position(|&b| b == b' ');
        if space.is_none_or(|at| at + 2 == merge.len()) {
            return Err(VocabError::MalformedMerge {
                index,
                text: lossy(merge),
            });
        }
    }
    Ok(merges)
}

/// libllama decodes each ordinary BPE token once. A character outside of the byte alphabet is replaced by a note that
/// contains the whole token, so a long token of such characters would grow to the square of its length.
fn expect_decodable(tokens: &[Cow<'_, [u8]>], types: Option<&[u32]>) -> Result<(), VocabError> {
    let in_alphabet = |c: char| matches!(c, '!'..='~' | '¡'..='¬' | '®'..='\u{143}');
    let mut total = 0usize;
    for (id, token) in tokens.iter().enumerate() {
        if types.is_some_and(|types| types[id] != TYPE_NORMAL) {
            continue;
        }
        // Invalid bytes become U+FFFD here as there.
        let noted = String::from_utf8_lossy(token)
            .chars()
            .filter(|&c| !in_alphabet(c))
            .count();
        total = total.saturating_add(noted.saturating_mul(token.len() + 32));
    }
    at_most(KEY_TOKENS, "bytes when decoded", total, MAX_TEXT_BYTES)
}
