//! From logits to a token id: libllama's sampler chain, and plain argmax where nothing else is asked for.

use ggml_sys as sys;
use std::ptr::NonNull;

/// Longest window of the penalties, in tokens: libllama allocates the window when the sampler is made.
const MAX_LAST_N: u32 = 1 << 20;
/// libllama's LLAMA_DEFAULT_SEED, a macro without a binding: asks for a random seed.
const RANDOM_SEED: u32 = u32::MAX;
/// Below this, dividing logits by the temperature overflows F32 for logits that real models produce.
const MIN_TEMPERATURE: f32 = 1e-3;

/// A setting that cannot be used, or logits that no token can be drawn from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplerError {
    /// A number outside of what the setting allows.
    #[error("{name} is {got}, it must be {expected}")]
    OutOfRange {
        /// The setting.
        name: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What was given.
        got: f64,
    },
    /// A logit bias for a token that the model does not have.
    #[error("logit bias for token {id}, but the vocabulary has {n_vocab} tokens")]
    BiasToken {
        /// The token.
        id: i32,
        /// V.
        n_vocab: usize,
    },
    /// The generator of libllama takes this one seed as a request for a random one.
    #[error("seed {} is reserved, choose a smaller one", u32::MAX)]
    ReservedSeed,
    /// The vocabulary is empty or too large for token ids.
    #[error("cannot sample from a vocabulary of {n_vocab} tokens")]
    VocabSize {
        /// V.
        n_vocab: usize,
    },
    /// The row of logits belongs to another vocabulary.
    #[error("{got} logits for a vocabulary of {expected} tokens")]
    LogitCount {
        /// V.
        expected: usize,
        /// What was given.
        got: usize,
    },
    /// A logit is NaN or +infinity, or all are -infinity: the model's or the adapter's weights are damaged.
    #[error("the logits are not finite: the model or the adapter holds damaged weights")]
    NonFinite,
}

/// How the next token is chosen. The default is llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerParams {
    /// Divides the logits; 0 takes the most likely token (greedy). Default 0.8.
    pub temperature: f32,
    /// Keeps the k most likely tokens; 0 keeps all. Default 40.
    pub top_k: u32,
    /// Keeps the smallest set of tokens whose probabilities reach p, from 0 to 1; 1 keeps all. Default 0.95.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the most likely one, from 0 to 1; 0 keeps all. Default 0.05.
    pub min_p: f32,
    /// Divides the logits (multiplies the negative ones) of recent tokens; 1 does nothing. Default 1.
    pub repeat_penalty: f32,
    /// How many tokens the three penalties look back on; 0 switches them off. Default 64.
    pub repeat_last_n: u32,
    /// Subtracted from the logit of a recent token for each time it occurred. Default 0.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of a recent token. Default 0.
    pub presence_penalty: f32,
    /// Added to the logits of single tokens; -infinity bans a token.
    pub logit_bias: Vec<(i32, f32)>,
    /// Equal seeds give equal tokens for equal logits; `None` takes a random one. `u32::MAX` is reserved.
    pub seed: Option<u32>,
}

impl Default for SamplerParams {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

impl SamplerParams {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Checks every setting against a vocabulary of `n_vocab` tokens.
    ///
    /// # Errors
    /// [`SamplerError::OutOfRange`], [`SamplerError::BiasToken`], [`SamplerError::ReservedSeed`], [`SamplerError::VocabSize`].
    pub fn validate(&self, n_vocab: usize) -> Result<(), SamplerError> {
        let check = |ok: bool, name, expected, got: f64| match ok {
            true => Ok(()),
            false => Err(SamplerError::OutOfRange {
                name,
                expected,
                got,
            }),
        };
        if n_vocab == 0 || i32::try_from(n_vocab).is_err() {
            return Err(SamplerError::VocabSize { n_vocab });
        }
        let t = self.temperature;
        let usable = t == 0.0 || (t.is_finite() && t >= MIN_TEMPERATURE);
        check(usable, "temperature", "0 or at least 0.001", t.into())?;
        check(
            (0.0..=1.0).contains(&self.top_p),
            "top_p",
            "from 0 to 1",
            self.top_p.into(),
        )?;
        check(
            (0.0..=1.0).contains(&self.min_p),
            "min_p",
            "from 0 to 1",
            self.min_p.into(),
        )?;
        let repeat = self.repeat_penalty;
        check(
            repeat.is_finite() && repeat > 0.0,
            "repeat_penalty",
            "above 0",
            repeat.into(),
        )?;
        let last_n = self.repeat_last_n;
        check(
            last_n <= MAX_LAST_N,
            "repeat_last_n",
            "at most 1048576",
            last_n.into(),
        )?;
        let frequency = self.frequency_penalty;
        check(
            frequency.is_finite(),
            "frequency_penalty",
            "a finite number",
            frequency.into(),
        )?;
        let presence = self.presence_penalty;
        check(
            presence.is_finite(),
            "presence_penalty",
            "a finite number",
            presence.into(),
        )?;
        for &(id, bias) in &self.logit_bias {
            if usize::try_from(id).is_ok_and(|id| id < n_vocab) {
                check(
                    bias < f32::INFINITY,
                    "logit_bias",
                    "a finite number or -infinity",
                    bias.into(),
                )?;
            } else {
                return Err(SamplerError::BiasToken { id, n_vocab });
            }
        }
        match self.seed {
            Some(RANDOM_SEED) => Err(SamplerError::ReservedSeed),
            _ => Ok(()),
        }
    }

