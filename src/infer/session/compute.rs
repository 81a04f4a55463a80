//! Text and virtual tokens go through the model.

use super::{EachLogits, Segment, Session};
use crate::adapter::Item;
use crate::error::Result;
use crate::ggml::GraphMemory;
use crate::infer::attached::{Attached, arranged};
use crate::infer::core::{Input, Part, check_logits, most_logits};
use crate::infer::error::SessionError;
use crate::infer::text::Utf8Stream;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

impl Session {
    pub(super) fn check_room(&self, needed: usize) -> Result<(), SessionError> {
        if needed > self.n_ctx() {
            return Err(SessionError::ContextFull {
                needed,
                n_ctx: self.n_ctx(),
            });
        }
        Ok(())
    }

    /// Tokenizes and computes a prompt. The first prompt of a session starts with BOS if the model wants it, and goes
    /// through the adapter's template if it has one. Special tokens in the text are recognised.
    ///
    /// # Errors
    /// If the model has no tokenizer, the text does not fit, or computing fails; [`SessionError::EmptyPrompt`].
    pub fn prompt(&mut self, text: &str) -> Result<()> {
        let vocab = self.core.model.vocab();
        let tokens = match self.history.is_empty() {
            true => vocab.tokenize_start(text)?,
            false => vocab.tokenize(text, false, true)?,
        };
        self.prompt_tokens(&tokens)
    }

    /// As [`Session::prompt`], for tokens without BOS.
    ///
    /// # Errors
    /// If the text does not fit or computing fails; [`SessionError::EmptyPrompt`].
    pub fn prompt_tokens(&mut self, tokens: &[i32]) -> Result<()> {
        self.check_tokens(tokens)?;
        self.feed_prompt(tokens.to_vec())
    }

    /// As [`Session::prompt_tokens`], and hands out the logits of every real token that is computed: `each(id, logits)` with
    /// logits `ne = [V]`. Those are BOS where the model wants it, the fixed text of the adapter's template and `tokens`, in
    /// order of position.
    ///
    /// # Errors
    /// As [`Session::prompt_tokens`].
    pub fn prompt_tokens_with_logits(
        &mut self,
        tokens: &[i32],
        mut each: impl FnMut(i32, &[f32]),
    ) -> Result<()> {
        self.check_tokens(tokens)?;
        self.feed_prompt_with(tokens.to_vec(), Some(&mut each))
    }

    /// `tokens` without BOS; remembered as a prompt, so that another adapter's template can place it anew.
    pub(super) fn feed_prompt(&mut self, tokens: Vec<i32>) -> Result<()> {
        self.feed_prompt_with(tokens, None)
    }

    fn feed_prompt_with(&mut self, tokens: Vec<i32>, each: Option<EachLogits<'_>>) -> Result<()> {
        let first = self.history.is_empty();
        let mut items = arranged(&self.core.model, self.attached.as_ref(), &tokens, first)?;
        let n: usize = items.iter().map(Item::len).sum();
        if n == 0 {
            return Err(SessionError::EmptyPrompt.into());
        }
        self.check_room(self.taken() + n)?;
        let joined = match (self.uncomputed, items.first_mut(), &each) {
            (Some(id), Some(Item::Tokens(tokens)), None) => {
                tokens.insert(0, id);
                true
            }
            _ => false,
        };
        self.whole(|s| {
            if !joined {
                s.settle()?;
            }
            s.run_items(&items, each)
        })?;
        self.unfinished = Utf8Stream::new();
        self.history.push(Segment {
            tokens,
            prompt: true,
        });
        Ok(())
    }

    /// Computes what a prompt was arranged to, and hands out the logits of tokens; those of the last position are kept.
    pub(super) fn run_items(
        &mut self,
        items: &[Item],
        mut each: Option<EachLogits<'_>>,
    ) -> Result<()> {
        for (i, item) in items.iter().enumerate() {
            let is_last = i + 1 == items.len();
            match (item, &mut each) {
                (Item::Tokens(tokens), None) => self.run_all(Input::Tokens(tokens), is_last)?,
                (Item::Tokens(tokens), Some(each)) => {
                    self.run_tokens_with_logits(tokens, is_last, |at, row| each(tokens[at], row))?
                }
                (Item::Virtual(rows), _) => self.run_virtual(rows.clone(), is_last)?,
            }
        }
        Ok(())
    }

