//! Models of architectures that only libllama knows: its decoder computes, and its context keeps the texts.
//!
//! A text remembers what it was made of. What the context has of it is a beginning that can be lost at any time (memory of a recurrent layer, or of one that sees a window,
//! does not go back, for example), and is computed again when the text goes on.

use super::core::{Extent, Input, Mode, Part};
use super::error::SessionError;
use crate::adapter::Adapter;
use crate::error::Result;
use crate::ggml::{CancelToken, KvFull};
use crate::host::{Fed, Graft, HostError, Llama, LlamaOptions, LlamaPart, Piece};
use crate::model::{BaseShape, LlamaModel, Model};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Sequences of a context at most, libllama's `LLAMA_MAX_SEQ`.
const MAX_SEQUENCES: usize = 256;
/// Sequences that belong to no running text: adapters are prepared in one, and a text may be computed anew while the old one is still there.
const SPARE: usize = 2;
/// Of several texts one can have the length of the context, and each of the others these positions: where more are needed, somebody waits.
const BESIDE: usize = 512;

/// A context of libllama's, in which texts are sequences.
pub(crate) struct LlamaMemory {
    /// Unlike any other's.
    id: u64,
    /// Positions of all texts together.
    cells: usize,
    /// Of the keys and values of a position.
    cell_bytes: usize,
    /// D.
    n_embd: usize,
    inner: Mutex<Inner>,
}

struct Inner {
    llama: Llama,
    /// Sequences of no text.
    free: Vec<i32>,
    /// Cells that texts have, or will need.
    promised: usize,
}

impl LlamaMemory {
    fn open(model: &Model, llama: &Arc<LlamaModel>, mode: Mode, extent: &Extent) -> Result<Self> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let n_sequences = extent.n_texts.saturating_add(SPARE);
        if n_sequences > MAX_SEQUENCES {
            let most = MAX_SEQUENCES - SPARE;
            return Err(SessionError::BadOption {
                option: "texts at a time",
                value: extent.n_texts.to_string(),
                why: format!("must be at most {most} where libllama computes"),
            }
            .into());
        }
        let cell_bytes = cell_bytes(model.shape(), mode);
        let beside = (extent.n_texts - 1) * extent.n_ctx.min(BESIDE);
        let mut cells = extent.n_ctx.saturating_add(beside);
        if let Some(limit) = extent.kv_bytes {
            cells = cells.min(limit / cell_bytes.max(1)).max(1);
        }
        let options = LlamaOptions {
            n_ctx: cells,
            n_sequences,
            kv_unified: true,
            type_k: mode.ty.ggml(),
            type_v: mode.ty.ggml(),
            flash_attention: (!mode.flash).then_some(false),
            swa_full: false,
            n_threads: Some(extent.n_threads),
        };
        let base = model.base().clone();
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            cells,
            cell_bytes,
            n_embd: base.shape().n_embd,
            inner: Mutex::new(Inner {
                llama: Llama::new(llama, base, &options)?,
                free: (0..n_sequences as i32).rev().collect(),
                promised: 0,
            }),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A step that panicked leaves texts whose beginnings are not known to be there.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the keys and values of so many positions.
    pub(super) fn bytes(&self, n: usize) -> usize {
        n.saturating_mul(self.cell_bytes)
    }

    /// Bytes of those that texts have.
    pub(super) fn used(&self) -> usize {
        self.bytes(self.inner().promised)
    }

    /// An adapter in the form of this memory, made on first use and then kept with the adapter.
    pub(super) fn prepare(&self, adapter: &Adapter) -> Result<Arc<Graft>> {
        adapter.compiled((self.id, 0), || {
            let mut inner = self.inner();
            let seq = inner.free.pop().ok_or(SessionError::OutOfMemory)?;
            let graft = inner.llama.host().graft(adapter, seq);
            inner.free.push(seq);
            graft.map(Arc::new).map_err(|e| match e {
                crate::Error::Host(e) => SessionError::from(e).into(),
                e => e,
            })
        })
    }
}

/// Of the keys and values of a position, in all layers.
fn cell_bytes(shape: &BaseShape, mode: Mode) -> usize {
    let width = |il| Some(shape.n_head_kv.get(il)? * shape.head_dim.get(il)?);
    let values: usize = (0..shape.n_layer).filter_map(width).sum();
    // Rows of whole blocks, or there is no such cache.
    2 * mode.ty.ggml().row_bytes(values as u64).unwrap_or(0) as usize
}

