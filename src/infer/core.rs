//! The computing half of sessions: graphs, without any notion of text.

use super::error::SessionError;
use super::kv::{Cached, KvText, KvType, Reads};
use crate::ggml::{
    CancelToken, ComputeError, Graph, GraphMemory, KvLayout, KvSequence, KvStep, Tensor, ThreadPool,
};
use crate::graph::{Builder, Decoder, Inputs, Masks, Topology, VirtualTokens, causal_mask};
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

/// ggml's attention reads keys in steps of this many, so that one graph serves as many tokens.
const KV_BUCKET: usize = 256;

/// The computing half of sessions: graphs, without any notion of text.
pub(crate) struct Core {
    pub(crate) model: Model,
    pub(super) pool: Arc<ThreadPool>,
    pub(super) mode: Mode,
    pub(super) n_batch: usize,
    layout: Arc<KvLayout>,
    /// What comes out for a text must not depend on what else is in a step, nor on how its tokens are divided among steps.
    pub(super) invariant: bool,
    /// Attention by our own kernel, in all layers.
    own_attention: bool,
    /// What graphs read and write.
    step: Arc<KvStep>,
    graphs: Graphs,
    /// Of steps whose parts are computed one after the other.
    logits: Vec<f32>,
    pub(super) cancel: CancelToken,
    pub(super) graphs_built: usize,
    pub(super) positions_computed: usize,
}

/// A graph with what is needed to run it.
pub(super) struct Built {
    topology: Topology,
    pub(super) graph: Graph,
    inputs: Inputs,
    /// Of attention over keys side by side.
    masks: Option<Masks>,
    pub(super) logits: Option<Tensor>,
    /// Intermediates to be read, by name.
    pub(super) traced: Vec<(String, Tensor)>,
}

/// The graphs that were used last. Another topology replaces a graph in the same memory.
#[derive(Default)]
struct Graphs {
    /// Of steps in which each token is some text's next one, the last used graph at the end: one for each number of texts that are written.
    writing: Vec<Built>,
    /// Of any other step.
    other: Option<Built>,
}

impl Graphs {
    /// Of steps that write, as many as are kept, of so many tokens at most.
    const KEPT: usize = 4;
    const FEW: usize = 64;

    fn writes(topology: &Topology) -> bool {
        let n = topology.n_tokens;
        n == topology.n_outputs && n <= Self::FEW && topology.n_virtual == 0
    }

    /// The graph of this topology, or memory for it.
    fn take(&mut self, topology: &Topology) -> Result<Built, GraphMemory> {
        let memory = |built: Built| built.graph.into_memory();
        if !Self::writes(topology) {
            return match self.other.take() {
                Some(built) if built.topology == *topology => Ok(built),
                other => Err(other.map_or_else(GraphMemory::new, memory)),
            };
        }
        match self.writing.iter().position(|b| b.topology == *topology) {
            Some(i) => Ok(self.writing.remove(i)),
            None if self.writing.len() < Self::KEPT => Err(GraphMemory::new()),
            None => Err(memory(self.writing.remove(0))),
        }
    }

    fn put(&mut self, built: Built) -> &Built {
        if !Self::writes(&built.topology) {
            return self.other.insert(built);
        }
        self.writing.push(built);
        self.writing.last().expect("just pushed")
    }
}

/// What enters a step.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    Tokens(&'a [i32]),
    /// Virtual tokens, `ne = [D, n]`.
    Virtual(&'a [f32]),
}

impl<'a> Input<'a> {
    /// Tokens, or rows of `width` values.
    fn len(self, width: usize) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Virtual(rows) => rows.len() / width,
        }
    }

    /// Pieces of at most `n` positions, in order, each with its number of positions.
    pub(super) fn pieces(self, n: usize, width: usize) -> Vec<(Self, usize)> {
        let pieces: Vec<Self> = match self {
            Self::Tokens(tokens) => tokens.chunks(n).map(Self::Tokens).collect(),
            Self::Virtual(rows) => rows.chunks(n * width).map(Self::Virtual).collect(),
        };
        pieces.into_iter().map(|p| (p, p.len(width))).collect()
    }
}

/// The part of a text in a step.
pub(super) struct Part<'a> {
    pub(super) text: &'a mut KvText,
    /// What is computed next.
    pub(super) input: Input<'a>,
    /// Which of these need logits.
    pub(super) outputs: Range<usize>,
}

