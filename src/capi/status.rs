//! Status codes, the message of the last error, versions.

use ggraft::Error;
use ggraft::adapter::AdapterError;
use ggraft::host::HostError;
use ggraft::model::ModelError;
use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Grows when a change of the library breaks programs that were compiled with an older header.
pub const GGRAFT_ABI_VERSION: u32 = 1;

/// What a function returns: zero, or a negative number for each class of error. Numbers never change their meaning; new ones
/// may join. `ggraft_last_error` tells the details.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_status {
    /// Success.
    GGRAFT_OK = 0,
    /// A pointer that must not be NULL is NULL.
    GGRAFT_ERROR_NULL = -1,
    /// An argument or a field of a params struct is out of range.
    GGRAFT_ERROR_ARGUMENT = -2,
    /// A string is not UTF-8.
    GGRAFT_ERROR_UTF8 = -3,
    /// The buffer is too small; the size that is needed was stored.
    GGRAFT_ERROR_BUFFER = -4,
    /// The operating system refused to read or write a file.
    GGRAFT_ERROR_IO = -5,
    /// A GGUF file is malformed.
    GGRAFT_ERROR_GGUF = -6,
    /// The model is not one that this library runs.
    GGRAFT_ERROR_MODEL = -7,
    /// The tokenizer or the chat template cannot be used, or the text cannot be tokenized.
    GGRAFT_ERROR_VOCAB = -8,
    /// A PEFT folder is malformed or of a kind that is not supported.
    GGRAFT_ERROR_PEFT = -9,
    /// An adapter is malformed, or cannot be used in this way.
    GGRAFT_ERROR_ADAPTER = -10,
    /// The adapter was made for another base model.
    GGRAFT_ERROR_ADAPTER_MISMATCH = -11,
    /// The text does not fit into the context.
    GGRAFT_ERROR_CONTEXT_FULL = -12,
    /// The session or the trainer was cancelled.
    GGRAFT_ERROR_CANCELLED = -13,
    /// Memory ran out.
    GGRAFT_ERROR_MEMORY = -14,
    /// The model computed values that are not finite: its weights or the adapter are damaged, or a learning rate is too high.
    GGRAFT_ERROR_NON_FINITE = -15,
    /// The session is not in a state for this: an adapter is attached already or none is, or nothing was computed yet.
    GGRAFT_ERROR_STATE = -16,
    /// The handle is in use, by another thread or by the function that called this callback.
    GGRAFT_ERROR_BUSY = -17,
    /// The process has a log receiver already that this library cannot replace.
    GGRAFT_ERROR_LOG = -18,
    /// A checkpoint is damaged, or of another run.
    GGRAFT_ERROR_CHECKPOINT = -21,
    /// A defect of this library. The handle that was in use refuses further work; others are not affected.
    GGRAFT_ERROR_INTERNAL = -19,
    /// A row of a data set cannot be used.
    GGRAFT_ERROR_DATA = -20,
    /// A saved session is damaged, or was saved with another model, adapter or KV cache.
    GGRAFT_ERROR_SAVED = -22,
    /// An application's llama_context cannot take an adapter, or one of its functions failed.
    GGRAFT_ERROR_HOST = -23,
}

#[cfg(feature = "runtime")]
mod runtime;

use ggraft_status::*;

/// A status other than OK, with the message for `ggraft_last_error`.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: ggraft_status,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(status: ggraft_status, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(class(&error), error.to_string())
    }
}

/// The errors of the library's modules, by way of [`Error`].
macro_rules! failure_from {
    ($($error:ty),*) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Error::from(error).into()
            }
        }
    )*};
}

#[cfg(feature = "runtime")]
use failure_from;

failure_from!(AdapterError);