    fn has_penalties(&self) -> bool {
        self.repeat_last_n > 0
            && (self.repeat_penalty != 1.0
                || self.frequency_penalty != 0.0
                || self.presence_penalty != 0.0)
    }
}

/// Draws tokens for one session. Holds the generator's state and the recent tokens.
#[derive(Debug)]
pub struct Sampler {
    n_vocab: usize,
    greedy: bool,
    /// `None` for plain greedy, which needs nothing but the logits.
    chain: Option<Chain>,
    /// Candidates of one step, reused: V entries once the chain has run.
    candidates: Vec<sys::llama_token_data>,
}

impl Sampler {
    /// A sampler for logits of `n_vocab` tokens.
    ///
    /// # Errors
    /// As [`SamplerParams::validate`].
    pub fn new(params: &SamplerParams, n_vocab: usize) -> Result<Self, SamplerError> {
        params.validate(n_vocab)?;
        let greedy = params.temperature == 0.0;
        let plain = greedy && params.logit_bias.is_empty() && !params.has_penalties();
        Ok(Self {
            n_vocab,
            greedy,
            chain: (!plain).then(|| Chain::new(params, n_vocab)),
            candidates: Vec::new(),
        })
    }

    /// Chooses a token for `logits` (`ne = [V]`). Of equally likely tokens greedy takes the lowest id. Call
    /// [`Sampler::accept`] with the token that is really used.
    ///
    /// # Errors
    /// [`SamplerError::LogitCount`], [`SamplerError::NonFinite`].
    pub fn sample(&mut self, logits: &[f32]) -> Result<i32, SamplerError> {
        if logits.len() != self.n_vocab {
            return Err(SamplerError::LogitCount {
                expected: self.n_vocab,
                got: logits.len(),
            });
        }
        let best = argmax(logits)?;
        let Some(chain) = &mut self.chain else {
            return Ok(best);
        };
        self.candidates.clear();
        self.candidates
            .extend((0..).zip(logits).map(|(id, &logit)| sys::llama_token_data {
                id,
                logit,
                p: 0.0,
            }));
        let (kept, selected) = chain.apply(&mut self.candidates);
        if self.greedy {
            // Without a filter the chain keeps all candidates in the order of their ids.
            let best = kept
                .iter()
                .copied()
                .reduce(|best, c| if c.logit > best.logit { c } else { best });
            return match best {
                Some(c) if c.logit.is_finite() => Ok(c.id),
                _ => Err(SamplerError::NonFinite),
            };
        }
        // A bias or penalty may have pushed all logits to infinity: then the probability is NaN.
        match selected.and_then(|i| kept.get(i)) {
            Some(c) if c.logit.is_finite() && c.p.is_finite() => Ok(c.id),
            _ => Err(SamplerError::NonFinite),
        }
    }

    /// Tells the penalties that `token` is now part of the text: chosen tokens, and the prompt's where it should count.
    pub fn accept(&mut self, token: i32) {
        if let Some(chain) = &mut self.chain {
            chain.accept(token);
        }
    }

    /// Forgets the text and starts the random numbers anew from the seed.
    pub fn reset(&mut self) {
        if let Some(chain) = &mut self.chain {
            chain.reset();
        }
    }
}

/// The lowest index of the largest logit.
fn argmax(logits: &[f32]) -> Result<i32, SamplerError> {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &logit) in (0..).zip(logits) {
        // True of NaN and +infinity only.
        if !matches!(
            logit.partial_cmp(&f32::INFINITY),
            Some(std::cmp::Ordering::Less)
        ) {
            return Err(SamplerError::NonFinite);
        }
        if logit > best.1 {
            best = (id, logit);
        }
    }
    if best.1 == f32::NEG_INFINITY {
        return Err(SamplerError::NonFinite);
    }
    Ok(best.0)
}

