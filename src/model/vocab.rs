//! The vocabulary: token ids to text and back, and chat templates, through libllama.
//!
//! libllama aborts the process on many malformed files. So it never sees the file: `validate_tokenizer` reads the
//! tokenizer's keys with our own parser, refuses what libllama could not survive, and hands over a metadata object
//! rebuilt from the accepted values alone. Nothing else of the file (other keys, tensors, split parts) can reach it.

use crate::file::gguf::{Gguf, GgufError};
use crate::file::mmap::MappedGguf;
use crate::ggml;
use ggml_sys as sys;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

/// Most tokens accepted. The largest vocabularies in use have 262 thousand.
const MAX_TOKENS: usize = 1 << 20;
/// Most merges accepted. The largest tokenizers in use have 0.6 million.
const MAX_MERGES: usize = 1 << 21;
/// Most bytes of all tokens, and of all merges, together: bounds what libllama allocates. Real ones stay below 8 MB.
const MAX_TEXT_BYTES: usize = 64 << 20;
/// Most bytes of a chat template. Real ones stay below 100 KB.
const MAX_TEMPLATE_BYTES: usize = 4 << 20;
/// Longest text to tokenize, and longest chat to format, in bytes: libllama counts in 32 bits and may triple it.
const MAX_INPUT_BYTES: usize = i32::MAX as usize / 8;
/// Stack that a recursive pre-tokenizer needs: a fixed part, and a part for each character of a run ([`longest_run`]).
/// On x86-64 the most measured is 384 bytes for each character; the rest is room for other CPUs and unoptimised builds.
const STACK_BASE: usize = 256 << 10;
const STACK_PER_CHAR: usize = 4096;
/// Runs of up to this many characters are left to the caller's stack (512 KB).
const MAX_RUN_ON_CALLER: usize = 64;
/// Longest run for a recursive pre-tokenizer: reserves 1 GB of address space, of which what is needed is used.
const MAX_RUN: usize = 1 << 18;

const KEY_MODEL: &str = "tokenizer.ggml.model";
const KEY_PRE: &str = "tokenizer.ggml.pre";
const KEY_TOKENS: &str = "tokenizer.ggml.tokens";
const KEY_SCORES: &str = "tokenizer.ggml.scores";
const KEY_TYPES: &str = "tokenizer.ggml.token_type";
const KEY_MERGES: &str = "tokenizer.ggml.merges";
const KEY_TEMPLATE: &str = "tokenizer.chat_template";

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
const PRE_ITERATIVE: &[&str] = &[
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "mellum", "gigachat", "a.x-4.0",
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe",
    "chatglm-bpe", "glm4", "qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "qwen35", "grok-2",
    "starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b",
];
/// Pre-tokenizers that libllama runs through `std::regex`, which recurses for every character of a run.
#[rustfmt::skip]
const PRE_RECURSIVE: &[&str] = &[
    "default", "tekken", "gpt-4o", "llama4", "kanana2", "falcon", "deepseek-llm", "deepseek-coder", "deepseek-v3",
    "poro-chat", "viking", "bloom", "gpt3-finnish", "seed-coder", "bailingmoe", "hunyuan-dense",
];

