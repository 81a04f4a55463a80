//! Many requests, computed in the same steps.

use crate::failure::{Failure, Result};
use ggraft::infer::Generated;
use ggraft::infer::engine::{Event, Request, RequestId, Scheduler};
use std::collections::HashMap;

/// Where requests come from, and their answers go to.
pub(crate) trait Jobs {
    /// Names a request.
    type Key;

    /// The next request, if there is one.
    fn next(&mut self) -> Option<(Self::Key, Request)>;

    /// What became of a request.
    fn end(&mut self, key: Self::Key, outcome: Result<Generated>);
}

/// Requests that are submitted beyond those that run: of some that begin with the same the first is computed, and the others go on from there.
const AHEAD: usize = 64;

/// Computes all requests, until the scheduler's token is raised.
pub(crate) fn serve<J: Jobs>(scheduler: &mut Scheduler, jobs: &mut J) {
    let cancel = scheduler.cancel_token();
    let mut running: HashMap<RequestId, J::Key> = HashMap::new();
    let mut more = true;
    while !cancel.is_cancelled() {
        while more && scheduler.len()[1] < AHEAD {
            let Some((key, request)) = jobs.next() else {
                more = false;
                break;
            };
            match scheduler.submit(request) {
                Ok(id) => drop(running.insert(id, key)),
                Err(e) => jobs.end(key, Err(e.into())),
            }
        }
        if scheduler.is_idle() {
            return;
        }
        for (id, event) in scheduler.step() {
            let outcome = match event {
                Event::Done(out) => Ok(out),
                Event::Failed(e) => Err(Failure::from(e)),
                _ => continue,
            };
            if let Some(key) = running.remove(&id) {
                jobs.end(key, outcome);
            }
        }
    }
}
