//! A request at work.

use super::error::EngineError;
use super::prefix::{Key, PrefixCache, is_same};
use super::request::{EngineOptions, Event, Prompt, Request, RequestId};
use crate::adapter::{Adapter, Item};
use crate::error::Result;
use crate::ggml::{KV_PAGE, KvPool};
use crate::infer::SessionError;
use crate::infer::attached::{Attached, arranged};
use crate::infer::core::{Input, Mode, Part, check_logits};
use crate::infer::generate::{Answer, StopReason};
use crate::infer::kv::KvText;
use crate::model::Model;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

/// What is needed to accept a request, on any thread.
pub(super) struct Reception {
    pub(super) model: Model,
    pub(super) mode: Mode,
    pub(super) pool: Arc<KvPool>,
    pub(super) n_ctx: usize,
    pub(super) n_threads: usize,
    pub(super) options: EngineOptions,
}

/// A request that was accepted: its text, as far as it is computed and as far as it is known.
pub(super) struct Task {
    pub(super) id: RequestId,
    pub(super) priority: i32,
    pub(super) deadline: Option<Instant>,
    attached: Option<Attached>,
    /// Keys and values of what is computed.
    text: KvText,
    /// The prompt, then the answer.
    items: Vec<Item>,
    /// The same, for [`PrefixCache`].
    keys: Vec<Key>,
    /// How many of them it has.
    kept: usize,
    /// Positions of all of it, the adapter's in front included.
    n: usize,
    /// Of the prompt.
    n_prompt: usize,
    answer: Answer,
    /// When its first token was there.
    begun: Option<Instant>,
    n_ctx: usize,
}

impl Reception {
    /// Checks all that can be known before anything is computed.
    pub(super) fn accept(&self, id: RequestId, request: Request) -> Result<Task> {
        let (model, options) = (&self.model, &self.options);
        let n_vocab = model.weights().n_vocab();
        let tokens = match request.prompt {
            Prompt::Text(text) => model.vocab().tokenize_start(&text)?,
            Prompt::Tokens(tokens) => tokens,
        };
        if let Some(&id) = tokens.iter().find(|&&id| id < 0 || id as usize >= n_vocab) {
            return Err(SessionError::TokenOutOfRange { id, n_vocab }.into());
        }
        let attach = |adapter| {
            let other_base = options.accept_other_base;
            Attached::new(adapter, model, self.mode, self.n_threads, other_base)
        };
        let attached = request.adapter.as_ref().map(attach).transpose()?;
        let items = arranged(model, attached.as_ref(), &tokens, true)?;
        let own: usize = items.iter().map(Item::len).sum();
        if own == 0 {
            return Err(SessionError::EmptyPrompt.into());
        }
        let n = own + attached.as_ref().map_or(0, Attached::prefix_len);
        // The last token of an answer is not computed.
        let answer = request.generate.max_tokens.unwrap_or(1).max(1) - 1;
        let needed = n + answer;
        if needed > self.n_ctx {
            let n_ctx = self.n_ctx;
            return Err(SessionError::ContextFull { needed, n_ctx }.into());
        }
        if let Some(limit) = options.kv_bytes {
            let tokens = (own + answer).next_multiple_of(KV_PAGE);
            let needed = self.pool.layout().bytes(tokens);
            if needed > limit {
                return Err(EngineError::TooLarge { needed, limit }.into());
            }
        }
        let mut text = KvText::new(self.pool.clone());
        text.restart(attached.as_ref().and_then(Attached::block).cloned());
        Ok(Task {
            id,
            priority: request.priority,
            deadline: request.deadline,
            attached,
            text,
            keys: items.iter().flat_map(keys).collect(),
            kept: 0,
            items,
            n,
            n_prompt: n,
            answer: Answer::new(&request.generate, n_vocab, &tokens)?,
            begun: None,
            n_ctx: self.n_ctx,
        })
    }
}

/// The item that token `at` is in, and which one it is of it.
fn find_item(items: &[Item], mut at: usize) -> Option<(&Item, usize)> {
    for item in items {
        if at < item.len() {
            return Some((item, at));
        }
        at -= item.len();
    }
    None
}

fn keys(item: &Item) -> Vec<Key> {
    match item {
        Item::Tokens(tokens) => tokens.iter().map(|&id| id.into()).collect(),
        Item::Virtual(rows) => rows.clone().map(|row| -1 - row as Key).collect(),
    }
}

impl Task {
    /// Tokens that are known and not computed.
    pub(super) fn left(&self) -> usize {
        self.n - self.text.len()
    }

    /// Its text is being written: of what is known, only the last token is not computed.
    pub(super) fn is_written(&self) -> bool {
        self.n > self.n_prompt && self.left() == 1
    }

