//! Passes by our own decoder, with a tape. Graphs are kept for batches of the same shape ([`cache`](super::cache)).

use super::backward;
use super::cache::{Cache, Key};
use super::forward::{PackedKeys, Stack};
use super::io::Io;
use super::loss::{Chunks, Head};
use super::recompute::fewest;
use super::{Goal, Outcome};
use crate::error::Result;
use crate::ggml::{ComputeError, Graph, GraphMemory, GraphShape, Tensor, ThreadPool};
use crate::graph::{Builder, Decoder};
use crate::model::{Kernels, Model, Native};
use crate::train::TrainError;
use crate::train::batch::Packed;
use crate::train::variables::Variables;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Runs passes over one base in memory that it keeps.
pub(crate) struct Taped {
    pub(super) native: Arc<Native>,
    pub(super) kernels: Kernels,
    pub(super) pool: Arc<ThreadPool>,
    /// Bytes that a pass should need at most.
    budget: usize,
    /// LongRoPE's factors for contexts beyond the original one.
    pub(super) long_context: bool,
    memory: Option<GraphMemory>,
    pub(super) cache: Cache<Planned>,
}

/// A graph without memory, and how it keeps within the budget.
pub(super) struct Planned {
    shape: GraphShape,
    ends: Ends,
    /// Layers that it computes twice.
    recomputed: usize,
}

/// Inputs and outputs of a graph.
struct Ends {
    io: Io,
    /// Of the leaves, in their order; none unless asked for.
    gradients: Vec<Tensor>,
    /// I32 and F32 `ne = [k, n]`, some targets at a time; none unless asked for.
    predictions: Vec<(Tensor, Tensor)>,
}

impl Taped {
    /// For texts of up to `n_ctx` positions, within `budget` bytes if that can be done.
    ///
    /// # Errors
    /// [`ModelError::NoBackward`](crate::model::ModelError::NoBackward) if libllama computes the model.
    pub(super) fn new(
        model: &Model,
        pool: Arc<ThreadPool>,
        budget: usize,
        n_ctx: usize,
    ) -> Result<Self> {
        let native = model.native()?.clone();
        Ok(Self {
            kernels: model.kernels(),
            pool,
            budget,
            long_context: native.has_long_context(n_ctx),
            native,
            memory: None,
            cache: Cache::default(),
        })
    }

    /// Computes with `pool` from now on.
    pub(super) fn set_pool(&mut self, pool: Arc<ThreadPool>) {
        self.pool = pool;
    }

    /// Computes the losses of `batch` and, if asked for, the gradient of `sum(scale * weight * loss)`.
    pub(super) fn run(
        &mut self,
        batch: &Packed,
        variables: &Variables,
        scale: f64,
        smoothing: f32,
        goal: Goal,
        cancel: Option<&AtomicBool>,
    ) -> Result<Outcome> {
        let key = Key::new(batch, variables, smoothing, goal);
        let planned = match self.cache.take(&key) {
            Some(planned) => planned,
            None => self.plan(batch, variables, smoothing, goal),
        };
        let Planned {
            shape,
            ends,
            recomputed,
        } = planned;
        let memory = self.memory.take().unwrap_or_else(GraphMemory::new);
        let mut graph = Graph::allocate(shape, memory).map_err(|_| TrainError::OutOfMemory)?;
        ends.io.fill(&mut graph, batch, variables, scale);
        let computed = graph.compute(&self.pool, cancel);
        let outcome = computed.map(|()| Outcome {
            losses: match goal {
                Goal::Predictions(_) => Vec::new(),
                Goal::Losses | Goal::Gradients => graph.read_f32(&ends.io.targets.losses).to_vec(),
            },
            gradients: (goal == Goal::Gradients).then(|| {
                let mut found = ends.gradients.iter().map(|g| graph.read_f32(g).to_vec());
                variables.map(|_| found.next().expect("one gradient per variable"))
            }),
            predictions: read_predictions(&graph, &ends.predictions),
            recomputed,
        });
        let (shape, memory) = graph.into_parts();
        self.memory = Some(memory);
        self.cache.put(
            key,
            Planned {
                shape,
                ends,
                recomputed,
            },
        );
        Ok(outcome.map_err(|e| match e {
            ComputeError::Cancelled => TrainError::Cancelled,
            ComputeError::OutOfMemory => TrainError::OutOfMemory,
        })?)
    }

