//! Weights by which an ensemble predicts given texts best.

use super::{Combine, Ensemble, EnsembleError};
use crate::error::Result;
use crate::infer::engine::{EngineOptions, Jobs, Request, Scheduler, Watch};
use crate::infer::{CancelToken, GenerateOptions, Generated, SessionError, TokenLogprobs};
use crate::kernels::{exp_sub_sum, largest};
use crate::model::Model;
use std::sync::{Arc, Mutex, PoisonError};

/// A text and how it goes on, to measure an ensemble by.
#[derive(Clone, Debug)]
pub struct Sample {
    /// What is given, without BOS.
    pub prompt: Vec<i32>,
    /// What follows, and which of these tokens count.
    pub answer: Vec<(i32, bool)>,
    /// How much they count.
    pub weight: f32,
}

/// How well members predict, each for itself and all together: mean negative log-likelihood of a token in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct Losses {
    /// All together; infinite for a vote, unless everybody is right.
    pub together: f64,
    /// Each for itself.
    pub members: Vec<f64>,
    /// Tokens that count.
    pub tokens: usize,
    /// Samples that do not fit into the context.
    pub left_out: usize,
}

/// What fitting found.
#[derive(Clone, Debug)]
pub struct Fit {
    /// The ensemble with the weights that predict the samples best.
    pub ensemble: Ensemble,
    /// Its loss.
    pub loss: f64,
    /// With the weights that it had.
    pub before: Losses,
}

/// A token's part in the mean, and how likely each member finds it, as logarithms.
type Token = (f64, Vec<f64>);

impl Ensemble {
    /// How well it predicts `samples`, on an engine of these options.
    ///
    /// # Errors
    /// If an adapter does not fit, [`SessionError::Cancelled`] when `cancel` is raised, [`SessionError::ContextFull`] if no sample fits into the context,
    /// [`EnsembleError::NothingCounts`] if none has a token that counts.
    pub fn measure(
        &self,
        model: &Model,
        options: &EngineOptions,
        samples: &[Sample],
        cancel: &CancelToken,
    ) -> Result<Losses> {
        let engine = Engine {
            model,
            options,
            samples,
            cancel,
        };
        Ok(engine.pass(self, None)?.0)
    }

    /// The weights by which it predicts `samples` best: by expectation-maximization for [`Combine::MeanProb`], whose likelihood has one maximum, by Newton's method for
    /// [`Combine::MeanLogit`] and [`Combine::Product`], whose loss is convex, with a pass over the samples for each of its few steps. Weights are 0 or more; all but a product's are parts of 1.
    ///
    /// A prior keeps few samples from being learned by heart: for [`Combine::MeanProb`] one token for each member that only this one knows, for the others a normal distribution of width 1
    /// around equal parts of 1.
    ///
    /// # Errors
    /// As [`Ensemble::measure`]; [`EnsembleError::NoLikelihood`] for a vote, [`EnsembleError::InfiniteLoss`] of a member.
    pub fn fit(
        &self,
        model: &Model,
        options: &EngineOptions,
        samples: &[Sample],
        cancel: &CancelToken,
    ) -> Result<Fit> {
        if self.combine == Combine::Vote {
            return Err(EnsembleError::NoLikelihood.into());
        }
        let engine = Engine {
            model,
            options,
            samples,
            cancel,
        };
        let (before, tokens) = engine.pass(self, None)?;
        if let Some(member) = before.members.iter().position(|loss| !loss.is_finite()) {
            return Err(EnsembleError::InfiniteLoss { index: member + 1 }.into());
        }
        let (weights, loss) = match self.combine {
            Combine::MeanProb => mixture(&tokens),
            _ => engine.newton(self)?,
        };
        // What is less than a millionth has no weight.
        let weight = |w: f64| if w < 1e-6 { 0.0 } else { w as f32 };
        let weights: Vec<f32> = weights.into_iter().map(weight).collect();
        Ok(Fit {
            ensemble: self.clone().weights(&weights)?,
            loss,
            before,
        })
    }
}

struct Engine<'a> {
    model: &'a Model,
    options: &'a EngineOptions,
    samples: &'a [Sample],
    cancel: &'a CancelToken,
}

