//! Log lines for a C callback, installed on request only.

use super::status::{Failure, c_string, call, ggraft_status, ggraft_status::*};
use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::fmt::{self, Write};
use std::sync::{Mutex, PoisonError, RwLock};
use tracing::field::{Field, Visit};
use tracing::subscriber::{Interest, Subscriber};
use tracing::{Event, Level, Metadata, span};

/// How important a log line is.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ggraft_log_level {
    /// Something failed.
    GGRAFT_LOG_ERROR = 1,
    /// Something is not as it should be.
    GGRAFT_LOG_WARN = 2,
    /// What a user may want to know.
    GGRAFT_LOG_INFO = 3,
    /// What a developer may want to know.
    GGRAFT_LOG_DEBUG = 4,
    /// Everything.
    GGRAFT_LOG_TRACE = 5,
}

use ggraft_log_level::*;

impl ggraft_log_level {
    fn of(level: Level) -> Self {
        match level {
            Level::ERROR => GGRAFT_LOG_ERROR,
            Level::WARN => GGRAFT_LOG_WARN,
            Level::INFO => GGRAFT_LOG_INFO,
            Level::DEBUG => GGRAFT_LOG_DEBUG,
            Level::TRACE => GGRAFT_LOG_TRACE,
        }
    }

    fn from_c(value: i32) -> Option<Self> {
        [
            GGRAFT_LOG_ERROR,
            GGRAFT_LOG_WARN,
            GGRAFT_LOG_INFO,
            GGRAFT_LOG_DEBUG,
            GGRAFT_LOG_TRACE,
        ]
        .into_iter()
        .find(|&level| level as i32 == value)
    }
}

/// Receives a log line: a `ggraft_log_level`, the part of the library it comes from, and the text (UTF-8, NUL-terminated, both
/// live until the callback returns). It is called from any thread, also from several at once. Lines that are logged by
/// functions that the callback calls are dropped. No exception and no longjmp may leave it.
pub type ggraft_log_callback = Option<
    unsafe extern "C" fn(
        level: i32,
        target: *const c_char,
        message: *const c_char,
        user_data: *mut c_void,
    ),
>;

/// Where lines go now.
#[derive(Clone, Copy)]
struct Receiver {
    callback: unsafe extern "C" fn(i32, *const c_char, *const c_char, *mut c_void),
    user_data: *mut c_void,
    max_level: ggraft_log_level,
}

// SAFETY: the caller of `ggraft_log_set` promises that the callback may run with this data on any thread.
unsafe impl Send for Receiver {}
// SAFETY: as above, also on several threads at once.
unsafe impl Sync for Receiver {}

/// Read-locked while the callback runs, so that the data of a replaced callback can be freed.
static RECEIVER: RwLock<Option<Receiver>> = RwLock::new(None);

thread_local! {
    /// The callback runs on this thread: a second read lock could wait for ever.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// The process-wide receiver of `tracing` events.
struct Bridge;

impl Subscriber for Bridge {
    fn register_callsite(&self, _metadata: &'static Metadata<'static>) -> Interest {
        // The level can change at any time: ask for each event.
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        !INSIDE.get()
            && metadata.is_event()
            && RECEIVER
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .is_some_and(|r| ggraft_log_level::of(*metadata.level()) <= r.max_level)
    }

    fn event(&self, event: &Event<'_>) {
        // Formatted outside of the lock: values with a `Debug` of their own may do anything.
        let mut line = Line::default();
        event.record(&mut line);
        let metadata = event.metadata();
        let level = ggraft_log_level::of(*metadata.level());
        let (target, text) = (c_string(metadata.target()), c_string(&line.text()));
        if INSIDE.get() {
            return;
        }
        let receiver = RECEIVER.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(r) = receiver.filter(|r| level <= r.max_level) {
            INSIDE.set(true);
            // SAFETY: the function and data that `ggraft_log_set` was given and that, because of the lock, are still set.
            unsafe { (r.callback)(level as i32, target.as_ptr(), text.as_ptr(), r.user_data) };
            INSIDE.set(false);
        }
    }

    // Only events are shown. `enabled` refuses all spans, so these are never called with one of ours.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// An event as text: the message, then ` name=value` for each field.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn text(self) -> String {
        if self.message.is_empty() {
            self.fields.trim_start().to_owned()
        } else {
            self.message + &self.fields
        }
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail; a `Debug` that fails leaves what it wrote.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

/// Sends log lines up to `max_level` (a `ggraft_log_level`) to `callback`; NULL switches them off again. When it returns, the
/// callback from before is not running and never called again.
///
/// The first call installs the receiver for the process. If the library is part of a Rust program that has installed a
/// `tracing` subscriber of its own, log lines go there and this is GGRAFT_ERROR_LOG. From inside the callback it is
/// GGRAFT_ERROR_BUSY.
///
/// # Safety
/// `callback` may be called with `user_data` from any thread, also several at once, until the next call of this function returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_log_set(
    callback: ggraft_log_callback,
    user_data: *mut c_void,
    max_level: i32,
) -> ggraft_status {
    call(|| {
        if INSIDE.get() {
            return Err(Failure::new(
                GGRAFT_ERROR_BUSY,
                "the log callback cannot be changed from inside itself",
            ));
        }
        let receiver = match callback {
            None => None,
            Some(callback) => {
                let max_level = ggraft_log_level::from_c(max_level).ok_or_else(|| {
                    Failure::new(
                        GGRAFT_ERROR_ARGUMENT,
                        format!("{max_level} is no ggraft_log_level"),
                    )
                })?;
                install()?;
                Some(Receiver {
                    callback,
                    user_data,
                    max_level,
                })
            }
        };
        *RECEIVER.write().unwrap_or_else(PoisonError::into_inner) = receiver;
        Ok(())
    })
}

fn install() -> Result<(), Failure> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*installed {
        tracing::subscriber::set_global_default(Bridge).map_err(|_| {
            Failure::new(
                GGRAFT_ERROR_LOG,
                "the program has installed a tracing subscriber already: it receives the log lines",
            )
        })?;
        *installed = true;
    }
    Ok(())
}
