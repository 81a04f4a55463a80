//! A session: one text, one adapter, on a model that others share.

mod compute;
mod options;
mod saved;
mod truncate;

pub use options::{ExistingText, FlashAttention, SessionOptions};
pub use saved::SavedError;

use super::attached::Attached;
use super::core::{Core, Extent, Input, Mode, Part, check_logits};
use super::error::SessionError;
use super::kv::KvType;
use super::memory::KvText;
use super::text::Utf8Stream;
use crate::adapter::{Adapter, Item, Payload};
use crate::error::Result;
use crate::ggml::{CancelToken, KV_PAGE, default_threads};
use crate::model::Model;

/// A run of tokens that was fed.
struct Segment {
    tokens: Vec<i32>,
    /// It came through [`Session::prompt`], so a template applies to it.
    prompt: bool,
}

/// Called with a token and its logits, `ne = [V]`.
type EachLogits<'a> = &'a mut dyn FnMut(i32, &[f32]);

/// One text with at most one adapter. Many sessions can work on one model at once, each from its own thread.
pub struct Session {
    core: Core,
    /// Keys and values of what is computed, the adapter's included.
    text: KvText,
    n_ctx: usize,
    attached: Option<Attached>,
    accept_other_base: bool,
    history: Vec<Segment>,
    /// The last token of `history` if it has been sampled, or the text behind it was taken back, and nothing has asked for what follows it: it is
    /// computed with the next input, and has no position until then.
    uncomputed: Option<i32>,
    /// Logits of the last computed input, `ne = [V]`; empty before the first, and while they are not known, which they are again when the token
    /// is computed that is not.
    logits: Vec<f32>,
    /// The beginning of a character that [`Session::generate`] stopped in the middle of; empty once other text follows.
    unfinished: Utf8Stream,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("model", &self.core.model)
            .field("n_past", &self.text.len())
            .finish_non_exhaustive()
    }
}

/// Positions of a text that libllama computes, unless somebody says otherwise: memory for all of them is taken at once.
const LLAMA_CTX: usize = 4096;

/// How to compute, and the context length.
///
/// # Errors
/// If an option is out of range.
pub(super) fn check(model: &Model, options: &SessionOptions) -> Result<(Mode, usize)> {
    let native = model.computed_by().ok();
    let bad = |option, value: String, why: &str| SessionError::BadOption {
        option,
        value,
        why: why.to_owned(),
    };
    let n_ctx_train = model.n_ctx_train();
    let n_ctx = options.n_ctx.unwrap_or(match native {
        Some(_) => n_ctx_train,
        None => n_ctx_train.min(LLAMA_CTX),
    });
    let limit = match native.and_then(|n| n.weights.position_embd.as_ref()) {
        Some(_) => n_ctx_train,
        None => i32::MAX as usize,
    };
    if n_ctx == 0 || n_ctx > limit {
        return Err(bad(
            "context length",
            n_ctx.to_string(),
            &format!("must be 1 to {limit} for this model"),
        )
        .into());
    }
    let n_threads = options.n_threads.unwrap_or_else(default_threads);
    // ggml's own limit.
    const MAX_THREADS: usize = 512;
    if n_threads == 0 || n_threads > MAX_THREADS {
        return Err(bad(
            "threads",
            n_threads.to_string(),
            &format!("must be 1 to {MAX_THREADS}"),
        )
        .into());
    }
    if options.n_batch == 0 || options.n_batch > 1 << 16 {
        return Err(bad(
            "batch size",
            options.n_batch.to_string(),
            "must be 1 to 65536",
        )
        .into());
    }
    let flash = match options.flash_attention {
        FlashAttention::On => true,
        FlashAttention::Off => false,
    };
    if options.kv_type == KvType::Q8_0 {
        let head_dims = model.shape().head_dim.values().iter().copied();
        if let Some(d) = head_dims.into_iter().find(|d| !d.is_multiple_of(32)) {
            let why = format!("needs a head size that is a multiple of 32, the model's is {d}");
            return Err(bad("KV cache type", "q8_0".into(), &why).into());
        }
        if !flash {
            return Err(bad("KV cache type", "q8_0".into(), "needs flash attention").into());
        }
    }
    let mode = Mode {
        ty: options.kv_type,
        flash,
        long_context: native.is_some_and(|n| n.has_long_context(n_ctx)),
    };
    Ok((mode, n_ctx))
}