/// Owns libllama's sampler chain.
#[derive(Debug)]
struct Chain(NonNull<sys::llama_sampler>);

// SAFETY: the chain is plain heap data without thread-local parts or other owners; `&mut self` serialises all use.
unsafe impl Send for Chain {}

impl Chain {
    /// The order is that of llama.cpp's own tools. `params` passed [`SamplerParams::validate`].
    fn new(params: &SamplerParams, n_vocab: usize) -> Self {
        // `validate` has checked that it fits.
        let n_vocab = n_vocab as i32;
        let bias: Vec<_> = params
            .logit_bias
            .iter()
            .map(|&(token, bias)| sys::llama_logit_bias { token, bias })
            .collect();
        let top_k = i32::try_from(params.top_k).unwrap_or(i32::MAX);
        // SAFETY: takes a plain struct and returns a new chain, never null (C++ `new`).
        let chain =
            unsafe { sys::llama_sampler_chain_init(sys::llama_sampler_chain_default_params()) };
        let add = |part| {
            // SAFETY: `chain` lives, and takes over `part`, which was made just now and is used nowhere else.
            unsafe { sys::llama_sampler_chain_add(chain, part) }
        };
        // SAFETY: each constructor copies its arguments (`bias` lives until the end of this function) and allocates;
        // `validate` has bounded the penalties' window, the only argument that sets how much.
        unsafe {
            if !bias.is_empty() {
                add(sys::llama_sampler_init_logit_bias(
                    n_vocab,
                    bias.len() as i32,
                    bias.as_ptr(),
                ));
            }
            if params.has_penalties() {
                add(sys::llama_sampler_init_penalties(
                    n_vocab,
                    params.repeat_last_n as i32,
                    params.repeat_penalty,
                    params.frequency_penalty,
                    params.presence_penalty,
                ));
            }
            if params.temperature > 0.0 {
                add(sys::llama_sampler_init_top_k(top_k));
                add(sys::llama_sampler_init_top_p(params.top_p, 0));
                add(sys::llama_sampler_init_min_p(params.min_p, 0));
                add(sys::llama_sampler_init_temp(params.temperature));
                add(sys::llama_sampler_init_dist(
                    params.seed.unwrap_or(RANDOM_SEED),
                ));
            }
        }
        Self(NonNull::new(chain).expect("C++ new does not return null"))
    }

