//! Sessions: taking back the end of their text, and keeping it in files.

use super::pointer::{handle, path, text};
use super::session::{ggraft_session, with};
use super::status::{c_string, call, ggraft_status};
use std::ffi::c_char;

/// Takes back the end of the text: of `ggraft_session_tokens` the first `n_tokens` stay, with what was computed of them; with that many or
/// fewer nothing happens. The last turn of a chat is taken back by the number of tokens there were before it. What an adapter's
/// template puts behind the first prompt, and the text of models with a sliding window, may have to be computed anew; if that
/// fails, the session is as it was.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_truncate(
    session: *mut ggraft_session,
    n_tokens: usize,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    call(|| unsafe { with(session, |s| Ok(s.truncate(n_tokens)?)) })
}

/// Writes the text and what was computed of it to a file: a session of another process goes on with it without computing it
/// again (`ggraft_session_load`). `note` is for the application, which gets it back, the messages of a conversation for
/// example; NULL for none, at most 16 MiB. The file is replaced when the new one is complete.
///
/// # Safety
/// `session` is a live handle, `path` a NUL-terminated string, `note` NULL or one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_save(
    session: *mut ggraft_session,
    path: *const c_char,
    note: *const c_char,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let path = unsafe { self::path(path, "path")? };
        let note = match note.is_null() {
            true => "",
            // SAFETY: the caller's promise.
            false => unsafe { text(note, "note")? },
        };
        // SAFETY: the caller's promise.
        unsafe { with(session, |s| Ok(s.save(path, note)?)) }
    })
}

/// Goes on with the text of a file that `ggraft_session_save` wrote, in place of the session's own. The model, the attached adapter and the
/// type of the KV cache must be those it was saved with; the context may be another if the text fits. On failure
/// (GGRAFT_ERROR_SAVED if the file is damaged or belongs to another session) the session is as it was.
///
/// `note` may be NULL; otherwise `*note` becomes the note, which is empty if there was none. It belongs to the session and lives until its
/// next load, or until the session is freed.
///
/// # Safety
/// `session` is a live handle, `path` a NUL-terminated string, `note` NULL or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_load(
    session: *mut ggraft_session,
    path: *const c_char,
    note: *mut *const c_char,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let path = unsafe { self::path(path, "path")? };
        // SAFETY: the caller's promise.
        let found = unsafe { with(session, |s| Ok(s.load(path)?))? };
        // SAFETY: the caller's promise.
        let mut kept = unsafe { handle(session, "session")? }
            .note
            .lock("session")?;
        *kept = c_string(&found);
        if !note.is_null() {
            // SAFETY: the caller's promise.
            unsafe { note.write(kept.as_ptr()) };
        }
        Ok(())
    })
}