/// Why a step of libllama's failed, in a session's words.
impl From<HostError> for SessionError {
    fn from(e: HostError) -> Self {
        match e {
            HostError::Decode { code: 1, .. } | HostError::NoRoom { .. } => Self::OutOfMemory,
            HostError::Decode { code: 2, .. } => Self::Cancelled,
            e => Self::Llama(e),
        }
    }
}

/// A text in libllama's memory.
pub(crate) struct LlamaText {
    memory: Arc<LlamaMemory>,
    /// In front of the text.
    block: Option<Arc<Graft>>,
    /// What was computed behind it.
    fed: Vec<Piece>,
    /// Positions, the block's included.
    n: usize,
    seat: Option<Seat>,
    /// Cells that are promised to it.
    room: usize,
}

/// What the context has of a text.
struct Seat {
    seq: i32,
    /// So many of the text's first positions.
    there: usize,
    /// There may be others behind them, which must go.
    ragged: bool,
    /// The most positions that it had: layers with windows have forgotten what these do not see.
    most: usize,
}

impl LlamaText {
    pub(super) fn new(memory: &Arc<LlamaMemory>) -> Self {
        Self {
            memory: memory.clone(),
            block: None,
            fed: Vec::new(),
            n: 0,
            seat: None,
            room: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.n
    }

    fn block_rows(&self) -> usize {
        self.block.as_ref().map_or(0, |graft| graft.length())
    }

    pub(super) fn restart(&mut self, block: Option<Arc<Graft>>) {
        self.block = block;
        self.fed.clear();
        self.n = self.block_rows();
        self.leave();
    }

    /// Computed anew when it goes on.
    pub(super) fn fork(&self) -> Self {
        let mut text = Self::new(&self.memory);
        text.block.clone_from(&self.block);
        text.fed.clone_from(&self.fed);
        text.n = self.n;
        text
    }

    pub(super) fn truncate(&mut self, n: usize) {
        let n = n.max(self.block_rows());
        if n >= self.n {
            return;
        }
        let mut left = n - self.block_rows();
        let width = self.memory.n_embd;
        self.fed.retain_mut(|piece| {
            let stay = left.min(piece.len(width));
            left -= stay;
            piece.truncate(stay, width);
            stay > 0
        });
        self.n = n;
        if let Some(seat) = self.seat.as_mut().filter(|seat| seat.there > n) {
            seat.there = n;
            seat.ragged = true;
        }
        if self.room > n {
            self.memory.inner().promised -= self.room - n;
            self.room = n;
        }
    }

    pub(super) fn reserve(&mut self, n: usize) -> Result<(), KvFull> {
        let mut inner = self.memory.inner();
        let more = (self.n + n).saturating_sub(self.room);
        if inner.promised + more > self.memory.cells {
            return Err(KvFull);
        }
        if self.seat.is_none() {
            self.seat = Some(Seat {
                seq: inner.free.pop().ok_or(KvFull)?,
                there: 0,
                ragged: false,
                most: 0,
            });
        }
        inner.promised += more;
        self.room += more;
        Ok(())
    }

    /// Remembers an input as computed; the context may have it or not.
    pub(super) fn push(&mut self, input: Input<'_>) {
        let width = self.memory.n_embd;
        self.n += input.len(width);
        match (input, self.fed.last_mut()) {
            (Input::Tokens(ids), Some(Piece::Tokens(tokens))) => tokens.extend_from_slice(ids),
            (Input::Virtual(values), Some(Piece::Rows(rows))) => rows.extend_from_slice(values),
            (Input::Tokens(ids), _) => self.fed.push(Piece::Tokens(ids.to_vec())),
            (Input::Virtual(values), _) => self.fed.push(Piece::Rows(values.to_vec())),
        }
    }

    /// Lets the context have all of it.
    fn sit(&mut self, llama: &mut Llama) -> Result<(), HostError> {
        let (width, rows) = (self.memory.n_embd, self.block_rows());
        let seat = self.seat.as_mut().expect("there was room for it");
        let seq = seat.seq;
        if seat.ragged {
            let window = llama.window();
            let forgot = window > 0 && seat.most > window;
            if forgot || seat.there <= rows || !llama.truncate(seq, seat.there)? {
                seat.there = 0;
            }
        }
        if seat.there == 0 {
            match &self.block {
                Some(graft) => llama.put(graft, seq)?,
                None => llama.clear(seq)?,
            }
            seat.there = rows;
            seat.most = rows;
        }
        seat.ragged = false;
        let mut at = rows;
        for piece in &self.fed {
            let n = piece.len(width);
            let missing = seat.there.saturating_sub(at).min(n)..n;
            if !missing.is_empty() {
                let part = LlamaPart {
                    seq,
                    position: at + missing.start,
                    fed: match piece {
                        Piece::Tokens(tokens) => Fed::Tokens(&tokens[missing]),
                        Piece::Rows(rows) => Fed::Rows(&rows[missing.start * width..]),
                    },
                    outputs: 0..0,
                };
                // What fails half way is thrown away.
                seat.ragged = true;
                llama.step(&[part], &mut Vec::new())?;
                seat.ragged = false;
                seat.there = at + n;
            }
            at += n;
        }
        seat.most = seat.most.max(self.n);
        Ok(())
    }

    /// Gives back its sequence and its cells.
    fn leave(&mut self) {
        let seat = self.seat.take();
        if seat.is_none() && self.room == 0 {
            return;
        }
        let mut inner = self.memory.inner();
        inner.promised -= self.room;
        self.room = 0;
        if let Some(seat) = seat {
            // A sequence of this context can always be emptied.
            let _ = inner.llama.clear(seat.seq);
            inner.free.push(seat.seq);
        }
    }
}

impl Drop for LlamaText {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Libllama's decoder at work.
pub(super) struct LlamaDecoder {
    memory: Arc<LlamaMemory>,
    cancel: CancelToken,
    /// Of the last step.
    logits: Vec<f32>,
    positions_computed: usize,
}

impl LlamaDecoder {
    pub(super) fn new(
        model: &Model,
        llama: &Arc<LlamaModel>,
        mode: Mode,
        extent: &Extent,
    ) -> Result<Self> {
        let mut decoder = Self {
            memory: Arc::new(LlamaMemory::open(model, llama, mode, extent)?),
            cancel: CancelToken::default(),
            logits: Vec::new(),
            positions_computed: 0,
        };
        decoder.cancelled_by(&CancelToken::default());
        Ok(decoder)
    }

