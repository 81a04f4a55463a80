//! One forward and backward pass through the frozen base.

use super::TrainError;
use super::batch::{Packed, Slot};
use crate::error::Result;
use crate::file::types::GgmlType;
use crate::ggml::{
    ComputeError, Context, Graph, GraphMemory, GraphShape, Spans, Targets, Tensor, ThreadPool,
};
use crate::graph::{
    Builder, Decoder, Entry, Inputs, KeyValues, Tape, VirtualRows, input, max_nodes,
};
use crate::model::{HParams, Model};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Logits of so many bytes exist at a time: large enough to use the caches when the output matrix is multiplied backwards,
/// small beside the activations of a model with a large vocabulary.
const LOGIT_BYTES: usize = 32 << 20;

/// What is trained, in the form in which the graph reads it.
pub(crate) enum Variables {
    /// Nothing: the base alone.
    None,
    /// For each layer keys, then values, `ne = [Hk d, P]`, in the base's row order.
    Prefix {
        length: usize,
        layers: Vec<[Vec<f32>; 2]>,
    },
    /// Virtual tokens `ne = [D, P]`.
    Rows { length: usize, values: Vec<f32> },
}

impl Variables {
    /// P in front of every sequence, in the keys.
    fn prefix_length(&self) -> usize {
        match self {
            Self::Prefix { length, .. } => *length,
            Self::None | Self::Rows { .. } => 0,
        }
    }
}

/// What a pass is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Goal {
    /// The loss of each target.
    Losses,
    /// Losses, and the gradient of their weighted sum.
    Gradients,
    /// The most probable tokens at each target.
    Predictions(usize),
}

/// What a pass found.
pub(crate) struct Outcome {
    /// Cross-entropy of each target, in the order of the batch's targets.
    pub(crate) losses: Vec<f32>,
    /// Gradients of the weighted sum of the losses, in the shape of the variables; `None` if not asked for.
    pub(crate) gradients: Option<Variables>,
    /// For each target the most probable tokens with their probabilities, most probable first; empty if not asked for.
    pub(crate) predictions: Vec<Vec<(i32, f32)>>,
    /// Layers whose activations were computed twice.
    pub(crate) recomputed: usize,
}

/// Runs passes over one base in memory that it keeps.
pub(crate) struct Passes {
    model: Model,
    pool: Arc<ThreadPool>,
    /// Bytes that a pass should need at most.
    budget: usize,
    /// LongRoPE's factors for contexts beyond the original one.
    long_context: bool,
    memory: Option<GraphMemory>,
}

/// A variable in the graph.
enum Leaves {
    None,
    Prefix(Vec<[Tensor; 2]>),
    Rows(Tensor),
}

/// A graph without memory, with its inputs and outputs.
struct Plan {
    shape: GraphShape,
    inputs: Inputs,
    leaves: Leaves,
    targets: Targets,
    gradients: Vec<Tensor>,
    /// I32 and F32 `ne = [k, n]`, some targets at a time.
    predictions: Vec<(Tensor, Tensor)>,
}

/// Keys and values of the tokens at hand, behind a trained prefix.
struct PackedKeys<'a> {
    leaves: &'a Leaves,
    spans: &'a Arc<Spans>,
    window_spans: &'a Arc<Spans>,
    hp: &'a HParams,
    stored: Option<(Tensor, Tensor)>,
}

impl KeyValues for PackedKeys<'_> {
    fn store(&mut self, _: &mut Builder, _: usize, k: &Tensor, v: &Tensor) {
        self.stored = Some((k.clone(), v.clone()));
    }

    fn attend(&mut self, b: &mut Builder, il: usize, q: &Tensor) -> Tensor {
        let (k, v) = self
            .stored
            .take()
            .expect("a layer stores before it attends");
        let windowed = self.hp.window.as_ref().is_some_and(|w| w.layers[il]);
        let spans = if windowed {
            self.window_spans
        } else {
            self.spans
        };
        let prefix = match self.leaves {
            Leaves::Prefix(layers) => Some((&layers[il][0], &layers[il][1])),
            Leaves::None | Leaves::Rows(_) => None,
        };
        b.packed_attention(spans, q, &k, &v, prefix)
    }
}

