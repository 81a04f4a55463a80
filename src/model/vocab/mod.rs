//! The vocabulary: token ids to text and back, through libllama, and conversations in the chat template.
//!
//! libllama aborts the process on many malformed files. So it never sees the file: `validate_tokenizer` reads the
//! tokenizer's keys with our own parser, refuses what libllama could not survive, and hands over a metadata object
//! rebuilt from the accepted values alone. Nothing else of the file (other keys, tensors, split parts) can reach it.

mod check;
mod error;
mod native;

pub use error::VocabError;

use super::chat::{
    ChatFormat, ChatMessage, ChatScript, ChatTemplate, Conversation, built_in_template,
};
use crate::file::gguf::Gguf;
use crate::file::mmap::MappedGguf;
use check::{Tokenizer, at_most, lossy, validate_tokenizer};
use native::Native;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

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

const KEY_TEMPLATE: &str = "tokenizer.chat_template";

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

/// The vocabulary of one model. Load it once and share it (`Arc`): all methods take `&self` and may run in parallel.
#[derive(Debug)]
pub struct Vocab {
    /// Where libllama's tables are built from at first use; `None` if they are there, or never will be.
    source: Option<Arc<MappedGguf>>,
    /// libllama's tables; [`VocabError::NoTokenizer`] for a model without tokenizer.
    tables: OnceLock<Result<Native, VocabError>>,
    n_tokens: usize,
    recursive: bool,
    chat: ChatOptions,
    /// The template of `chat`, compiled at first use.
    format: OnceLock<Result<ChatFormat, VocabError>>,
    said: Said,
}

/// How conversations are formatted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChatOptions {
    /// Jinja source, or a name that [`built_in_template`] knows, instead of the file's template.
    pub template: Option<String>,
    /// The text of control tokens (`<|im_end|>`) inside messages becomes those tokens. Off by default: whoever may write a message
    /// could otherwise end it, and speak for somebody else.
    pub parse_special: bool,
}

/// What is said once for each model.
#[derive(Debug, Default)]
struct Said {
    bos: AtomicBool,
    eos: AtomicBool,
    endless_turn: AtomicBool,
}

impl ChatOptions {
    /// Sets [`ChatOptions::template`].
    pub fn template(mut self, source_or_name: impl Into<String>) -> Self {
        self.template = Some(source_or_name.into());
        self
    }

