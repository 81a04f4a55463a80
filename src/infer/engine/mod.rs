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
mod jobs;
mod prefix;
mod reply;
mod request;
mod rhythm;
mod scheduler;
mod task;
mod voice;

pub use error::EngineError;
pub use jobs::Jobs;
pub use reply::{Canceller, Reply};
pub(super) use request::Watch;
pub use request::{EngineOptions, Event, Prompt, Request, RequestId, WhenFull};
pub use scheduler::Scheduler;

use crate::error::Result;
use crate::infer::SessionError;
use crate::model::Model;
use reply::Outlet;
use std::collections::HashMap;
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

/// What an engine has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// Requests that are computed.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Bytes of keys and values, those that are kept for others included, adapters' not.
    pub kv_bytes: usize,
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
    tasks: Vec<(Task, Outlet)>,
    cancelled: Vec<RequestId>,
    /// Requests that are computed.
    running: usize,
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

    /// What it has to do, and the memory that this takes.
    pub fn usage(&self) -> Usage {
        let kv_bytes = self.shared.reception.memory.used();
        let inbox = self.shared.inbox();
        Usage {
            running: inbox.running,
            waiting: inbox.waiting,
            kv_bytes,
        }
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
            let (reply, outlet) = Reply::new(task.id, &self.shared);
            replies.push(reply);
            inbox.tasks.push((task, outlet));
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
    let mut outlets = HashMap::new();
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
        for (task, outlet) in tasks {
            outlets.insert(task.id, outlet);
            scheduler.enqueue(task);
        }
        for id in cancelled {
            scheduler.cancel(id);
            if let Some(outlet) = outlets.remove(&id) {
                outlet.send(Event::Failed(SessionError::Cancelled.into()));
            }
        }
        for (id, event) in scheduler.step() {
            let is_over = !matches!(event, Event::Text(_));
            let Some(outlet) = outlets.get(&id) else {
                continue;
            };
            outlet.send(event);
            if is_over {
                outlets.remove(&id);
            }
        }
        let [running, waiting] = scheduler.len();
        let mut inbox = shared.inbox();
        inbox.running = running;
        inbox.waiting = waiting + inbox.tasks.len();
    }
}
