//! What users ask for, and how they are served.

use crate::adapter::Adapter;
use crate::infer::generate::{GenerateOptions, Generated};
use crate::infer::session::{FlashAttention, SessionOptions};
use crate::infer::{KvType, SessionError};
use std::time::Instant;

/// A text to be completed.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Tokenized as by [`Session::prompt`](crate::Session::prompt): BOS comes in front if the model wants it, special tokens are recognised.
    Text(String),
    /// Tokens without BOS, which comes in front if the model wants it.
    Tokens(Vec<i32>),
}

/// What a user asks for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Request {
    /// What is to be completed.
    pub prompt: Prompt,
    /// Stands in front of the prompt, or in it as its template says.
    pub adapter: Option<Adapter>,
    /// How the answer is generated.
    pub generate: GenerateOptions,
    /// Who waits with a higher one begins first. Default 0.
    pub priority: i32,
    /// From then on nobody needs the answer any more.
    pub deadline: Option<Instant>,
}

impl Request {
    /// To complete a text.
    pub fn text(prompt: impl Into<String>) -> Self {
        Self::new(Prompt::Text(prompt.into()))
    }

    /// To complete tokens without BOS.
    pub fn tokens(tokens: impl Into<Vec<i32>>) -> Self {
        Self::new(Prompt::Tokens(tokens.into()))
    }

    fn new(prompt: Prompt) -> Self {
        Self {
            prompt,
            adapter: None,
            generate: GenerateOptions::default(),
            priority: 0,
            deadline: None,
        }
    }

    /// Sets [`Request::adapter`].
    pub fn adapter(mut self, adapter: &Adapter) -> Self {
        self.adapter = Some(adapter.clone());
        self
    }

    /// Sets [`Request::generate`].
    pub fn generate(mut self, options: GenerateOptions) -> Self {
        self.generate = options;
        self
    }

    /// Sets [`Request::priority`].
    pub fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// Sets [`Request::deadline`].
    pub fn deadline(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }
}

/// What happens when keys and values of the running texts take more than [`EngineOptions::kv_bytes`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The youngest text waits until there is room again, and is computed anew then. Its answer stays the same.
    #[default]
    Recompute,
    /// The youngest text ends with [`EngineError::OutOfPages`](super::EngineError::OutOfPages).
    Refuse,
}

/// How an engine computes, and for how many.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EngineOptions {
    /// Positions of one text, the adapter's included; default: what the model was trained on.
    pub n_ctx: Option<usize>,
    /// Threads that compute; default: [`crate::default_threads`].
    pub n_threads: Option<usize>,
    /// Type of the KV cache.
    pub kv_type: KvType,
    /// Fused attention. Without it texts are computed one after the other.
    pub flash_attention: FlashAttention,
    /// Bytes of keys and values at most, of running texts and of what is kept of others; default: as much as it takes.
    pub kv_bytes: Option<usize>,
    /// Texts at most that are computed at a time. Default 64.
    pub max_running: usize,
    /// Requests at most that wait. Default 1024.
    pub max_waiting: usize,
    /// Tokens of prompts at most in a step that nobody waits for. Default 512.
    pub n_batch: usize,
    /// The same beside texts that are being written, whose next token waits for the step; default: as many as about double its time.
    pub n_batch_beside: Option<usize>,
    /// Bytes of keys and values at most, out of [`EngineOptions::kv_bytes`], that are kept of texts that are over, for those that begin with the same under
    /// the same adapter. Running texts come first. Default 256 MiB.
    pub prefix_bytes: usize,
    /// What happens when memory is short.
    pub when_full: WhenFull,
    /// Take adapters whose fingerprint names another base of the same shape.
    pub accept_other_base: bool,
}

impl From<&SessionOptions> for EngineOptions {
    /// An engine whose texts are computed as a session's.
    fn from(session: &SessionOptions) -> Self {
        Self {
            n_ctx: session.n_ctx,
            n_threads: session.n_threads,
            kv_type: session.kv_type,
            flash_attention: session.flash_attention,
            n_batch: session.n_batch,
            accept_other_base: session.accept_other_base,
            ..Self::default()
        }
    }
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            n_ctx: None,
            n_threads: None,
            kv_type: KvType::default(),
            flash_attention: FlashAttention::default(),
            kv_bytes: None,
            max_running: 64,
            max_waiting: 1024,
            n_batch: 512,
            n_batch_beside: None,
            prefix_bytes: 256 << 20,
            when_full: WhenFull::default(),
            accept_other_base: false,
        }
    }
}

/// Names a request of a [`Scheduler`](super::Scheduler).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(super) u64);

/// What became of a request.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// The answer goes on: whole characters, never the beginning of a stop string.
    Text(String),
    /// It is complete.
    Done(Generated),
    /// It will not be. What was shown of it stands.
    Failed(crate::Error),
}

impl From<SessionError> for Event {
    fn from(e: SessionError) -> Self {
        Self::Failed(e.into())
    }
}
