//! A request at work.

use super::error::EngineError;
use super::prefix::PrefixCache;
use super::request::{EngineOptions, Event, Prompt, Request, RequestId, Watch};
use super::voice::Voice;
use crate::adapter::Adapter;
use crate::error::Result;
use crate::ggml::KV_PAGE;
use crate::infer::attached::Attached;
use crate::infer::core::{Mode, check_logits};
use crate::infer::generate::{Answer, Generated, StopReason};
use crate::infer::memory::Memory;
use crate::infer::{Ensemble, SessionError};
use crate::model::Model;
use std::ops::{ControlFlow, Range};
use std::time::Instant;

/// What is needed to accept a request, on any thread.
pub(super) struct Reception {
    pub(super) model: Model,
    pub(super) mode: Mode,
    pub(super) memory: Memory,
    pub(super) n_ctx: usize,
    pub(super) n_threads: usize,
    pub(super) options: EngineOptions,
}

/// A request that was accepted: the text as each member of the ensemble has it, and the answer that comes of it.
pub(super) struct Task {
    pub(super) id: RequestId,
    pub(super) priority: i32,
    pub(super) deadline: Option<Instant>,
    /// The request that this is another answer to.
    pub(super) sibling: Option<RequestId>,
    ensemble: Ensemble,
    voices: Vec<Voice>,
    answer: Answer,
    watch: Option<Watch>,
    /// When its first token was there.
    begun: Option<Instant>,
    n_ctx: usize,
}

impl Reception {
    /// Accepts a request for as many answers as there are ids.
    pub(super) fn accept_all(
        &self,
        ids: impl Iterator<Item = RequestId>,
        request: Request,
    ) -> Result<Vec<Task>> {
        let mut first = None;
        let mut accept = |(i, id): (usize, RequestId)| {
            let mut request = request.clone();
            if let Some(seed) = request.generate.sampler.seed.as_mut().filter(|_| i > 0) {
                // Behind the one below the reserved one comes 0.
                *seed = ((u64::from(*seed) + i as u64) % u64::from(u32::MAX)) as u32;
            }
            let task = self.accept(id, request)?;
            let sibling = *first.get_or_insert(id);
            Ok(Task {
                sibling: (sibling != id).then_some(sibling),
                ..task
            })
        };
        ids.enumerate().map(&mut accept).collect()
    }

    /// The adapter on the model.
    pub(super) fn attach(&self, adapter: &Adapter) -> Result<Attached> {
        let other_base = self.options.accept_other_base;
        Attached::new(
            adapter,
            &self.model,
            self.mode,
            self.n_threads,
            &self.memory,
            other_base,
        )
    }

