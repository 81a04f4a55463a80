//! A session: one text, one adapter, on a model that others share.

use super::engine::{Core, Input, Mode};
use super::error::SessionError;
use super::kv_block::KvBlock;
use super::kv_cache::KvType;
use super::text::Utf8Stream;
use crate::adapter::{Adapter, Item, Payload, arrange};
use crate::error::Result;
use crate::ggml::{CancelToken, GraphMemory, default_threads};
use crate::model::Model;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// What happens to text that was computed under another adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExistingText {
    /// Compute it again under the new adapter; the conversation goes on.
    Recompute,
    /// Forget it; the session starts empty.
    Drop,
}

/// Whether attention runs in one fused kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlashAttention {
    /// Fused: faster on every CPU.
    #[default]
    On,
    /// Separate products and softmax.
    Off,
}

/// How a session computes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SessionOptions {
    /// Positions, the adapter's included; default: what the model was trained on. Memory is touched as it fills.
    pub n_ctx: Option<usize>,
    /// Threads that compute; default: [`crate::default_threads`]. They wait for each other by spinning, so that fewer are faster
    /// where other programs keep cores busy. Sessions of one model with equal counts share one pool and take turns.
    pub n_threads: Option<usize>,
    /// Type of the KV cache.
    pub kv_type: KvType,
    /// Fused attention.
    pub flash_attention: FlashAttention,
    /// Tokens per prefill step.
    pub n_batch: usize,
    /// Attach adapters whose fingerprint names another base of the same shape.
    pub accept_other_base: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            n_ctx: None,
            n_threads: None,
            kv_type: KvType::default(),
            flash_attention: FlashAttention::default(),
            n_batch: 512,
            accept_other_base: false,
        }
    }
}

impl SessionOptions {
    /// Sets [`SessionOptions::n_ctx`].
    pub fn n_ctx(mut self, n: usize) -> Self {
        self.n_ctx = Some(n);
        self
    }

    /// Sets [`SessionOptions::n_threads`].
    pub fn n_threads(mut self, n: usize) -> Self {
        self.n_threads = Some(n);
        self
    }

    /// Sets [`SessionOptions::kv_type`].
    pub fn kv_type(mut self, ty: KvType) -> Self {
        self.kv_type = ty;
        self
    }

    /// Sets [`SessionOptions::flash_attention`].
    pub fn flash_attention(mut self, mode: FlashAttention) -> Self {
        self.flash_attention = mode;
        self
    }

    /// Sets [`SessionOptions::n_batch`].
    pub fn n_batch(mut self, n: usize) -> Self {
        self.n_batch = n;
        self
    }

    /// Sets [`SessionOptions::accept_other_base`].
    pub fn accept_other_base(mut self, accept: bool) -> Self {
        self.accept_other_base = accept;
        self
    }
}

/// Values of one graph's logits at most: more rows are computed in several steps.
const MAX_LOGITS: usize = 1 << 24;

/// An adapter at work.
struct Attached {
    adapter: Adapter,
    how: How,
}

impl Attached {
    /// Positions in front of the text.
    fn prefix_len(&self) -> usize {
        match &self.how {
            How::Block(block) => block.n_rows(),
            How::Template(_) => 0,
        }
    }
}