    /// Runs the chain over `candidates`; returns those that are left and the position of the drawn one among them.
    fn apply<'a>(
        &mut self,
        candidates: &'a mut [sys::llama_token_data],
    ) -> (&'a [sys::llama_token_data], Option<usize>) {
        let mut array = sys::llama_token_data_array {
            data: candidates.as_mut_ptr(),
            size: candidates.len(),
            selected: -1,
            sorted: false,
        };
        // SAFETY: the chain lives as long as `self`; `array` describes `candidates`, which stays borrowed.
        unsafe { sys::llama_sampler_apply(self.0.as_ptr(), &mut array) };
        // The samplers of this chain work in place and only ever shorten the array.
        assert!(std::ptr::eq(array.data, candidates.as_ptr()) && array.size <= candidates.len());
        (
            &candidates[..array.size],
            usize::try_from(array.selected).ok(),
        )
    }

    fn accept(&mut self, token: i32) {
        // SAFETY: the chain lives as long as `self`; the token is only counted, never used as an index.
        unsafe { sys::llama_sampler_accept(self.0.as_ptr(), token) };
    }

    fn reset(&mut self) {
        // SAFETY: the chain lives as long as `self`.
        unsafe { sys::llama_sampler_reset(self.0.as_ptr()) };
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        // SAFETY: made by `llama_sampler_chain_init`, freed once; it frees its parts too.
        unsafe { sys::llama_sampler_free(self.0.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: usize = 64;

    fn logits() -> Vec<f32> {
        (0..V).map(|i| ((i * 37) % 17) as f32 * 0.3).collect()
    }

    fn draw(params: &SamplerParams, n: usize) -> Vec<i32> {
        let mut s = Sampler::new(params, V).unwrap();
        (0..n)
            .map(|_| {
                let id = s.sample(&logits()).unwrap();
                s.accept(id);
                id
            })
            .collect()
    }

    #[test]
    fn greedy_takes_the_lowest_of_equal_ids() {
        let mut s = Sampler::new(&SamplerParams::greedy(), 5).unwrap();
        assert_eq!(s.sample(&[0.0, 3.0, -1.0, 3.0, 2.0]), Ok(1));
        assert_eq!(
            s.sample(&[
                f32::NEG_INFINITY,
                f32::NEG_INFINITY,
                -8.0,
                f32::NEG_INFINITY,
                -8.0
            ]),
            Ok(2)
        );
        assert!(
            s.chain.is_none() && s.candidates.capacity() == 0,
            "plain greedy allocates nothing"
        );
        // The chain's greedy follows the same rule.
        let biased = SamplerParams {
            logit_bias: vec![(1, -5.0)],
            ..SamplerParams::greedy()
        };
        assert_eq!(
            Sampler::new(&biased, 5)
                .unwrap()
                .sample(&[2.0, 3.0, -1.0, 2.0, 2.0]),
            Ok(0)
        );
    }

    #[test]
    fn a_seed_fixes_the_sequence_and_reset_repeats_it() {
        let params = SamplerParams {
            seed: Some(7),
            repeat_penalty: 1.3,
            ..SamplerParams::default()
        };
        let first = draw(&params, 50);
        assert_eq!(first, draw(&params, 50));
        assert_ne!(
            first,
            draw(
                &SamplerParams {
                    seed: Some(8),
                    ..params.clone()
                },
                50
            )
        );
        let mut s = Sampler::new(&params, V).unwrap();
        for _ in 0..2 {
            let again: Vec<i32> = (0..50)
                .map(|_| {
                    let id = s.sample(&logits()).unwrap();
                    s.accept(id);
                    id
                })
                .collect();
            assert_eq!(first, again);
            s.reset();
        }
    }

    #[test]
    fn filters_keep_what_they_promise() {
        let base = SamplerParams {
            seed: Some(1),
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            temperature: 1.0,
            ..SamplerParams::default()
        };
        let l = logits();
        let mut order: Vec<usize> = (0..V).collect();
        order.sort_by(|&a, &b| l[b].total_cmp(&l[a]));
        let third = l[order[2]];
        assert!(
            draw(
                &SamplerParams {
                    top_k: 3,
                    ..base.clone()
                },
                200
            )
            .iter()
            .all(|&id| l[id as usize] >= third)
        );
        let max = l[order[0]];
        let near = draw(
            &SamplerParams {
                min_p: 0.5,
                ..base.clone()
            },
            200,
        );
        assert!(near.iter().all(|&id| l[id as usize] >= max + 0.5f32.ln()));
        let top = draw(
            &SamplerParams {
                top_p: 0.0,
                ..base.clone()
            },
            50,
        );
        assert!(top.iter().all(|&id| l[id as usize] == max));
        let free = draw(&base, 2000);
        assert!(free.iter().any(|&id| l[id as usize] < third));
    }

    #[test]
    fn temperature_one_draws_the_softmax() {
        let params = SamplerParams {
            seed: Some(3),
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            temperature: 1.0,
            ..SamplerParams::default()
        };
        let l = logits();
        let sum: f32 = l.iter().map(|x| x.exp()).sum();
        let n = 40_000;
        let mut counts = vec![0usize; V];
        for id in draw(&params, n) {
            counts[id as usize] += 1;
        }
        for (i, &count) in counts.iter().enumerate() {
            let p = l[i].exp() / sum;
            let sigma = (n as f32 * p * (1.0 - p)).sqrt();
            assert!(
                (count as f32 - n as f32 * p).abs() < 5.0 * sigma,
                "token {i}: {count} draws, p = {p}"
            );
        }
    }

    #[test]
    fn penalties_and_bans_apply() {
        let params = SamplerParams {
            repeat_penalty: 1e6,
            repeat_last_n: 3,
            ..SamplerParams::greedy()
        };
        let mut s = Sampler::new(&params, 4).unwrap();
        let l = [4.0, 3.0, 2.0, 1.0];
        let ids: Vec<i32> = (0..8)
            .map(|_| {
                let id = s.sample(&l).unwrap();
                s.accept(id);
                id
            })
            .collect();
        assert_eq!(ids, [0, 1, 2, 3, 0, 1, 2, 3]);
        for penalty in [
            SamplerParams {
                frequency_penalty: 2.0,
                ..SamplerParams::greedy()
            },
            SamplerParams {
                presence_penalty: 2.0,
                ..SamplerParams::greedy()
            },
        ] {
            let mut s = Sampler::new(&penalty, 4).unwrap();
            s.accept(0);
            assert_eq!(s.sample(&l), Ok(1));
            s.reset();
            assert_eq!(s.sample(&l), Ok(0));
        }
        let banned = SamplerParams {
            logit_bias: vec![(0, f32::NEG_INFINITY)],
            seed: Some(2),
            ..SamplerParams::default()
        };
        assert!(draw(&banned, 300).iter().all(|&id| id != 0));
    }

    #[test]
    fn logits_without_a_choice_are_an_error() {
        let all_banned = (0..4).map(|id| (id, f32::NEG_INFINITY)).collect();
        for params in [
            SamplerParams::greedy(),
            SamplerParams {
                repeat_penalty: 1.1,
                ..SamplerParams::greedy()
            },
            SamplerParams {
                seed: Some(1),
                ..SamplerParams::default()
            },
        ] {
            let mut s = Sampler::new(&params, 4).unwrap();
            for bad in [f32::NAN, f32::INFINITY] {
                for at in 0..4 {
                    let mut l = [1.0, 2.0, 3.0, f32::NEG_INFINITY];
                    l[at] = bad;
                    assert_eq!(s.sample(&l), Err(SamplerError::NonFinite));
                }
            }
            assert_eq!(
                s.sample(&[f32::NEG_INFINITY; 4]),
                Err(SamplerError::NonFinite)
            );
            assert_eq!(
                s.sample(&[0.0; 3]),
                Err(SamplerError::LogitCount {
                    expected: 4,
                    got: 3
                })
            );
            let banned = SamplerParams {
                logit_bias: Vec::clone(&all_banned),
                ..params
            };
            assert_eq!(
                Sampler::new(&banned, 4).unwrap().sample(&[0.0; 4]),
                Err(SamplerError::NonFinite)
            );
        }
    }

    #[test]
    fn unusable_settings_are_refused() {
        let d = SamplerParams::default;
        for (params, name) in [
            (
                SamplerParams {
                    temperature: f32::NAN,
                    ..d()
                },
                "temperature",
            ),
            (
                SamplerParams {
                    temperature: -1.0,
                    ..d()
                },
                "temperature",
            ),
            (
                SamplerParams {
                    temperature: 1e-9,
                    ..d()
                },
                "temperature",
            ),
            (
                SamplerParams {
                    temperature: f32::INFINITY,
                    ..d()
                },
                "temperature",
            ),
            (SamplerParams { top_p: 1.5, ..d() }, "top_p"),
            (
                SamplerParams {
                    top_p: f32::NAN,
                    ..d()
                },
                "top_p",
            ),
            (SamplerParams { min_p: -0.1, ..d() }, "min_p"),
            (
                SamplerParams {
                    repeat_penalty: 0.0,
                    ..d()
                },
                "repeat_penalty",
            ),
            (
                SamplerParams {
                    repeat_last_n: u32::MAX,
                    ..d()
                },
                "repeat_last_n",
            ),
            (
                SamplerParams {
                    frequency_penalty: f32::NAN,
                    ..d()
                },
                "frequency_penalty",
            ),
            (
                SamplerParams {
                    presence_penalty: f32::INFINITY,
                    ..d()
                },
                "presence_penalty",
            ),
            (
                SamplerParams {
                    logit_bias: vec![(0, f32::INFINITY)],
                    ..d()
                },
                "logit_bias",
            ),
            (
                SamplerParams {
                    logit_bias: vec![(0, f32::NAN)],
                    ..d()
                },
                "logit_bias",
            ),
        ] {
            match Sampler::new(&params, V) {
                Err(SamplerError::OutOfRange { name: got, .. }) => assert_eq!(got, name),
                other => panic!("{name}: {other:?}"),
            }
        }
        for id in [-1, V as i32] {
            let params = SamplerParams {
                logit_bias: vec![(id, 1.0)],
                ..d()
            };
            assert_eq!(
                params.validate(V),
                Err(SamplerError::BiasToken { id, n_vocab: V })
            );
        }
        assert_eq!(
            SamplerParams {
                seed: Some(u32::MAX),
                ..d()
            }
            .validate(V),
            Err(SamplerError::ReservedSeed)
        );
        assert_eq!(d().validate(0), Err(SamplerError::VocabSize { n_vocab: 0 }));
        assert_eq!(d().validate(V), Ok(()));
    }
}