/// Keeps an eye on the keys and values that pass by.
struct Watched<'a> {
    inner: PackedKeys<'a>,
    /// Keys, then values of each layer.
    seen: Vec<Tensor>,
}

impl KeyValues for Watched<'_> {
    fn store(&mut self, b: &mut Builder, il: usize, k: &Tensor, v: &Tensor) {
        self.seen.extend([k.clone(), v.clone()]);
        self.inner.store(b, il, k, v);
    }

    fn attend(&mut self, b: &mut Builder, il: usize, q: &Tensor) -> Tensor {
        self.inner.attend(b, il, q)
    }
}

/// Who sees whom, in layers without and with a sliding window.
fn spans(hp: &HParams, prefix: usize, shared: usize, rows: Vec<Range<usize>>) -> [Arc<Spans>; 2] {
    [None, hp.window.as_ref().map(|w| w.size)].map(|window| {
        Arc::new(Spans {
            prefix,
            shared,
            rows: rows.clone(),
            window,
            scale: hp.attn_scale,
            softcap: hp.attn_softcap,
        })
    })
}

impl Passes {
    pub(crate) fn new(
        model: &Model,
        pool: Arc<ThreadPool>,
        budget: usize,
        long_context: bool,
    ) -> Self {
        Self {
            model: model.clone(),
            pool,
            budget,
            long_context,
            memory: None,
        }
    }

    /// Computes with `pool` from now on.
    pub(crate) fn set_pool(&mut self, pool: Arc<ThreadPool>) {
        self.pool = pool;
    }

    /// Computes the losses of `batch` and, if asked for, the gradient of `sum(scale * weight * loss)`.
    pub(crate) fn run(
        &mut self,
        batch: &Packed,
        variables: &Variables,
        scale: f64,
        smoothing: f32,
        goal: Goal,
        cancel: Option<&AtomicBool>,
    ) -> Result<Outcome> {
        let (plan, recomputed) = self.plan(batch, variables, smoothing, goal);
        let Plan {
            shape,
            inputs,
            leaves,
            targets,
            gradients,
            predictions,
        } = plan;
        let memory = self.memory.take().unwrap_or_else(GraphMemory::new);
        let mut graph = Graph::allocate(shape, memory).map_err(|_| TrainError::OutOfMemory)?;
        self.fill(
            &mut graph, &inputs, &leaves, &targets, batch, variables, scale,
        );
        let computed = graph.compute(&self.pool, cancel);
        let outcome = computed.map(|()| {
            let read = |t: &Tensor| graph.read_f32(t).to_vec();
            let mut found = gradients.iter().map(read);
            let mut next = || found.next().expect("one gradient per variable");
            let k = predictions.first().map_or(1, |(ids, _)| ids.ne()[0]);
            Outcome {
                losses: if predictions.is_empty() {
                    read(&targets.losses)
                } else {
                    Vec::new()
                },
                gradients: (goal == Goal::Gradients).then(|| match variables {
                    Variables::None => Variables::None,
                    Variables::Prefix { length, layers } => Variables::Prefix {
                        length: *length,
                        layers: layers.iter().map(|_| [next(), next()]).collect(),
                    },
                    Variables::Rows { length, .. } => Variables::Rows {
                        length: *length,
                        values: next(),
                    },
                }),
                predictions: predictions
                    .iter()
                    .flat_map(|(ids, probabilities)| {
                        let ids = graph.read_i32(ids).chunks_exact(k);
                        let probabilities = graph.read_f32(probabilities).chunks_exact(k);
                        ids.zip(probabilities)
                            .map(|(i, p)| i.iter().copied().zip(p.iter().copied()).collect())
                    })
                    .collect(),
                recomputed,
            }
        });
        self.memory = Some(graph.into_memory());
        Ok(outcome.map_err(|e| match e {
            ComputeError::Cancelled => TrainError::Cancelled,
            ComputeError::OutOfMemory => TrainError::OutOfMemory,
        })?)
    }

