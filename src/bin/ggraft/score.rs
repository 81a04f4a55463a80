//! How well a session predicts given tokens.

use crate::failure::{Failure, Result};
use ggraft::Session;
use ggraft::train::data::Example;

/// Loss of one row.
#[derive(Default)]
pub(crate) struct Score {
    /// Summed negative log-likelihood, natural logarithm.
    pub(crate) nll: f64,
    /// Tokens in that sum.
    pub(crate) tokens: usize,
    /// Each of them is the most likely one: greedy decoding would have written exactly this.
    pub(crate) exact: bool,
}

/// Scores a row on a session that is emptied first.
pub(crate) fn score(session: &mut Session, row: &Example) -> Result<Score> {
    let mut score = Score {
        exact: true,
        ..Score::default()
    };
    let (first, counts) = row.then[0];
    session.reset();
    session.prompt_tokens(&row.given)?;
    if counts {
        score.add(session.logits()?, first)?;
    }
    let mut result = Ok(());
    // The last token predicts nothing that is asked for.
    let fed: Vec<i32> = row.then[..row.then.len() - 1].iter().map(|t| t.0).collect();
    if !fed.is_empty() {
        session.feed_with_logits(&fed, |i, logits| {
            let (target, counts) = row.then[i + 1];
            if counts && result.is_ok() {
                result = score.add(logits, target);
            }
        })?;
    }
    result.map(|()| score)
}

impl Score {
    /// `logits` `ne = [V]`.
    fn add(&mut self, logits: &[f32], target: i32) -> Result<()> {
        let label = usize::try_from(target).ok().and_then(|i| logits.get(i));
        let &label = label.ok_or_else(|| {
            Failure::Unsuitable(format!("token {target} is outside of the vocabulary"))
        })?;
        // Of equally likely tokens greedy decoding takes the first.
        let best =
            (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
        let max = f64::from(logits[best]);
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
        self.nll += sum.ln() + max - f64::from(label);
        self.tokens += 1;
        self.exact &= best as i64 == i64::from(target);
        Ok(())
    }
}
