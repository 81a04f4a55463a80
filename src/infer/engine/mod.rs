//! Many users at once: one base, one pool of memory for keys and values, steps that compute some tokens of everybody's text.
//!
//! ```
//! use ggraft::infer::GenerateOptions;
//! use ggraft::infer::engine::{Engine, EngineOptions, Request};
//! use ggraft::infer::sampler::SamplerParams;
//! use ggraft::{Adapter, Model, ModelOptions};
//!
//! let model = Model::open("models/tinylm-q8_0.gguf", &ModelOptions::default())?;
//! let engine = Engine::new(&model, &EngineOptions::default())?;
//! let greedy = GenerateOptions::default().sampler(SamplerParams::greedy()).max_tokens(8);
//! // Both are computed in the same steps; with adapters of their own, if they had some.
//! let one = engine.submit(Request::text("Once upon a time").generate(greedy.clone()))?;
//! let other = engine.submit(Request::text("There was a dog").generate(greedy))?;
//! println!("{}", one.wait()?.text);
//! for piece in other {
//!     print!("{}", piece?);
//! }
//! # Ok::<(), ggraft::Error>(())
//! ```

mod error;
mod prefix;
mod request;
mod scheduler;
mod task;
mod voice;

pub use error::EngineError;
pub(super) use request::Watch;
pub use request::{EngineOptions, Event, Prompt, Request, RequestId, WhenFull};
pub use scheduler::Scheduler;

use crate::error::Result;
use crate::infer::SessionError;
use crate::infer::generate::Generated;
use crate::model::Model;
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use task::{Reception, Task};

/// A [`Scheduler`] on a thread of its own. Any thread may submit requests.
///
/// When it is dropped, requests that are not over end with [`EngineError::Ended`].
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    reception: Arc<Reception>,
    inbox: Mutex<Inbox>,
    /// There is something in it.
    filled: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("model", &self.reception.model)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Inbox {
    tasks: Vec<(Task, Sender<Event>)>,
    cancelled: Vec<RequestId>,
    /// Requests that were accepted and have not begun.
    waiting: usize,
    next_id: u64,
    over: bool,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        // Nothing that changes it panics half way.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// Without requests yet.
    ///
    /// # Errors
    /// If an option is out of range, or the system has no thread to give.
    pub fn new(model: &Model, options: &EngineOptions) -> Result<Self> {
        let scheduler = Scheduler::new(model, options)?;
        let shared = Arc::new(Shared {
            reception: scheduler.reception().clone(),
            inbox: Mutex::default(),
            filled: Condvar::new(),
        });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("ggraft engine".to_owned())
            // The tree of beginnings is as deep as a text has pages, and is walked recursively.
            .stack_size(32 << 20)
            .spawn(move || serve(scheduler, &theirs))
            .map_err(|source| EngineError::NoThread { source })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.shared.reception.model
    }

    /// Takes a request, and begins with it as soon as there is room.
    ///
    /// # Errors
    /// As [`Scheduler::submit`]; [`EngineError::Ended`].
    pub fn submit(&self, request: Request) -> Result<Reply> {
        let mut replies = self.fork(request, 1)?;
        Ok(replies.pop().expect("one reply to one request"))
    }

    /// Takes a request for `n` answers to one prompt, as [`Scheduler::fork`] does.
    ///
    /// # Errors
    /// As [`Scheduler::submit`]; [`EngineError::Ended`].
    pub fn fork(&self, request: Request, n: usize) -> Result<Vec<Reply>> {
        let ids = {
            let mut inbox = self.shared.inbox();
            if inbox.over {
                return Err(EngineError::Ended.into());
            }
            let waiting = inbox.waiting;
            if waiting.saturating_add(n) > self.shared.reception.options.max_waiting {
                return Err(EngineError::Busy { waiting }.into());
            }
            inbox.waiting += n;
            let first = inbox.next_id;
            inbox.next_id += n as u64;
            first..inbox.next_id
        };
        let tasks = (self.shared.reception).accept_all(ids.map(RequestId), request);
        let mut inbox = self.shared.inbox();
        let tasks = tasks.inspect_err(|_| inbox.waiting -= n)?;
        if inbox.over {
            return Err(EngineError::Ended.into());
        }
        let mut replies = Vec::with_capacity(n);
        for task in tasks {
            let (sender, events) = channel();
            replies.push(Reply {
                id: task.id,
                events,
                shared: self.shared.clone(),
                end: None,
            });
            inbox.tasks.push((task, sender));
        }
        self.shared.filled.notify_one();
        Ok(replies)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.inbox().over = true;
        self.shared.filled.notify_one();
        if let Some(thread) = self.thread.take() {
            // What it panicked with was said already.
            let _ = thread.join();
        }
    }
}

