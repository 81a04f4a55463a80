//! Text out of logits: sampling, end of generation, stop strings, streaming, timings.

use super::sampler::{Sampler, SamplerParams};
use super::session::Session;
use super::text::StopMatcher;
use crate::error::Result;
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
}

/// How long a generation took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Tokens that were computed one by one: usually one less than were generated, the first one comes from the prompt.
    pub decode_tokens: usize,
    /// Time of those, sampling included.
    pub decode: Duration,
}

impl Timings {
    /// Tokens per second.
    pub fn decode_rate(&self) -> f64 {
        self.decode_tokens as f64 / self.decode.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The text, without stop strings and without a character at its end that the tokens do not complete.
    pub text: String,
    /// The tokens, an end-of-generation token included.
    pub tokens: Vec<i32>,
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
        let vocab = model.vocab();
        if self.is_empty() {
            return Err(super::SessionError::NoLogits.into());
        }
        let mut sampler = Sampler::new(&options.sampler, model.weights().n_vocab())?;
        for id in self.tokens() {
            sampler.accept(id);
        }
        let mut stops = StopMatcher::new(options.stop.iter().cloned())?;
        let mut utf8 = self.take_unfinished();
        let mut out = Generated {
            text: String::new(),
            tokens: Vec::new(),
            reason: StopReason::MaxTokens,
            timings: Timings::default(),
        };
        let begin = Instant::now();
        let mut emit = |text: &mut String, piece: &str| {
            text.push_str(piece);
            if piece.is_empty() {
                ControlFlow::Continue(())
            } else {
                each(piece)
            }
        };
        let mut failure = None;
        while options.max_tokens.is_none_or(|max| out.tokens.len() < max) {
            let id = match self.sample(&mut sampler, &mut out.timings) {
                Ok(id) => id,
                Err(e) => {
                    failure = Some(e);
                    break;
                }
            };
            sampler.accept(id);
            out.tokens.push(id);
            if vocab.is_eog(id) && !options.ignore_eog {
                out.reason = StopReason::EndOfGeneration;
                break;
            }
            let piece = stops.push(&utf8.push(&vocab.token_bytes(id, false)));
            if emit(&mut out.text, &piece).is_break() {
                out.reason = StopReason::Callback;
                break;
            }
            if stops.matched().is_some() {
                out.reason = StopReason::StopString;
                break;
            }
            self.append(id);
        }
        if out.reason != StopReason::StopString && out.reason != StopReason::Callback {
            // The generation has ended, perhaps by a failure: all of the text is shown, and there is nothing to break off.
            let _ = emit(&mut out.text, &stops.finish());
        }
        if out.reason == StopReason::MaxTokens {
            self.keep_unfinished(utf8);
        }
        if let Some(e) = failure {
            return Err(e);
        }
        out.timings.decode = begin.elapsed();
        Ok(out)
    }

    /// The next token. The one before it is computed now, if it has not been.
    fn sample(&mut self, sampler: &mut Sampler, timings: &mut Timings) -> Result<i32> {
        let before = self.positions_computed();
        let id = sampler.sample(self.logits()?)?;
        timings.decode_tokens += self.positions_computed() - before;
        Ok(id)
    }
}