impl Core {
    pub(crate) fn new(model: &Model, mode: Mode, pool: Arc<ThreadPool>) -> Self {
        let (hp, kernels) = (model.hparams(), model.kernels());
        let attends = |d| kernels.attend(mode.ty.ggml(), d);
        Self {
            model: model.clone(),
            pool,
            mode,
            n_batch: 512,
            layout: Arc::new(mode.ty.layout(hp)),
            invariant: false,
            own_attention: mode.flash && hp.layers.iter().all(|l| attends(l.head_dim)),
            step: Arc::default(),
            graphs: Graphs::default(),
            logits: Vec::new(),
            cancel: CancelToken::default(),
            graphs_built: 0,
            positions_computed: 0,
        }
    }

    /// Where keys and values lie.
    pub(super) fn layout(&self) -> &Arc<KvLayout> {
        &self.layout
    }

    /// Computes the next tokens of some texts. Returns logits of the outputs of all parts, one part behind the other,
    /// `ne = [V, outputs]`. Each text's are what they would be without the others. Whether they are numbers is for the caller to
    /// [check](check_logits).
    pub(super) fn step(&mut self, parts: &mut [Part<'_>]) -> Result<&[f32], SessionError> {
        if self.own_attention || parts.len() == 1 {
            return self.step_together(parts);
        }
        let mut logits = std::mem::take(&mut self.logits);
        logits.clear();
        let outcome = parts.chunks_mut(1).try_for_each(|part| {
            logits.extend_from_slice(self.step_together(part)?);
            Ok(())
        });
        self.logits = logits;
        outcome.map(|()| &self.logits[..])
    }

    fn step_together(&mut self, parts: &mut [Part<'_>]) -> Result<&[f32], SessionError> {
        if self.cancel.is_cancelled() {
            return Err(SessionError::Cancelled);
        }
        let topology = self.topology(parts);
        let mut built = match self.graphs.take(&topology) {
            Ok(built) => built,
            Err(memory) => {
                self.graphs_built += 1;
                self.build(topology, &[], memory)?
            }
        };
        let outcome = self.run(&mut built, parts);
        let Built { graph, logits, .. } = self.graphs.put(built);
        outcome?;
        self.positions_computed += topology.n_tokens;
        Ok(logits.as_ref().map_or(&[], |logits| graph.read_f32(logits)))
    }

    pub(super) fn topology(&self, parts: &[Part<'_>]) -> Topology {
        let width = self.model.hparams().n_embd;
        let n_tokens = parts.iter().map(|p| p.input.len(width)).sum();
        let n_virtual = parts.iter().map(|p| match p.input {
            Input::Tokens(_) => 0,
            Input::Virtual(_) => p.input.len(width),
        });
        let most = parts.iter().map(|p| p.text.len()).max().unwrap_or(0);
        Topology {
            n_tokens,
            n_virtual: n_virtual.sum(),
            n_outputs: parts.iter().map(|p| p.outputs.len()).sum(),
            n_kv: (!self.own_attention).then(|| (most + n_tokens).next_multiple_of(KV_BUCKET)),
        }
    }

    /// Fills the graph's inputs and computes it; the texts have grown then.
    pub(super) fn run(
        &self,
        built: &mut Built,
        parts: &mut [Part<'_>],
    ) -> Result<(), SessionError> {
        let width = self.model.hparams().n_embd;
        for part in &mut *parts {
            (part.text.reserve(part.input.len(width))).map_err(|_| SessionError::OutOfMemory)?;
        }
        fill(built, parts, width);
        let mut sequences: Vec<KvSequence<'_>> = (parts.iter_mut())
            .map(|part| part.text.sequence(part.input.len(width)))
            .collect();
        self.step.begin(&self.layout, &mut sequences);
        let outcome = built.graph.compute(&self.pool, Some(self.cancel.flag()));
        self.step.end();
        outcome.map_err(|e| match e {
            ComputeError::Cancelled => SessionError::Cancelled,
            ComputeError::OutOfMemory => SessionError::OutOfMemory,
        })?;
        for part in parts {
            part.text.advance(part.input.len(width));
        }
        Ok(())
    }

    /// Builds a graph in `memory`; what is called one of `traced` can be read after it ran.
    pub(super) fn build(
        &self,
        topology: Topology,
        traced: &[&str],
        memory: GraphMemory,
    ) -> Result<Built, SessionError> {
        let Topology {
            n_tokens,
            n_virtual,
            n_outputs,
            n_kv,
        } = topology;
        let hp = self.model.hparams();
        let mut b = Builder::new(self.model.kernels().operations());
        if self.invariant {
            b = b.invariant();
        }
        let mut inputs = Inputs::new(b.ctx(), n_tokens, n_outputs);
        inputs.virtual_tokens =
            (n_virtual > 0).then(|| VirtualTokens::new(b.ctx(), hp, n_virtual, n_tokens));
        let masks = n_kv.map(|n_kv| Masks::new(b.ctx(), hp, n_tokens, n_kv));
        let mut kv = Cached {
            ty: self.mode.ty,
            layout: &self.layout,
            step: &self.step,
            hp,
            reads: match (&masks, n_kv) {
                (Some(masks), Some(n_kv)) => Reads::SideBySide {
                    masks,
                    n_kv,
                    fused: self.mode.flash,
                    rooms: Vec::new(),
                },
                _ => Reads::Pages,
            },
        };
        let decoder = Decoder::new(hp, self.model.weights(), &inputs, self.mode.long_context);
        let logits = decoder.run(&mut b, n_outputs, &mut kv);
        let traced = traced
            .iter()
            .filter_map(|&name| Some((name.to_owned(), b.ctx().output(b.ctx().find(name)?))))
            .collect();
        let graph = Graph::allocate(b.finish(), memory).map_err(|_| SessionError::OutOfMemory)?;
        Ok(Built {
            topology,
            graph,
            inputs,
            masks,
            logits,
            traced,
        })
    }
}

/// Fills the graph's inputs.
fn fill(built: &mut Built, parts: &[Part<'_>], width: usize) {
    let Built {
        topology,
        graph,
        inputs,
        masks,
        ..
    } = built;
    let n = topology.n_tokens;
    let (mut tokens, mut slots) = (Vec::with_capacity(n), Vec::with_capacity(n));
    let (mut positions, mut outputs) = (Vec::with_capacity(n), Vec::new());
    let mut rows = Vec::new();
    for part in parts {
        let (first, len) = (positions.len(), part.input.len(width));
        positions.extend((part.text.len() as i32..).take(len));
        outputs.extend(part.outputs.clone().map(|i| (first + i) as i32));
        match part.input {
            Input::Tokens(ids) => {
                tokens.extend_from_slice(ids);
                slots.resize(first + len, -1);
            }
            Input::Virtual(values) => {
                // Any token that there is: its embedding is replaced.
                tokens.resize(first + len, 0);
                slots.extend((rows.len() / width..).take(len).map(|slot| slot as i32));
                rows.extend_from_slice(values);
            }
        }
    }
    graph.slice_mut(&inputs.tokens).copy_from_slice(&tokens);
    // Inputs that no node reads have no memory: a model without rotary embedding needs no positions.
    if graph.has_memory(&inputs.positions) {
        graph
            .slice_mut(&inputs.positions)
            .copy_from_slice(&positions);
    }
    if let Some(virtual_tokens) = &inputs.virtual_tokens {
        graph
            .slice_mut(&virtual_tokens.values)
            .copy_from_slice(&rows);
        graph
            .slice_mut(&virtual_tokens.slots)
            .copy_from_slice(&slots);
    }
    if let Some(ids) = &inputs.outputs {
        graph.slice_mut(ids).copy_from_slice(&outputs);
    }
    for (window, mask) in masks.iter().flat_map(|masks| &masks.0) {
        if let (true, Some(n_kv)) = (graph.has_memory(mask), topology.n_kv) {
            causal_mask(graph.slice_mut::<f16>(mask), n_kv, &positions, *window);
        }
    }
}

/// Rows of logits that are read from one step at most, so that they take no more than 64 MiB: more are computed in several steps.
pub(super) fn most_logits(n_vocab: usize) -> usize {
    ((1 << 24) / n_vocab).max(1)
}

/// Logits that are no numbers must not become text.
pub(super) fn check_logits(logits: &[f32]) -> Result<(), SessionError> {
    match all_finite(logits) {
        true => Ok(()),
        false => Err(SessionError::NonFiniteLogits),
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
