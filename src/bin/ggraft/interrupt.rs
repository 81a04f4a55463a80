//! Ctrl-C, SIGTERM and SIGHUP: the first one stops the computation that runs and lets the command end in order, the next one ends
//! the process.

use ggraft::infer::CancelToken;
use std::sync::{Mutex, Once, PoisonError};

/// Exit status after Ctrl-C, as shells report it: 128 + SIGINT; also after the other signals, which are not told apart.
pub(crate) const STATUS: u8 = 130;

type Cancel = Box<dyn FnOnce() + Send>;

/// What the next Ctrl-C does instead of ending the process.
static NEXT: Mutex<Option<Cancel>> = Mutex::new(None);

fn set(cancel: Option<Cancel>) {
    *NEXT.lock().unwrap_or_else(PoisonError::into_inner) = cancel;
}

/// While it lives, the first Ctrl-C cancels something instead of ending the process.
pub(crate) struct Guard(());

impl Guard {
    /// Lowers and watches the token of a session.
    pub(crate) fn new(token: CancelToken) -> Self {
        token.reset();
        Self::calling(move || token.cancel())
    }

    /// Calls `cancel`, on another thread.
    pub(crate) fn calling(cancel: impl FnOnce() + Send + 'static) -> Self {
        static INSTALL: Once = Once::new();
        // First: a signal may come as soon as there is a handler.
        set(Some(Box::new(cancel)));
        INSTALL.call_once(|| {
            // Where no handler can be installed, Ctrl-C ends the process as it would have done anyway.
            if let Err(e) = ctrlc::set_handler(handle) {
                tracing::warn!("Ctrl-C cannot be handled: {e}");
            }
        });
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
    let next = NEXT.lock().unwrap_or_else(PoisonError::into_inner).take();
    match next {
        Some(cancel) => cancel(),
        None => std::process::exit(STATUS.into()),
    }
}