/// A tokenizer that cannot be used, one variant per cause.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum VocabError {
    /// A key of the tokenizer has the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The algorithm is not one of those that are validated here.
    #[error(
        "tokenizer kind {kind:?} is not supported, only gpt2 (byte-level BPE) and llama (SentencePiece BPE) are"
    )]
    UnsupportedKind {
        /// `tokenizer.ggml.model`.
        kind: String,
    },
    /// The rule that cuts text into words is not known.
    #[error("pre-tokenizer {pre:?} is not supported")]
    UnsupportedPre {
        /// `tokenizer.ggml.pre`.
        pre: String,
    },
    /// A key that this kind of tokenizer needs is absent.
    #[error("{key} is missing")]
    MissingKey {
        /// The key.
        key: &'static str,
    },
    /// A list or text is larger than any real one.
    #[error("{key} has {got} {unit}, at most {max} are accepted")]
    TooLarge {
        /// The key.
        key: &'static str,
        /// What is counted.
        unit: &'static str,
        /// How many there are.
        got: usize,
        /// How many may be.
        max: usize,
    },
    /// A list that belongs to the tokens has another length.
    #[error("{key} has {got} entries for {expected} tokens")]
    ListLength {
        /// The key.
        key: &'static str,
        /// The number of tokens.
        expected: usize,
        /// The number of entries.
        got: usize,
    },
    /// Two tokens have the same text.
    #[error("tokens {first} and {second} are both {text:?}")]
    DuplicateToken {
        /// The first of the two.
        first: usize,
        /// The second.
        second: usize,
        /// Their text, with U+FFFD for invalid bytes.
        text: String,
    },
    /// A score is NaN.
    #[error("the score of token {id} is not a number")]
    ScoreNotANumber {
        /// The token.
        id: usize,
    },
    /// A token type outside of 0 to 6.
    #[error("token {id} has type {got}, expected 0 to 6")]
    TokenType {
        /// The token.
        id: usize,
        /// Its type.
        got: i64,
    },
    /// A token of type byte is not called `<0x00>` to `<0xFF>`.
    #[error("token {id} is of type byte, but called {text:?}, expected the form <0x0A>")]
    MalformedByteToken {
        /// The token.
        id: usize,
        /// Its text.
        text: String,
    },
    /// SentencePiece falls back to bytes for unknown characters, and one of them has no token.
    #[error("there is no token for byte 0x{byte:02X} (expected <0x{byte:02X}>)")]
    MissingByteToken {
        /// The byte.
        byte: u8,
    },
    /// A merge is not two parts with a space between.
    #[error("merge {index} is {text:?}, expected two parts with a space between")]
    MalformedMerge {
        /// Position in the list.
        index: usize,
        /// Its text.
        text: String,
    },
    /// A special token lies outside of the vocabulary.
    #[error("{key} is {id}, but there are {n_tokens} tokens")]
    SpecialToken {
        /// The key.
        key: &'static str,
        /// The id.
        id: u32,
        /// The number of tokens.
        n_tokens: usize,
    },
    /// The file asks for a token to be added that it does not name.
    #[error("the file asks for {what} to be added to each text, but has no such token")]
    MissingSpecial {
        /// `BOS` or `EOS`.
        what: &'static str,
    },
    /// libllama refused the tokenizer for a reason that is not checked here.
    #[error("libllama refused the tokenizer, see its log lines for the reason")]
    Refused,
    /// The model has no tokenizer: only token ids can be used.
    #[error("the model has no tokenizer, use token ids")]
    NoTokenizer,
    /// The text is too long to be tokenized or formatted in one piece.
    #[error("the text has {len} bytes, at most {max} can be used at once")]
    TextTooLong {
        /// Its length.
        len: usize,
        /// The longest possible.
        max: usize,
    },
    /// A word, or a stretch of white space, is too long for the recursive pattern of this pre-tokenizer.
    #[error(
        "the text has {run} characters without a break, this tokenizer can take {max}: insert spaces"
    )]
    RunTooLong {
        /// Length of the word with the space around it, in characters.
        run: usize,
        /// The longest possible.
        max: usize,
    },
    /// A chat message or template contains a NUL character, which libllama takes for the end.
    #[error("{what} contains a NUL character")]
    Nul {
        /// Where.
        what: &'static str,
    },
    /// The template is none of those that libllama knows.
    #[error(
        "the model's chat template is none of those that libllama knows: format the prompt yourself"
    )]
    UnknownTemplate,
    /// The system gave no thread for a pre-tokenizer that needs a large stack.
    #[error("cannot start a thread to tokenize: {kind}")]
    Thread {
        /// What the system said.
        kind: std::io::ErrorKind,
    },
}

/// The rule that cuts text into words before byte-level BPE.
#[derive(Clone, Copy)]
struct Pre {
    name: &'static str,
    /// Its stack grows with the text.
    recursive: bool,
}

