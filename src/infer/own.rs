//! Our own decoder at work: graphs, without any notion of text.

use super::core::{Input, Mode, Part};
use super::error::SessionError;
use super::kv::{Cached, PagedText, Reads};
use crate::ggml::{
    CancelToken, ComputeError, Graph, GraphMemory, KvLayout, KvSequence, KvStep, Tensor, ThreadPool,
};
use crate::graph::{Builder, Decoder, Inputs, Masks, Topology, VirtualTokens, causal_mask};
use crate::model::{Kernels, Model, Native};
use half::f16;
use std::sync::Arc;

/// ggml's attention reads keys in steps of this many, so that one graph serves as many tokens.
const KV_BUCKET: usize = 256;

/// Our own decoder at work.
pub(super) struct OwnDecoder {
    native: Arc<Native>,
    kernels: Kernels,
    pool: Arc<ThreadPool>,
    mode: Mode,
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

impl OwnDecoder {
    pub(super) fn new(model: &Model, native: &Arc<Native>, mode: Mode, n_threads: usize) -> Self {
        let (hp, kernels) = (&native.hp, model.kernels());
        let attends = |d| kernels.attend(mode.ty.ggml(), d);
        Self {
            native: native.clone(),
            kernels,
            pool: model.pool(n_threads),
            mode,
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
    pub(super) fn step(
        &mut self,
        parts: &mut [Part<'_, PagedText>],
    ) -> Result<&[f32], SessionError> {
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

    fn step_together(&mut self, parts: &mut [Part<'_, PagedText>]) -> Result<&[f32], SessionError> {
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

    pub(super) fn topology(&self, parts: &[Part<'_, PagedText>]) -> Topology {
        let width = self.native.hp.n_embd;
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
        parts: &mut [Part<'_, PagedText>],
    ) -> Result<(), SessionError> {
        let width = self.native.hp.n_embd;
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
        let hp = &self.native.hp;
        let mut b = Builder::new(self.kernels.operations());
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
        let decoder = Decoder::new(hp, &self.native.weights, &inputs, self.mode.long_context);
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
fn fill(built: &mut Built, parts: &[Part<'_, PagedText>], width: usize) {
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
