//! Who is computed next.

use super::error::EngineError;
use super::prefix::PrefixCache;
use super::request::{EngineOptions, Event, Request, RequestId, WhenFull};
use super::rhythm::Rhythm;
use super::task::{Reception, Task};
use super::voice::Voice;
use crate::error::Result;
use crate::ggml::{CancelToken, KV_PAGE, default_threads};
use crate::infer::core::{Core, Extent, Part, most_logits};
use crate::infer::generate::Generated;
use crate::infer::session::{self, SessionOptions};
use crate::infer::{Ensemble, SessionError};
use crate::model::Model;
use std::sync::Arc;
use std::time::Instant;

/// Serves many requests, each with its own adapter, in steps that compute some tokens of all of them. Whoever has it drives it; an
/// [`Engine`](super::Engine) does so on a thread of its own.
///
/// Every answer is, bit for bit, what it would be alone, with kernels of our own ([`Kernels`](crate::Kernels), no repacking, fused attention).
pub struct Scheduler {
    core: Core,
    reception: Arc<Reception>,
    /// In order of priority, then of arrival.
    waiting: Vec<Task>,
    /// In the order in which they began.
    running: Vec<Task>,
    prefixes: PrefixCache,
    next_id: u64,
    rhythm: Rhythm,
    /// Whose prompt is computed next, counted from the first of those that run: all in turn.
    turn: usize,
}

impl std::fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scheduler")
            .field("model", &self.core.model)
            .field("running", &self.running.len())
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

impl Scheduler {
    /// Without requests yet.
    ///
    /// # Errors
    /// If an option is out of range.
    pub fn new(model: &Model, options: &EngineOptions) -> Result<Self> {
        let session = SessionOptions {
            n_ctx: options.n_ctx,
            n_threads: options.n_threads,
            kv_type: options.kv_type,
            flash_attention: options.flash_attention,
            n_batch: options.n_batch,
            accept_other_base: options.accept_other_base,
        };
        let (mode, n_ctx) = session::check(model, &session)?;
        for (option, n) in [
            ("texts at a time", options.max_running),
            (
                "prompt tokens beside texts",
                options.n_batch_beside.unwrap_or(1),
            ),
        ] {
            if n == 0 {
                return Err(SessionError::BadOption {
                    option,
                    value: n.to_string(),
                    why: "must be at least 1".to_owned(),
                }
                .into());
            }
        }
        let n_threads = options.n_threads.unwrap_or_else(default_threads);
        let extent = Extent {
            n_threads,
            n_batch: options.n_batch,
            n_ctx,
            n_texts: options.max_running,
            kv_bytes: options.kv_bytes,
        };
        let core = Core::new(model, mode, &extent)?.invariant();
        Ok(Self {
            reception: Arc::new(Reception {
                model: model.clone(),
                mode,
                memory: core.memory().clone(),
                n_ctx,
                n_threads,
                options: options.clone(),
            }),
            core,
            waiting: Vec::new(),
            running: Vec::new(),
            prefixes: PrefixCache::default(),
            next_id: 0,
            rhythm: Rhythm::default(),
            turn: 0,
        })
    }

    /// Whether the members of an ensemble fit this model; what can be prepared for them is then.
    ///
    /// # Errors
    /// If one does not fit, or its rows cannot be computed.
    pub fn check_fits(&self, ensemble: &Ensemble) -> Result<()> {
        let mut adapters = ensemble.members().iter().flatten();
        adapters.try_for_each(|adapter| self.reception.attach(adapter).map(drop))
    }

    pub(super) fn options(&self) -> &EngineOptions {
        &self.reception.options
    }