/// What a file says of its tokenizer, checked: libllama accepts it without an abort.
struct Tokenizer<'a> {
    kind: &'static str,
    /// Only byte-level BPE has one.
    pre: Option<Pre>,
    tokens: Vec<Cow<'a, [u8]>>,
    scores: Option<Vec<f32>>,
    types: Option<Vec<i32>>,
    merges: Vec<&'a [u8]>,
    special: Vec<(&'static str, u32)>,
    flags: Vec<(&'static str, bool)>,
    /// libllama strips spaces after the special tokens of Phi-3, which it recognises by the model's name.
    phi3: bool,
}

/// Reads the tokenizer of `gguf`, which was parsed from `bytes`, and refuses all that libllama would abort on, throw
/// on or read out of bounds with. `Ok(None)`: the model has no tokenizer.
fn validate_tokenizer<'a>(
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

/// Loading allocates and frees many small strings; glibc keeps the pages. For a vocabulary of 128 thousand tokens and
/// 280 thousand merges, 21 of 89 MB of anonymous memory are given back.
fn return_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

fn expect_length(key: &'static str, got: usize, expected: usize) -> Result<(), VocabError> {
    if got == expected {
        Ok(())
    } else {
        Err(VocabError::ListLength { key, expected, got })
    }
}

fn at_most(
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

/// An upper bound of the characters that a pattern of [`PRE_RECURSIVE`] looks at for one match. Whatever the pattern, a
/// match is one character, then a stretch without white space, then a stretch of white space (line ends). Which of the
/// rarer characters libllama takes for white space does not matter: they count for both stretches.
fn longest_run(text: &str) -> usize {
    let is_space = |c: char| c.is_ascii_whitespace() || c == '\u{b}';
    let longest = |breaks: &dyn Fn(char) -> bool| {
        text.split(breaks)
            .map(|s| s.chars().count())
            .max()
            .unwrap_or(0)
    };
    // `/` may follow a word together with line ends.
    1 + longest(&is_space)
        + longest(&|c: char| c.is_alphanumeric() || c.is_ascii_graphic() && c != '/')
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl ChatMessage {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// The vocabulary of one model. Load it once and share it (`Arc`): all methods take `&self` and may run in parallel.
#[derive(Debug)]
pub struct Vocab {
    /// Where libllama's tables are built from at first use; `None` if they are there, or never will be.
    source: Option<Arc<MappedGguf>>,
    /// libllama's tables; [`VocabError::NoTokenizer`] for a model without tokenizer.
    tables: OnceLock<Result<Native, VocabError>>,
    n_tokens: usize,
    recursive: bool,
    chat_template: Option<String>,
}

impl Vocab {
    /// Checks the tokenizer and chat template of a mapped model. libllama's own tables (0.4 s and 60 MB for 128,000
    /// tokens) are built when a text function is first called, or by [`Vocab::preload`].
    ///
    /// # Errors
    /// As [`Vocab::load`].
    pub fn open(file: &Arc<MappedGguf>) -> Result<Self, VocabError> {
        let main = file.main();
        let (vocab, tokenizer) = Self::checked(&main.gguf, main.bytes())?;
        Ok(Self {
            source: tokenizer.is_some().then(|| file.clone()),
            ..vocab
        })
    }

    /// Reads the tokenizer and chat template of `gguf`, which was parsed from `bytes` (of a split model, the first part).
    ///
    /// Supported are `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE). A model without tokenizer (`none`, or no
    /// tokenizer keys) loads too: ids work, functions on text return [`VocabError::NoTokenizer`].
    ///
    /// # Errors
    /// Every variant of [`VocabError`] that describes a file.
    pub fn load(gguf: &Gguf, bytes: &[u8]) -> Result<Self, VocabError> {
        let (vocab, tokenizer) = Self::checked(gguf, bytes)?;
        if let Some(tokenizer) = tokenizer {
            let native = build(tokenizer)?;
            vocab.tables.set(Ok(native)).expect("not set yet");
        }
        Ok(vocab)
    }

    /// Everything but libllama's tables.
    fn checked<'a>(
        gguf: &Gguf,
        bytes: &'a [u8],
    ) -> Result<(Self, Option<Tokenizer<'a>>), VocabError> {
        let chat_template = gguf.str(KEY_TEMPLATE)?.map(str::to_owned);
        if let Some(template) = &chat_template {
            at_most(KEY_TEMPLATE, "bytes", template.len(), MAX_TEMPLATE_BYTES)?;
        }
        let tokenizer = validate_tokenizer(gguf, bytes)?;
        let n_tokens = match &tokenizer {
            Some(tokenizer) => tokenizer.tokens.len(),
            None => {
                let arch = gguf.str("general.architecture")?.unwrap_or_default();
                gguf.u32(&format!("{arch}.vocab_size"))?.unwrap_or(0) as usize
            }
        };
        let pre = tokenizer.as_ref().and_then(|t| t.pre);
        let vocab = Self {
            source: None,
            tables: OnceLock::new(),
            n_tokens,
            recursive: pre.is_some_and(|p| p.recursive),
            chat_template,
        };
        Ok((vocab, tokenizer))
    }

    fn native(&self) -> Result<&Native, VocabError> {
        let tables = self.tables.get_or_init(|| {
            let file = self.source.as_ref().ok_or(VocabError::NoTokenizer)?;
            let main = file.main();
            let tokenizer = validate_tokenizer(&main.gguf, main.bytes())?;
            build(tokenizer.ok_or(VocabError::NoTokenizer)?)
        });
        tables.as_ref().map_err(Clone::clone)
    }

    /// Builds what text functions need now, for a host that wants no delay at its first prompt; returns at once if it is
    /// there. May be called from a thread of its own.
    ///
    /// # Errors
    /// [`VocabError::NoTokenizer`], [`VocabError::Refused`], [`VocabError::MissingSpecial`].
    pub fn preload(&self) -> Result<(), VocabError> {
        self.native().map(|_| ())
    }

    /// Number of tokens. The model's embedding may have more rows (padding).
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<i32> {
        self.native().ok()?.special(sys::llama_vocab_bos)
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<i32> {
        self.native().ok()?.special(sys::llama_vocab_eos)
    }

    /// The token that ends a turn of a conversation.
    pub fn eot(&self) -> Option<i32> {
        self.native().ok()?.special(sys::llama_vocab_eot)
    }

    /// Whether generation ends with this token: EOS, EOT and whatever else libllama counts among them.
    pub fn is_eog(&self, id: i32) -> bool {
        self.native().is_ok_and(|n| n.is_eog(id))
    }

    /// Whether the file asks for BOS in front of each text. [`Vocab::tokenize`] with `add_special` does it.
    pub fn add_bos(&self) -> bool {
        self.native().is_ok_and(Native::add_bos)
    }

    /// BOS if the file asks for it in front of each text.
    pub fn leading_bos(&self) -> Option<i32> {
        self.add_bos().then(|| self.bos()).flatten()
    }

    /// [`Vocab::leading_bos`] where a text begins. Elsewhere the vocabulary is not asked, which would make it load tables that
    /// token ids do without.
    pub(crate) fn leading_bos_if(&self, begins: bool) -> Option<i32> {
        if begins { self.leading_bos() } else { None }
    }

    /// Whether the file asks for EOS after each text. [`Vocab::tokenize`] with `add_special` does it.
    pub fn add_eos(&self) -> bool {
        self.native().is_ok_and(Native::add_eos)
    }

    /// The ids of `text`. `add_special` adds BOS and EOS as the file asks for. With `parse_special` the text of control
    /// tokens (`<|im_end|>`) becomes those tokens: never do this with text from strangers.
    ///
    /// # Errors
    /// [`VocabError::NoTokenizer`], [`VocabError::TextTooLong`], [`VocabError::RunTooLong`], [`VocabError::Thread`].
    pub fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<i32>, VocabError> {
        let native = self.native()?;
        if text.len() > MAX_INPUT_BYTES {
            return Err(VocabError::TextTooLong {
                len: text.len(),
                max: MAX_INPUT_BYTES,
            });
        }
        let run = if self.recursive { longest_run(text) } else { 0 };
        if run <= MAX_RUN_ON_CALLER {
            return native.tokenize(text, add_special, parse_special);
        }
        if run > MAX_RUN {
            return Err(VocabError::RunTooLong { run, max: MAX_RUN });
        }
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("tokenize".into())
                .stack_size(STACK_BASE + run * STACK_PER_CHAR)
                .spawn_scoped(scope, || native.tokenize(text, add_special, parse_special))
                .map_err(|e| VocabError::Thread { kind: e.kind() })?
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The bytes a token stands for, possibly a part of a character; none for an unknown id. Control tokens have bytes
    /// only if `special`.
    pub fn token_bytes(&self, id: i32, special: bool) -> Vec<u8> {
        match self.native() {
            Ok(native) if self.contains(id) => native.token_bytes(id, special),
            _ => Vec::new(),
        }
    }

    /// The token as the vocabulary spells it (`Ġthe`, `▁the`, `<0x0A>`), with U+FFFD for invalid bytes.
    pub fn token_text(&self, id: i32) -> Option<String> {
        let native = self.native().ok()?;
        self.contains(id).then(|| native.token_text(id))
    }

    /// The text of `ids`: exactly what streaming their bytes gives, without control tokens. U+FFFD stands for bytes
    /// that are not UTF-8.
    pub fn detokenize(&self, ids: &[i32]) -> String {
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|&id| self.token_bytes(id, false))
            .collect();
        lossy(&bytes)
    }

    /// The file's chat template (Jinja source).
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Formats a conversation; with `add_assistant` the text ends where the answer begins. Tokenize it with
    /// `parse_special`.
    ///
    /// libllama has no Jinja interpreter: it recognises the well-known templates. For a file without template it takes
    /// ChatML, and so does this.
    ///
    /// # Errors
    /// [`VocabError::UnknownTemplate`], [`VocabError::Nul`], [`VocabError::TextTooLong`].
    pub fn apply_chat(
        &self,
        messages: &[ChatMessage],
        add_assistant: bool,
    ) -> Result<String, VocabError> {
        ggml::log::init();
        let len = messages
            .iter()
            .map(|m| m.role.len() + m.content.len())
            .fold(0, usize::saturating_add);
        if len > MAX_INPUT_BYTES {
            return Err(VocabError::TextTooLong {
                len,
                max: MAX_INPUT_BYTES,
            });
        }
        let c_string = |text: &str, what| CString::new(text).map_err(|_| VocabError::Nul { what });
        let template = self
            .chat_template
            .as_deref()
            .map(|t| c_string(t, "the chat template"))
            .transpose()?;
        let owned = messages
            .iter()
            .map(|m| {
                Ok((
                    c_string(&m.role, "the role of a message")?,
                    c_string(&m.content, "a message")?,
                ))
            })
            .collect::<Result<Vec<_>, VocabError>>()?;
        let chat: Vec<_> = owned
            .iter()
            .map(|(role, content)| sys::llama_chat_message {
                role: role.as_ptr(),
                content: content.as_ptr(),
            })
            .collect();
        let mut out: Vec<u8> = Vec::with_capacity(2 * len + 1024);
        loop {
            // SAFETY: template (or null) and messages are NUL-terminated strings that live in `template` and `owned`;
            // at most `capacity` bytes are written to `out`.
            let n = unsafe {
                sys::llama_chat_apply_template(
                    template.as_ref().map_or(std::ptr::null(), |t| t.as_ptr()),
                    chat.as_ptr(),
                    chat.len(),
                    add_assistant,
                    out.as_mut_ptr().cast(),
                    i32::try_from(out.capacity()).unwrap_or(i32::MAX),
                )
            };
            let n = usize::try_from(n).map_err(|_| VocabError::UnknownTemplate)?;
            if n > out.capacity() {
                out.reserve(n);
                continue;
            }
            // SAFETY: libllama has written the `n` bytes of the result, which fit.
            unsafe { out.set_len(n) };
            return Ok(lossy(&out));
        }
    }

    fn contains(&self, id: i32) -> bool {
        usize::try_from(id).is_ok_and(|id| id < self.n_tokens)
    }
}

/// libllama's tables, from a tokenizer that passed the gate.
fn build(tokenizer: Tokenizer<'_>) -> Result<Native, VocabError> {
    let native = Native::load(&tokenizer)?;
    drop(tokenizer);
    return_freed_memory();
    // libllama asserts this whenever a text is tokenized.
    let bos = native.special(sys::llama_vocab_bos);
    let eos = native.special(sys::llama_vocab_eos);
    match (
        native.add_bos() && bos.is_none(),
        native.add_eos() && eos.is_none(),
    ) {
        (true, _) => Err(VocabError::MissingSpecial { what: "BOS" }),
        (_, true) => Err(VocabError::MissingSpecial { what: "EOS" }),
        _ => Ok(native),
    }
}

/// Owns a `llama_model` that holds nothing but a vocabulary.
#[derive(Debug)]
struct Native {
    model: NonNull<sys::llama_model>,
    vocab: NonNull<sys::llama_vocab>,
}

// SAFETY: the model is plain heap data with one owner; nothing in it is tied to a thread.
unsafe impl Send for Native {}
// SAFETY: libllama only reads the vocabulary after it is loaded (its functions take `const llama_vocab *`, and
// tokenization keeps its state in a session object per call); its lazily built static tables are C++11 statics, which
// are initialised once under a lock.
unsafe impl Sync for Native {}

impl Native {
    /// Hands the accepted values to libllama.
    fn load(tokenizer: &Tokenizer<'_>) -> Result<Self, VocabError> {
        ggml::log::init();
        let metadata = Metadata::new();
        // Any architecture that libllama knows: its name only decides how tensors would be read.
        metadata.set_str("general.architecture", "llama");
        if tokenizer.phi3 {
            metadata.set_str("general.name", "phi-3");
        }
        metadata.set_str(KEY_MODEL, tokenizer.kind);
        if let Some(pre) = tokenizer.pre {
            metadata.set_str(KEY_PRE, pre.name);
        }
        metadata.set_strs(KEY_TOKENS, tokenizer.tokens.iter().map(|t| t.as_ref()));
        if let Some(scores) = &tokenizer.scores {
            metadata.set_array(KEY_SCORES, sys::GGUF_TYPE_FLOAT32, scores);
        }
        if let Some(types) = &tokenizer.types {
            metadata.set_array(KEY_TYPES, sys::GGUF_TYPE_INT32, types);
        }
        if tokenizer.pre.is_some() {
            metadata.set_strs(KEY_MERGES, tokenizer.merges.iter().copied());
        }
        for &(key, id) in &tokenizer.special {
            metadata.set_u32(key, id);
        }
        for &(key, on) in &tokenizer.flags {
            metadata.set_bool(key, on);
        }
        // SAFETY: returns a plain struct.
        let mut params = unsafe { sys::llama_model_default_params() };
        params.vocab_only = true;
        // SAFETY: `metadata` lives until the end of this function and libllama copies what it keeps. Without weights
        // the tensor callback is never called, so it may be absent. C++ exceptions are caught inside.
        let model = unsafe {
            sys::llama_model_init_from_user(metadata.0.as_ptr(), None, std::ptr::null_mut(), params)
        };
        let model = NonNull::new(model).ok_or(VocabError::Refused)?;
        // SAFETY: `model` was just made; the vocabulary is a part of it and lives as long.
        let vocab = unsafe { sys::llama_model_get_vocab(model.as_ptr()) };
        let vocab =
            NonNull::new(vocab.cast_mut()).expect("the vocabulary is a member of the model");
        Ok(Self { model, vocab })
    }

    fn vocab(&self) -> *const sys::llama_vocab {
        self.vocab.as_ptr()
    }

    /// A special token, by libllama's function for it.
    fn special(&self, get: unsafe extern "C" fn(*const sys::llama_vocab) -> i32) -> Option<i32> {
        // SAFETY: the vocabulary lives as long as `self`.
        let id = unsafe { get(self.vocab()) };
        (id >= 0).then_some(id)
    }

    fn add_bos(&self) -> bool {
        // SAFETY: the vocabulary lives as long as `self`.
        unsafe { sys::llama_vocab_get_add_bos(self.vocab()) }
    }

    fn add_eos(&self) -> bool {
        // SAFETY: the vocabulary lives as long as `self`.
        unsafe { sys::llama_vocab_get_add_eos(self.vocab()) }
    }

    fn is_eog(&self, id: i32) -> bool {
        // SAFETY: the vocabulary lives as long as `self`; the id is looked up in a set, any value will do.
        unsafe { sys::llama_vocab_is_eog(self.vocab(), id) }
    }

    /// `text` is at most [`MAX_INPUT_BYTES`] long.
    fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<i32>, VocabError> {
        // Enough unless SentencePiece spells spaces in bytes: hardly any text is tokenized twice.
        let mut ids: Vec<i32> = Vec::with_capacity(text.len() + 8);
        loop {
            // SAFETY: the text is passed with its length, and at most `capacity` ids are written. The vocabulary has
            // passed `validate_tokenizer` and the text is UTF-8: no assertion can fail and nothing throws.
            let n = unsafe {
                sys::llama_tokenize(
                    self.vocab(),
                    text.as_ptr().cast(),
                    text.len() as i32,
                    ids.as_mut_ptr(),
                    i32::try_from(ids.capacity()).unwrap_or(i32::MAX),
                    add_special,
                    parse_special,
                )
            };
            match n {
                // The number of ids does not fit 32 bits.
                i32::MIN => {
                    return Err(VocabError::TextTooLong {
                        len: text.len(),
                        max: MAX_INPUT_BYTES,
                    });
                }
                n if n < 0 => ids.reserve(n.unsigned_abs() as usize),
                n => {
                    // SAFETY: libllama has written `n` ids, which fit.
                    unsafe { ids.set_len(n as usize) };
                    return Ok(ids);
                }
            }
        }
    }

    /// `id` is within the vocabulary.
    fn token_bytes(&self, id: i32, special: bool) -> Vec<u8> {
        let mut piece: Vec<u8> = Vec::with_capacity(32);
        loop {
            // SAFETY: the id is within the vocabulary; at most `capacity` bytes are written.
            let n = unsafe {
                sys::llama_token_to_piece(
                    self.vocab(),
                    id,
                    piece.as_mut_ptr().cast(),
                    i32::try_from(piece.capacity()).unwrap_or(i32::MAX),
                    0,
                    special,
                )
            };
            if n < 0 {
                piece.reserve(n.unsigned_abs() as usize);
                continue;
            }
            // SAFETY: libllama has written `n` bytes, which fit.
            unsafe { piece.set_len(n as usize) };
            return piece;
        }
    }

    /// `id` is within the vocabulary.
    fn token_text(&self, id: i32) -> String {
        // SAFETY: the id is within the vocabulary, which lives as long as `self` and keeps a NUL-terminated text.
        let text = unsafe { CStr::from_ptr(sys::llama_vocab_get_text(self.vocab(), id)) };
        text.to_string_lossy().into_owned()
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: made by `llama_model_init_from_user`, freed once; the vocabulary goes with it.
        unsafe { sys::llama_model_free(self.model.as_ptr()) };
    }
}

/// Owns a `gguf_context` that is being filled.
struct Metadata(NonNull<sys::gguf_context>);

impl Metadata {
    fn new() -> Self {
        // SAFETY: allocates an empty object.
        let ctx = unsafe { sys::gguf_init_empty() };
        Self(NonNull::new(ctx).expect("C++ new does not return null"))
    }

    fn set_str(&self, key: &str, value: &str) {
        let (key, value) = (c_key(key), c_key(value));
        // SAFETY: both strings are NUL-terminated and are copied.
        unsafe { sys::gguf_set_val_str(self.0.as_ptr(), key.as_ptr(), value.as_ptr()) };
    }

    fn set_u32(&self, key: &str, value: u32) {
        let key = c_key(key);
        // SAFETY: the key is NUL-terminated and is copied.
        unsafe { sys::gguf_set_val_u32(self.0.as_ptr(), key.as_ptr(), value) };
    }

    fn set_bool(&self, key: &str, value: bool) {
        let key = c_key(key);
        // SAFETY: the key is NUL-terminated and is copied.
        unsafe { sys::gguf_set_val_bool(self.0.as_ptr(), key.as_ptr(), value) };
    }

    /// `T` is the Rust type of `ty`.
    fn set_array<T: bytemuck::Pod>(&self, key: &str, ty: sys::gguf_type, values: &[T]) {
        let key = c_key(key);
        // SAFETY: `values` holds that many elements of that type, which are copied.
        unsafe {
            sys::gguf_set_arr_data(
                self.0.as_ptr(),
                key.as_ptr(),
                ty,
                values.as_ptr().cast::<c_void>(),
                values.len(),
            );
        }
    }

    /// The values contain no NUL.
    fn set_strs<'a>(&self, key: &str, values: impl Iterator<Item = &'a [u8]>) {
        let key = c_key(key);
        // One allocation for all: there may be half a million.
        let mut text = Vec::new();
        let mut starts = Vec::new();
        for value in values {
            starts.push(text.len());
            text.extend_from_slice(value);
            text.push(0);
        }
        let mut pointers: Vec<*const c_char> = starts
            .iter()
            .map(|&at| text[at..].as_ptr().cast())
            .collect();
        // SAFETY: that many pointers to NUL-terminated strings in `text`, which are copied.
        unsafe {
            sys::gguf_set_arr_str(
                self.0.as_ptr(),
                key.as_ptr(),
                pointers.as_mut_ptr(),
                pointers.len(),
            )
        };
    }
}

impl Drop for Metadata {
    fn drop(&mut self) {
        // SAFETY: made by `gguf_init_empty`, freed once.
        unsafe { sys::gguf_free(self.0.as_ptr()) };
    }
}

/// A key or one of this module's own constants: they contain no NUL.
fn c_key(text: &str) -> CString {
    CString::new(text).expect("constants without NUL")
}

#[cfg(test)]
mod tests {
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
}
