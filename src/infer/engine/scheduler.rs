//! Who is computed next.

use super::error::EngineError;
use super::prefix::PrefixCache;
use super::request::{EngineOptions, Event, Request, RequestId, WhenFull};
use super::task::{Reception, Task};
use crate::error::Result;
use crate::ggml::{KV_PAGE, KvPool, default_threads};
use crate::infer::SessionError;
use crate::infer::core::{Core, Part};
use crate::infer::session::{self, SessionOptions};
use crate::model::Model;
use std::sync::Arc;
use std::time::{Duration, Instant};

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

/// How many tokens of prompts a step can take beside texts that are being written without their readers minding. Results do not depend on it.
struct Rhythm {
    /// Seconds of a step without prompts, smoothed.
    alone: Option<f64>,
    beside: usize,
}

impl Default for Rhythm {
    fn default() -> Self {
        Self {
            alone: None,
            beside: 8,
        }
    }
}

impl Rhythm {
    /// A step with so many tokens of prompts took so long.
    fn heard(&mut self, of_prompts: usize, time: Duration, most: usize) {
        let seconds = time.as_secs_f64();
        match (of_prompts, self.alone) {
            (0, None) => self.alone = Some(seconds),
            (0, Some(alone)) => self.alone = Some(0.8 * alone + 0.2 * seconds),
            (n, Some(alone)) if seconds > 1.9 * alone => {
                self.beside = (n.min(self.beside) * 7 / 8).max(1);
            }
            (n, Some(alone)) if n >= self.beside && seconds < 1.7 * alone => {
                self.beside = (self.beside + 1).min(most);
            }
            _ => {}
        }
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
        let mut core = Core::new(model, mode, model.pool(n_threads));
        core.invariant = true;
        let limit = options.kv_bytes.unwrap_or(usize::MAX);
        let pool = KvPool::new(core.layout().clone(), limit);
        Ok(Self {
            reception: Arc::new(Reception {
                model: model.clone(),
                mode,
                pool,
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

    fn options(&self) -> &EngineOptions {
        &self.reception.options
    }

    /// Takes a request, to be computed in the next steps.
    ///
    /// # Errors
    /// If it cannot be served: [`EngineError::Busy`], [`EngineError::TooLarge`], [`SessionError::ContextFull`], or what is wrong with the prompt, the adapter or
    /// the options.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        let waiting = self.waiting.len();
        if waiting >= self.options().max_waiting {
            return Err(EngineError::Busy { waiting }.into());
        }
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let task = self.reception.accept(id, request)?;
        self.enqueue(task);
        Ok(id)
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

    /// Forgets a request. Nothing happens if it is over.
    pub fn cancel(&mut self, id: RequestId) {
        self.waiting.retain(|t| t.id != id);
        if let Some(at) = self.running.iter().position(|t| t.id == id) {
            let mut task = self.running.remove(at);
            task.keep(&mut self.prefixes, true);
            self.trim();
        }
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
        self.reception.pool.used()
    }

    /// Bytes of the keys and values of a page: memory is given out by pages of 64 tokens.
    pub fn page_bytes(&self) -> usize {
        self.reception.pool.layout().bytes(KV_PAGE)
    }

    /// Positions computed so far, also those that were computed again.
    pub fn positions_computed(&self) -> usize {
        self.core.positions_computed
    }

    /// Computes the next tokens of as many texts as may run, and says what came of it, in the order of requests that are computed.
    pub fn step(&mut self) -> Vec<(RequestId, Event)> {
        let mut events = Vec::new();
        self.end_late(&mut events);
        self.begin_waiting(&mut events);
        let lengths = self.plan(&mut events);
        let tokens = |written: bool| {
            let pairs = self.running.iter().zip(&lengths);
            let chosen = pairs.filter(|(task, _)| task.is_written() == written);
            chosen.map(|(_, n)| n).sum::<usize>()
        };
        let [written, of_prompts] = [true, false].map(tokens);
        let start = Instant::now();
        self.compute(&lengths, &mut events);
        if written > 0 {
            let most = self.reception.options.n_batch;
            self.rhythm.heard(of_prompts, start.elapsed(), most);
        }
        events
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
        let mut next = 0;
        while next < self.waiting.len() && self.running.len() < self.options().max_running {
            let task = &mut self.waiting[next];
            if task.reason().is_some() {
                let task = self.waiting.remove(next);
                let id = task.id;
                task.finish(|event| events.push((id, event)));
                continue;
            }
            task.find(&mut self.prefixes);
            if self.running.iter().any(|other| task.waits_for(other)) {
                task.preempt();
                next += 1;
                continue;
            }
            let n = task.left();
            while !task.reserve(n) && self.prefixes.evict() {}
            if !task.reserve(n) && !self.running.is_empty() {
                // Nobody passes it by: others have to end.
                task.preempt();
                break;
            }
            self.running.push(self.waiting.remove(next));
        }
    }

    /// How many tokens of each running text are computed next, for which there is room then.
    fn plan(&mut self, events: &mut Vec<(RequestId, Event)>) -> Vec<usize> {
        let options = &self.reception.options;
        let is_written = self.running.iter().any(Task::is_written);
        let mut budget = match is_written {
            true => options.n_batch_beside.unwrap_or(self.rhythm.beside),
            false => options.n_batch,
        };
        // Prompts take turns, from who is next on.
        let n = self.running.len();
        let turn = self.turn % n.max(1);
        let mut lengths: Vec<usize> = vec![0; n];
        for i in (turn..n).chain(0..turn) {
            let task = &self.running[i];
            if task.is_written() {
                lengths[i] = 1;
            } else if budget > 0 {
                lengths[i] = task.next(budget);
                budget -= lengths[i];
                if budget == 0 {
                    self.turn = i + 1;
                }
            }
        }
        // Older texts first.
        let mut i = 0;
        while i < self.running.len() {
            if self.running[i].reserve(lengths[i]) || self.prefixes_make_room(i, lengths[i]) {
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
    fn prefixes_make_room(&mut self, i: usize, n: usize) -> bool {
        while self.prefixes.evict() || self.prefixes.let_go() {
            if self.running[i].reserve(n) {
                return true;
            }
        }
        false
    }

    fn compute(&mut self, lengths: &[usize], events: &mut Vec<(RequestId, Event)>) {
        let with_length = |(task, &n): (_, &usize)| (n > 0).then_some((task, n));
        let pairs = self.running.iter_mut().zip(lengths);
        let mut parts: Vec<Part<'_>> = pairs
            .filter_map(with_length)
            .map(|(task, n): (&mut Task, usize)| task.part(n))
            .collect();
        if parts.is_empty() {
            return;
        }
        let wanted: Vec<bool> = parts.iter().map(|p| !p.outputs.is_empty()).collect();
        let n_vocab = self.core.model.weights().n_vocab();
        let model = self.core.model.clone();
        let logits = match self.core.step(&mut parts) {
            Ok(logits) => logits,
            Err(_) => {
                drop(parts);
                // Without memory for the step nobody can go on.
                for task in self.running.drain(..) {
                    events.push((task.id, SessionError::OutOfMemory.into()));
                }
                return;
            }
        };
        drop(parts);
        let mut rows = logits.chunks_exact(n_vocab);
        let mut over = vec![false; self.running.len()];
        let computed = self.running.iter_mut().zip(lengths).zip(&mut over);
        let computed = computed.filter(|((_, n), _)| **n > 0);
        for (((task, _), over), wanted) in computed.zip(wanted) {
            if wanted {
                let id = task.id;
                let row = rows.next().expect("a row for each part that wants one");
                *over = task.take(row, &model, |event| events.push((id, event)));
            }
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