impl Engine<'_> {
    /// All samples once. What a token counts, its place and the members' logits go to `watch`.
    fn pass(
        &self,
        ensemble: &Ensemble,
        watch: Option<&Arc<Curvature>>,
    ) -> Result<(Losses, Vec<Token>)> {
        let n = ensemble.members.len();
        let mut options = self.options.clone();
        options.max_running = options.max_running.max(n);
        let mut scheduler = Scheduler::new(self.model, &options)?.stopped_by(self.cancel);
        let mut pass = Pass {
            ensemble,
            watch,
            rest: self.samples.iter(),
            together: 0.0,
            mass: 0.0,
            tokens: Vec::new(),
            left_out: 0,
            full: None,
            failed: None,
        };
        scheduler.serve(&mut pass);
        if let Some(e) = pass.failed {
            return Err(e);
        }
        if self.cancel.is_cancelled() {
            return Err(SessionError::Cancelled.into());
        }
        let (tokens, mass) = (pass.tokens, pass.mass);
        if tokens.is_empty() {
            return Err(pass.full.unwrap_or(EnsembleError::NothingCounts.into()));
        }
        let of_member = |m: usize| -tokens.iter().map(|(part, p)| part * p[m]).sum::<f64>() / mass;
        let losses = Losses {
            together: pass.together / mass,
            members: (0..n).map(of_member).collect(),
            tokens: tokens.len(),
            left_out: pass.left_out,
        };
        Ok((losses, tokens))
    }

    /// Weights of logits, and their loss.
    fn newton(&self, ensemble: &Ensemble) -> Result<(Vec<f64>, f64)> {
        const PASSES: usize = 16;
        let n = ensemble.members.len();
        let is_mean = ensemble.combine == Combine::MeanLogit;
        let mut next = vec![1.0 / n as f64; n];
        // Where loss and prior are lowest so far, and the loss alone.
        let mut best: Option<(Vec<f64>, f64, f64)> = None;
        for _ in 0..PASSES {
            let weights: Vec<f32> = next.iter().map(|&w| w as f32).collect();
            // A product's weights are logits' factors as they are.
            let product = Ensemble {
                combine: Combine::Product,
                weights,
                ..ensemble.clone()
            };
            let curvature = Arc::new(Curvature {
                weights: next.clone(),
                sums: Mutex::new(Sums::new(n)),
            });
            let loss = self.pass(&product, Some(&curvature))?.0.together;
            let sums = curvature.sums.lock();
            let mut sums = sums.unwrap_or_else(PoisonError::into_inner).clone();
            let cost = loss + sums.add_prior(&next);
            let least = best.as_ref().map_or(f64::INFINITY, |(_, least, _)| *least);
            let gain = least - cost;
            if gain > 0.0 {
                let lowest = sums.lowest(&next, is_mean);
                best = Some((std::mem::replace(&mut next, lowest), cost, loss));
            } else if let Some((w, ..)) = &best {
                // Too far: the loss is no parabola.
                next = w.iter().zip(&next).map(|(a, b)| 0.5 * (a + b)).collect();
            }
            if gain.abs() < 1e-6 {
                break;
            }
        }
        let (weights, _, loss) = best.expect("the first pass has a finite loss");
        Ok((weights, loss))
    }
}

/// Samples on their way.
struct Pass<'a> {
    ensemble: &'a Ensemble,
    watch: Option<&'a Arc<Curvature>>,
    rest: std::slice::Iter<'a, Sample>,
    together: f64,
    /// What all tokens count.
    mass: f64,
    tokens: Vec<Token>,
    left_out: usize,
    /// Why a sample was left out.
    full: Option<crate::Error>,
    failed: Option<crate::Error>,
}

impl<'a> Jobs for Pass<'a> {
    type Key = &'a Sample;

    fn next(&mut self) -> Option<(&'a Sample, Request)> {
        if self.failed.is_some() {
            return None;
        }
        let sample = self.rest.next()?;
        Some((sample, sample.request(self.ensemble, self.watch)))
    }

    fn end(&mut self, sample: &'a Sample, outcome: Result<Generated>) {
        match outcome {
            Ok(out) => {
                for (part, token) in sample.parts().zip(&out.logprobs) {
                    if part > 0.0 {
                        self.together -= part * f64::from(token.logprob);
                        self.mass += part;
                        self.tokens.push((part, members(token)));
                    }
                }
            }
            Err(e @ crate::Error::Session(SessionError::ContextFull { .. })) => {
                self.full = Some(e);
                self.left_out += 1;
            }
            Err(e) => self.failed = Some(e),
        }
    }
}