enum How {
    /// Rows in front of the text.
    Block(Arc<KvBlock>),
    /// Virtual tokens at the places that the adapter's template says, `ne = [D, P]`.
    Template(Vec<f32>),
}

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
    attached: Option<Attached>,
    accept_other_base: bool,
    /// Positions computed, the adapter's included.
    n_past: usize,
    history: Vec<Segment>,
    /// The last token of `history` if it has been sampled and nothing has asked for what follows it: it is computed with the
    /// next input, and has no position until then.
    uncomputed: Option<i32>,
    /// Logits of the last computed input, `ne = [V]`; empty before the first.
    logits: Vec<f32>,
    /// The beginning of a character that [`Session::generate`] stopped in the middle of; empty once other text follows.
    unfinished: Utf8Stream,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("model", &self.core.model)
            .field("n_past", &self.n_past)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// An empty session on `model`.
    ///
    /// # Errors
    /// If an option is out of range or memory for the KV cache cannot be reserved.
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Self> {
        let hp = model.hparams();
        let bad = |option, value: String, why: &str| SessionError::BadOption {
            option,
            value,
            why: why.to_owned(),
        };
        let n_ctx = options.n_ctx.unwrap_or(hp.n_ctx_train);
        let limit = if model.weights().position_embd.is_some() {
            hp.n_ctx_train
        } else {
            i32::MAX as usize
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
            if !hp.head_dim.is_multiple_of(32) {
                let why = format!(
                    "needs a head size that is a multiple of 32, the model's is {}",
                    hp.head_dim
                );
                return Err(bad("KV cache type", "q8_0".into(), &why).into());
            }
            if !flash {
                return Err(bad("KV cache type", "q8_0".into(), "needs flash attention").into());
            }
        }
        let mode = Mode {
            ty: options.kv_type,
            flash,
            long_context: model.has_long_context(n_ctx),
        };
        let mut core = Core::new(model, mode, n_ctx, model.pool(n_threads))?;
        core.n_batch = options.n_batch;
        Ok(Self {
            core,
            attached: None,
            accept_other_base: options.accept_other_base,
            n_past: 0,
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
        self.core.cache.cells()
    }

    /// Positions in use, the adapter's included.
    pub fn n_past(&self) -> usize {
        // A text may end with a token that has no room any more.
        self.taken().min(self.n_ctx())
    }

    /// Positions that the text takes, that of a token that is not computed yet included.
    fn taken(&self) -> usize {
        self.n_past + usize::from(self.uncomputed.is_some())
    }

    /// Threads that compute.
    pub fn n_threads(&self) -> usize {
        self.core.pool.n_threads()
    }

    /// Bytes reserved for the KV cache; they become resident as the context fills.
    pub fn kv_bytes(&self) -> usize {
        self.core.cache.bytes()
    }

    /// The attached adapter.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.attached.as_ref().map(|a| &a.adapter)
    }

    /// A handle that stops the session from another thread.
    pub fn cancel_token(&self) -> CancelToken {
        self.core.cancel.clone()
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
        Ok(&self.logits)
    }

    /// Computes the token that is not, if there is one.
    fn settle(&mut self) -> Result<(), SessionError> {
        if let Some(id) = self.uncomputed {
            self.check_room(self.taken())?;
            self.run(Input::Tokens(&[id]), 1, 0..1)?;
            self.uncomputed = None;
        }
        Ok(())
    }

    /// Nothing was fed yet.
    pub(super) fn is_empty(&self) -> bool {
        self.logits.is_empty()
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
        let (Payload::Rows(rows), How::Block(_)) = (attached.adapter.payload(), &attached.how)
        else {
            return Err(SessionError::NoVirtualTokens.into());
        };
        let (core, n) = (&self.core, rows.n_rows());
        let mut core = Core::new(&core.model, core.mode, n, core.pool.clone())?;
        Ok(core.step(Input::Rows(&rows.to_f32()), 0, 0..n)?.to_vec())
    }

    /// Forgets the text; the adapter stays.
    pub fn reset(&mut self) {
        self.history.clear();
        self.logits.clear();
        self.unfinished = Utf8Stream::new();
        self.uncomputed = None;
        self.n_past = self.attached.as_ref().map_or(0, Attached::prefix_len);
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
        let model = &self.core.model;
        adapter.check_fits(model.shape(), &model.fingerprint(), self.accept_other_base)?;
        let how = match (adapter.template(), adapter.payload()) {
            (Some(_), Payload::Rows(rows)) => How::Template(rows.to_f32()),
            _ => {
                let (mode, n_threads) = (self.core.mode, self.core.pool.n_threads());
                How::Block(KvBlock::of(adapter, model, mode, n_threads)?)
            }
        };
        self.change(
            Some(Attached {
                adapter: adapter.clone(),
                how,
            }),
            existing,
        )
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
                needed += if segment.prompt {
                    let items = self.arrange(attached.as_ref(), &segment.tokens, i == 0)?;
                    items.iter().map(Item::len).sum()
                } else {
                    segment.tokens.len()
                };
            }
        }
        let virtual_tokens = attached.as_ref().map_or(0, |a| a.adapter.length());
        self.check_room(needed.max(virtual_tokens))?;
        if let Some(Attached {
            how: How::Block(block),
            ..
        }) = &attached
        {
            block.copy_into(&mut self.core.cache, 0);
        }
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

    fn check_room(&self, needed: usize) -> Result<(), SessionError> {
        if needed > self.n_ctx() {
            return Err(SessionError::ContextFull {
                needed,
                n_ctx: self.n_ctx(),
            });
        }
        Ok(())
    }

    /// Tokenizes and computes a prompt. The first prompt of a session starts with BOS if the model wants it, and goes
    /// through the adapter's template if it has one. Special tokens in the text are recognised.
    ///
    /// # Errors
    /// If the model has no tokenizer, the text does not fit, or computing fails; [`SessionError::EmptyPrompt`].
    pub fn prompt(&mut self, text: &str) -> Result<()> {
        let vocab = self.core.model.vocab();
        let tokens = match self.history.is_empty() {
            true => vocab.tokenize_start(text)?,
            false => vocab.tokenize(text, false, true)?,
        };
        self.prompt_tokens(&tokens)
    }

    /// As [`Session::prompt`], for tokens without BOS.
    ///
    /// # Errors
    /// If the text does not fit or computing fails; [`SessionError::EmptyPrompt`].
    pub fn prompt_tokens(&mut self, tokens: &[i32]) -> Result<()> {
        self.check_tokens(tokens)?;
        self.feed_prompt(tokens.to_vec())
    }

    /// As [`Session::prompt_tokens`], and hands out the logits of every real token that is computed: `each(id, logits)` with
    /// logits `ne = [V]`. Those are BOS where the model wants it, the fixed text of the adapter's template and `tokens`, in
    /// order of position.
    ///
    /// # Errors
    /// As [`Session::prompt_tokens`].
    pub fn prompt_tokens_with_logits(
        &mut self,
        tokens: &[i32],
        mut each: impl FnMut(i32, &[f32]),
    ) -> Result<()> {
        self.check_tokens(tokens)?;
        self.feed_prompt_with(tokens.to_vec(), Some(&mut each))
    }

    /// `tokens` without BOS; remembered as a prompt, so that another adapter's template can place it anew.
    fn feed_prompt(&mut self, tokens: Vec<i32>) -> Result<()> {
        self.feed_prompt_with(tokens, None)
    }

    fn feed_prompt_with(
        &mut self,
        tokens: Vec<i32>,
        mut each: Option<EachLogits<'_>>,
    ) -> Result<()> {
        let first = self.history.is_empty();
        let mut items = self.arrange(self.attached.as_ref(), &tokens, first)?;
        let width = self.core.model.hparams().n_embd;
        let n: usize = items.iter().map(Item::len).sum();
        if n == 0 {
            return Err(SessionError::EmptyPrompt.into());
        }
        self.check_room(self.taken() + n)?;
        let joined = match (self.uncomputed, items.first_mut(), &each) {
            (Some(id), Some(Item::Tokens(tokens)), None) => {
                tokens.insert(0, id);
                true
            }
            _ => false,
        };
        self.whole(|s| {
            if !joined {
                s.settle()?;
            }
            let last = items.len() - 1;
            for (i, item) in items.iter().enumerate() {
                match (item, &mut each) {
                    (Item::Tokens(tokens), None) => s.run_all(Input::Tokens(tokens), i == last)?,
                    (Item::Tokens(tokens), Some(each)) => {
                        s.run_tokens_with_logits(tokens, i == last, |at, row| {
                            each(tokens[at], row)
                        })?
                    }
                    (Item::Virtual(rows), _) => {
                        s.run_virtual(rows.start * width..rows.end * width, i == last)?
                    }
                }
            }
            Ok(())
        })?;
        self.unfinished = Utf8Stream::new();
        self.history.push(Segment {
            tokens,
            prompt: true,
        });
        Ok(())
    }

    /// All of `work`, which computes the text's last token if it is not, or nothing: after an error the session stands where
    /// it stood. Logits are only replaced by the last step, so they still belong to the text.
    fn whole(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let (n_past, uncomputed) = (self.n_past, self.uncomputed);
        match work(self) {
            Ok(()) => {
                self.uncomputed = None;
                Ok(())
            }
            Err(e) => {
                (self.n_past, self.uncomputed) = (n_past, uncomputed);
                Err(e)
            }
        }
    }

    /// `tokens` with the token in front that is not computed yet.
    fn behind_uncomputed<'a>(&self, tokens: &'a [i32]) -> Cow<'a, [i32]> {
        match self.uncomputed {
            Some(id) => [&[id], tokens].concat().into(),
            None => tokens.into(),
        }
    }

    /// The order in which a prompt's tokens and the virtual tokens of a template of `attached` are computed.
    fn arrange(
        &self,
        attached: Option<&Attached>,
        tokens: &[i32],
        first: bool,
    ) -> Result<Vec<Item>> {
        let template = match attached {
            Some(Attached {
                adapter,
                how: How::Template(_),
            }) if first => adapter.template(),
            _ => None,
        };
        arrange(self.core.model.vocab(), template, tokens, first)
    }

    /// Computes tokens as they are; logits of the last one are kept.
    ///
    /// # Errors
    /// If an id is out of range, the text does not fit, or computing fails.
    pub fn feed(&mut self, tokens: &[i32]) -> Result<()> {
        self.check_feed(tokens)?;
        let input = self.behind_uncomputed(tokens);
        self.whole(|s| s.run_all(Input::Tokens(&input), true))?;
        self.remember(tokens);
        Ok(())
    }

    /// As [`Session::feed`], and hands out the logits of every token: `each(i, logits)` with logits `ne = [V]`.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn feed_with_logits(
        &mut self,
        tokens: &[i32],
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        self.check_feed(tokens)?;
        self.whole(|s| {
            s.settle()?;
            s.run_tokens_with_logits(tokens, true, &mut each)
        })?;
        self.remember(tokens);
        Ok(())
    }

    /// As [`Session::feed`], in one step of any length, and returns the intermediate results called one of `names` as far
    /// as there are such: llama.cpp's names (`attn_norm-0`, `Qcur-0`, `l_out-1`, `result_norm`), elements in ggml order.
    /// For tests that look for the first place where two implementations differ.
    ///
    /// # Errors
    /// As [`Session::feed`], but logits may be anything.
    #[doc(hidden)]
    pub fn trace(&mut self, tokens: &[i32], names: &[&str]) -> Result<BTreeMap<String, Vec<f32>>> {
        self.check_feed(tokens)?;
        self.settle()?;
        let (core, input) = (&self.core, Input::Tokens(tokens));
        let topology = core.topology(input, self.n_past, tokens.len());
        let mut built = core.build(topology, names, GraphMemory::new())?;
        core.run(&mut built, input, self.n_past, 0..tokens.len())?;
        let logits = built.logits.as_ref().expect("asked for");
        let n_vocab = core.model.weights().n_vocab();
        let last = (tokens.len() - 1) * n_vocab;
        self.logits = built.graph.read_f32(logits)[last..].to_vec();
        self.n_past += tokens.len();
        self.remember(tokens);
        Ok(built
            .traced
            .iter()
            .map(|(name, t)| (name.clone(), built.graph.gather_f32(t)))
            .collect())
    }

    /// Positions computed so far, those that were forgotten or computed again included. For tests.
    #[doc(hidden)]
    pub fn positions_computed(&self) -> usize {
        self.core.positions_computed
    }

    /// Graphs built so far: decoding reuses one for many tokens. For tests.
    #[doc(hidden)]
    pub fn graphs_built(&self) -> usize {
        self.core.graphs_built
    }

    fn check_tokens(&self, tokens: &[i32]) -> Result<(), SessionError> {
        let n_vocab = self.core.model.weights().n_vocab();
        match tokens.iter().find(|&&id| id < 0 || id as usize >= n_vocab) {
            Some(&id) => Err(SessionError::TokenOutOfRange { id, n_vocab }),
            None => Ok(()),
        }
    }

    fn check_feed(&self, tokens: &[i32]) -> Result<(), SessionError> {
        if tokens.is_empty() {
            return Err(SessionError::Empty);
        }
        self.check_tokens(tokens)?;
        self.check_room(self.taken() + tokens.len())
    }

    /// The character that the text ends in the middle of, for the one who goes on with it.
    pub(super) fn take_unfinished(&mut self) -> Utf8Stream {
        std::mem::take(&mut self.unfinished)
    }

    /// The text ends in the middle of a character, perhaps.
    pub(super) fn keep_unfinished(&mut self, utf8: Utf8Stream) {
        self.unfinished = utf8;
    }

    fn remember(&mut self, tokens: &[i32]) {
        self.unfinished = Utf8Stream::new();
        match self.history.last_mut() {
            Some(Segment {
                tokens: old,
                prompt: false,
            }) => old.extend_from_slice(tokens),
            _ => self.history.push(Segment {
                tokens: tokens.to_vec(),
                prompt: false,
            }),
        }
    }

    /// Computes `input` in steps of at most `n_batch` positions; logits of the last one are kept if wanted.
    fn run_all(&mut self, input: Input<'_>, want_logits: bool) -> Result<()> {
        let width = self.core.model.hparams().n_embd;
        let pieces = input.pieces(self.core.n_batch, width);
        let last = pieces.len().saturating_sub(1);
        for (i, (piece, n)) in pieces.into_iter().enumerate() {
            let wanted = want_logits && i == last;
            self.run(piece, n, if wanted { n - 1..n } else { 0..0 })?;
        }
        Ok(())
    }

    /// Logits of every token, `each(i, logits)`; those of the last one are kept if `keep_last`.
    fn run_tokens_with_logits(
        &mut self,
        tokens: &[i32],
        keep_last: bool,
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let n_vocab = self.core.model.weights().n_vocab();
        let size = self.core.n_batch.min((MAX_LOGITS / n_vocab).max(1));
        for (c, chunk) in tokens.chunks(size).enumerate() {
            let logits = self
                .core
                .step(Input::Tokens(chunk), self.n_past, 0..chunk.len())?;
            for (i, row) in logits.chunks_exact(n_vocab).enumerate() {
                each(c * size + i, row);
            }
            if keep_last && (c + 1) * size >= tokens.len() {
                self.logits.clear();
                self.logits
                    .extend_from_slice(&logits[(chunk.len() - 1) * n_vocab..]);
            }
            self.n_past += chunk.len();
        }
        Ok(())
    }

    fn run_virtual(&mut self, values: Range<usize>, want_logits: bool) -> Result<()> {
        let Some(Attached {
            how: How::Template(rows),
            ..
        }) = &self.attached
        else {
            unreachable!("only a template places virtual tokens")
        };
        let rows = rows[values].to_vec();
        self.run_all(Input::Rows(&rows), want_logits)
    }

    /// One step; on success the positions count as used.
    fn run(
        &mut self,
        input: Input<'_>,
        n: usize,
        outputs: Range<usize>,
    ) -> Result<(), SessionError> {
        let wanted = !outputs.is_empty();
        let logits = self.core.step(input, self.n_past, outputs)?;
        if wanted {
            self.logits.clear();
            self.logits.extend_from_slice(logits);
        }
        self.n_past += n;
        Ok(())
    }
}
