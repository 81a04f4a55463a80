//! Text out of logits: sampling, end of generation, stop strings, streaming, timings.

use super::sampler::{Sampler, SamplerError, SamplerParams};
use super::session::Session;
use super::text::{StopMatcher, Utf8Stream};
use crate::error::Result;
use crate::kernels::log_sum_exp;
use crate::model::vocab::Vocab;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// How text is generated.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct GenerateOptions {
    /// Tokens at most; `None`: until the model ends the text.
    pub max_tokens: Option<usize>,
    /// How the next token is chosen; default: llama.cpp's defaults, which draw at random.
    pub sampler: SamplerParams,
    /// Text that ends the generation; it is not part of the result.
    pub stop: Vec<String>,
    /// Go on behind an end-of-generation token (it is part of the text then).
    pub ignore_eog: bool,
    /// Say how likely each token was, and so many of the most likely ones; `None`: do not.
    pub logprobs: Option<usize>,
}

impl GenerateOptions {
    /// Sets [`GenerateOptions::max_tokens`].
    pub fn max_tokens(mut self, n: usize) -> Self {
        self.max_tokens = Some(n);
        self
    }

    /// Sets [`GenerateOptions::sampler`].
    pub fn sampler(mut self, params: SamplerParams) -> Self {
        self.sampler = params;
        self
    }

    /// Sets [`GenerateOptions::logprobs`].
    pub fn logprobs(mut self, n: usize) -> Self {
        self.logprobs = Some(n);
        self
    }

    /// Adds a stop string.
    pub fn stop(mut self, text: impl Into<String>) -> Self {
        self.stop.push(text.into());
        self
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The model ended the text.
    EndOfGeneration,
    /// `max_tokens` were generated.
    MaxTokens,
    /// A stop string was found.
    StopString,
    /// The callback said so.
    Callback,
    /// The context is full. Of an engine's answers: a session, whose text can go on behind a reset, fails.
    ContextFull,
}

/// How long a generation took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Tokens that were computed one by one: usually one less than were generated, the first one comes from the prompt.
    pub decode_tokens: usize,
    /// Time of those, sampling included.
    pub decode: Duration,
    /// Positions of the prompt that an engine had computed for another text, and kept ([`EngineOptions::prefix_bytes`](super::engine::EngineOptions::prefix_bytes)). 0 for a
    /// session.
    pub cached_tokens: usize,
}