    pub(super) fn memory(&self) -> &Arc<LlamaMemory> {
        &self.memory
    }

    pub(super) fn cancel(&self) -> &CancelToken {
        &self.cancel
    }

    pub(super) fn cancelled_by(&mut self, token: &CancelToken) {
        self.cancel = token.clone();
        self.memory.inner().llama.cancelled_by(token);
    }

    pub(super) fn positions_computed(&self) -> usize {
        self.positions_computed
    }

    pub(super) fn step(&mut self, parts: &mut [Part<'_>]) -> Result<&[f32], SessionError> {
        if self.cancel.is_cancelled() {
            return Err(SessionError::Cancelled);
        }
        let width = self.memory.n_embd;
        for part in &mut *parts {
            let room = part.text.reserve(part.input.len(width));
            room.map_err(|_| SessionError::OutOfMemory)?;
        }
        let llama = &mut self.memory.inner().llama;
        let mut work = Vec::with_capacity(parts.len());
        for part in &mut *parts {
            let text = part.text.llama_mut();
            text.sit(llama)?;
            work.push(LlamaPart {
                seq: text.seat.as_ref().expect("it sits").seq,
                position: text.n,
                fed: match part.input {
                    Input::Tokens(tokens) => Fed::Tokens(tokens),
                    Input::Virtual(rows) => Fed::Rows(rows),
                },
                outputs: part.outputs.clone(),
            });
        }
        self.logits.clear();
        let outcome = llama.step(&work, &mut self.logits);
        for part in parts {
            let text = part.text.llama_mut();
            if outcome.is_ok() {
                text.push(part.input);
                self.positions_computed += part.input.len(width);
            }
            let n = text.n;
            let seat = text.seat.as_mut().expect("it sits");
            seat.there = n;
            seat.most = seat.most.max(n + part.input.len(width));
            seat.ragged = outcome.is_err();
        }
        outcome?;
        Ok(&self.logits)
    }
}
