//! Ctrl-C, SIGTERM, SIGHUP and SIGXCPU (`ulimit -S -t`): the first one stops the computation that runs and lets the command end in
//! order, one that comes more than a second later ends the process.

use ggraft::infer::CancelToken;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

/// Exit status after Ctrl-C, as shells report it: 128 + SIGINT; also after the other signals, which are not told apart.
pub(crate) const STATUS: u8 = 130;

/// Signals within this time of the first one are the same wish: `timeout` sends one to the process and one to its group, and
/// fingers bounce.
const SAME: Duration = Duration::from_secs(1);

type Cancel = Box<dyn FnOnce() + Send>;

struct State {
    /// What the next signal does instead of ending the process.
    cancel: Option<Cancel>,
    /// When one was last obeyed.
    obeyed: Option<Instant>,
}

fn state() -> MutexGuard<'static, State> {
    static STATE: Mutex<State> = Mutex::new(State {
        cancel: None,
        obeyed: None,
    });
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
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
        state().cancel = Some(Box::new(cancel));
        INSTALL.call_once(|| {
            // Where no handler can be installed, Ctrl-C ends the process as it would have done anyway.
            if let Err(e) = signals::install(handle) {
                tracing::warn!("Ctrl-C cannot be handled: {e}");
            }
        });
        Self(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        state().cancel = None;
    }
}

/// Runs on a thread of its own.
fn handle() {
    let mut state = state();
    match state.cancel.take() {
        Some(cancel) => {
            state.obeyed = Some(Instant::now());
            cancel();
        }
        None if state.obeyed.is_some_and(|at| at.elapsed() < SAME) => {}
        None => std::process::exit(STATUS.into()),
    }
}

/// What is done about signals before anything else: a file that may not grow (`ulimit -f`) is a write that fails, as on a full
/// disk, and no end of the process.
pub(crate) fn prepare() {
    signals::survive_limits();
}

#[cfg(unix)]
mod signals {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXCPU, SIGXFSZ};
    use signal_hook::iterator::Signals;
    use std::io;
    use std::mem::MaybeUninit;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    /// Calls `handle`, on another thread, for every signal that asks for an end. One that is ignored stays ignored: that is how
    /// `nohup` and shells protect what runs in the background.
    pub(super) fn install(handle: fn()) -> io::Result<()> {
        let polite = [SIGINT, SIGTERM, SIGHUP, SIGXCPU];
        let mut signals = Signals::new(polite.into_iter().filter(|&s| !is_ignored(s)))?;
        let wait = move || signals.forever().for_each(|_| handle());
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(wait)
            .map(drop)
    }

    pub(super) fn survive_limits() {
        // Whoever catches the signal gets an error from the write; the flag is of no interest. Where it cannot be caught, the
        // process ends as it would have done anyway.
        if !is_ignored(SIGXFSZ) {
            let _ = signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
        }
    }

    fn is_ignored(signal: i32) -> bool {
        let mut found = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: without a new action nothing changes, and there is room for the one that is in force.
        let known = unsafe { libc::sigaction(signal, std::ptr::null(), found.as_mut_ptr()) } == 0;
        // SAFETY: it was zeroed, which is a valid value, and then perhaps filled.
        known && unsafe { found.assume_init() }.sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(not(unix))]
mod signals {
    pub(super) fn install(handle: fn()) -> Result<(), ctrlc::Error> {
        ctrlc::set_handler(handle)
    }

    pub(super) fn survive_limits() {}
}
