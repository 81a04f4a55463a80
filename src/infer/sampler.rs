//! From logits to a token id: libllama's sampler chain, and plain argmax where nothing else is asked for.

use ggml_sys as sys;
use std::ptr::NonNull;

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
    /// Largest [`SamplerParams::repeat_last_n`]: libllama allocates the window when the sampler is made.
    pub const MAX_REPEAT_LAST_N: u32 = 1 << 20;

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
            last_n <= Self::MAX_REPEAT_LAST_N,
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
mod tests;