    /// The graph with the fewest recomputed layers that stays within the budget, or with all of them recomputed.
    fn plan(
        &self,
        batch: &Packed,
        variables: &Variables,
        smoothing: f32,
        goal: Goal,
    ) -> (Plan, usize) {
        let n_layer = self.model.hparams().n_layer;
        let plan = |recomputed| self.build(batch, variables, smoothing, goal, recomputed);
        let fits = |plan: &Plan| plan.shape.memory_needed() <= self.budget;
        let all_kept = plan(0);
        if goal != Goal::Gradients || fits(&all_kept) {
            return (all_kept, 0);
        }
        let (mut too_few, mut enough) = (0, n_layer);
        while enough - too_few > 1 {
            let middle = (too_few + enough) / 2;
            if fits(&plan(middle)) {
                enough = middle;
            } else {
                too_few = middle;
            }
        }
        (plan(enough), enough)
    }

    /// The graph of a pass. The activations of the lowest `recomputed` layers are not kept but computed again when the
    /// gradient arrives (Chen et al. 2016): the lowest, because those above are free again by then.
    fn build(
        &self,
        batch: &Packed,
        variables: &Variables,
        smoothing: f32,
        goal: Goal,
        recomputed: usize,
    ) -> Plan {
        let backward = goal == Goal::Gradients;
        let (hp, w) = (self.model.hparams(), self.model.weights());
        let (t, c) = (batch.n_tokens(), batch.outputs.len());
        let chunk = (LOGIT_BYTES / (4 * w.n_vocab()) / 16 * 16).clamp(16, c.max(16));
        let nodes = 6 * max_nodes(hp) + 32 * c.div_ceil(chunk);
        let ctx = Context::new(nodes, true);

        let mut inputs = Inputs::new(&ctx, hp, Entry::Tokens, t, 0);
        let outputs = input(&ctx, GgmlType::I32, &[c], "inp_outputs");
        inputs.outputs = Some(outputs.clone());
        let leaves = match variables {
            Variables::None => Leaves::None,
            Variables::Prefix { length, layers } => {
                let leaf = |name, il| {
                    ctx.new_tensor(GgmlType::F32, &[hp.head_dim, hp.n_head_kv, *length])
                        .named(name, Some(il))
                        .input()
                };
                let pair = |il| [leaf("prefix_k", il), leaf("prefix_v", il)];
                Leaves::Prefix((0..layers.len()).map(pair).collect())
            }
            Variables::Rows { length, .. } => {
                let values = input(&ctx, GgmlType::F32, &[hp.n_embd, *length], "inp_virtual");
                inputs.virtual_rows = Some(VirtualRows {
                    values: values.clone(),
                    slots: input(&ctx, GgmlType::I32, &[t], "inp_slots"),
                });
                Leaves::Rows(values)
            }
        };
        let k = batch.n_choices();
        let targets = Targets {
            ids: input(&ctx, GgmlType::I32, &[k, c], "target_ids"),
            probabilities: input(&ctx, GgmlType::F32, &[k, c], "target_probabilities"),
            weights: input(&ctx, GgmlType::F32, &[c], "target_weights"),
            losses: input(&ctx, GgmlType::F32, &[c], "losses").output(),
        };
        let prefix = variables.prefix_length();
        let [all, windowed] = spans(hp, prefix, batch.shared, batch.rows.clone());

        let decoder = Decoder::new(hp, w, &inputs, self.long_context);
        let mut b = Builder::new(ctx.clone());
        let mut kv = PackedKeys {
            leaves: &leaves,
            spans: &all,
            window_spans: &windowed,
            hp,
            stored: None,
        };
        let last = hp.n_layer - 1;
        let ids = |il: usize| (il == last).then_some(&outputs);

        // Forward. Each layer has a tape of its own, whose variables are its input (if a gradient is wanted below) and its
        // part of the prefix.
        let first_input = matches!(leaves, Leaves::Rows(_));
        if let Leaves::Rows(rows) = &leaves {
            b.record([rows]);
        }
        let mut x = decoder.embed(&b, Entry::Tokens);
        let embed_tape = first_input.then(|| b.recorded());
        let record = |b: &mut Builder, il: usize, x: &Tensor| {
            let mut variables = Vec::new();
            if il > 0 || first_input {
                variables.push(x);
            }
            if let Leaves::Prefix(layers) = &leaves {
                variables.extend(&layers[il]);
            }
            b.record(variables);
        };
        let mut entered = Vec::with_capacity(hp.n_layer);
        let mut tapes: Vec<Option<(Tape, Tensor)>> = Vec::with_capacity(hp.n_layer);
        for il in 0..hp.n_layer {
            let keep = backward && il >= recomputed;
            if keep {
                record(&mut b, il, &x);
            }
            let y = decoder.layer(&mut b, il, &x, ids(il), &mut kv);
            b.demand(&y);
            tapes.push(keep.then(|| (b.recorded(), y.clone())));
            entered.push(std::mem::replace(&mut x, y));
        }

        // Loss and its gradient, a few rows of logits at a time: x becomes dx.
        let mut dx: Option<Tensor> = None;
        let mut predictions = Vec::new();
        for start in (0..c).step_by(chunk) {
            let n = chunk.min(c - start);
            let rows = |t: &Tensor| {
                let [n0, _, ..] = t.ne();
                let nb = t.nb()[1];
                ctx.view(t, [n0, n, 1, 1], [nb, nb * n, nb * n], start * nb)
            };
            let part = rows(&x);
            if let Goal::Predictions(k) = goal {
                let logits = decoder.logits(&b, &decoder.output_norm(&b, &part));
                let (ids, probabilities) = ctx.top_k(&logits, k);
                let (ids, probabilities) = (ids.output(), probabilities.output());
                b.demand(&ids);
                b.demand(&probabilities);
                predictions.push((ids, probabilities));
                continue;
            }
            b.record([&part]);
            let normed = decoder.output_norm(&b, &part);
            let mut logits = decoder.logits(&b, &normed);
            let tape = b.recorded();
            let result = logits.clone();
            if hp.logit_softcap != 0.0 {
                // The cap's derivative reads the capped logits, which the loss would overwrite.
                logits = ctx.cont(&logits);
            }
            let values = |t: &Tensor| {
                let size = size_of::<f32>();
                ctx.view(t, [n, 1, 1, 1], [n * size; 3], start * size)
            };
            let gradient = ctx.cross_entropy(
                &logits,
                &Targets {
                    ids: rows(&targets.ids),
                    probabilities: rows(&targets.probabilities),
                    weights: values(&targets.weights),
                    losses: values(&targets.losses),
                },
                smoothing,
            );
            b.demand(&gradient);
            if backward {
                let gradients = tape.backward(&ctx, &result, &gradient);
                let part_dx = gradients.of(&part).expect("logits depend on x").clone();
                let sum = match dx {
                    Some(dx) => ctx.concat_rows(&dx, &part_dx),
                    None => part_dx,
                };
                b.demand(&sum);
                dx = Some(sum);
            }
        }

        // Backward.
        let mut found: Vec<[Tensor; 2]> = Vec::new();
        let mut gradients = Vec::new();
        if let Some(mut dx) = dx {
            for il in (0..hp.n_layer).rev() {
                let x = &entered[il];
                let (tape, y) = tapes[il].take().unwrap_or_else(|| {
                    record(&mut b, il, x);
                    let y = decoder.layer(&mut b, il, x, ids(il), &mut kv);
                    (b.recorded(), y)
                });
                let grads = tape.backward(&ctx, &y, &dx);
                if let Leaves::Prefix(layers) = &leaves {
                    let pair = layers[il].each_ref().map(|leaf| {
                        let g = grads.of(leaf).expect("every layer attends to its prefix");
                        g.clone().output()
                    });
                    pair.iter().for_each(|g| b.demand(g));
                    found.push(pair);
                }
                if let Some(g) = grads.of(x) {
                    b.demand(g);
                    dx = g.clone();
                }
            }
            if let (Some(tape), Leaves::Rows(rows)) = (embed_tape, &leaves) {
                let grads = tape.backward(&ctx, &entered[0], &dx);
                let g = grads.of(rows).expect("embeddings depend on them");
                let g = g.clone().output();
                b.demand(&g);
                gradients.push(g);
            }
            gradients.extend(found.into_iter().rev().flatten());
        }
        let shape = GraphShape::new(ctx, nodes, &b.into_outputs());
        Plan {
            shape,
            inputs,
            leaves,
            targets,
            gradients,
            predictions,
        }
    }