    /// All of `work`, which computes the text's last token if it is not, or nothing: after an error the session stands where
    /// it stood. Logits are only replaced by the last step, so they still belong to the text; those of a token that was not computed may be there by then,
    /// and are known no more.
    fn whole(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let (n_past, uncomputed) = (self.text.len(), self.uncomputed);
        match work(self) {
            Ok(()) => {
                self.uncomputed = None;
                self.text.forget_unseen();
                Ok(())
            }
            Err(e) => {
                self.text.truncate(n_past);
                self.uncomputed = uncomputed;
                if uncomputed.is_some() {
                    self.logits.clear();
                }
                Err(e)
            }
        }
    }

    /// `tokens` with the token in front that is not computed yet.
    fn behind_uncomputed<'a>(&self, tokens: &'a [i32]) -> Cow<'a, [i32]> {
        match self.uncomputed {
            Some(id) => [&[id], tokens].concat().into(),
            None => tokens.into(),
        }
    }

    /// What is computed of a segment, the first of the text or another, in order.
    pub(super) fn items(
        &self,
        attached: Option<&Attached>,
        segment: &Segment,
        first: bool,
    ) -> Result<Vec<Item>> {
        match segment.prompt {
            true => arranged(&self.core.model, attached, &segment.tokens, first),
            false => Ok(vec![Item::Tokens(segment.tokens.clone())]),
        }
    }

    /// Computes tokens as they are; logits of the last one are kept.
    ///
    /// # Errors
    /// If an id is out of range, the text does not fit, or computing fails.
    pub fn feed(&mut self, tokens: &[i32]) -> Result<()> {
        self.check_feed(tokens)?;
        let input = self.behind_uncomputed(tokens);
        self.whole(|s| s.run_all(Input::Tokens(&input), true))?;
        self.remember(tokens);
        Ok(())
    }

    /// As [`Session::feed`], and hands out the logits of every token: `each(i, logits)` with logits `ne = [V]`.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn feed_with_logits(
        &mut self,
        tokens: &[i32],
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        self.check_feed(tokens)?;
        self.whole(|s| {
            s.settle()?;
            s.run_tokens_with_logits(tokens, true, &mut each)
        })?;
        self.remember(tokens);
        Ok(())
    }

    /// As [`Session::feed`], in one step of any length, and returns the intermediate results called one of `names` as far
    /// as there are such: llama.cpp's names (`attn_norm-0`, `Qcur-0`, `l_out-1`, `result_norm`), elements in ggml order.
    /// For tests that look for the first place where two implementations differ.
    ///
    /// # Errors
    /// As [`Session::feed`], but logits may be anything.
    ///
    /// # Panics
    /// If libllama computes the model.
    #[doc(hidden)]
    pub fn trace(&mut self, tokens: &[i32], names: &[&str]) -> Result<BTreeMap<String, Vec<f32>>> {
        self.check_feed(tokens)?;
        self.settle()?;
        let core = &self.core;
        let own = core.own().expect("traces are our own decoder's");
        let mut parts = [Part {
            text: self.text.paged_mut(),
            input: Input::Tokens(tokens),
            outputs: 0..tokens.len(),
        }];
        let mut built = own.build(own.topology(&parts), names, GraphMemory::new())?;
        own.run(&mut built, &mut parts)?;
        let logits = built.logits.as_ref().expect("asked for");
        let n_vocab = core.model.shape().n_vocab;
        let last = (tokens.len() - 1) * n_vocab;
        self.logits = built.graph.read_f32(logits)[last..].to_vec();
        self.remember(tokens);
        Ok(built
            .traced
            .iter()
            .map(|(name, t)| (name.clone(), built.graph.gather_f32(t)))
            .collect())
    }

    /// Positions computed so far, those that were forgotten or computed again included. For tests.
    #[doc(hidden)]
    pub fn positions_computed(&self) -> usize {
        self.core.positions_computed()
    }

    /// Graphs built so far: decoding reuses one for many tokens. For tests.
    #[doc(hidden)]
    pub fn graphs_built(&self) -> usize {
        self.core.graphs_built()
    }

    pub(super) fn check_tokens(&self, tokens: &[i32]) -> Result<(), SessionError> {
        let n_vocab = self.core.model.shape().n_vocab;
        match tokens.iter().find(|&&id| id < 0 || id as usize >= n_vocab) {
            Some(&id) => Err(SessionError::TokenOutOfRange { id, n_vocab }),
            None => Ok(()),
        }
    }

    fn check_feed(&self, tokens: &[i32]) -> Result<(), SessionError> {
        if tokens.is_empty() {
            return Err(SessionError::Empty);
        }
        self.check_tokens(tokens)?;
        self.check_room(self.taken() + tokens.len())
    }

    /// The character that the text ends in the middle of, for the one who goes on with it.
    pub(in crate::infer) fn take_unfinished(&mut self) -> Utf8Stream {
        std::mem::take(&mut self.unfinished)
    }

    /// The text ends in the middle of a character, perhaps.
    pub(in crate::infer) fn keep_unfinished(&mut self, utf8: Utf8Stream) {
        self.unfinished = utf8;
    }

    pub(super) fn remember(&mut self, tokens: &[i32]) {
        self.unfinished = Utf8Stream::new();
        match self.history.last_mut() {
            Some(Segment {
                tokens: old,
                prompt: false,
            }) => old.extend_from_slice(tokens),
            _ => self.history.push(Segment {
                tokens: tokens.to_vec(),
                prompt: false,
            }),
        }
    }

    /// Computes `input` in steps of at most `n_batch` positions; logits of the last one are kept if wanted.
    fn run_all(&mut self, input: Input<'_>, want_logits: bool) -> Result<()> {
        let width = self.core.model.shape().n_embd;
        let pieces = input.pieces(self.core.n_batch, width);
        let last = pieces.len().saturating_sub(1);
        for (i, (piece, n)) in pieces.into_iter().enumerate() {
            let wanted = want_logits && i == last;
            self.run(piece, if wanted { n - 1..n } else { 0..0 })?;
        }
        Ok(())
    }

    /// Logits of every token, `each(i, logits)`; those of the last one are kept if `keep_last`.
    fn run_tokens_with_logits(
        &mut self,
        tokens: &[i32],
        keep_last: bool,
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let n_vocab = self.core.model.shape().n_vocab;
        let size = self.core.n_batch.min(most_logits(n_vocab));
        for (c, chunk) in tokens.chunks(size).enumerate() {
            let logits = self.core.step(&mut [Part {
                text: &mut self.text,
                input: Input::Tokens(chunk),
                outputs: 0..chunk.len(),
            }])?;
            check_logits(logits)?;
            for (i, row) in logits.chunks_exact(n_vocab).enumerate() {
                each(c * size + i, row);
            }
            if keep_last && (c + 1) * size >= tokens.len() {
                self.logits.clear();
                self.logits
                    .extend_from_slice(&logits[(chunk.len() - 1) * n_vocab..]);
            }
        }
        Ok(())
    }

    fn run_virtual(&mut self, placed: Range<usize>, want_logits: bool) -> Result<()> {
        let attached = self.attached.as_ref().expect("items are its template's");
        let rows = attached.placed(placed).to_vec();
        self.run_all(Input::Virtual(&rows), want_logits)
    }

    /// One step; on success the positions count as used.
    pub(super) fn run(
        &mut self,
        input: Input<'_>,
        outputs: Range<usize>,
    ) -> Result<(), SessionError> {
        let (wanted, before) = (!outputs.is_empty(), self.text.len());
        let logits = self.core.step(&mut [Part {
            text: &mut self.text,
            input,
            outputs,
        }])?;
        check_logits(logits).inspect_err(|_| self.text.truncate(before))?;
        if wanted {
            self.logits.clear();
            self.logits.extend_from_slice(logits);
        }
        Ok(())
    }
}