impl Timings {
    /// Tokens per second.
    pub fn decode_rate(&self) -> f64 {
        self.decode_tokens as f64 / self.decode.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

/// How likely a token was, by the logits as they are: natural logarithms of probabilities.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that was taken.
    pub logprob: f32,
    /// The most likely tokens, the most likely one first.
    pub top: Vec<(i32, f32)>,
    /// Of the token that was taken, by each member of an [`Ensemble`](super::Ensemble); empty if there is only one.
    pub members: Vec<f32>,
}

impl TokenLogprobs {
    /// Of token `id` and the `n` most likely ones.
    fn new(logits: &[f32], id: i32, n: usize) -> Self {
        let log_sum = log_sum_exp(logits);
        let logprob = |id: usize| (f64::from(logits[id]) - log_sum) as f32;
        // Of equally likely ones the lowest ids.
        let mut top: Vec<usize> = Vec::new();
        let mut least = f32::NEG_INFINITY;
        for (id, &z) in logits.iter().enumerate().filter(|_| n > 0) {
            if top.len() == n && z <= least {
                continue;
            }
            let at = top.partition_point(|&other| logits[other] >= z);
            top.truncate(n - 1);
            top.insert(at, id);
            least = logits[top[top.len() - 1]];
        }
        Self {
            logprob: logprob(id as usize),
            top: (top.into_iter().map(|id| (id as i32, logprob(id)))).collect(),
            members: Vec::new(),
        }
    }
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The text, without stop strings and without a character at its end that the tokens do not complete.
    pub text: String,
    /// The tokens, an end-of-generation token included.
    pub tokens: Vec<i32>,
    /// How likely each of them was; empty unless [`GenerateOptions::logprobs`] asks for it.
    pub logprobs: Vec<TokenLogprobs>,
    /// Why it ended.
    pub reason: StopReason,
    /// How long it took.
    pub timings: Timings,
}

impl Session {
    /// Generates from the current logits on: call [`Session::prompt`] or [`Session::feed`] before. `each` gets text as
    /// soon as it is complete (never part of a character, never the beginning of a stop string) and can end the
    /// generation. What was generated is part of the session's text, so that a conversation can go on; only the token
    /// that ended the generation (end of text, stop string, callback) is not. Bytes at the end that are only the beginning
    /// of a character are in the tokens and not in the text; if the next call goes on from there, it shows the character.
    ///
    /// A token is computed when something follows it: of N tokens N - 1 are, and the last one when the text goes on or
    /// [`Session::logits`] is called.
    ///
    /// # Errors
    /// If nothing was fed yet, sampler parameters are out of range, the context is full
    /// ([`super::SessionError::ContextFull`]), logits are not finite, or the session was cancelled.
    pub fn generate(
        &mut self,
        options: &GenerateOptions,
        mut each: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated> {
        let model = self.model().clone();
        if self.is_empty() {
            return Err(super::SessionError::NoLogits.into());
        }
        let n_vocab = model.shape().n_vocab;
        let mut answer = Answer::new(options, n_vocab, &self.tokens())?;
        answer.utf8 = self.take_unfinished();
        let begin = Instant::now();
        let mut failure = None;
        while answer.reason().is_none() {
            let before = self.positions_computed();
            let id = match self.logits() {
                Ok(logits) => answer.sample(logits).map_err(Into::into),
                Err(e) => Err(e.into()),
            };
            answer.out.timings.decode_tokens += self.positions_computed() - before;
            match id {
                Ok(id) => {
                    if answer.push(id, model.vocab(), &mut each) {
                        self.append(id);
                    }
                }
                Err(e) => {
                    failure = Some(e);
                    break;
                }
            }
        }
        let (out, unfinished) = answer.finish(&mut each);
        if let Some(utf8) = unfinished {
            self.keep_unfinished(utf8);
        }
        if let Some(e) = failure {
            return Err(e);
        }
        Ok(Generated {
            timings: Timings {
                decode: begin.elapsed(),
                ..out.timings
            },
            ..out
        })
    }
}

/// An answer in the making: from logits to text.
pub(super) struct Answer {
    options: GenerateOptions,
    /// Its tokens, if they are not to be drawn.
    given: Option<Vec<i32>>,
    sampler: Sampler,
    stops: StopMatcher,
    utf8: Utf8Stream,
    /// Why it has ended.
    ended: Option<StopReason>,
    out: Generated,
}

/// Takes text that is complete, and may end the generation.
type EachPiece<'a> = &'a mut dyn FnMut(&str) -> ControlFlow<()>;

impl Answer {
    /// Nothing yet, behind a text of these tokens.
    ///
    /// # Errors
    /// If the sampler's parameters are out of range, or a stop string is empty.
    pub(super) fn new(options: &GenerateOptions, n_vocab: usize, behind: &[i32]) -> Result<Self> {
        let mut sampler = Sampler::new(&options.sampler, n_vocab)?;
        for &id in behind {
            sampler.accept(id);
        }
        Ok(Self {
            sampler,
            stops: StopMatcher::new(options.stop.iter().cloned())?,
            utf8: Utf8Stream::new(),
            ended: (options.max_tokens == Some(0)).then_some(StopReason::MaxTokens),
            options: options.clone(),
            given: None,
            out: Generated {
                text: String::new(),
                tokens: Vec::new(),
                logprobs: Vec::new(),
                reason: StopReason::MaxTokens,
                timings: Timings::default(),
            },
        })
    }

