//! A list of requests that is worked off.

use super::request::{Event, Request, RequestId};
use super::scheduler::Scheduler;
use crate::error::Result;
use crate::infer::generate::Generated;
use std::collections::HashMap;

/// Where requests come from, and their answers go to.
pub trait Jobs {
    /// Names a request.
    type Key;

    /// The next request, if there is one. It is asked for when there is room for it, so that a long list need not be in memory.
    fn next(&mut self) -> Option<(Self::Key, Request)>;

    /// What became of a request: requests end in any order.
    fn end(&mut self, key: Self::Key, outcome: Result<Generated>);
}

/// Requests that are submitted beyond those that run: of some that begin with the same the first is computed, and the others go on from there.
const AHEAD: usize = 64;

impl Scheduler {
    /// Computes all requests of `jobs`, until there are none or the token ([`Scheduler::cancel_token`]) is raised. Requests that were submitted before are computed
    /// beside them, and what they say is lost.
    pub fn serve<J: Jobs>(&mut self, jobs: &mut J) {
        let cancel = self.cancel_token();
        let ahead = AHEAD.min(self.options().max_waiting).max(1);
        let mut running: HashMap<RequestId, J::Key> = HashMap::new();
        let mut more = true;
        while !cancel.is_cancelled() {
            while more && self.len()[1] < ahead {
                let Some((key, request)) = jobs.next() else {
                    more = false;
                    break;
                };
                match self.submit(request) {
                    Ok(id) => drop(running.insert(id, key)),
                    Err(e) => jobs.end(key, Err(e)),
                }
            }
            if self.is_idle() {
                return;
            }
            for (id, event) in self.step() {
                let outcome = match event {
                    Event::Done(out) => Ok(out),
                    Event::Failed(e) => Err(e),
                    Event::Text(_) => continue,
                };
                if let Some(key) = running.remove(&id) {
                    jobs.end(key, outcome);
                }
            }
        }
    }
}