    /// The graph with the fewest recomputed layers that stays within the budget, or with all of them recomputed.
    fn plan(&self, batch: &Packed, variables: &Variables, smoothing: f32, goal: Goal) -> Planned {
        let graph = |recomputed| self.build(batch, variables, smoothing, goal, recomputed);
        match goal {
            Goal::Losses | Goal::Predictions(_) => graph(0),
            Goal::Gradients => {
                let fits = |graph: &Planned| graph.shape.memory_needed() <= self.budget;
                fewest(self.native.hp.n_layer(), graph, fits)
            }
        }
    }

    /// Bytes of the graph that [`Taped::run`] computes gradients with.
    pub(super) fn gradient_memory(
        &self,
        batch: &Packed,
        variables: &Variables,
        smoothing: f32,
    ) -> usize {
        let planned = self.plan(batch, variables, smoothing, Goal::Gradients);
        planned.shape.memory_needed()
    }

    /// The graph of a pass, in which the lowest `recomputed` layers are computed again when the gradient arrives.
    fn build(
        &self,
        batch: &Packed,
        variables: &Variables,
        smoothing: f32,
        goal: Goal,
        recomputed: usize,
    ) -> Planned {
        let (hp, w) = (&self.native.hp, &self.native.weights);
        let chunks = Chunks::new(batch.outputs.len(), w.n_vocab());
        let mut b = Builder::new(self.kernels.operations());
        let io = Io::new(b.ctx(), hp, batch, variables);
        let decoder = Decoder::new(hp, w, &io.inputs, self.long_context);
        let prefix = variables.prefix_length();
        let kv = PackedKeys::new(hp, &io.leaves, prefix, batch.shared, &batch.rows);
        let mut stack = Stack::new(&decoder, &io, hp.n_layer(), kv);
        let head = Head {
            decoder: &decoder,
            chunks: &chunks,
            capped: hp.logit_softcap != 0.0,
        };

        let backward = goal == Goal::Gradients;
        let taped = if backward {
            recomputed..hp.n_layer()
        } else {
            0..0
        };
        let forward = stack.forward(&mut b, taped);
        let (mut gradients, mut predictions) = (Vec::new(), Vec::new());
        if let Goal::Predictions(k) = goal {
            predictions = head.predictions(&mut b, &forward.output, k);
        } else {
            let (x, targets) = (&forward.output, &io.targets);
            if let Some(dx) = head.losses(&mut b, x, targets, smoothing, backward) {
                gradients = backward::backward(&mut b, &mut stack, forward, dx);
            }
        }
        Planned {
            shape: b.finish(),
            ends: Ends {
                io,
                gradients,
                predictions,
            },
            recomputed,
        }
    }

    /// Whether [`Taped::predict`] stays within the budget.
    pub(super) fn can_predict(&self, batch: &Packed, k: usize) -> bool {
        let graph = self.build(batch, &Variables::None, 0.0, Goal::Predictions(k), 0);
        graph.shape.memory_needed() <= self.budget
    }

    /// The `k <= V` most probable tokens at each target of `batch`, with probabilities that sum to 1: what the base alone says.
    pub(super) fn predict(
        &mut self,
        batch: &Packed,
        k: usize,
        cancel: &AtomicBool,
    ) -> Result<Vec<Vec<(i32, f32)>>> {
        let goal = Goal::Predictions(k);
        let outcome = self.run(batch, &Variables::None, 1.0, 0.0, goal, Some(cancel))?;
        Ok(outcome.predictions)
    }
}

/// For each target the most probable tokens with their probabilities.
fn read_predictions(graph: &Graph, found: &[(Tensor, Tensor)]) -> Vec<Vec<(i32, f32)>> {
    let mut predictions = Vec::new();
    for (ids, probabilities) in found {
        let k = ids.ne()[0];
        let ids = graph.read_i32(ids).chunks_exact(k);
        let probabilities = graph.read_f32(probabilities).chunks_exact(k);
        let pairs = |(i, p): (&[i32], &[f32])| i.iter().copied().zip(p.iter().copied()).collect();
        predictions.extend(ids.zip(probabilities).map(pairs));
    }
    predictions
}