    /// Whether [`Passes::predict`] stays within the budget.
    pub(crate) fn can_predict(&self, batch: &Packed, k: usize) -> bool {
        let plan = self.build(batch, &Variables::None, 0.0, Goal::Predictions(k), 0);
        plan.shape.memory_needed() <= self.budget
    }

    /// The `k <= V` most probable tokens at each target of `batch`, with probabilities that sum to 1: what the base alone says.
    pub(crate) fn predict(
        &mut self,
        batch: &Packed,
        k: usize,
        cancel: &AtomicBool,
    ) -> Result<Vec<Vec<(i32, f32)>>> {
        let goal = Goal::Predictions(k);
        let outcome = self.run(batch, &Variables::None, 1.0, 0.0, goal, Some(cancel))?;
        Ok(outcome.predictions)
    }

    /// Embeddings of tokens as virtual tokens: `ne = [D, n]`.
    pub(crate) fn embeddings(&mut self, ids: &[i32]) -> Result<Vec<f32>> {
        let (hp, w) = (self.model.hparams(), self.model.weights());
        let ctx = Context::new(16, true);
        let inputs = Inputs::new(&ctx, hp, Entry::Tokens, ids.len(), 0);
        let b = Builder::new(ctx.clone());
        let rows = b.scale(&b.get_rows(&w.token_embd, &inputs.entry), hp.token_scale);
        self.read(ctx, 16, &inputs, ids, vec![rows.output()])
            .map(|mut found| found.remove(0))
    }

