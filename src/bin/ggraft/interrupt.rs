//! Ctrl-C: the first one stops the computation that runs and lets the command end in order, the next one ends the process.

use ggraft::infer::CancelToken;
use std::sync::{Mutex, Once, PoisonError};

/// Exit status after Ctrl-C, as shells report it: 128 + SIGINT.
pub(crate) const STATUS: u8 = 130;

/// What Ctrl-C stops at the moment.
static RUNNING: Mutex<Option<CancelToken>> = Mutex::new(None);

fn set(token: Option<CancelToken>) {
    *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = token;
}

/// While it lives, Ctrl-C raises a token instead of ending the process.
pub(crate) struct Guard(());

impl Guard {
    /// Lowers and watches `token`.
    pub(crate) fn new(token: CancelToken) -> Self {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            // Where no handler can be installed, Ctrl-C ends the process as it would have done anyway.
            if let Err(e) = ctrlc::set_handler(handle) {
                tracing::warn!("Ctrl-C cannot be handled: {e}");
            }
        });
        token.reset();
        set(Some(token));
        Self(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        set(None);
    }
}

/// Runs on a thread of its own.
fn handle() {
    match &*RUNNING.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(token) if !token.is_cancelled() => token.cancel(),
        _ => std::process::exit(STATUS.into()),
    }
}
