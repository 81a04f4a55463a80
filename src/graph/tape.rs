//! Reverse-mode differentiation: each verb records how the gradient of its result becomes gradients of its operands.

use crate::ggml::{Context, Tensor};
use std::collections::{HashMap, HashSet};

/// From the gradient of a verb's result to those of its operands, in their order.
type Vjp = Box<dyn FnOnce(&Context, &Tensor) -> Vec<Tensor>>;

struct Step {
    operands: Vec<Tensor>,
    result: Tensor,
    vjp: Vjp,
}

/// What was computed from variables, in order.
#[derive(Default)]
pub(crate) struct Tape {
    steps: Vec<Step>,
    /// Variables and everything that depends on them.
    tracked: HashSet<usize>,
}

/// Gradients of tensors. Each has the shape of its tensor and no gaps.
#[derive(Default)]
pub(crate) struct Gradients(HashMap<usize, Tensor>);

impl Tape {
    /// A tape on which the gradients of `variables` can be found.
    pub(crate) fn new<'a>(variables: impl IntoIterator<Item = &'a Tensor>) -> Self {
        Self {
            steps: Vec::new(),
            tracked: variables.into_iter().map(Tensor::id).collect(),
        }
    }

    /// Notes that `result` was computed from `operands`. Nothing is kept if none of them depends on a variable, so no
    /// gradient is computed below the lowest variable.
    pub(super) fn record(
        &mut self,
        operands: &[&Tensor],
        result: &Tensor,
        vjp: impl FnOnce(&Context, &Tensor) -> Vec<Tensor> + 'static,
    ) {
        if operands.iter().any(|t| self.tracked.contains(&t.id())) {
            self.tracked.insert(result.id());
            self.steps.push(Step {
                operands: operands.iter().map(|&t| t.clone()).collect(),
                result: result.clone(),
                vjp: Box::new(vjp),
            });
        }
    }

    /// Emits the reverse graph: gradients of everything tracked, given that of `result`.
    pub(crate) fn backward(self, ctx: &Context, result: &Tensor, gradient: &Tensor) -> Gradients {
        let mut gradients = Gradients::default();
        gradients.add(ctx, result, gradient, false);
        for step in self.steps.into_iter().rev() {
            // A result that nothing used has no gradient. What was used is complete: all users came later.
            let Some(gradient) = gradients.0.remove(&step.result.id()) else {
                continue;
            };
            let parts = (step.vjp)(ctx, &gradient);
            assert_eq!(parts.len(), step.operands.len());
            // What is passed on as it came, or looks into another tensor, has other readers.
            let times = |id| parts.iter().filter(|part| part.id() == id).count();
            let is_new = |part: &Tensor| {
                part.id() != gradient.id() && !part.is_view() && times(part.id()) == 1
            };
            for (operand, part) in step.operands.iter().zip(&parts) {
                if self.tracked.contains(&operand.id()) {
                    gradients.add(ctx, operand, part, is_new(part));
                }
            }
        }
        gradients
    }
}

impl Gradients {
    /// Adds a part of the gradient of `t`; `is_new` if nothing else reads the part.
    fn add(&mut self, ctx: &Context, t: &Tensor, part: &Tensor, is_new: bool) {
        let sum = match self.0.remove(&t.id()) {
            Some(sum) if is_new => ctx.add_onto(part, &sum),
            Some(sum) => ctx.add(&sum, part),
            None => part.clone(),
        };
        self.0.insert(t.id(), sum);
    }

    /// The gradient of a variable, if anything depended on it.
    pub(crate) fn of(&self, variable: &Tensor) -> Option<&Tensor> {
        self.0.get(&variable.id())
    }
}