/// How likely each member finds a token.
fn members(token: &TokenLogprobs) -> Vec<f64> {
    match token.members.is_empty() {
        true => vec![token.logprob.into()],
        false => token.members.iter().map(|&p| p.into()).collect(),
    }
}

impl Sample {
    /// What its tokens count.
    fn parts(&self) -> impl Iterator<Item = f64> {
        let weight = f64::from(self.weight);
        let part = move |&(_, counts): &(i32, bool)| if counts { weight } else { 0.0 };
        self.answer.iter().map(part)
    }

    fn request(&self, ensemble: &Ensemble, watch: Option<&Arc<Curvature>>) -> Request {
        let answer: Vec<i32> = self.answer.iter().map(|&(id, _)| id).collect();
        let mut request = Request::tokens(self.prompt.clone())
            .ensemble(ensemble)
            .generate(GenerateOptions::default().logprobs(0))
            .answer(answer);
        request.watch = watch.map(|watch| {
            let (watch, parts) = (watch.clone(), self.parts().collect::<Vec<_>>());
            Watch::new(move |i, id, rows| watch.add(parts[i], id, rows))
        });
        request
    }
}

/// Parts of a mixture that make the tokens likeliest, and the loss with them.
fn mixture(tokens: &[Token]) -> (Vec<f64>, f64) {
    const STEPS: usize = 2000;
    let n = tokens.first().map_or(0, |(_, p)| p.len());
    let mass: f64 = tokens.iter().map(|(part, _)| part).sum();
    let mut weights = vec![1.0 / n as f64; n];
    // Probabilities as parts of each token's largest: they may be very small.
    let scaled: Vec<(f64, f64, Vec<f64>)> = (tokens.iter())
        .map(|(part, p)| {
            let max = p.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            (*part, max, p.iter().map(|p| (p - max).exp()).collect())
        })
        .collect();
    let mix = |weights: &[f64], p: &[f64]| weights.iter().zip(p).map(|(w, p)| w * p).sum::<f64>();
    for _ in 0..STEPS {
        let mut sums = vec![0.0; n];
        for (part, _, p) in &scaled {
            let all = mix(&weights, p);
            for ((sum, w), p) in sums.iter_mut().zip(&weights).zip(p) {
                *sum += part * w * p / all;
            }
        }
        let next: Vec<f64> = (sums.iter())
            .map(|sum| (sum + 1.0) / (mass + n as f64))
            .collect();
        let change = next.iter().zip(&weights).map(|(a, b)| (a - b).abs());
        let change = change.fold(0.0, f64::max);
        weights = next;
        if change < 1e-9 {
            break;
        }
    }
    let loss = |(part, max, p): &(f64, f64, Vec<f64>)| part * (mix(&weights, p).ln() + max);
    let loss = -scaled.iter().map(loss).sum::<f64>() / mass;
    (weights, loss)
}

/// Slope and curvature of the loss over weights of logits, summed while a pass goes on.
struct Curvature {
    weights: Vec<f64>,
    sums: Mutex<Sums>,
}

#[derive(Clone)]
struct Sums {
    mass: f64,
    /// `ne = [M]`: the mean of each member's logits under what all say together, less the token's own.
    slope: Vec<f64>,
    /// `ne = [M, M]`: the logits' covariance.
    curvature: Vec<f64>,
}

impl Curvature {
    /// A token that counts so much.
    fn add(&self, part: f64, id: i32, rows: &[&[f32]]) {
        /// What is less likely is left out of the means: all of it together is less than the rounding of the logits.
        const LEAST: f32 = 1e-10;
        if part == 0.0 {
            return;
        }
        let n = rows.len();
        let mut p = vec![0.0; rows[0].len()];
        for (row, &w) in rows.iter().zip(&self.weights) {
            for (p, z) in p.iter_mut().zip(*row) {
                *p += w as f32 * z;
            }
        }
        let max = largest(&p);
        let sum = f64::from(exp_sub_sum(&mut p, max));
        let (mut mean, mut square) = (vec![0.0; n], vec![0.0; n * n]);
        for (v, &exp) in p.iter().enumerate().filter(|(_, exp)| **exp > LEAST) {
            let p = f64::from(exp) / sum;
            let z = |m: usize| f64::from(rows[m][v] - rows[m][id as usize]);
            for a in 0..n {
                mean[a] += p * z(a);
                for b in 0..n {
                    square[a * n + b] += p * z(a) * z(b);
                }
            }
        }
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.mass += part;
        for a in 0..n {
            sums.slope[a] += part * mean[a];
            for b in 0..n {
                sums.curvature[a * n + b] += part * (square[a * n + b] - mean[a] * mean[b]);
            }
        }
    }
}

