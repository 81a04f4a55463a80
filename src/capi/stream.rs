//! Tokens to text that never ends inside a character, for callers that loop themselves.

use super::exclusive::Exclusive;
use super::model::ggraft_model;
use super::pointer::{give, handle, place, take_back};
use super::status::{Failure, call, ggraft_status};
use ggraft::infer::text::Utf8Stream;
use ggraft::model::Model;
use std::ffi::c_char;

/// Turns tokens into text piece by piece. For one thread at a time.
pub struct ggraft_text_stream {
    model: Model,
    state: Exclusive<State>,
}

#[derive(Default)]
struct State {
    utf8: Utf8Stream,
    /// The last piece, with a NUL.
    piece: String,
}

impl State {
    /// Keeps `piece` until the next call and stores where it is.
    ///
    /// # Safety
    /// `text` and `length` are valid for writes.
    unsafe fn show(&mut self, piece: String, text: *mut *const c_char, length: *mut usize) {
        self.piece = piece;
        // SAFETY: the caller's promise.
        unsafe { length.write(self.piece.len()) };
        self.piece.push('\0');
        // SAFETY: the caller's promise.
        unsafe { text.write(self.piece.as_ptr().cast()) };
    }
}

/// A stream for tokens of `model`.
///
/// # Safety
/// `model` is a live handle, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_text_stream_new(
    model: *const ggraft_model,
    out: *mut *mut ggraft_text_stream,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let handle = unsafe { handle(model, "model")? };
        let object = ggraft_text_stream {
            model: handle.model.clone(),
            state: Exclusive::new(State::default()),
        };
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, object) };
        Ok(())
    })
}

/// Takes the next token. `*text` becomes the text that is complete now (UTF-8, NUL-terminated, possibly empty), `*length` its
/// bytes without the NUL. The text belongs to the stream and lives until its next call.
///
/// # Safety
/// `stream` is a live handle, `text` and `length` are valid for writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_text_stream_push(
    stream: *mut ggraft_text_stream,
    token: i32,
    text: *mut *const c_char,
    length: *mut usize,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    unsafe {
        step(stream, text, length, |model, utf8| {
            utf8.push(&model.vocab().token_bytes(token, false))
        })
    }
}

/// Ends the text: U+FFFD if its last character is incomplete, else nothing. The stream can be used again for another text.
///
/// # Safety
/// As `ggraft_text_stream_push`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_text_stream_finish(
    stream: *mut ggraft_text_stream,
    text: *mut *const c_char,
    length: *mut usize,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    unsafe { step(stream, text, length, |_, utf8| utf8.finish()) }
}

/// # Safety
/// As `ggraft_text_stream_push`.
unsafe fn step(
    stream: *mut ggraft_text_stream,
    text: *mut *const c_char,
    length: *mut usize,
    next: impl FnOnce(&Model, &mut Utf8Stream) -> String,
) -> ggraft_status {
    call(|| {
        let (text, length) = (place(text, "text")?, place(length, "length")?);
        // SAFETY: the caller's promise.
        let handle = unsafe { handle(stream, "stream")? };
        let mut state = handle.state.lock("text stream")?;
        let piece = next(&handle.model, &mut state.utf8);
        // SAFETY: the caller's promise.
        unsafe { state.show(piece, text, length) };
        Ok::<_, Failure>(())
    })
}

/// Frees the stream; NULL is allowed.
///
/// # Safety
/// `stream` is NULL or a live handle that no thread uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_text_stream_free(stream: *mut ggraft_text_stream) {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { take_back(stream) };
        Ok(())
    });
}