/// The life of the engine's thread.
fn serve(mut scheduler: Scheduler, shared: &Shared) {
    // However it ends, nobody waits for it then.
    struct End<'a>(&'a Shared);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            let mut inbox = self.0.inbox();
            inbox.over = true;
            inbox.tasks.clear();
        }
    }
    let _end = End(shared);
    let mut senders = HashMap::new();
    loop {
        let (tasks, cancelled) = {
            let mut inbox = shared.inbox();
            while scheduler.is_idle()
                && inbox.tasks.is_empty()
                && inbox.cancelled.is_empty()
                && !inbox.over
            {
                inbox = (shared.filled.wait(inbox)).unwrap_or_else(PoisonError::into_inner);
            }
            if inbox.over {
                return;
            }
            (
                std::mem::take(&mut inbox.tasks),
                std::mem::take(&mut inbox.cancelled),
            )
        };
        for (task, sender) in tasks {
            senders.insert(task.id, sender);
            scheduler.enqueue(task);
        }
        for id in cancelled {
            scheduler.cancel(id);
            if let Some(sender) = senders.remove(&id) {
                // Nobody may be there to hear of it.
                let _ = sender.send(Event::Failed(SessionError::Cancelled.into()));
            }
        }
        for (id, event) in scheduler.step() {
            let is_over = !matches!(event, Event::Text(_));
            let Some(sender) = senders.get(&id) else {
                continue;
            };
            // Who does not want to hear of it any more has cancelled it.
            let _ = sender.send(event);
            if is_over {
                senders.remove(&id);
            }
        }
        let [_, waiting] = scheduler.len();
        let mut inbox = shared.inbox();
        inbox.waiting = waiting + inbox.tasks.len();
    }
}

/// The answer to a request, as it comes. It is an iterator over the text's pieces, which ends with the answer or after an error; dropped before, it cancels the
/// request.
#[derive(Debug)]
pub struct Reply {
    id: RequestId,
    events: Receiver<Event>,
    shared: Arc<Shared>,
    /// How it ended: `None` before, and once it was handed out.
    end: Option<End>,
}

#[derive(Debug)]
enum End {
    Done(Generated),
    Over,
}

impl Reply {
    /// What came of the request since the last call, without waiting: `None` if nothing did, or if it is over and its end was handed out.
    pub fn poll(&mut self) -> Option<Event> {
        if self.end.is_some() {
            return None;
        }
        let event = match self.events.try_recv() {
            Ok(event) => event,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => Event::Failed(EngineError::Ended.into()),
        };
        if !matches!(event, Event::Text(_)) {
            self.end = Some(End::Over);
        }
        Some(event)
    }

    /// Ends the request from another thread.
    pub fn canceller(&self) -> Canceller {
        Canceller {
            id: self.id,
            shared: self.shared.clone(),
        }
    }

    /// Waits for all of it.
    ///
    /// # Errors
    /// If the request failed.
    pub fn wait(mut self) -> Result<Generated> {
        for piece in &mut self {
            piece?;
        }
        self.take_end()
    }

    /// All of the answer, once the iterator has ended.
    ///
    /// # Errors
    /// [`EngineError::Ended`] if it is not over, it failed, or its end was handed out.
    pub fn take_end(&mut self) -> Result<Generated> {
        match self.end.take() {
            Some(End::Done(out)) => {
                self.end = Some(End::Over);
                Ok(out)
            }
            other => {
                self.end = other;
                Err(EngineError::Ended.into())
            }
        }
    }
}

/// Ends a request, also while another thread waits for it: that gets [`SessionError::Cancelled`].
#[derive(Clone, Debug)]
pub struct Canceller {
    id: RequestId,
    shared: Arc<Shared>,
}

impl Canceller {
    /// Ends it when the step that is being computed is over. Nothing happens if it is over.
    pub fn cancel(&self) {
        self.shared.inbox().cancelled.push(self.id);
        self.shared.filled.notify_one();
    }
}

impl Iterator for Reply {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        if self.end.is_some() {
            return None;
        }
        match self.events.recv() {
            Ok(Event::Text(text)) => Some(Ok(text)),
            Ok(Event::Done(out)) => {
                self.end = Some(End::Done(out));
                None
            }
            Ok(Event::Failed(e)) => {
                self.end = Some(End::Over);
                Some(Err(e))
            }
            Err(_) => {
                self.end = Some(End::Over);
                Some(Err(EngineError::Ended.into()))
            }
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.end.is_none() {
            self.canceller().cancel();
        }
    }
}
