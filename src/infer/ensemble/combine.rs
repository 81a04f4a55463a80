//! From several distributions to one.

use crate::kernels::{log_add_exp, log_sum_exp};

/// How distributions of the next token become one. `w` are the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Combine {
    /// The weighted mean of the probabilities, `sum(w p) / sum(w)`: what one member finds likely stays possible. Its loss is at most the weighted mean of the members' losses.
    #[default]
    MeanProb,
    /// The weighted mean of the logits, `softmax(sum(w z) / sum(w))`, the geometric mean of the probabilities: what one member rules out is ruled out.
    MeanLogit,
    /// Each member votes for its most likely token; a token's probability is its part of the votes, by weight. Of equally many votes the token that has the larger mean probability
    /// comes first. What nobody votes for cannot be drawn.
    Vote,
    /// The product of the probabilities to the power of the weights, `softmax(sum(w z))` (Hinton 2002, product of experts): as [`Combine::MeanLogit`], but members who agree make each other
    /// surer.
    Product,
}

impl Combine {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::MeanProb, Self::MeanLogit, Self::Vote, Self::Product];

    /// Its name in commands and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::MeanProb => "mean-prob",
            Self::MeanLogit => "mean-logit",
            Self::Vote => "vote",
            Self::Product => "product",
        }
    }

    /// Logits of the combined distribution, from those of each member.
    pub(super) fn logits(self, rows: &[&[f32]], weights: &[f32]) -> Vec<f32> {
        match self {
            Self::MeanProb => mean_prob(rows, weights),
            Self::MeanLogit => weighted_sum(rows, parts(weights)),
            Self::Product => weighted_sum(rows, weights.iter().map(|&w| w.into())),
            Self::Vote => vote(rows, weights),
        }
    }
}

/// Weights as parts of 1.
fn parts(weights: &[f32]) -> impl Iterator<Item = f64> {
    let sum: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    weights.iter().map(move |&w| f64::from(w) / sum)
}

/// Logarithms of the weighted mean of the probabilities.
fn mean_prob(rows: &[&[f32]], weights: &[f32]) -> Vec<f32> {
    let (rows, offsets): (Vec<&[f32]>, Vec<f32>) = (rows.iter().zip(parts(weights)))
        .filter(|(_, part)| *part > 0.0)
        .map(|(row, part)| (*row, (part.ln() - log_sum_exp(row)) as f32))
        .unzip();
    let mut out = vec![0.0; rows[0].len()];
    log_add_exp(&rows, &offsets, &mut out);
    out
}

/// Sums of logits times weights.
fn weighted_sum(rows: &[&[f32]], weights: impl Iterator<Item = f64>) -> Vec<f32> {
    let mut out = vec![0.0; rows[0].len()];
    for (row, w) in rows.iter().zip(weights) {
        for (out, z) in out.iter_mut().zip(*row) {
            *out += w as f32 * z;
        }
    }
    out
}