    /// Takes a request, to be computed in the next steps.
    ///
    /// # Errors
    /// If it cannot be served: [`EngineError::Busy`], [`EngineError::TooLarge`], [`EngineError::TooManyMembers`], [`SessionError::ContextFull`], or what is wrong with
    /// the prompt, an adapter or the options.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        Ok(self.fork(request, 1)?[0])
    }

    /// Takes a request for `n` answers to one prompt, which is computed once if anything may be kept for others ([`EngineOptions::prefix_bytes`]). Answer `i`, counted
    /// from 0, is drawn with the request's seed plus `i`, if it has one.
    ///
    /// # Errors
    /// As [`Scheduler::submit`]; all are taken, or none.
    pub fn fork(&mut self, request: Request, n: usize) -> Result<Vec<RequestId>> {
        let waiting = self.waiting.len();
        if waiting.saturating_add(n) > self.options().max_waiting {
            return Err(EngineError::Busy { waiting }.into());
        }
        let ids = self.next_id..self.next_id + n as u64;
        self.next_id = ids.end;
        let tasks = self.reception.accept_all(ids.map(RequestId), request)?;
        let ids = tasks.iter().map(|task| task.id).collect();
        tasks.into_iter().for_each(|task| self.enqueue(task));
        Ok(ids)
    }

    /// Whatever is needed to accept requests elsewhere.
    pub(super) fn reception(&self) -> &Arc<Reception> {
        &self.reception
    }

    /// Behind those of its priority that are older.
    pub(super) fn enqueue(&mut self, task: Task) {
        let rank = |t: &Task| (std::cmp::Reverse(t.priority), t.id);
        let at = self.waiting.partition_point(|t| rank(t) < rank(&task));
        self.waiting.insert(at, task);
    }

    /// Forgets a request, and gives what there is of its answer, as if a callback had ended it. `None` if it is over.
    pub fn cancel(&mut self, id: RequestId) -> Option<Generated> {
        if let Some(at) = self.waiting.iter().position(|t| t.id == id) {
            return Some(self.waiting.remove(at).break_off());
        }
        let at = self.running.iter().position(|t| t.id == id)?;
        let mut task = self.running.remove(at);
        task.keep(&mut self.prefixes, true);
        let out = task.break_off();
        self.trim();
        Some(out)
    }

    /// A handle that stops the step that is being computed from another thread. Nothing of it counts then: as long as the token is raised
    /// steps compute nothing, and then all go on as if nothing had been.
    pub fn cancel_token(&self) -> CancelToken {
        self.core.cancel().clone()
    }

    /// Lets another token than one of its own stop it ([`Scheduler::cancel_token`]).
    pub fn stopped_by(mut self, token: &CancelToken) -> Self {
        self.core.cancelled_by(token);
        self
    }

    /// Nothing is to be computed.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Requests that are computed, and requests that wait.
    pub fn len(&self) -> [usize; 2] {
        [self.running.len(), self.waiting.len()]
    }

    /// Bytes of keys and values, those that are kept for others included, adapters' not.
    pub fn kv_bytes(&self) -> usize {
        self.reception.memory.used()
    }

    /// Bytes of the keys and values of a page: memory is given out by pages of 64 tokens.
    pub fn page_bytes(&self) -> usize {
        self.reception.memory.bytes(KV_PAGE)
    }

    /// Positions computed so far, also those that were computed again.
    pub fn positions_computed(&self) -> usize {
        self.core.positions_computed()
    }

    /// Computes the next tokens of as many texts as may run, and says what came of it, in the order of requests that are computed.
    pub fn step(&mut self) -> Vec<(RequestId, Event)> {
        let mut events = Vec::new();
        self.end_late(&mut events);
        self.begin_waiting(&mut events);
        let lengths = self.plan(&mut events);
        let all: usize = lengths.iter().flatten().sum();
        // One token of each is among them.
        let written = self.texts_written();
        let start = Instant::now();
        self.compute(&lengths, &mut events);
        if written > 0 {
            let most = self.reception.options.n_batch;
            (self.rhythm).heard(written, all - written, start.elapsed(), most);
        }
        events
    }

    /// Texts that are being written: their prompts are computed, and each step adds a token. A member of an ensemble is a text.
    pub fn texts_written(&self) -> usize {
        let voices = self.running.iter().flat_map(Task::voices);
        voices.filter(|voice| voice.is_written()).count()
    }

    /// Ends what nobody needs any more.
    fn end_late(&mut self, events: &mut Vec<(RequestId, Event)>) {
        let now = Instant::now();
        for tasks in [&mut self.running, &mut self.waiting] {
            tasks.retain(|task| {
                let late = task.deadline.is_some_and(|at| at <= now);
                if late {
                    events.push((task.id, Event::Failed(EngineError::Late.into())));
                }
                !late
            });
        }
    }

    /// Lets requests begin for which there is room.
    fn begin_waiting(&mut self, events: &mut Vec<(RequestId, Event)>) {
        let texts = |task: &Task| task.voices().len();
        let mut room = self.options().max_running - self.running.iter().map(texts).sum::<usize>();
        let mut next = 0;
        while next < self.waiting.len() {
            let task = &mut self.waiting[next];
            if task.reason().is_some() {
                let task = self.waiting.remove(next);
                let id = task.id;
                task.finish(|event| events.push((id, event)));
                continue;
            }
            if texts(task) > room {
                // Nobody passes it by: others have to end.
                break;
            }
            task.find(&mut self.prefixes);
            if self.running.iter().any(|other| task.waits_for(other)) {
                task.preempt();
                next += 1;
                continue;
            }
            while !task.reserve_all() && self.prefixes.evict() {}
            if !task.reserve_all() && !self.running.is_empty() {
                task.preempt();
                break;
            }
            room -= texts(task);
            self.running.push(self.waiting.remove(next));
        }
    }

    /// How many tokens of each running text are computed next, for which there is room then.
    fn plan(&mut self, events: &mut Vec<(RequestId, Event)>) -> Vec<Vec<usize>> {
        let options = &self.reception.options;
        let mut budget = match self.texts_written() {
            0 => options.n_batch,
            written => (options.n_batch_beside).unwrap_or_else(|| self.rhythm.beside(written)),
        };
        let mut logits = most_logits(self.core.model.shape().n_vocab);
        // Prompts take turns, from who is next on.
        let n = self.running.len();
        let turn = self.turn % n.max(1);
        let mut lengths: Vec<Vec<usize>> = vec![Vec::new(); n];
        for i in (turn..n).chain(0..turn) {
            let mut length = |voice: &Voice| {
                if voice.is_written() {
                    return voice.next(1, 1);
                }
                let n = voice.next(budget, logits);
                budget -= n;
                logits -= voice.outputs(n).len();
                n
            };
            lengths[i] = self.running[i].voices().iter().map(&mut length).collect();
            if budget == 0 || logits == 0 {
                self.turn = i + 1;
            }
        }
        // Older texts first.
        let mut i = 0;
        while i < self.running.len() {
            if self.running[i].reserve(&lengths[i]) || self.prefixes_make_room(i, &lengths[i]) {
                i += 1;
                continue;
            }
            let last = self.running.len() - 1;
            let youngest = (i..=last).max_by_key(|&i| self.running[i].id).unwrap_or(i);
            let mut task = self.running.remove(youngest);
            lengths.remove(youngest);
            match self.reception.options.when_full {
                // Alone it gets what there is, or there will never be enough.
                WhenFull::Recompute if !self.running.is_empty() => {
                    task.preempt();
                    self.enqueue(task);
                }
                _ => events.push((task.id, Event::Failed(EngineError::OutOfPages.into()))),
            }
        }
        lengths
    }

    /// Whether there is room for a text when less is kept of others.
    fn prefixes_make_room(&mut self, i: usize, lengths: &[usize]) -> bool {
        while self.prefixes.evict() || self.prefixes.let_go() {
            if self.running[i].reserve(lengths) {
                return true;
            }
        }
        false
    }

    fn compute(&mut self, lengths: &[Vec<usize>], events: &mut Vec<(RequestId, Event)>) {
        // Of each text the rows of the step's logits that are its own.
        let mut n_rows = 0;
        let mut rows = Vec::with_capacity(lengths.len());
        let mut parts: Vec<Part<'_>> = Vec::new();
        for (task, lengths) in self.running.iter_mut().zip(lengths) {
            let mut own = Vec::with_capacity(lengths.len());
            for (voice, &n) in task.voices_mut().iter_mut().zip(lengths) {
                let first = n_rows;
                n_rows += voice.outputs(n).len();
                own.push(first..n_rows);
                if n > 0 {
                    parts.push(voice.part(n));
                }
            }
            rows.push(own);
        }
        if parts.is_empty() {
            return;
        }
        let model = self.core.model.clone();
        let logits = match self.core.step(&mut parts) {
            Ok(logits) => logits,
            Err(SessionError::Cancelled) => return,
            Err(e) => {
                drop(parts);
                // Without the step nobody can go on.
                for task in self.running.drain(..) {
                    let why = match &e {
                        SessionError::Llama(e) => SessionError::Llama(e.clone()),
                        _ => SessionError::OutOfMemory,
                    };
                    events.push((task.id, why.into()));
                }
                return;
            }
        };
        drop(parts);
        let mut over = Vec::with_capacity(rows.len());
        for (task, rows) in self.running.iter_mut().zip(&rows) {
            let id = task.id;
            over.push(task.hear(logits, rows, &model, |event| events.push((id, event))));
        }
        self.settle(&over, events);
    }

    /// Ends those that are over, and keeps what others may begin with.
    fn settle(&mut self, over: &[bool], events: &mut Vec<(RequestId, Event)>) {
        let keeps = self.options().prefix_bytes > 0;
        let mut over = over.iter();
        for mut task in std::mem::take(&mut self.running) {
            let is_over = *over.next().expect("one for each");
            if keeps {
                task.keep(&mut self.prefixes, is_over);
            }
            if !is_over {
                self.running.push(task);
            } else if task.reason().is_some() {
                let id = task.id;
                task.finish(|event| events.push((id, event)));
            }
        }
        self.running.iter_mut().for_each(Task::forget_unseen);
        self.trim();
    }

    /// Keeps no more than may be kept of texts that are over.
    fn trim(&mut self) {
        while self.prefixes.unused_bytes() > self.reception.options.prefix_bytes
            && self.prefixes.evict()
        {}
    }
}
