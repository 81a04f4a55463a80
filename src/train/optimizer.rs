//! Rules by which parameters move against their gradient.

use super::param::{Param, StateError};
use std::collections::HashMap;

/// Adafactor's exponent of the step in the decay rate of the second moment.
const ADAFACTOR_DECAY_RATE: f64 = -0.8;
/// Adafactor's addend to squared gradients.
const ADAFACTOR_EPS: f32 = 1e-30;
/// Adafactor's largest root mean square of an update, before the learning rate.
const ADAFACTOR_CLIP_THRESHOLD: f32 = 1.0;
/// What PyTorch adds to the norm when it clips.
const CLIP_EPS: f64 = 1e-6;

/// Which optimizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay (Loshchilov and Hutter 2019), as `torch.optim.AdamW`.
    #[default]
    AdamW,
    /// Shazeer and Stern 2018, as `transformers.Adafactor` with `relative_step`, `scale_parameter`, `warmup_init` and the first
    /// moment off: what Lester et al. 2021 train soft prompts with, at a learning rate of 0.3. Remembers one value per row and
    /// per column of a matrix.
    Adafactor,
    /// Gradient descent, as `torch.optim.SGD`.
    Sgd,
}

/// How parameters move. The learning rate is the trainer's.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct OptimizerOptions {
    /// Which optimizer.
    pub kind: OptimizerKind,
    /// AdamW's decay of the mean of the gradient and of its square per step.
    pub betas: (f64, f64),
    /// AdamW's addend to the denominator.
    pub eps: f64,
    /// Weight decay: decoupled from the gradient for AdamW and Adafactor (values shrink by this times the learning rate), added
    /// to the gradient for SGD. Default: 0.01 for AdamW and 0 for the others, as in PyTorch and Transformers.
    pub weight_decay: f64,
    /// SGD's share of the previous update; 0 switches the memory off.
    pub momentum: f64,
}

impl OptimizerOptions {
    /// The defaults of PyTorch (AdamW, SGD) and Transformers (Adafactor) for `kind`.
    pub fn new(kind: OptimizerKind) -> Self {
        Self {
            kind,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: match kind {
                OptimizerKind::AdamW => 0.01,
                OptimizerKind::Adafactor | OptimizerKind::Sgd => 0.0,
            },
            momentum: 0.0,
        }
    }

    /// Sets [`OptimizerOptions::betas`].
    pub fn betas(mut self, mean: f64, square: f64) -> Self {
        self.betas = (mean, square);
        self
    }

    /// Sets [`OptimizerOptions::eps`].
    pub fn eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// Sets [`OptimizerOptions::weight_decay`].
    pub fn weight_decay(mut self, decay: f64) -> Self {
        self.weight_decay = decay;
        self
    }

    /// Sets [`OptimizerOptions::momentum`].
    pub fn momentum(mut self, momentum: f64) -> Self {
        self.momentum = momentum;
        self
    }
}

impl Default for OptimizerOptions {
    fn default() -> Self {
        Self::new(OptimizerKind::default())
    }
}

/// A tensor that an optimizer remembers.
#[derive(Debug)]
struct Moment {
    /// PyTorch's or Transformers' name of it, `.`, name of the parameter.
    name: String,
    value: Vec<f32>,
}

/// An optimizer at work on a list of parameters.
#[derive(Debug)]
pub(crate) struct Optimizer {
    options: OptimizerOptions,
    /// Steps taken.
    step: u64,
    /// Of each parameter, as [`Optimizer::new`] lists them.
    moments: Vec<Vec<Moment>>,
}

impl Optimizer {
    /// For these parameters: names and shapes count, values do not.
    pub(crate) fn new(options: OptimizerOptions, params: &[Param]) -> Self {
        let moments = |param: &Param| {
            let shape = param.trainable_shape();
            let numel = shape.iter().product();
            let sizes = match (options.kind, &shape[..]) {
                (OptimizerKind::AdamW, _) => vec![("exp_avg", numel), ("exp_avg_sq", numel)],
                (OptimizerKind::Adafactor, &[rows, cols]) => {
                    vec![("exp_avg_sq_row", rows), ("exp_avg_sq_col", cols)]
                }
                (OptimizerKind::Adafactor, _) => vec![("exp_avg_sq", numel)],
                (OptimizerKind::Sgd, _) if options.momentum != 0.0 => {
                    vec![("momentum_buffer", numel)]
                }
                (OptimizerKind::Sgd, _) => vec![],
            };
            let moment = |(name, size)| Moment {
                name: format!("{name}.{}", param.name),
                value: vec![0.0; size],
            };
            sizes.into_iter().map(moment).collect()
        };
        Self {
            moments: params.iter().map(moments).collect(),
            options,
            step: 0,
        }
    }