    /// Keys and values that the base computes for a text, for each layer `ne = [Hk d, n]`.
    pub(crate) fn keys_values(&mut self, ids: &[i32]) -> Result<Vec<[Vec<f32>; 2]>> {
        let (hp, w) = (self.model.hparams(), self.model.weights());
        let nodes = 2 * max_nodes(hp);
        let ctx = Context::new(nodes, true);
        let inputs = Inputs::new(&ctx, hp, Entry::Tokens, ids.len(), 0);
        let [all, windowed] = spans(hp, 0, 0, std::iter::once(0..ids.len()).collect());
        let mut kv = Watched {
            inner: PackedKeys {
                leaves: &Leaves::None,
                spans: &all,
                window_spans: &windowed,
                hp,
                stored: None,
            },
            seen: Vec::new(),
        };
        let decoder = Decoder::new(hp, w, &inputs, self.long_context);
        let mut b = Builder::new(ctx.clone());
        let mut x = decoder.embed(&b, Entry::Tokens);
        for il in 0..hp.n_layer {
            x = decoder.layer(&mut b, il, &x, None, &mut kv);
        }
        let outputs = kv.seen.into_iter().map(|t| ctx.cont(&t).output()).collect();
        let found = self.read(ctx, nodes, &inputs, ids, outputs)?;
        let mut found = found.into_iter();
        Ok(std::iter::from_fn(|| Some([found.next()?, found.next()?])).collect())
    }