/// The class of an error. The catch-alls are for the compiler, which forbids to count another crate's variants: a test checks
/// that those of the small enumerations are all named here and in `status/runtime.rs` (tests/capi.rs).
fn class(error: &Error) -> ggraft_status {
    match error {
        Error::Gguf { .. } => GGRAFT_ERROR_GGUF,
        Error::Peft(_) => GGRAFT_ERROR_PEFT,
        Error::Adapter(e) => match e {
            AdapterError::FingerprintMismatch { .. }
            | AdapterError::ConcatFingerprints { .. }
            | AdapterError::ConcatBases { .. } => GGRAFT_ERROR_ADAPTER_MISMATCH,
            e if e.is_shape_mismatch() => GGRAFT_ERROR_ADAPTER_MISMATCH,
            _ => GGRAFT_ERROR_ADAPTER,
        },
        Error::Model { source, .. } => match source {
            ModelError::Metadata(_) => GGRAFT_ERROR_GGUF,
            ModelError::OutOfMemory { .. } => GGRAFT_ERROR_MEMORY,
            _ => GGRAFT_ERROR_MODEL,
        },
        Error::Host(e) => match e {
            HostError::NoContext => GGRAFT_ERROR_NULL,
            HostError::SequenceRange { .. } | HostError::OtherHost => GGRAFT_ERROR_ARGUMENT,
            HostError::NotEmpty { .. } => GGRAFT_ERROR_STATE,
            HostError::NoRoom { .. } => GGRAFT_ERROR_CONTEXT_FULL,
            HostError::Template
            | HostError::NoVirtualTokens
            | HostError::ControlWidth { .. }
            | HostError::ControlLayers { .. } => GGRAFT_ERROR_ADAPTER,
            HostError::Tokenize => GGRAFT_ERROR_VOCAB,
            HostError::Options { .. } => GGRAFT_ERROR_MODEL,
            HostError::MissingFunction { .. }
            | HostError::OtherBase { .. }
            | HostError::NoMemory
            | HostError::Recurrent
            | HostError::Encoder
            | HostError::UnknownState { .. }
            | HostError::CacheType { .. }
            | HostError::NoState
            | HostError::ControlRefused { .. }
            | HostError::Decode { .. } => GGRAFT_ERROR_HOST,
            _ => GGRAFT_ERROR_INTERNAL,
        },
        Error::Io { .. } => GGRAFT_ERROR_IO,
        #[cfg(feature = "runtime")]
        other => runtime::class(other),
        #[cfg(not(feature = "runtime"))]
        _ => GGRAFT_ERROR_INTERNAL,
    }
}

thread_local! {
    /// The message of the last function that failed on this thread.
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// `text` for C, which cannot see what follows a NUL.
pub(crate) fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "\u{fffd}")).expect("NULs were replaced")
}

/// Runs the body of an extern function: errors and panics become a status and a message.
pub(crate) fn call(body: impl FnOnce() -> Result<(), Failure>) -> ggraft_status {
    match call_value(|| body().map(|()| 0)) {
        Ok(_) => GGRAFT_OK,
        Err(status) => status,
    }
}

/// As [`call`], for functions that return a number or a negative status.
pub(crate) fn call_number(body: impl FnOnce() -> Result<i64, Failure>) -> i64 {
    call_value(body).unwrap_or_else(|status| status as i64)
}

fn call_value(body: impl FnOnce() -> Result<i64, Failure>) -> Result<i64, ggraft_status> {
    // Whatever a panic leaves half-changed is behind a mutex, which it poisons.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(failure)) => failure,
        Err(panic) => Failure::new(
            GGRAFT_ERROR_INTERNAL,
            format!("internal error: {}", panic_message(&*panic)),
        ),
    };
    // Fails only while the thread's locals are being destroyed, when nobody can ask any more.
    let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = c_string(&failure.message));
    Err(failure.status)
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}

/// The message of the last function that failed on the calling thread, empty if none did. A success does not clear it. The
/// string belongs to the thread and lives until the next function fails on it, or the thread ends.
#[unsafe(no_mangle)]
pub extern "C" fn ggraft_last_error() -> *const c_char {
    LAST_ERROR
        .try_with(|last| last.borrow().as_ptr())
        .unwrap_or(c"".as_ptr())
}

/// The library's version, for example "0.1.0". A static string.
#[unsafe(no_mangle)]
pub extern "C" fn ggraft_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => unreachable!(),
        };
    VERSION.as_ptr()
}

/// GGRAFT_ABI_VERSION of the library, to be compared with that of the header.
#[unsafe(no_mangle)]
pub extern "C" fn ggraft_abi_version() -> u32 {
    GGRAFT_ABI_VERSION
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last_error() -> String {
        // SAFETY: the string lives until the next error on this thread.
        unsafe { CStr::from_ptr(ggraft_last_error()) }
            .to_str()
            .unwrap()
            .to_owned()
    }

    #[test]
    fn a_panic_becomes_a_status_and_a_message() {
        assert_eq!(call(|| panic!("number {}", 7)), GGRAFT_ERROR_INTERNAL);
        assert_eq!(last_error(), "internal error: number 7");
        assert_eq!(call(|| panic!("plain")), GGRAFT_ERROR_INTERNAL);
        assert_eq!(last_error(), "internal error: plain");
        assert_eq!(
            call_number(|| std::panic::panic_any(7)),
            GGRAFT_ERROR_INTERNAL as i64
        );
        assert_eq!(last_error(), "internal error: no message");
    }

    #[test]
    fn a_success_keeps_the_message_and_nul_is_replaced() {
        let fail = || Err(Failure::new(GGRAFT_ERROR_ARGUMENT, "a\0b"));
        assert_eq!(call(fail), GGRAFT_ERROR_ARGUMENT);
        assert_eq!(call(|| Ok(())), GGRAFT_OK);
        assert_eq!(call_number(|| Ok(5)), 5);
        assert_eq!(last_error(), "a\u{fffd}b");
    }
}