    fn prefix_len(&self) -> usize {
        self.attached.as_ref().map_or(0, Attached::prefix_len)
    }

    /// Makes room for `n` tokens. False if the pool is full.
    pub(super) fn reserve(&mut self, n: usize) -> bool {
        self.text.reserve(n).is_ok()
    }

    /// Gives back all memory; the text is computed anew.
    pub(super) fn preempt(&mut self) {
        let block = self.attached.as_ref().and_then(Attached::block).cloned();
        self.text.restart(block);
        self.kept = 0;
    }

    fn adapter(&self) -> Option<&Adapter> {
        self.attached.as_ref().map(Attached::adapter)
    }

    /// Tokens behind the adapter's rows that are computed.
    fn computed(&self) -> usize {
        self.text.len() - self.prefix_len()
    }

    /// Takes what is known of its beginning, but for the last token, whose logits are needed.
    pub(super) fn find(&mut self, prefixes: &mut PrefixCache) {
        let most = self.keys.len() - 1;
        let known = prefixes.find(self.adapter(), &self.keys[..most]);
        self.text.adopt(known.pages, known.n);
    }

    /// Whether `other`, which is not that far yet, computes a part of this one's beginning.
    pub(super) fn waits_for(&self, other: &Self) -> bool {
        if is_same(self.adapter(), other.adapter()) && other.n == other.n_prompt {
            let both = self.keys[..self.keys.len() - 1].iter().zip(&other.keys);
            let common = both.take_while(|(a, b)| a == b).count();
            // What is less than a page is computed twice in the same step.
            return common >= KV_PAGE.max(other.computed()).max(self.computed() + 1);
        }
        false
    }

    /// Leaves what is computed to those who begin with the same, whenever a page, the prompt or all of it is complete.
    pub(super) fn keep(&mut self, prefixes: &mut PrefixCache, over: bool) {
        let n = self.computed();
        let is_complete = over || n.is_multiple_of(KV_PAGE) || self.text.len() == self.n_prompt;
        if is_complete && n > self.kept {
            prefixes.insert(self.adapter(), &self.keys[..n], |i| self.text.page(i));
            self.kept = n;
        }
    }

    /// How many tokens are computed next, of at most `most`: those of one item.
    pub(super) fn next(&self, most: usize) -> usize {
        find_item(&self.items, self.computed()).map_or(0, |(item, at)| most.min(item.len() - at))
    }

    /// The next `n` tokens, of one item, as part of a step. Logits of the last token that is known are wanted.
    pub(super) fn part(&mut self, n: usize) -> Part<'_> {
        let last = n == self.left();
        let (item, at) = find_item(&self.items, self.computed()).expect("there are tokens left");
        let input = match item {
            Item::Tokens(tokens) => Input::Tokens(&tokens[at..at + n]),
            Item::Virtual(rows) => {
                let (first, attached) = (rows.start + at, self.attached.as_ref());
                let attached = attached.expect("items are its template's");
                Input::Virtual(attached.placed(first..first + n))
            }
        };
        Part {
            text: &mut self.text,
            input,
            outputs: if last { n - 1..n } else { 0..0 },
        }
    }

    /// Takes the logits of its last token. The request has ended if anything but text comes out.
    pub(super) fn take(
        &mut self,
        logits: &[f32],
        model: &Model,
        mut event: impl FnMut(Event),
    ) -> bool {
        let begun = *self.begun.get_or_insert_with(Instant::now);
        let id = match check_logits(logits) {
            Ok(()) => self.answer.sample(logits).map_err(crate::Error::from),
            Err(e) => Err(e.into()),
        };
        let id = match id {
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
        if belongs {
            self.append(id);
        }
        self.answer.timed(begun.elapsed());
        if self.answer.reason().is_none() && self.n > self.n_ctx {
            let (needed, n_ctx) = (self.n, self.n_ctx);
            event(SessionError::ContextFull { needed, n_ctx }.into());
            return true;
        }
        self.answer.reason().is_some()
    }

    fn append(&mut self, id: i32) {
        self.n += 1;
        self.keys.push(id.into());
        match self.items.last_mut() {
            Some(Item::Tokens(tokens)) => tokens.push(id),
            _ => self.items.push(Item::Tokens(vec![id])),
        }
    }

    pub(super) fn forget_unseen(&mut self) {
        self.text.forget_unseen();
    }

    /// Why the answer is complete, if it is.
    pub(super) fn reason(&self) -> Option<StopReason> {
        self.answer.reason()
    }

    /// The whole answer.
    pub(super) fn finish(self, mut event: impl FnMut(Event)) {
        let (out, _) = self.answer.finish(&mut |piece| {
            event(Event::Text(piece.to_owned()));
            ControlFlow::Continue(())
        });
        event(Event::Done(out));
    }
}
