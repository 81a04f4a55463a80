//! Loss and gradient of a step.

use super::Trainer;
use crate::error::Result;
use crate::train::batch::{MAX_TOKENS, Packed, Sequence, groups};
use crate::train::data::{Example, Examples};
use crate::train::layout::Layout;
use crate::train::pass::Goal;
use crate::train::sequences::Sequences;
use crate::train::variables::Variables;
use std::collections::BTreeMap;

/// What the graphs of a step add up to.
pub(super) struct Sums {
    /// Mean over the targets, weighted.
    pub(super) loss: f64,
    /// Tokens computed.
    pub(super) tokens: u64,
    pub(super) targets: u64,
    /// Of the loss, with respect to what is trained.
    gradient: Variables,
}

impl Trainer {
    /// Mean cross-entropy of `examples` under the current parameters, and its gradient with respect to each of them by PEFT's
    /// name, in PyTorch's shapes; `prompt_embeddings` stands for the rows that an encoder produces. Nothing is changed. The
    /// targets are the examples' own tokens whatever the objective: the teacher of [`Objective::Distill`](crate::train::Objective::Distill) is not asked.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn gradient(&mut self, examples: &[Example]) -> Result<(f64, BTreeMap<String, Vec<f32>>)> {
        let examples: Examples = examples.iter().cloned().collect();
        let sets = [&examples, &Examples::default()];
        let layout = Layout::new(&self.model, &self.options, self.length, sets)?;
        let n_vocab = self.model.shape().n_vocab;
        let (sequences, _) = Sequences::new(examples, &layout, n_vocab, "examples")?;
        let rows = self.state.encoder.forward();
        let batch: Vec<_> = sequences.iter(&layout).collect();
        let variables = self.variables(&rows)?;
        let sums = self.accumulate(&batch, batch.len(), &variables)?;
        let d_rows = sums.gradient.into_encoder(self.model.shape())?;
        self.backward(&d_rows);
        let mut found: BTreeMap<_, _> = self
            .state
            .encoder
            .params()
            .iter()
            .map(|p| (p.name.clone(), p.grad.clone()))
            .collect();
        found.insert("prompt_embeddings".to_owned(), d_rows);
        Ok((sums.loss, found))
    }

    /// Leaves gradients in the encoder's parameters; returns what was summed.
    pub(super) fn forward_backward(&mut self) -> Result<Sums> {
        let rows = self.state.encoder.forward();
        let mask = self.dropout_mask(rows.len());
        let variables = match &mask {
            Some(mask) => {
                let used: Vec<f32> = rows.iter().zip(mask).map(|(r, m)| r * m).collect();
                self.variables(&used)?
            }
            None => self.variables(&rows)?,
        };
        self.passes.begin_step(self.state.step);
        let drawn = self.state.drawn.iter();
        let batch: Vec<_> = drawn
            .map(|&i| self.train.get(&self.layout, i as usize))
            .collect();
        let mut sums = self.accumulate(&batch, self.options.batch, &variables)?;
        let gradient = std::mem::replace(&mut sums.gradient, Variables::None);
        let mut d_rows = gradient.into_encoder(self.model.shape())?;
        if let Some(mask) = &mask {
            d_rows.iter_mut().zip(mask).for_each(|(d, m)| *d *= m);
        }
        self.backward(&d_rows);
        if sums.loss.is_finite() {
            self.state.good = rows;
        }
        Ok(sums)
    }

    /// The gradients of the encoder's parameters from that of its rows.
    fn backward(&mut self, d_rows: &[f32]) {
        let encoder = &mut self.state.encoder;
        encoder.params_mut().iter_mut().for_each(|p| p.zero_grad());
        encoder.backward(d_rows);
    }

    /// 0 with the probability of dropout, otherwise what keeps the mean.
    fn dropout_mask(&mut self, n: usize) -> Option<Vec<f32>> {
        let p = self.options.dropout;
        let rng = &mut self.state.dropout;
        let mut draw = || {
            if rng.uniform(0.0, 1.0) < p {
                0.0
            } else {
                1.0 / (1.0 - p)
            }
        };
        (p > 0.0).then(|| (0..n).map(|_| draw()).collect())
    }

    /// Means over `batch`, of which `at_once` rows are computed together if they fit into a graph.
    fn accumulate(
        &mut self,
        batch: &[Sequence],
        at_once: usize,
        variables: &Variables,
    ) -> Result<Sums> {
        let mass: f64 = batch.iter().map(Sequence::mass).sum();
        // A batch of rows without weight teaches nothing.
        let scale = if mass > 0.0 { 1.0 / mass } else { 0.0 };
        let mut sums = Sums {
            loss: 0.0,
            tokens: 0,
            targets: 0,
            gradient: variables.zeros(),
        };
        let parts = batch.chunks(at_once);
        for group in parts.flat_map(|part| groups(part, MAX_TOKENS)) {
            let packed = Packed::new(&group);
            let outcome = self.passes.run(
                &packed,
                variables,
                scale,
                self.options.label_smoothing,
                Goal::Gradients,
                Some(self.cancel.flag()),
            )?;
            for (&l, &w) in outcome.losses.iter().zip(&packed.weights) {
                sums.loss += f64::from(l) * f64::from(w) * scale;
            }
            sums.tokens += packed.n_tokens() as u64;
            sums.targets += packed.outputs.len() as u64;
            self.recomputed = self.recomputed.max(outcome.recomputed);
            sums.gradient.add(&outcome.gradients.expect("asked for"));
        }
        Ok(sums)
    }

    /// What the encoder yields, as graphs read it.
    pub(in crate::train) fn variables(&self, rows: &[f32]) -> Result<Variables> {
        let (method, shape) = (self.options.method, self.model.shape());
        Ok(Variables::from_encoder(method, shape, rows)?)
    }
}