impl Session {
    /// An empty session on `model`.
    ///
    /// # Errors
    /// If an option is out of range or memory for the KV cache cannot be reserved.
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Self> {
        let (mode, n_ctx) = check(model, options)?;
        let extent = Extent {
            n_threads: options.n_threads.unwrap_or_else(default_threads),
            n_batch: options.n_batch,
            n_ctx,
            n_texts: 1,
            // The context length is the limit.
            kv_bytes: None,
        };
        let core = Core::new(model, mode, &extent)?;
        Ok(Self {
            text: core.memory().text(),
            core,
            n_ctx,
            attached: None,
            accept_other_base: options.accept_other_base,
            history: Vec::new(),
            uncomputed: None,
            logits: Vec::new(),
            unfinished: Utf8Stream::new(),
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.core.model
    }

    /// Positions that the session can hold.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Positions in use, the adapter's included.
    pub fn n_past(&self) -> usize {
        // A text may end with a token that has no room any more.
        self.taken().min(self.n_ctx())
    }

    /// Positions that the text takes, that of a token that is not computed yet included.
    fn taken(&self) -> usize {
        self.text.len() + usize::from(self.uncomputed.is_some())
    }

    /// Threads that compute.
    pub fn n_threads(&self) -> usize {
        self.core.n_threads
    }

    /// Bytes that keys and values of a full context take. They are allocated, and become resident, as the context fills.
    pub fn kv_bytes(&self) -> usize {
        let tokens = self.n_ctx.next_multiple_of(KV_PAGE);
        self.core.memory().bytes(tokens)
    }

    /// The attached adapter.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.attached.as_ref().map(Attached::adapter)
    }

    /// A handle that stops the session from another thread.
    pub fn cancel_token(&self) -> CancelToken {
        self.core.cancel().clone()
    }

    /// All real tokens fed so far, virtual ones left out.
    pub fn tokens(&self) -> Vec<i32> {
        self.history
            .iter()
            .flat_map(|s| &s.tokens)
            .copied()
            .collect()
    }

    /// Logits of the last token, `ne = [V]`. Behind [`Session::generate`] that token is computed now.
    ///
    /// # Errors
    /// [`SessionError::NoLogits`] if nothing was fed yet; if computing fails.
    pub fn logits(&mut self) -> Result<&[f32], SessionError> {
        if self.is_empty() {
            return Err(SessionError::NoLogits);
        }
        self.settle()?;
        self.text.forget_unseen();
        Ok(&self.logits)
    }

    /// Positions in front of the text.
    fn prefix_len(&self) -> usize {
        self.attached.as_ref().map_or(0, Attached::prefix_len)
    }

    /// Computes the token that is not, if there is one.
    fn settle(&mut self) -> Result<(), SessionError> {
        if let Some(id) = self.uncomputed {
            self.check_room(self.taken())?;
            self.run(Input::Tokens(&[id]), 0..1)?;
            self.uncomputed = None;
        }
        Ok(())
    }

    /// Nothing was fed yet.
    pub(super) fn is_empty(&self) -> bool {
        self.history.is_empty()
    }

    /// A token that was sampled becomes part of the text. It is computed with what follows.
    pub(super) fn append(&mut self, id: i32) {
        debug_assert!(self.uncomputed.is_none(), "sampled from older logits");
        self.remember(&[id]);
        self.uncomputed = Some(id);
    }

    /// Logits of the attached adapter's virtual tokens, `ne = [V, P]`: what the model expects behind each of them when
    /// they stand in front of everything. The last row predicts the first real token.
    ///
    /// # Errors
    /// [`SessionError::NotAttached`] without an adapter, [`SessionError::NoVirtualTokens`] if it holds K/V rows or places
    /// its virtual tokens inside the text.
    pub fn virtual_logits(&self) -> Result<Vec<f32>> {
        let attached = self.attached.as_ref().ok_or(SessionError::NotAttached)?;
        let (Payload::VirtualTokens(rows), Some(_)) =
            (attached.adapter().payload(), attached.block())
        else {
            return Err(SessionError::NoVirtualTokens.into());
        };
        let n = rows.n_rows();
        let extent = Extent {
            n_threads: self.core.n_threads,
            n_batch: self.core.n_batch,
            n_ctx: n,
            n_texts: 1,
            kv_bytes: None,
        };
        let mut core = Core::new(&self.core.model, self.core.mode, &extent)?;
        let mut text = core.memory().text();
        let logits = core.step(&mut [Part {
            text: &mut text,
            input: Input::Virtual(&rows.to_f32()),
            outputs: 0..n,
        }])?;
        check_logits(logits)?;
        Ok(logits.to_vec())
    }

    /// Forgets the text; the adapter stays.
    pub fn reset(&mut self) {
        self.history.clear();
        self.logits.clear();
        self.unfinished = Utf8Stream::new();
        self.uncomputed = None;
        self.text
            .restart(self.attached.as_ref().and_then(Attached::block));
    }

    /// Puts `adapter` in front of the text (or, with a template, into the next prompt).
    ///
    /// # Errors
    /// [`SessionError::AlreadyAttached`], or as [`Session::swap`].
    pub fn attach(&mut self, adapter: &Adapter, existing: ExistingText) -> Result<()> {
        if self.attached.is_some() {
            return Err(SessionError::AlreadyAttached.into());
        }
        self.swap(adapter, existing)
    }

    /// Replaces the attached adapter, if any, by `adapter`.
    ///
    /// # Errors
    /// If the adapter does not fit the base, or the text does not fit behind it; the session is then as it was. If
    /// recomputing fails or is cancelled, the new adapter is attached and the text is dropped.
    pub fn swap(&mut self, adapter: &Adapter, existing: ExistingText) -> Result<()> {
        let (core, other_base) = (&self.core, self.accept_other_base);
        let attached = Attached::new(
            adapter,
            &core.model,
            core.mode,
            core.n_threads,
            core.memory(),
            other_base,
        )?;
        self.change(Some(attached), existing)
    }

    /// Takes the adapter off.
    ///
    /// # Errors
    /// [`SessionError::NotAttached`]. If recomputing fails or is cancelled, the adapter is off and the text is dropped.
    pub fn detach(&mut self, existing: ExistingText) -> Result<()> {
        if self.attached.is_none() {
            return Err(SessionError::NotAttached.into());
        }
        self.change(None, existing)
    }

    fn change(&mut self, attached: Option<Attached>, existing: ExistingText) -> Result<()> {
        // Everything that can be known to fail fails before anything changes.
        let mut needed = attached.as_ref().map_or(0, Attached::prefix_len);
        if existing == ExistingText::Recompute {
            for (i, segment) in self.history.iter().enumerate() {
                let items = self.items(attached.as_ref(), segment, i == 0)?;
                needed += items.iter().map(Item::len).sum::<usize>();
            }
        }
        let virtual_tokens = (attached.as_ref()).map_or(0, |a| a.adapter().length());
        self.check_room(needed.max(virtual_tokens))?;
        self.attached = attached;
        let history = std::mem::take(&mut self.history);
        let unfinished = self.take_unfinished();
        self.reset();
        if existing == ExistingText::Recompute {
            self.recompute(history).inspect_err(|_| self.reset())?;
            self.unfinished = unfinished;
        }
        Ok(())
    }

    fn recompute(&mut self, history: Vec<Segment>) -> Result<()> {
        for segment in history {
            if segment.prompt {
                self.feed_prompt(segment.tokens)?;
            } else {
                self.feed(&segment.tokens)?;
            }
        }
        Ok(())
    }
}