/// Logarithms of parts of the votes.
fn vote(rows: &[&[f32]], weights: &[f32]) -> Vec<f32> {
    // Of equally likely tokens greedy decoding takes the first.
    let first =
        |row: &[f32]| (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best });
    let mut votes: Vec<(usize, f64)> = Vec::new();
    for (row, part) in (rows.iter().zip(parts(weights))).filter(|(_, part)| *part > 0.0) {
        let id = first(row);
        match votes.iter_mut().find(|(other, _)| *other == id) {
            Some((_, sum)) => *sum += part,
            None => votes.push((id, part)),
        }
    }
    let mean = mean_prob(rows, weights);
    let order = |a: &(usize, f64), b: &(usize, f64)| {
        b.1.total_cmp(&a.1).then(mean[b.0].total_cmp(&mean[a.0]))
    };
    votes.sort_by(order);
    let mut out = vec![f32::NEG_INFINITY; rows[0].len()];
    let mut least = f32::INFINITY;
    for (id, part) in votes {
        // By the least bit less than the one before it, if it would be as much.
        least = (part.ln() as f32).min(least.next_down());
        out[id] = least;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::Ensemble;

    fn probabilities(logits: &[f32]) -> Vec<f64> {
        let exp: Vec<f64> = logits.iter().map(|&z| f64::from(z).exp()).collect();
        let sum: f64 = exp.iter().sum();
        exp.iter().map(|e| e / sum).collect()
    }

    fn near(logits: &[f32], want: &[f64]) {
        for (got, want) in probabilities(logits).iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{got}, not {want}");
        }
    }

    #[test]
    fn distributions_are_combined_by_their_formulas() {
        let rows: [Vec<f32>; 3] = [1u32, 2, 3].map(|seed| {
            let value = |i: u32| (i * 7919 * seed) % 1000;
            (0..700)
                .map(|i| value(i) as f32 * 0.009 + seed as f32)
                .collect()
        });
        let rows = rows.each_ref().map(|row| &row[..]);
        let p = rows.map(probabilities);
        let weights = [2.0, 0.5, 1.5];
        let of = |combine: Combine| {
            let ensemble = Ensemble::new([None, None, None], combine).unwrap();
            ensemble
                .weights(&weights.map(|w| w as f32))
                .unwrap()
                .combined(&rows)
        };
        let normal = |p: Vec<f64>| {
            let sum: f64 = p.iter().sum();
            p.iter().map(|p| p / sum).collect::<Vec<_>>()
        };
        let at = |f: &dyn Fn(usize) -> f64| normal((0..700).map(f).collect());
        near(
            &of(Combine::MeanProb),
            &at(&|i| (0..3).map(|m| weights[m] * p[m][i]).sum()),
        );
        near(
            &of(Combine::MeanLogit),
            &at(&|i| (0..3).map(|m| p[m][i].powf(weights[m] / 4.0)).product()),
        );
        near(
            &of(Combine::Product),
            &at(&|i| (0..3).map(|m| p[m][i].powf(weights[m])).product()),
        );
    }

    #[test]
    fn the_most_votes_win_and_probability_decides_between_equals() {
        let rows: [&[f32]; 4] = [
            &[0.0, 3.0, 1.0],
            &[0.0, 1.1, 1.0],
            &[0.0, 0.0, 9.0],
            &[0.1, 0.0, 0.0],
        ];
        let of = |weights: &[f32]| {
            let ensemble = Ensemble::new(vec![None; 4], Combine::Vote).unwrap();
            ensemble.weights(weights).unwrap().combined(&rows)
        };
        near(&of(&[1.0; 4]), &[0.25, 0.5, 0.25]);
        near(&of(&[1.0, 0.0, 2.0, 1.0]), &[0.25, 0.25, 0.5]);
        // One vote for each of the last two: the last one is surer.
        let tie = of(&[1.0, 0.0, 1.0, 0.0]);
        assert!(tie[2] > tie[1] && tie[0] == f32::NEG_INFINITY);
        near(&tie, &[0.0, 0.5, 0.5]);
    }

    #[test]
    fn one_member_is_itself_and_what_is_no_ensemble_is_refused() {
        use super::super::EnsembleError as E;
        let row: &[f32] = &[0.3, -2.0, 7.5];
        for combine in Combine::ALL {
            let alone = Ensemble::new([None], combine).unwrap();
            assert_eq!(alone.combined(&[row]), row);
        }
        // A power of one's own probabilities, as a temperature.
        let sharper = Ensemble::new([None], Combine::Product).unwrap();
        let sharper = sharper.weights(&[2.0]).unwrap();
        assert_eq!(sharper.combined(&[row]), [0.6, -4.0, 15.0]);
        assert_eq!(Ensemble::new([], Combine::Vote).unwrap_err(), E::NoMembers);
        let two = || Ensemble::new([None, None], Combine::MeanProb).unwrap();
        let count = E::WeightCount {
            expected: 2,
            got: 1,
        };
        assert_eq!(two().weights(&[1.0]).unwrap_err(), count);
        assert_eq!(
            two().weights(&[1.0, -1.0]).unwrap_err(),
            E::Weight {
                index: 2,
                got: -1.0
            }
        );
        assert!(matches!(
            two().weights(&[f32::NAN, 1.0]).unwrap_err(),
            E::Weight { index: 1, .. }
        ));
        assert_eq!(two().weights(&[0.0, 0.0]).unwrap_err(), E::NoWeight);
    }
}