    /// One whose tokens are known: how likely each of them is.
    ///
    /// # Errors
    /// If the vocabulary is none.
    pub(super) fn given(tokens: Vec<i32>, top: usize, n_vocab: usize) -> Result<Self> {
        let options = GenerateOptions {
            max_tokens: Some(tokens.len()),
            sampler: SamplerParams::greedy(),
            ignore_eog: true,
            logprobs: Some(top),
            stop: Vec::new(),
        };
        Ok(Self {
            given: Some(tokens),
            ..Self::new(&options, n_vocab, &[])?
        })
    }

    /// Tokens so far.
    pub(super) fn len(&self) -> usize {
        self.out.tokens.len()
    }

    /// Its tokens are not drawn.
    pub(super) fn is_given(&self) -> bool {
        self.given.is_some()
    }

    /// Why it has ended, if it has.
    pub(super) fn reason(&self) -> Option<StopReason> {
        self.ended
    }

    /// There is no room for more.
    pub(super) fn end_full(&mut self) {
        self.ended.get_or_insert(StopReason::ContextFull);
    }

    /// The next token.
    pub(super) fn sample(&mut self, logits: &[f32]) -> Result<i32, SamplerError> {
        let id = match &self.given {
            Some(tokens) => tokens[self.out.tokens.len()],
            None => self.sampler.sample(logits)?,
        };
        if let Some(n) = self.options.logprobs {
            self.out.logprobs.push(TokenLogprobs::new(logits, id, n));
        }
        Ok(id)
    }

    /// How likely each member of an ensemble finds the token that was taken, from their logits.
    pub(super) fn note_members(&mut self, id: i32, rows: &[&[f32]]) {
        if let Some(token) = self.out.logprobs.last_mut() {
            let logprob = |row: &&[f32]| (f64::from(row[id as usize]) - log_sum_exp(row)) as f32;
            token.members = rows.iter().map(logprob).collect();
        }
    }

    /// Takes the next token. Whether it belongs to the text: the one that ends it does not.
    pub(super) fn push(&mut self, id: i32, vocab: &Vocab, each: EachPiece<'_>) -> bool {
        self.sampler.accept(id);
        self.out.tokens.push(id);
        if vocab.is_eog(id) && !self.options.ignore_eog {
            self.ended = Some(StopReason::EndOfGeneration);
            return false;
        }
        let bytes = vocab.token_bytes(id, false);
        let piece = self.stops.push(&self.utf8.push(&bytes));
        if self.show(&piece, each).is_break() {
            self.ended = Some(StopReason::Callback);
            return false;
        }
        if self.stops.matched().is_some() {
            self.ended = Some(StopReason::StopString);
            return false;
        }
        let max = self.options.max_tokens;
        self.ended = (max == Some(self.out.tokens.len())).then_some(StopReason::MaxTokens);
        true
    }

    fn show(&mut self, piece: &str, each: EachPiece<'_>) -> ControlFlow<()> {
        self.out.text.push_str(piece);
        match piece.is_empty() {
            true => ControlFlow::Continue(()),
            false => each(piece),
        }
    }

    /// So long ago its first token was there, and so much of the prompt was computed before.
    pub(super) fn timed(&mut self, decode: Duration, cached_tokens: usize) {
        self.out.timings = Timings {
            decode_tokens: self.out.tokens.len() - 1,
            decode,
            cached_tokens,
        };
    }

    /// All of it, and the beginning of a character that the text goes on with, if it can.
    pub(super) fn finish(mut self, each: EachPiece<'_>) -> (Generated, Option<Utf8Stream>) {
        let reason = self.ended.unwrap_or(StopReason::MaxTokens);
        if !matches!(reason, StopReason::StopString | StopReason::Callback) {
            // The generation has ended, perhaps by a failure: all of the text is shown, and there is nothing to break off.
            let rest = self.stops.finish();
            let _ = self.show(&rest, each);
        }
        self.out.reason = reason;
        (
            self.out,
            (reason == StopReason::MaxTokens).then_some(self.utf8),
        )
    }
}
