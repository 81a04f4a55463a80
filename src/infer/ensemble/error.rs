//! Why members cannot speak as one.

/// What makes no ensemble, one variant per cause.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EnsembleError {
    /// Nobody speaks.
    #[error("an ensemble without members: give it at least one")]
    NoMembers,
    /// There are more or fewer weights than members.
    #[error("{got} weights for {expected} members: give one for each")]
    WeightCount {
        /// Members.
        expected: usize,
        /// Weights.
        got: usize,
    },
    /// A weight that is no part of anything.
    #[error("the weight of member {index} is {got}, it must be a finite number, 0 or more")]
    Weight {
        /// Which one, counted from 1.
        index: usize,
        /// The weight.
        got: f32,
    },
    /// Nobody counts.
    #[error("all weights are 0: give at least one member another one")]
    NoWeight,
    /// Weights of a vote cannot be fitted.
    #[error(
        "a vote has no probabilities that weights could be fitted by: fit those of another method"
    )]
    NoLikelihood,
    /// There is nothing to measure by.
    #[error("no sample has a token that counts: give rows with an answer, and weights above 0")]
    NothingCounts,
    /// A member finds a token impossible, or its logits are no numbers.
    #[error("the loss of member {index} is not finite: no weights can be fitted with it")]
    InfiniteLoss {
        /// Which one, counted from 1.
        index: usize,
    },
}
