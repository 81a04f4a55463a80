//! The computing half of a session: cache and graphs, without any notion of text.

use super::error::SessionError;
use super::kv_cache::{Cached, KvCache, KvType};
use crate::error::Result;
use crate::ggml::{CancelToken, ComputeError, Graph, GraphMemory, Tensor, ThreadPool};
use crate::graph::{Builder, CacheInputs, Decoder, Entry, Inputs, Topology, causal_mask};
use crate::model::Model;
use half::f16;
use std::ops::Range;
use std::sync::Arc;

/// What the keys and values of a text depend on besides model and text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mode {
    /// Type of the rows.
    pub(crate) ty: KvType,
    /// Fused attention.
    pub(crate) flash: bool,
    /// LongRoPE's factors for contexts beyond the original one.
    pub(crate) long_context: bool,
}

impl Mode {
    /// A number of its own for each mode.
    pub(crate) fn key(self) -> u32 {
        self.ty.ggml() as u32 * 4 + u32::from(self.flash) * 2 + u32::from(self.long_context)
    }
}

/// Attention reads cells in steps of this many, so that one decode graph serves as many tokens.
const KV_BUCKET: usize = 256;

/// The computing half of a session: cache and graphs, without any notion of text.
pub(crate) struct Core {
    pub(crate) model: Model,
    pub(crate) cache: KvCache,
    pub(super) pool: Arc<ThreadPool>,
    pub(super) mode: Mode,
    pub(super) n_batch: usize,
    /// The last graph of single tokens, kept apart so that a prefill does not evict it. Another topology replaces a graph
    /// in the same memory.
    decode: Option<Built>,
    /// The last graph of anything else.
    prefill: Option<Built>,
    pub(super) cancel: CancelToken,
    pub(super) graphs_built: usize,
    pub(super) positions_computed: usize,
}

/// A graph with what is needed to run it.
pub(super) struct Built {
    topology: Topology,
    pub(super) graph: Graph,
    inputs: Inputs,
    cache_inputs: CacheInputs,
    pub(super) logits: Option<Tensor>,
    /// Intermediates to be read, by name.
    pub(super) traced: Vec<(String, Tensor)>,
}

/// What enters a step.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    Tokens(&'a [i32]),
    /// `ne = [D, n]`.
    Embeddings(&'a [f32]),
}

impl<'a> Input<'a> {
    /// Tokens, or rows of `width` values.
    fn len(self, width: usize) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Embeddings(rows) => rows.len() / width,
        }
    }

    /// Pieces of at most `n` positions, in order, each with its number of positions.
    pub(super) fn pieces(self, n: usize, width: usize) -> Vec<(Self, usize)> {
        let pieces: Vec<Self> = match self {
            Self::Tokens(tokens) => tokens.chunks(n).map(Self::Tokens).collect(),
            Self::Embeddings(rows) => rows.chunks(n * width).map(Self::Embeddings).collect(),
        };
        pieces.into_iter().map(|p| (p, p.len(width))).collect()
    }
}

impl Core {
    pub(crate) fn new(
        model: &Model,
        mode: Mode,
        n_ctx: usize,
        pool: Arc<ThreadPool>,
    ) -> Result<Self> {
        let cache = KvCache::new(model.hparams(), mode.ty, n_ctx, 1)
            .map_err(|_| SessionError::OutOfMemory)?;
        Ok(Self {
            model: model.clone(),
            cache,
            pool,
            mode,
            n_batch: 512,
            decode: None,
            prefill: None,
            cancel: CancelToken::default(),
            graphs_built: 0,
            positions_computed: 0,
        })
    }

    /// Runs virtual tokens, `rows` `ne = [D, n]`, from position `start` on; no logits.
    pub(crate) fn run_embeddings(&mut self, rows: &[f32], start: usize) -> Result<()> {
        let width = self.model.hparams().n_embd;
        let mut at = start;
        for (piece, n) in Input::Embeddings(rows).pieces(self.n_batch, width) {
            self.step(piece, at, 0..0)?;
            at += n;
        }
        Ok(())
    }

    /// Runs one graph over `input` at positions from `start` on. Returns logits of the inputs in `outputs`,
    /// `ne = [V, outputs.len()]`.
    pub(super) fn step(
        &mut self,
        input: Input<'_>,
        start: usize,
        outputs: Range<usize>,
    ) -> Result<&[f32], SessionError> {
        if self.cancel.is_cancelled() {
            return Err(SessionError::Cancelled);
        }
        let topology = self.topology(input, start, outputs.len());
        let mut built = match self.slot(&topology).take() {
            Some(built) if built.topology == topology => built,
            other => {
                let memory = other.map_or_else(GraphMemory::new, |b| b.graph.into_memory());
                self.graphs_built += 1;
                self.build(topology, &[], memory)?
            }
        };
        let outcome = self.run(&mut built, input, start, outputs);
        if outcome.is_ok() {
            self.positions_computed += topology.n_tokens;
        }
        let Built { graph, logits, .. } = self.slot(&topology).insert(built);
        outcome?;
        let Some(logits) = logits else { return Ok(&[]) };
        let logits = graph.read_f32(logits);
        if !all_finite(logits) {
            return Err(SessionError::NonFiniteLogits);
        }
        Ok(logits)
    }