impl Sums {
    fn new(n: usize) -> Self {
        Self {
            mass: 0.0,
            slope: vec![0.0; n],
            curvature: vec![0.0; n * n],
        }
    }

    /// Adds a normal distribution of width 1 around equal weights; returns its part of the mean loss at `w`.
    fn add_prior(&mut self, w: &[f64]) -> f64 {
        let n = w.len();
        let mut cost = 0.0;
        for (a, w) in w.iter().enumerate() {
            let far = w - 1.0 / n as f64;
            self.slope[a] += far;
            self.curvature[a * n + a] += 1.0;
            cost += 0.5 * far * far;
        }
        cost / self.mass
    }

    /// Where the parabola at `from` is lowest, of the weights that there may be.
    fn lowest(&self, from: &[f64], is_mean: bool) -> Vec<f64> {
        const STEPS: usize = 20_000;
        let n = from.len();
        let trace: f64 = (0..n).map(|a| self.curvature[a * n + a]).sum();
        // No direction is steeper than all together.
        let rate = 1.0 / trace;
        let mut w = from.to_vec();
        for _ in 0..STEPS {
            let slope = |a: usize| {
                let row = &self.curvature[a * n..][..n];
                let bend = row.iter().zip(&w).zip(from).map(|((c, w), f)| c * (w - f));
                self.slope[a] + bend.sum::<f64>()
            };
            let moved: Vec<f64> = (0..n).map(|a| w[a] - rate * slope(a)).collect();
            let next = if is_mean {
                onto_simplex(moved)
            } else {
                moved.into_iter().map(|w| w.max(0.0)).collect()
            };
            let change = next
                .iter()
                .zip(&w)
                .map(|(a, b): (&f64, &f64)| (a - b).abs());
            let change = change.fold(0.0, f64::max);
            w = next;
            if change < 1e-10 {
                break;
            }
        }
        w
    }
}

/// The nearest weights that are 0 or more and sum to 1 (Held, Wolfe and Crowder 1974).
fn onto_simplex(w: Vec<f64>) -> Vec<f64> {
    let mut sorted = w.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut shift) = (0.0, 0.0);
    for (i, x) in sorted.iter().enumerate() {
        sum += x;
        let next = (sum - 1.0) / (i + 1) as f64;
        if *x > next {
            shift = next;
        }
    }
    w.into_iter().map(|w| (w - shift).max(0.0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixture_is_found() {
        // Two members that are right about other tokens: three quarters are the first one's.
        let token = |a: f64, b: f64| (1.0, vec![a.ln(), b.ln()]);
        let tokens: Vec<_> = (0..400)
            .map(|i| {
                if i % 4 > 0 {
                    token(0.9, 1e-30)
                } else {
                    token(1e-30, 0.9)
                }
            })
            .collect();
        let (weights, loss) = mixture(&tokens);
        // The prior has a token of each.
        let first = 301.0 / 402.0;
        assert!((weights[0] - first).abs() < 1e-6, "{weights:?}");
        let want = -(0.75 * (first * 0.9f64).ln() + 0.25 * ((1.0 - first) * 0.9f64).ln());
        assert!((loss - want).abs() < 1e-9);
    }

    #[test]
    fn the_nearest_weights_sum_to_1() {
        assert_eq!(onto_simplex(vec![0.25, 0.75]), [0.25, 0.75]);
        assert_eq!(onto_simplex(vec![2.0, 0.5, -3.0]), [1.0, 0.0, 0.0]);
        let equal = onto_simplex(vec![7.0; 4]);
        assert!(equal.iter().all(|w| (w - 0.25).abs() < 1e-12));
    }
}