    /// Moves the parameters by their gradients. They are those of [`Optimizer::new`], in the same order.
    pub(crate) fn step(&mut self, params: &mut [Param], lr: f64) {
        assert_eq!(params.len(), self.moments.len());
        self.step += 1;
        let options = &self.options;
        for (param, moments) in params.iter_mut().zip(&mut self.moments) {
            let (value, grad) = param.trainable_mut();
            if value.is_empty() {
                continue;
            }
            match (options.kind, &mut moments[..]) {
                (OptimizerKind::AdamW, [mean, square]) => {
                    let moments = (&mut mean.value[..], &mut square.value[..]);
                    adamw(options, self.step, lr, value, grad, moments);
                }
                (OptimizerKind::Adafactor, [row, col]) => {
                    let update = factored_update(self.step, grad, &mut row.value, &mut col.value);
                    adafactor(options, lr, value, &update);
                }
                (OptimizerKind::Adafactor, [square]) => {
                    let update = unfactored_update(self.step, grad, &mut square.value);
                    adafactor(options, lr, value, &update);
                }
                (OptimizerKind::Sgd, [buffer]) => {
                    sgd_with_momentum(options, lr, value, grad, &mut buffer.value);
                }
                (OptimizerKind::Sgd, []) => sgd(options, lr, value, grad),
                (kind, moments) => unreachable!("{kind:?} with {} moments", moments.len()),
            }
        }
    }

    /// Steps taken.
    pub(crate) fn steps(&self) -> u64 {
        self.step
    }

    /// What it was made with.
    pub(crate) fn options(&self) -> &OptimizerOptions {
        &self.options
    }

    /// What a checkpoint holds, besides [`Optimizer::steps`].
    pub(crate) fn state(&self) -> Vec<(String, Vec<f32>)> {
        let moments = self.moments.iter().flatten();
        moments.map(|m| (m.name.clone(), m.value.clone())).collect()
    }

    /// Continues after `steps` steps, with the tensors of [`Optimizer::state`] in any order. Unchanged after an error.
    pub(crate) fn load_state(
        &mut self,
        steps: u64,
        state: Vec<(String, Vec<f32>)>,
    ) -> Result<(), StateError> {
        let mut state: HashMap<_, _> = state.into_iter().collect();
        let mut loaded = Vec::new();
        for moment in self.moments.iter().flatten() {
            let tensor = moment.name.clone();
            let Some(value) = state.remove(&tensor) else {
                return Err(StateError::Missing { tensor });
            };
            if value.len() != moment.value.len() {
                return Err(StateError::Shape {
                    tensor,
                    expected: vec![moment.value.len()],
                    got: vec![value.len()],
                });
            }
            loaded.push(value);
        }
        if let Some(tensor) = state.into_keys().min() {
            return Err(StateError::Unexpected { tensor });
        }
        for (moment, value) in self.moments.iter_mut().flatten().zip(loaded) {
            moment.value = value;
        }
        self.step = steps;
        Ok(())
    }
}

/// Operations in PyTorch's order (`_single_tensor_adam`), scalars in double precision until they meet a tensor, as there.
fn adamw(
    options: &OptimizerOptions,
    step: u64,
    lr: f64,
    value: &mut [f32],
    grad: &[f32],
    (exp_avg, exp_avg_sq): (&mut [f32], &mut [f32]),
) {
    let (beta1, beta2) = options.betas;
    let shrink = (1.0 - lr * options.weight_decay) as f32;
    let step = step as f64;
    let step_size = (lr / (1.0 - beta1.powf(step))) as f32;
    let correction2_sqrt = (1.0 - beta2.powf(step)).sqrt() as f32;
    let eps = options.eps as f32;
    let (mean_new, square_kept, square_new) =
        ((1.0 - beta1) as f32, beta2 as f32, (1.0 - beta2) as f32);
    for (((w, &g), m), v) in value.iter_mut().zip(grad).zip(exp_avg).zip(exp_avg_sq) {
        *w *= shrink;
        *m = lerp(*m, g, mean_new);
        *v = *v * square_kept + square_new * g * g;
        *w -= step_size * *m / (v.sqrt() / correction2_sqrt + eps);
    }
}

/// `torch.lerp`: exact at both ends.
fn lerp(from: f32, to: f32, weight: f32) -> f32 {
    if weight < 0.5 {
        from + weight * (to - from)
    } else {
        to - (to - from) * (1.0 - weight)
    }
}