    /// Sets [`ChatOptions::parse_special`].
    pub fn parse_special(mut self, on: bool) -> Self {
        self.parse_special = on;
        self
    }
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
            let native = Native::build(tokenizer)?;
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
            chat: ChatOptions {
                template: chat_template,
                parse_special: false,
            },
            format: OnceLock::new(),
            said: Said::default(),
        };
        Ok((vocab, tokenizer))
    }

    /// Formats conversations otherwise than the file says.
    ///
    /// # Errors
    /// [`VocabError::Chat`] for a template that cannot be read, [`VocabError::TooLarge`].
    pub fn with_chat(self, options: &ChatOptions) -> Result<Self, VocabError> {
        let mut chat = options.clone();
        match &options.template {
            Some(given) => {
                let source = built_in_template(given).unwrap_or(given);
                at_most(
                    "the chat template",
                    "bytes",
                    source.len(),
                    MAX_TEMPLATE_BYTES,
                )?;
                // The file's own template may be broken until somebody uses it, a chosen one may not.
                ChatTemplate::new(source)?;
                chat.template = Some(source.to_owned());
            }
            None => chat.template = self.chat.template,
        }
        Ok(Self {
            chat,
            format: OnceLock::new(),
            ..self
        })
    }

    fn native(&self) -> Result<&Native, VocabError> {
        let tables = self.tables.get_or_init(|| {
            let file = self.source.as_ref().ok_or(VocabError::NoTokenizer)?;
            let main = file.main();
            let tokenizer = validate_tokenizer(&main.gguf, main.bytes())?;
            Native::build(tokenizer.ok_or(VocabError::NoTokenizer)?)
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
        self.native().ok()?.bos()
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<i32> {
        self.native().ok()?.eos()
    }

    /// The token that ends a turn of a conversation.
    pub fn eot(&self) -> Option<i32> {
        self.native().ok()?.eot()
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

    /// The ids of a text that begins here, special tokens recognised. The BOS that the model wants in front is left to whoever
    /// computes the text; one that the text brings itself is not doubled.
    ///
    /// # Errors
    /// As [`Vocab::tokenize`].
    pub fn tokenize_start(&self, text: &str) -> Result<Vec<i32>, VocabError> {
        self.tokenize_start_with(text, true)
    }

    /// As [`Vocab::tokenize_start`], special tokens recognised if `parse_special`.
    pub(crate) fn tokenize_start_with(
        &self,
        text: &str,
        parse_special: bool,
    ) -> Result<Vec<i32>, VocabError> {
        let mut ids = self.tokenize(text, false, parse_special)?;
        self.drop_doubled_bos(&mut ids);
        Ok(ids)
    }

    /// Removes a BOS that the text brings itself where every text gets one, and says so once.
    pub(crate) fn drop_doubled_bos(&self, ids: &mut Vec<i32>) {
        if self.strip_bos(ids) && !self.said.bos.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "the text begins with BOS, which comes in front of every text: it is not doubled"
            );
        }
    }

    /// The ids of a text and of the EOS that ends it, special tokens recognised if `parse_special`. An EOS that the text brings itself
    /// is not doubled.
    pub(crate) fn tokenize_end(
        &self,
        text: &str,
        parse_special: bool,
    ) -> Result<Vec<i32>, VocabError> {
        let mut ids = self.tokenize(text, false, parse_special)?;
        let eos = self.eos();
        if eos.is_some() && ids.last() == eos.as_ref() {
            if !self.said.eos.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    "the text ends with EOS, which comes behind every row: it is not doubled"
                );
            }
        } else {
            ids.extend(eos);
        }
        Ok(ids)
    }

    /// Whether there was a BOS in front that every text gets anyway.
    pub(crate) fn strip_bos(&self, ids: &mut Vec<i32>) -> bool {
        let doubled = !ids.is_empty() && self.leading_bos() == Some(ids[0]);
        if doubled {
            ids.remove(0);
        }
        doubled
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

    /// The chat template in use (Jinja source): the file's, or the one of [`Vocab::with_chat`].
    pub fn chat_template(&self) -> Option<&str> {
        self.chat.template.as_deref()
    }

    /// [`ChatOptions::parse_special`].
    pub(crate) fn parses_special(&self) -> bool {
        self.chat.parse_special
    }

    /// A conversation as the model's chat template writes it; with `add_assistant` the text ends where the answer begins.
    ///
    /// # Errors
    /// [`VocabError::NoChatTemplate`], and [`VocabError::Chat`] for what the template refuses.
    pub fn apply_chat(
        &self,
        messages: &[ChatMessage],
        add_assistant: bool,
    ) -> Result<String, VocabError> {
        let script = self.script(&Conversation::new(messages.to_vec()))?;
        let text = script.render(messages.len(), add_assistant)?;
        Ok(script.plain(&text))
    }

    /// The ids of a conversation as the model's chat template writes it, without the BOS that whoever computes it adds; with
    /// `add_assistant` they end where the answer begins. The template's control tokens are tokens, their text inside messages
    /// stays text unless [`ChatOptions::parse_special`] says otherwise.
    ///
    /// # Errors
    /// As [`Vocab::apply_chat`] and [`Vocab::tokenize`].
    pub fn tokenize_chat(
        &self,
        messages: &[ChatMessage],
        add_assistant: bool,
    ) -> Result<Vec<i32>, VocabError> {
        let script = self.script(&Conversation::new(messages.to_vec()))?;
        let text = script.render(messages.len(), add_assistant)?;
        script.tokens_from_start(&text)
    }

    /// `conversation` as the model's chat template writes it.
    ///
    /// # Errors
    /// [`VocabError::NoChatTemplate`], [`VocabError::Chat`], [`VocabError::NoTokenizer`].
    pub fn script(&self, conversation: &Conversation) -> Result<ChatScript<'_>, VocabError> {
        let format = self.format.get_or_init(|| {
            let template = self.chat_template().ok_or(VocabError::NoChatTemplate)?;
            ChatFormat::new(template, self)
        });
        let format = format.as_ref().map_err(Clone::clone)?;
        Ok(ChatScript::new(
            self,
            format,
            conversation,
            self.chat.parse_special,
        )?)
    }

    /// Texts of the tokens that a text becomes only where special tokens are asked for, and whether they end a generation.
    pub(crate) fn control_texts(&self) -> Vec<(String, bool)> {
        let Ok(native) = self.native() else {
            return Vec::new();
        };
        let ids = (0..self.n_tokens as i32).filter(|&id| native.is_control(id));
        ids.map(|id| (native.token_text(id), native.is_eog(id)))
            .collect()
    }

    /// Says, once, that what the assistant says ends without a token that ends a generation.
    pub(crate) fn warn_of_endless_turn(&self, place: &dyn std::fmt::Display) {
        if !self.said.endless_turn.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "{place}: the chat template ends the assistant's turn without an end-of-generation token: the adapter will not learn \
                 to stop (--chat-template chooses another one)"
            );
        }
    }

    fn contains(&self, id: i32) -> bool {
        usize::try_from(id).is_ok_and(|id| id < self.n_tokens)
    }
}

#[cfg(test)]
mod tests;
