//! How well given tokens are predicted.

use ggraft::infer::engine::Request;
use ggraft::infer::{Ensemble, GenerateOptions, Generated};
use ggraft::train::data::Example;

/// Loss of one row.
#[derive(Default)]
pub(crate) struct Score {
    /// Summed negative log-likelihood, natural logarithm.
    pub(crate) nll: f64,
    /// The same of each member of an ensemble; empty of one.
    pub(crate) members: Vec<f64>,
    /// Tokens in that sum.
    pub(crate) tokens: usize,
    /// Each of them is the most likely one: greedy decoding would have written exactly this.
    pub(crate) exact: bool,
}

/// Asks how likely the tokens of a row are.
pub(crate) fn request(row: &Example, ensemble: &Ensemble) -> Request {
    let then: Vec<i32> = row.then.iter().map(|&(id, _)| id).collect();
    Request::tokens(row.given.clone())
        .ensemble(ensemble)
        .generate(GenerateOptions::default().logprobs(1))
        .answer(then)
}

impl Score {
    /// Of the answer to [`request`].
    pub(crate) fn new(row: &Example, answer: &Generated) -> Self {
        let mut score = Self {
            exact: true,
            ..Self::default()
        };
        for (&(id, counts), token) in row.then.iter().zip(&answer.logprobs) {
            if counts {
                score.nll -= f64::from(token.logprob);
                score.members.resize(token.members.len(), 0.0);
                for (sum, &logprob) in score.members.iter_mut().zip(&token.members) {
                    *sum -= f64::from(logprob);
                }
                score.tokens += 1;
                score.exact &= token.top.first().is_some_and(|&(best, _)| best == id);
            }
        }
        score
    }
}
