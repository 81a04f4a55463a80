//! What a run tells its caller.

/// Why a run is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// All steps were taken.
    Steps,
    /// The validation loss has not improved for as many evaluations as
    /// [`TrainOptions::patience`](super::TrainOptions::patience) says.
    EarlyStop,
    /// A step ended with [`TrainError::NonFinite`](super::TrainError::NonFinite).
    Failed,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub struct Report {
    /// Steps taken, this one included.
    pub step: u64,
    /// Steps of the run.
    pub steps: u64,
    /// Mean cross-entropy of the step's targets before the step, in nats.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens computed, virtual ones included.
    pub tokens: u64,
    /// Tokens predicted.
    pub targets: u64,
    /// Duration of the step without the evaluation.
    pub seconds: f64,
    /// Mean cross-entropy of the validation set after the step, if it was evaluated.
    pub valid_loss: Option<f64>,
    /// It is the lowest so far.
    pub best: bool,
    /// Passes over the training set so far.
    pub epoch: f64,
}

/// Rows of a data set that are too long, by their indices among the examples.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Trimmed {
    /// Rows that lose their ends.
    pub cut: Vec<usize>,
    /// Rows among them that lose every token that they have to predict: they are not used.
    pub lost: Vec<usize>,
}

/// A run so far.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Summary {
    /// Steps taken.
    pub steps: u64,
    /// Steps that were reported: one less while the evaluation of the last one was cancelled and not made up for.
    pub reported: u64,
    /// The step with the lowest validation loss.
    pub best_step: Option<u64>,
    /// The lowest validation loss.
    pub best_valid_loss: Option<f64>,
    /// Validation loss of the base without adapter, if [`Trainer::base_valid_loss`](super::Trainer::base_valid_loss) was asked.
    pub base_valid_loss: Option<f64>,
    /// Training loss of the first step.
    pub first_loss: Option<f64>,
    /// Training loss of the last step.
    pub last_loss: Option<f64>,
    /// Tokens computed in training steps.
    pub tokens: u64,
    /// Duration of all training steps.
    pub seconds: f64,
    /// Values that the optimizer moves, those of an encoder included.
    pub trained_parameters: u64,
    /// Values of the adapter.
    pub adapter_values: u64,
    /// Rows of the training set that were cut to the longest length.
    pub cut_rows: usize,
    /// Most layers that were computed twice in a step to stay within the memory budget.
    pub recomputed_layers: usize,
}
