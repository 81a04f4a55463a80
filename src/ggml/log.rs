//! One-time start-up of libllama, with its log lines and ggml's sent to [`tracing`] instead of stderr.

use ggml_sys as sys;
use std::cell::Cell;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Once;

/// Target of every event that comes from ggml or libllama, for filters such as `ggml=warn`.
const TARGET: &str = "ggml";

/// Installs the log callback and starts libllama's backends, once per process; later calls return at once.
pub(crate) fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: `forward` has the signature ggml asks for, lives for ever and ignores the null user data. `Once` keeps
        // two threads from setting it at the same time.
        unsafe { sys::llama_log_set(Some(forward), std::ptr::null_mut()) };
        // SAFETY: called once, before any other libllama function of this crate.
        unsafe { sys::llama_backend_init() };
    });
}

/// Receives one piece of log text from C++. A piece of level CONT continues the piece before it on the same thread.
unsafe extern "C" fn forward(
    level: sys::ggml_log_level,
    text: *const c_char,
    _user_data: *mut c_void,
) {
    thread_local! {
        static LAST: Cell<sys::ggml_log_level> = const { Cell::new(sys::GGML_LOG_LEVEL_INFO) };
    }
    if text.is_null() {
        return;
    }
    let level = if level == sys::GGML_LOG_LEVEL_CONT {
        LAST.get()
    } else {
        LAST.set(level);
        level
    };
    // SAFETY: ggml passes a NUL-terminated string that lives until this function returns.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let text = text.trim_end();
    if text.is_empty() {
        return;
    }
    match level {
        sys::GGML_LOG_LEVEL_ERROR => tracing::error!(target: TARGET, "{text}"),
        sys::GGML_LOG_LEVEL_WARN => tracing::warn!(target: TARGET, "{text}"),
        sys::GGML_LOG_LEVEL_INFO => tracing::info!(target: TARGET, "{text}"),
        _ => tracing::debug!(target: TARGET, "{text}"),
    }
}