    fn slot(&mut self, topology: &Topology) -> &mut Option<Built> {
        if topology.n_tokens == 1 && topology.entry == Entry::Tokens {
            &mut self.decode
        } else {
            &mut self.prefill
        }
    }

    pub(super) fn topology(&self, input: Input<'_>, start: usize, n_outputs: usize) -> Topology {
        let entry = match input {
            Input::Tokens(_) => Entry::Tokens,
            Input::Embeddings(_) => Entry::Embeddings,
        };
        let n = input.len(self.model.hparams().n_embd);
        Topology {
            entry,
            n_tokens: n,
            n_kv: (start + n)
                .next_multiple_of(KV_BUCKET)
                .min(self.cache.cells()),
            n_outputs,
            stream: 0,
            n_streams: 1,
        }
    }

    /// Fills the graph's inputs and computes it.
    pub(super) fn run(
        &self,
        built: &mut Built,
        input: Input<'_>,
        start: usize,
        outputs: Range<usize>,
    ) -> Result<(), SessionError> {
        let Built {
            topology,
            graph,
            inputs,
            cache_inputs,
            ..
        } = built;
        match input {
            Input::Tokens(tokens) => graph.slice_mut(&inputs.entry).copy_from_slice(tokens),
            Input::Embeddings(rows) => graph.slice_mut(&inputs.entry).copy_from_slice(rows),
        }
        let positions: Vec<i32> = (start as i32..).take(topology.n_tokens).collect();
        // Inputs that no node reads have no memory: a model without rotary embedding needs no positions.
        if graph.has_memory(&inputs.positions) {
            graph
                .slice_mut(&inputs.positions)
                .copy_from_slice(&positions);
        }
        for (i, cell) in graph
            .slice_mut::<i64>(&cache_inputs.cells)
            .iter_mut()
            .enumerate()
        {
            *cell = self.cache.row_index(0, start + i);
        }
        for (window, mask) in &cache_inputs.masks {
            if graph.has_memory(mask) {
                causal_mask(
                    graph.slice_mut::<f16>(mask),
                    topology.n_kv,
                    &positions,
                    *window,
                );
            }
        }
        if let Some(ids) = &inputs.outputs {
            for (id, i) in graph.slice_mut::<i32>(ids).iter_mut().zip(outputs) {
                *id = i as i32;
            }
        }
        graph
            .compute(&self.pool, Some(self.cancel.flag()))
            .map_err(|e| match e {
                ComputeError::Cancelled => SessionError::Cancelled,
                ComputeError::OutOfMemory => SessionError::OutOfMemory,
            })?;
        Ok(())
    }

    /// Builds a graph in `memory`; what is called one of `traced` can be read after it ran.
    pub(super) fn build(
        &self,
        topology: Topology,
        traced: &[&str],
        memory: GraphMemory,
    ) -> Result<Built, SessionError> {
        let hp = self.model.hparams();
        let mut b = Builder::new(self.model.kernels().operations());
        let inputs = Inputs::new(
            b.ctx(),
            hp,
            topology.entry,
            topology.n_tokens,
            topology.n_outputs,
        );
        let cache_inputs = CacheInputs::new(b.ctx(), hp, &topology);
        let mut kv = Cached {
            cache: &self.cache,
            hp,
            inputs: &cache_inputs,
            topology,
            flash: self.mode.flash,
            kernels: self.model.kernels(),
        };
        let decoder = Decoder::new(hp, self.model.weights(), &inputs, self.mode.long_context);
        let logits = decoder.run(&mut b, &topology, &mut kv);
        let traced = traced
            .iter()
            .filter_map(|&name| Some((name.to_owned(), b.ctx().output(b.ctx().find(name)?))))
            .collect();
        let graph = Graph::allocate(b.finish(), memory).map_err(|_| SessionError::OutOfMemory)?;
        Ok(Built {
            topology,
            graph,
            inputs,
            cache_inputs,
            logits,
            traced,
        })
    }
}

/// No NaN and no infinity. Compares bits, so that it runs at memory speed.
fn all_finite(values: &[f32]) -> bool {
    const INFINITY: u32 = 0x7f80_0000;
    values
        .iter()
        .fold(0, |max: u32, v| max.max(v.to_bits() & !(1 << 31)))
        < INFINITY
}
