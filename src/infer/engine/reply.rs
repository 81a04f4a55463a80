//! The answer to a request, on the way from the engine's thread.

use super::Shared;
use super::error::EngineError;
use super::request::{Event, RequestId};
use crate::error::Result;
use crate::infer::generate::Generated;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// The answer to a request, as it comes. It is an iterator over the text's pieces, which ends with the answer or after an error; dropped before, it cancels the
/// request.
#[derive(Debug)]
pub struct Reply {
    id: RequestId,
    events: Receiver<Event>,
    waker: Slot,
    shared: Arc<Shared>,
    /// How it ended: `None` before, and once it was handed out.
    end: Option<End>,
}

#[derive(Debug)]
enum End {
    Done(Generated),
    Over,
}

/// Whom to wake when something comes.
type Slot = Arc<Mutex<Option<Waker>>>;

/// The engine's end of a [`Reply`].
pub(super) struct Outlet {
    /// `None` when it is being dropped: who is woken then finds the other end gone.
    events: Option<Sender<Event>>,
    waker: Slot,
}

impl Outlet {
    /// Who does not want to hear of it any more has cancelled it.
    pub(super) fn send(&self, event: Event) {
        if let Some(events) = &self.events {
            let _ = events.send(event);
        }
        self.wake();
    }

    fn wake(&self) {
        let waker = self
            .waker
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.events = None;
        self.wake();
    }
}

impl Reply {
    /// Of a request, and the end that the engine talks to.
    pub(super) fn new(id: RequestId, shared: &Arc<Shared>) -> (Self, Outlet) {
        let (sender, events) = channel();
        let waker = Slot::default();
        let outlet = Outlet {
            events: Some(sender),
            waker: waker.clone(),
        };
        let reply = Self {
            id,
            events,
            waker,
            shared: shared.clone(),
            end: None,
        };
        (reply, outlet)
    }

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

    /// The next piece of text, for async code: wakes the task when there is one. `None` when the answer is over ([`Reply::take_end`] has all of it then) or
    /// behind an error. With the feature `async` a reply is a `Stream` of these.
    pub fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<String>>> {
        if self.end.is_some() {
            return Poll::Ready(None);
        }
        // First: what comes behind a look at the channel wakes.
        let waker = Some(context.waker().clone());
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = waker;
        match self.events.try_recv() {
            Err(TryRecvError::Empty) => Poll::Pending,
            event => Poll::Ready(self.piece(event.ok())),
        }
    }

    /// The piece in an event, or the end; without an event the engine has gone.
    fn piece(&mut self, event: Option<Event>) -> Option<Result<String>> {
        let (end, piece) = match event {
            Some(Event::Text(text)) => return Some(Ok(text)),
            Some(Event::Done(out)) => (End::Done(out), None),
            Some(Event::Failed(e)) => (End::Over, Some(Err(e))),
            None => (End::Over, Some(Err(EngineError::Ended.into()))),
        };
        self.end = Some(end);
        piece
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

/// Ends a request, also while another thread waits for it: that gets [`SessionError::Cancelled`](crate::infer::SessionError::Cancelled).
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
        let event = self.events.recv().ok();
        self.piece(event)
    }
}

#[cfg(feature = "async")]
impl futures_core::Stream for Reply {
    type Item = Result<String>;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<String>>> {
        self.get_mut().poll_piece(context)
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.end.is_none() {
            self.canceller().cancel();
        }
    }
}