    /// Checks all that can be known before anything is computed.
    pub(super) fn accept(&self, id: RequestId, request: Request) -> Result<Task> {
        let (model, options) = (&self.model, &self.options);
        let n_vocab = model.shape().n_vocab;
        let (members, most) = (request.ensemble.members(), options.max_running);
        if members.len() > most {
            let members = members.len();
            return Err(EngineError::TooManyMembers { members, most }.into());
        }
        let tokens = match request.prompt {
            Prompt::Text(text) => model.vocab().tokenize_start(&text)?,
            Prompt::Tokens(tokens) => tokens,
            Prompt::Messages(messages) => model.vocab().tokenize_chat(&messages, true)?,
        };
        let given = request.answer.iter().flatten();
        let is_token = |id: i32| id >= 0 && (id as usize) < n_vocab;
        if let Some(&id) = tokens.iter().chain(given).find(|&&id| !is_token(id)) {
            return Err(SessionError::TokenOutOfRange { id, n_vocab }.into());
        }
        let voice = |member: &Option<Adapter>| {
            let attached = member
                .as_ref()
                .map(|adapter| self.attach(adapter))
                .transpose()?;
            Voice::new(model, attached, &tokens, &self.memory)
        };
        let mut voices: Vec<_> = members.iter().map(voice).collect::<Result<_>>()?;
        if voices.iter().any(|voice| voice.own_len() == 0) {
            return Err(SessionError::EmptyPrompt.into());
        }
        // The last token of an answer is not computed.
        let mut more = match &request.answer {
            Some(tokens) => tokens.len().max(1) - 1,
            None => request.generate.max_tokens.unwrap_or(1).max(1) - 1,
        };
        let longest = voices.iter().map(Voice::len).max().unwrap_or(0);
        let n_ctx = self.n_ctx;
        if request.until_full && request.answer.is_none() {
            more = more.min(n_ctx.saturating_sub(longest));
        }
        let needed = longest + more;
        if needed > n_ctx {
            return Err(SessionError::ContextFull { needed, n_ctx }.into());
        }
        if let Some(limit) = options.kv_bytes {
            let tokens = |voice: &Voice| (voice.own_len() + more).next_multiple_of(KV_PAGE);
            let needed = self.memory.bytes(voices.iter().map(tokens).sum());
            if needed > limit {
                return Err(EngineError::TooLarge { needed, limit }.into());
            }
        }
        let answer = match request.answer {
            Some(given) => {
                let computed = &given[..more.min(given.len())];
                voices.iter_mut().for_each(|voice| voice.give(computed));
                Answer::given(given, request.generate.logprobs.unwrap_or(0), n_vocab)?
            }
            None => Answer::new(&request.generate, n_vocab, &tokens)?,
        };
        Ok(Task {
            id,
            priority: request.priority,
            deadline: request.deadline,
            sibling: None,
            ensemble: request.ensemble,
            voices,
            answer,
            watch: request.watch,
            begun: None,
            n_ctx,
        })
    }
}

impl Task {
    /// The text as the members have it.
    pub(super) fn voices(&self) -> &[Voice] {
        &self.voices
    }

    pub(super) fn voices_mut(&mut self) -> &mut [Voice] {
        &mut self.voices
    }

    /// Makes room for all that is known. False if the pool is full.
    pub(super) fn reserve_all(&mut self) -> bool {
        (self.voices.iter_mut()).all(|voice| voice.reserve(voice.left()))
    }

    /// Makes room for so many tokens of each voice. False if the pool is full.
    pub(super) fn reserve(&mut self, lengths: &[usize]) -> bool {
        let pairs = self.voices.iter_mut().zip(lengths);
        pairs.into_iter().all(|(voice, &n)| voice.reserve(n))
    }

    /// Gives back all memory; the text is computed anew.
    pub(super) fn preempt(&mut self) {
        self.voices.iter_mut().for_each(Voice::preempt);
    }

    /// Takes what is known of its beginning.
    pub(super) fn find(&mut self, prefixes: &mut PrefixCache) {
        self.voices.iter_mut().for_each(|v| v.find(prefixes));
    }

    /// Whether `other` computes a part of this one's beginning, and is not that far yet.
    pub(super) fn waits_for(&self, other: &Self) -> bool {
        // What is less than a page is computed twice in the same step, but for answers to one and the same prompt.
        let is_family = |a: &Self, b: &Self| a.sibling == Some(b.sibling.unwrap_or(b.id));
        let least = match is_family(self, other) || is_family(other, self) {
            true => 1,
            false => KV_PAGE,
        };
        let waits = |v: &Voice| other.voices.iter().any(|other| v.waits_for(other, least));
        self.voices.iter().any(waits)
    }

    /// Leaves what is computed to those who begin with the same, whenever a page, the prompt or all of it is complete.
    pub(super) fn keep(&mut self, prefixes: &mut PrefixCache, over: bool) {
        self.voices.iter_mut().for_each(|v| v.keep(prefixes, over));
    }