    /// Runs a graph over `ids` and reads its outputs.
    fn read(
        &self,
        ctx: Arc<Context>,
        nodes: usize,
        inputs: &Inputs,
        ids: &[i32],
        outputs: Vec<Tensor>,
    ) -> Result<Vec<Vec<f32>>> {
        let mut graph = Graph::new(ctx, nodes, &outputs, GraphMemory::new())
            .map_err(|_| TrainError::OutOfMemory)?;
        graph.slice_mut(&inputs.entry).copy_from_slice(ids);
        if graph.has_memory(&inputs.positions) {
            let positions = graph.slice_mut::<i32>(&inputs.positions);
            (0..).zip(positions).for_each(|(i, p)| *p = i);
        }
        graph
            .compute(&self.pool, None)
            .map_err(|_| TrainError::OutOfMemory)?;
        Ok(outputs.iter().map(|t| graph.read_f32(t).to_vec()).collect())
    }

    #[allow(clippy::too_many_arguments)]
    fn fill(
        &self,
        graph: &mut Graph,
        inputs: &Inputs,
        leaves: &Leaves,
        targets: &Targets,
        batch: &Packed,
        variables: &Variables,
        scale: f64,
    ) {
        let tokens = batch.slots.iter().map(|s| match *s {
            Slot::Token(id) => id,
            // Replaced by the virtual token; any valid id does.
            Slot::Virtual(_) => 0,
        });
        let fill = |out: &mut [i32], values: &mut dyn Iterator<Item = i32>| {
            out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
        };
        fill(graph.slice_mut(&inputs.entry), &mut { tokens });
        if graph.has_memory(&inputs.positions) {
            let behind = variables.prefix_length();
            fill(
                graph.slice_mut(&inputs.positions),
                &mut batch.positions.iter().map(|p| (p + behind) as i32),
            );
        }
        let outputs = inputs
            .outputs
            .as_ref()
            .expect("training asks for some logits");
        fill(
            graph.slice_mut(outputs),
            &mut batch.outputs.iter().map(|&o| o as i32),
        );
        if let Some(rows) = &inputs.virtual_rows {
            let slots = batch.slots.iter().map(|s| match *s {
                Slot::Token(_) => -1,
                Slot::Virtual(row) => row as i32,
            });
            fill(graph.slice_mut(&rows.slots), &mut { slots });
        }
        match (leaves, variables) {
            (Leaves::Prefix(leaves), Variables::Prefix { layers, .. }) => {
                for (leaf, values) in leaves.iter().flatten().zip(layers.iter().flatten()) {
                    graph.slice_mut(leaf).copy_from_slice(values);
                }
            }
            (Leaves::Rows(leaf), Variables::Rows { values, .. }) => {
                graph.slice_mut(leaf).copy_from_slice(values);
            }
            (Leaves::None, Variables::None) => {}
            _ => unreachable!("leaves are made from the variables"),
        }
        if !graph.has_memory(&targets.ids) {
            return;
        }
        let k = batch.n_choices();
        let ids = graph.slice_mut::<i32>(&targets.ids);
        ids.fill(0);
        for (row, target) in ids.chunks_exact_mut(k).zip(&batch.targets) {
            row.iter_mut().zip(target).for_each(|(o, &(id, _))| *o = id);
        }
        let probabilities = graph.slice_mut::<f32>(&targets.probabilities);
        probabilities.fill(0.0);
        for (row, target) in probabilities.chunks_exact_mut(k).zip(&batch.targets) {
            row.iter_mut().zip(target).for_each(|(o, &(_, p))| *o = p);
        }
        let weights = graph.slice_mut::<f32>(&targets.weights);
        for (o, &w) in weights.iter_mut().zip(&batch.weights) {
            *o = (f64::from(w) * scale) as f32;
        }
    }
}

#[cfg(test)]
mod tests;