/// Weights of the old and the new second moment. The first step forgets the zeros that the moment starts with.
fn adafactor_betas(step: u64) -> (f32, f32) {
    let beta2 = 1.0 - (step as f64).powf(ADAFACTOR_DECAY_RATE);
    (beta2 as f32, (1.0 - beta2) as f32)
}

/// Gradient over the root of its second moment, of which only row and column means are kept.
fn factored_update(step: u64, grad: &[f32], row: &mut [f32], col: &mut [f32]) -> Vec<f32> {
    let (kept, new) = adafactor_betas(step);
    let (rows, cols) = (row.len(), col.len());
    let mut col_sums = vec![0.0; cols];
    for (row, grad) in row.iter_mut().zip(grad.chunks_exact(cols)) {
        let mut row_sum = 0.0;
        for (col_sum, &g) in col_sums.iter_mut().zip(grad) {
            let square = f64::from(g * g + ADAFACTOR_EPS);
            row_sum += square;
            *col_sum += square;
        }
        *row = *row * kept + new * (row_sum / cols as f64) as f32;
    }
    for (col, col_sum) in col.iter_mut().zip(col_sums) {
        *col = *col * kept + new * (col_sum / rows as f64) as f32;
    }
    let row_mean = (row.iter().map(|&r| f64::from(r)).sum::<f64>() / rows as f64) as f32;
    let col_factors: Vec<f32> = col.iter().map(|c| 1.0 / c.sqrt()).collect();
    let mut update = Vec::with_capacity(grad.len());
    for (row, grad) in row.iter().zip(grad.chunks_exact(cols)) {
        let row_factor = 1.0 / (row / row_mean).sqrt();
        let scaled = grad.iter().zip(&col_factors);
        update.extend(scaled.map(|(g, col_factor)| row_factor * col_factor * g));
    }
    update
}

/// Gradient over the root of its second moment.
fn unfactored_update(step: u64, grad: &[f32], exp_avg_sq: &mut [f32]) -> Vec<f32> {
    let (kept, new) = adafactor_betas(step);
    let update = |(v, &g): (&mut f32, &f32)| {
        *v = *v * kept + new * (g * g + ADAFACTOR_EPS);
        g / v.sqrt()
    };
    exp_avg_sq.iter_mut().zip(grad).map(update).collect()
}

/// Clips the update and applies it.
fn adafactor(options: &OptimizerOptions, lr: f64, value: &mut [f32], update: &[f32]) {
    let rms = (sum_of_squares(update) / update.len() as f64).sqrt() as f32;
    let divisor = (rms / ADAFACTOR_CLIP_THRESHOLD).max(1.0);
    let decay = (options.weight_decay * lr) as f32;
    let lr = lr as f32;
    for (w, u) in value.iter_mut().zip(update) {
        *w -= decay * *w;
        *w -= lr * (u / divisor);
    }
}

fn sgd(options: &OptimizerOptions, lr: f64, value: &mut [f32], grad: &[f32]) {
    let (lr, decay) = (lr as f32, options.weight_decay as f32);
    for (w, g) in value.iter_mut().zip(grad) {
        *w -= lr * (g + decay * *w);
    }
}

/// PyTorch's buffer starts as the first gradient, which is what it becomes from zeros here.
fn sgd_with_momentum(
    options: &OptimizerOptions,
    lr: f64,
    value: &mut [f32],
    grad: &[f32],
    buffer: &mut [f32],
) {
    let (lr, decay) = (lr as f32, options.weight_decay as f32);
    let momentum = options.momentum as f32;
    for ((w, g), b) in value.iter_mut().zip(grad).zip(buffer) {
        *b = momentum * *b + (g + decay * *w);
        *w -= lr * *b;
    }
}

/// Scales the gradients of all parameters together so that their norm is `max_norm` at most, as
/// `torch.nn.utils.clip_grad_norm_`; infinity never scales. Returns the norm before that. A norm that is infinite or not a
/// number is returned too, with the gradients left as they are: no step should be taken with them.
pub(crate) fn clip_grad_norm(params: &mut [Param], max_norm: f64) -> f64 {
    let squares = params.iter().map(|p| sum_of_squares(p.trainable_grad()));
    let norm = squares.sum::<f64>().sqrt();
    let scale = max_norm / (norm + CLIP_EPS);
    if norm.is_finite() && scale < 1.0 {
        for g in params.iter_mut().flat_map(Param::trainable_grad_mut) {
            *g *= scale as f32;
        }
    }
    norm
}

/// In double precision, which no square of a single one exceeds.
fn sum_of_squares(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v).powi(2)).sum()
}

#[cfg(test)]
mod tests;
