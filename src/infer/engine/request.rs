//! What users ask for, and how they are served.

use crate::adapter::Adapter;
use crate::infer::generate::{GenerateOptions, Generated};
use crate::infer::session::{FlashAttention, SessionOptions};
use crate::infer::{Ensemble, KvType, SessionError};
use crate::model::chat::ChatMessage;
use std::sync::Arc;
use std::time::Instant;

/// A text to be completed.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Tokenized as by [`Session::prompt`](crate::Session::prompt): BOS comes in front if the model wants it, special tokens are recognised.
    Text(String),
    /// Tokens without BOS, which comes in front if the model wants it.
    Tokens(Vec<i32>),
    /// A conversation, put into the model's chat template up to where the assistant's next message begins.
    Messages(Vec<ChatMessage>),
}

/// What a user asks for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Request {
    /// What is to be completed.
    pub prompt: Prompt,
    /// Who completes it: adapters stand in front of the prompt, or in it as their templates say.
    pub ensemble: Ensemble,
    /// How the answer is generated.
    pub generate: GenerateOptions,
    /// The answer, if it is known and only its probabilities are wanted: [`Generated::logprobs`] has them, of all of these tokens and with as many of the most likely ones as
    /// [`GenerateOptions::logprobs`] says. Nothing is drawn then and nothing ends before it: of [`Request::generate`] nothing else counts.
    pub answer: Option<Vec<i32>>,
    /// An answer of [`GenerateOptions::max_tokens`] that does not fit behind the prompt ends with [`StopReason::ContextFull`](crate::infer::StopReason::ContextFull) if it comes to that, instead of being refused.
    /// Default false.
    pub until_full: bool,
    /// Who waits with a higher one begins first. Default 0.
    pub priority: i32,
    /// From then on nobody needs the answer any more.
    pub deadline: Option<Instant>,
    /// Who sees the logits.
    pub(in crate::infer) watch: Option<Watch>,
}

/// Sees the logits of each token of an answer, of each member, before they are combined.
#[derive(Clone)]
pub(in crate::infer) struct Watch(Arc<See>);

/// Gets the number of the token in the answer, the token, and the members' logits, each `ne = [V]`.
type See = dyn Fn(usize, i32, &[&[f32]]) + Send + Sync;

impl Watch {
    pub(in crate::infer) fn new(
        see: impl Fn(usize, i32, &[&[f32]]) + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(see))
    }

    pub(super) fn see(&self, at: usize, id: i32, rows: &[&[f32]]) {
        (self.0)(at, id, rows);
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
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

    /// To answer a conversation.
    pub fn messages(messages: impl Into<Vec<ChatMessage>>) -> Self {
        Self::new(Prompt::Messages(messages.into()))
    }

    fn new(prompt: Prompt) -> Self {
        Self {
            prompt,
            ensemble: Ensemble::of_one(None),
            generate: GenerateOptions::default(),
            answer: None,
            until_full: false,
            priority: 0,
            deadline: None,
            watch: None,
        }
    }

    /// Sets [`Request::ensemble`] to one adapter.
    pub fn adapter(self, adapter: &Adapter) -> Self {
        self.ensemble(&Ensemble::of_one(Some(adapter.clone())))
    }

    /// Sets [`Request::ensemble`].
    pub fn ensemble(mut self, ensemble: &Ensemble) -> Self {
        self.ensemble = ensemble.clone();
        self
    }

    /// Sets [`Request::answer`].
    pub fn answer(mut self, tokens: impl Into<Vec<i32>>) -> Self {
        self.answer = Some(tokens.into());
        self
    }

    /// Sets [`Request::generate`].
    pub fn generate(mut self, options: GenerateOptions) -> Self {
        self.generate = options;
        self
    }

    /// Sets [`Request::until_full`].
    pub fn until_full(mut self, yes: bool) -> Self {
        self.until_full = yes;
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
    /// Texts at most that are computed at a time, each member of an ensemble counted. Default 64.
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
