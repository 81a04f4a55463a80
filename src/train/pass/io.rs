//! What goes into a pass's graph: tokens, what is trained, targets.

use crate::file::types::GgmlType;
use crate::ggml::{Context, Graph, Targets, Tensor};
use crate::graph::{Inputs, VirtualTokens};
use crate::model::{HParams, LayerShape};
use crate::train::batch::{Packed, Slot};
use crate::train::variables::Variables;

/// What is trained, in the graph.
pub(super) enum Leaves {
    None,
    /// For each layer keys, then values, F32 `ne = [d, Hk, P]`.
    Prefix(Vec<[Tensor; 2]>),
    /// F32 `ne = [D, P]`.
    Virtual(Tensor),
}

impl Leaves {
    fn new(ctx: &Context, hp: &HParams, variables: &Variables) -> Self {
        match variables {
            Variables::None => Self::None,
            Variables::Prefix { length, layers } => {
                debug_assert_eq!(layers.len(), hp.n_layer());
                let pair = |(il, layer): (usize, &LayerShape)| {
                    ["k", "v"].map(|part| {
                        let ne = [layer.head_dim, layer.n_head_kv, *length];
                        ctx.input(GgmlType::F32, &ne, &format!("prefix_{part}-{il}"))
                    })
                };
                Self::Prefix(hp.layers.iter().enumerate().map(pair).collect())
            }
            Variables::Virtual { length, .. } => {
                Self::Virtual(ctx.input(GgmlType::F32, &[hp.n_embd, *length], "inp_virtual"))
            }
        }
    }

    /// Keys and values of the prefix in layer `il`.
    pub(super) fn prefix(&self, il: usize) -> Option<&[Tensor; 2]> {
        match self {
            Self::Prefix(layers) => Some(&layers[il]),
            Self::None | Self::Virtual(_) => None,
        }
    }

    /// Virtual tokens at the input layer.
    pub(super) fn virtual_tokens(&self) -> Option<&Tensor> {
        match self {
            Self::Virtual(rows) => Some(rows),
            Self::None | Self::Prefix(_) => None,
        }
    }

    fn fill(&self, graph: &mut Graph, variables: &Variables) {
        match (self, variables) {
            (Self::Prefix(leaves), Variables::Prefix { layers, .. }) => {
                for (leaf, values) in leaves.iter().flatten().zip(layers.iter().flatten()) {
                    graph.slice_mut(leaf).copy_from_slice(values);
                }
            }
            (Self::Virtual(leaf), Variables::Virtual { values, .. }) => {
                graph.slice_mut(leaf).copy_from_slice(values);
            }
            (Self::None, Variables::None) => {}
            _ => unreachable!("leaves are made from the variables"),
        }
    }
}

/// Everything that is written before the graph runs.
pub(super) struct Io {
    pub(super) inputs: Inputs,
    /// I32 `ne = [C]`: tokens whose logits are wanted.
    pub(super) outputs: Tensor,
    pub(super) leaves: Leaves,
    /// Ids and probabilities `ne = [k, C]`, weights and losses `ne = [C]`.
    pub(super) targets: Targets,
}

impl Io {
    pub(super) fn new(ctx: &Context, hp: &HParams, batch: &Packed, variables: &Variables) -> Self {
        let (t, c, k) = (batch.n_tokens(), batch.outputs.len(), batch.n_choices());
        let mut inputs = Inputs::new(ctx, t, 0);
        let outputs = ctx.input(GgmlType::I32, &[c], "inp_outputs");
        inputs.outputs = Some(outputs.clone());
        let leaves = Leaves::new(ctx, hp, variables);
        inputs.virtual_tokens = leaves.virtual_tokens().map(|values| VirtualTokens {
            values: values.clone(),
            slots: ctx.input(GgmlType::I32, &[t], "inp_slots"),
        });
        let targets = Targets {
            ids: ctx.input(GgmlType::I32, &[k, c], "target_ids"),
            probabilities: ctx.input(GgmlType::F32, &[k, c], "target_probabilities"),
            weights: ctx.input(GgmlType::F32, &[c], "target_weights"),
            losses: ctx.output(ctx.input(GgmlType::F32, &[c], "losses")),
        };
        Self {
            inputs,
            outputs,
            leaves,
            targets,
        }
    }

    /// Writes `batch` and `variables`, those of [`Io::new`] or others of the same shape. Weights are multiplied by `scale`.
    pub(super) fn fill(
        &self,
        graph: &mut Graph,
        batch: &Packed,
        variables: &Variables,
        scale: f64,
    ) {
        let tokens = batch.slots.iter().map(|s| match *s {
            Slot::Token(id) => id,
            // Replaced by the virtual token; any valid id does.
            Slot::Virtual(_) => 0,
        });
        fill(graph, &self.inputs.tokens, tokens);
        if graph.has_memory(&self.inputs.positions) {
            let behind = variables.prefix_length();
            let positions = batch.positions.iter().map(|p| (p + behind) as i32);
            fill(graph, &self.inputs.positions, positions);
        }
        let outputs = batch.outputs.iter().map(|&o| o as i32);
        fill(graph, &self.outputs, outputs);
        if let Some(rows) = &self.inputs.virtual_tokens {
            let slots = batch.slots.iter().map(|s| match *s {
                Slot::Token(_) => -1,
                Slot::Virtual(row) => row as i32,
            });
            fill(graph, &rows.slots, slots);
        }
        self.leaves.fill(graph, variables);
        if graph.has_memory(&self.targets.ids) {
            self.fill_targets(graph, batch, scale);
        }
    }

    fn fill_targets(&self, graph: &mut Graph, batch: &Packed, scale: f64) {
        let k = batch.n_choices();
        let ids = graph.slice_mut::<i32>(&self.targets.ids);
        ids.fill(0);
        for (row, target) in ids.chunks_exact_mut(k).zip(&batch.targets) {
            row.iter_mut()
                .zip(target.iter())
                .for_each(|(o, (id, _))| *o = id);
        }
        let probabilities = graph.slice_mut::<f32>(&self.targets.probabilities);
        probabilities.fill(0.0);
        for (row, target) in probabilities.chunks_exact_mut(k).zip(&batch.targets) {
            row.iter_mut()
                .zip(target.iter())
                .for_each(|(o, (_, p))| *o = p);
        }
        let weights = graph.slice_mut::<f32>(&self.targets.weights);
        for (o, &w) in weights.iter_mut().zip(&batch.weights) {
            *o = (f64::from(w) * scale) as f32;
        }
    }
}

fn fill(graph: &mut Graph, t: &Tensor, values: impl Iterator<Item = i32>) {
    let out = graph.slice_mut::<i32>(t);
    out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
}