    /// Takes logits that a step has computed, of each voice those of some rows of `logits`, `ne = [V, n]`. The request has ended if that is true.
    pub(super) fn hear(
        &mut self,
        logits: &[f32],
        rows: &[Range<usize>],
        model: &Model,
        mut event: impl FnMut(Event),
    ) -> bool {
        let n_vocab = model.shape().n_vocab;
        let of_rows = |rows: &Range<usize>| &logits[rows.start * n_vocab..rows.end * n_vocab];
        if let [rows] = rows {
            let mut rows = of_rows(rows).chunks_exact(n_vocab);
            return rows.any(|row| self.take(&[row], model, &mut event));
        }
        for (voice, rows) in self.voices.iter_mut().zip(rows) {
            voice.logits.extend_from_slice(of_rows(rows));
        }
        let complete = self.voices.iter().map(|voice| voice.logits.len()).min();
        let complete = complete.unwrap_or(0);
        let waiting = self
            .voices
            .iter_mut()
            .map(|v| std::mem::take(&mut v.logits));
        let mut waiting: Vec<_> = waiting.collect();
        for at in (0..complete).step_by(n_vocab) {
            let rows: Vec<_> = waiting.iter().map(|z| &z[at..at + n_vocab]).collect();
            if self.take(&rows, model, &mut event) {
                return true;
            }
        }
        for (voice, logits) in self.voices.iter_mut().zip(&mut waiting) {
            logits.drain(..complete);
            voice.logits = std::mem::take(logits);
        }
        false
    }

    /// Takes the logits of the next token of the answer, of each voice, `ne = [V]`. The request has ended if that is true.
    fn take(&mut self, rows: &[&[f32]], model: &Model, mut event: impl FnMut(Event)) -> bool {
        let begun = *self.begun.get_or_insert_with(Instant::now);
        let id = match self.sample(rows) {
            Ok(id) => id,
            Err(e) => {
                event(Event::Failed(e));
                return true;
            }
        };
        let belongs = self.answer.push(id, model.vocab(), &mut |piece| {
            event(Event::Text(piece.to_owned()));
            ControlFlow::Continue(())
        });
        let is_given = self.answer.is_given();
        for voice in &mut self.voices {
            voice.use_logits();
            if belongs && !is_given {
                voice.append(&[id]);
            }
        }
        let cached = self.voices.iter().map(Voice::n_cached).min();
        self.answer.timed(begun.elapsed(), cached.unwrap_or(0));
        let longest = self.voices.iter().map(Voice::len).max().unwrap_or(0);
        if longest > self.n_ctx {
            self.answer.end_full();
        }
        self.answer.reason().is_some()
    }

    /// The next token of the answer.
    fn sample(&mut self, rows: &[&[f32]]) -> Result<i32> {
        rows.iter().try_for_each(|row| check_logits(row))?;
        let at = self.answer.len();
        let id = match self.ensemble.is_one() {
            true => self.answer.sample(rows[0])?,
            false => {
                let id = self.answer.sample(&self.ensemble.combined(rows))?;
                self.answer.note_members(id, rows);
                id
            }
        };
        if let Some(watch) = &self.watch {
            watch.see(at, id, rows);
        }
        Ok(id)
    }

    pub(super) fn forget_unseen(&mut self) {
        self.voices.iter_mut().for_each(Voice::forget_unseen);
    }

    /// Why the answer is complete, if it is.
    pub(super) fn reason(&self) -> Option<StopReason> {
        self.answer.reason()
    }

    /// The whole answer, the rest of its text being shown.
    pub(super) fn finish(self, mut event: impl FnMut(Event)) {
        let (out, _) = self.answer.finish(&mut |piece| {
            event(Event::Text(piece.to_owned()));
            ControlFlow::Continue(())
        });
        event(Event::Done(out));
    }

    /// The answer as far as it came.
    pub(super) fn break_off(self) -> Generated {
        let (out, _) = self.answer.finish(&mut |_| ControlFlow::Continue(()));
        Generated {
            reason: StopReason::Callback,
            ..out
        }
    }
}
