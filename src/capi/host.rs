//! Adapters in an application's own `llama_context`.

use super::adapter::{ggraft_adapter, open};
use super::exclusive::Exclusive;
use super::pointer::{array, give, handle, path, place, take_back};
use super::status::{Failure, call, call_number, ggraft_status};
use ggraft::adapter::ControlVector;
use ggraft::host::{Api, Graft, Host, Piece};
use ggraft::model::Base;
use std::ffi::{c_char, c_void};

/// A `llama_context` of the application's, and the base that it runs. For one thread at a time (GGRAFT_ERROR_BUSY otherwise), as the context itself.
pub struct ggraft_host {
    host: Exclusive<Host>,
}

/// An adapter in the form that one context asked for. May be used by any thread.
pub struct ggraft_graft {
    graft: Graft,
}

/// Of `ggraft_host_steer`: to the last layer.
pub const GGRAFT_LAST_LAYER: u32 = u32::MAX;

/// A function of llama.h, to be cast to its own type.
pub type ggraft_function = Option<unsafe extern "C" fn()>;

/// Finds a function of the application's libllama by its name in llama.h, or returns NULL; `GGRAFT_HOST_FUNCTIONS` lists all that are asked for.
pub type ggraft_find_callback =
    Option<unsafe extern "C" fn(name: *const c_char, user_data: *mut c_void) -> ggraft_function>;

/// A part of a prompt: `n` tokens, with `rows` NULL, or `n` rows of embeddings, with `tokens` NULL. They live until the callback returns.
pub type ggraft_piece_callback = Option<
    unsafe extern "C" fn(tokens: *const i32, rows: *const f32, n: usize, user_data: *mut c_void),
>;

/// Makes a host of the application's `ctx`, a `struct llama_context *`, which runs the model file `base`. Its functions are found by `find`; with NULL by the dynamic linker, if
/// the process has them as a shared library. To see how the context keeps keys and values one token is decoded into the sequence `seq`, which must be empty, and taken out
/// again. The context must live as long as the host is used, but for `ggraft_host_free`, and no other thread may use it during a call.
///
/// # Safety
/// `find` returns the functions that it is asked for, or NULL, `ctx` is NULL or a live context of their library, `base` a NUL-terminated string, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_host_new(
    find: ggraft_find_callback,
    user_data: *mut c_void,
    ctx: *mut c_void,
    base: *const c_char,
    seq: i32,
    out: *mut *mut ggraft_host,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        let api = match find {
            None => loaded()?,
            Some(find) => {
                let at = |name: &std::ffi::CStr| {
                    // SAFETY: the caller's promise.
                    let function = unsafe { find(name.as_ptr(), user_data) };
                    function.map_or(std::ptr::null(), |f| f as *const c_void)
                };
                // SAFETY: the caller's promise.
                unsafe { Api::find(at) }.map_err(ggraft::Error::from)?
            }
        };
        // SAFETY: the caller's promise.
        let base = Base::open(unsafe { path(base, "base")? })?;
        // SAFETY: the caller's promise.
        let host = unsafe { Host::new(api, ctx, base, seq)? };
        let host = Exclusive::new(host);
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, ggraft_host { host }) };
        Ok(())
    })
}

#[cfg(unix)]
fn loaded() -> Result<Api, Failure> {
    Ok(Api::loaded().map_err(ggraft::Error::from)?)
}

#[cfg(not(unix))]
fn loaded() -> Result<Api, Failure> {
    use super::status::ggraft_status::GGRAFT_ERROR_NULL;
    let why = "find is NULL, and there is no dynamic linker to ask here";
    Err(Failure::new(GGRAFT_ERROR_NULL, why))
}

/// Frees the handle; NULL is allowed. Neither the context nor what was attached to it is touched.
///
/// # Safety
/// `host` is NULL or a live handle that no thread uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_host_free(host: *mut ggraft_host) {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { take_back(host) };
        Ok(())
    });
}

/// Loads an adapter: a GGUF adapter file, or a PEFT folder for the host's base. `ggraft_adapter_free` frees it.
///
/// # Safety
/// `host` is a live handle, `path` a NUL-terminated string, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_host_load(
    host: *const ggraft_host,
    path: *const c_char,
    out: *mut *mut ggraft_adapter,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let path = unsafe { self::path(path, "path")? };
        let base = |host: &mut Host| Ok((host.base().shape().clone(), host.base().fingerprint()));
        // SAFETY: the caller's promise.
        let adapter = open(path, || unsafe { with(host, base) })?;
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, adapter) };
        Ok(())
    })
}

/// Prepares an adapter for the host's context: once, to be attached often. Virtual tokens are decoded into the sequence `seq`, which must be empty, and taken out again; a
/// prefix does not need it. One whose template places virtual tokens among the text is refused: that is what `ggraft_host_prompt` is for.
///
/// # Safety
/// `host` and `adapter` are live handles, `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_host_prepare(
    host: *mut ggraft_host,
    adapter: *const ggraft_adapter,
    seq: i32,
    out: *mut *mut ggraft_graft,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let adapter = unsafe { &handle(adapter, "adapter")?.adapter };
        // SAFETY: the caller's promise.
        let graft = unsafe { with(host, |host| Ok(host.prepare(adapter, seq)?))? };
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, ggraft_graft { graft }) };
        Ok(())
    })
}

/// Positions that a prepared adapter takes, or a negative `ggraft_status`.
///
/// # Safety
/// `graft` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_graft_length(graft: *const ggraft_graft) -> i64 {
    // SAFETY: the caller's promise.
    call_number(|| unsafe { Ok(handle(graft, "graft")?.graft.length() as i64) })
}

/// Frees the handle; NULL is allowed. Sequences that it is attached to keep it.
///
/// # Safety
/// `graft` is NULL or a live handle that no thread uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_graft_free(graft: *mut ggraft_graft) {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { take_back(graft) };
        Ok(())
    });
}

/// Puts a prepared adapter at the beginning of the sequence `seq`, which must be empty. Returns the position of the first token behind it, or a negative `ggraft_status`.
///
/// # Safety
/// `host` and `graft` are live handles.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_host_attach(
    host: *mut ggraft_host,
    graft: *const ggraft_graft,
    seq: i32,
) -> i64 {
    // SAFETY: the caller's promise.
    unsafe { place_graft(host, graft, |host, graft| Ok(host.attach(graft, seq)?)) }
}

/// As `ggraft_host_attach`, in place of what `seq` has, text and all.
///
/// # Safety
/// As for `ggraft_host_attach`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_host_swap(
    host: *mut ggraft_host,
    graft: *const ggraft_graft,
    seq: i32,
) -> i64 {
    // SAFETY: the caller's promise.
    unsafe { place_graft(host, graft, |host, graft| Ok(host.swap(graft, seq)?)) }
}

/// As `ggraft_host_swap`, and decodes `tokens` behind the adapter, so that the text goes on under it. Returns the position behind them, or a negative `ggraft_status`; the
/// context's logits are those of the last one.
///
/// # Safety
/// As for `ggraft_host_attach`; `tokens` has `n` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_host_swap_and_recompute(
    host: *mut ggraft_host,
    graft: *const ggraft_graft,
    seq: i32,
    tokens: *const i32,
    n: usize,
) -> i64 {
    // SAFETY: the caller's promise.
    unsafe {
        place_graft(host, graft, |host, graft| {
            let tokens = array(tokens, n, "tokens")?;
            Ok(host.swap_and_recompute(graft, seq, tokens)?)
        })
    }
}

/// Empties the sequence `seq`.
///
/// # Safety
/// `host` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_host_detach(host: *mut ggraft_host, seq: i32) -> ggraft_status {
    // SAFETY: the caller's promise.
    call(|| unsafe { with(host, |host| Ok(host.detach(seq)?)) })
}

/// Lets the sequence `to`, which must be empty, begin with all that `from` has: cells are shared where the context has one cache for all sequences, and copied elsewhere.
///
/// # Safety
/// `host` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_host_copy(
    host: *mut ggraft_host,
    from: i32,
    to: i32,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    call(|| unsafe { with(host, |host| Ok(host.copy(from, to)?)) })
}

/// Steers all of the context's sequences from the next decode on by a control vector in llama.cpp's file at `path`, `strength` times as far, in the layers from `first` to `last`
/// (GGRAFT_LAST_LAYER: to the end) that it has directions for. A context has one: the last takes the place of the one before, and `path` NULL takes it off. The one function of
/// llama.h that `GGRAFT_HOST_FUNCTIONS` does not list is needed for it, `llama_set_adapter_cvec`, which not all versions have under this name.
///
/// # Safety
/// `host` is a live handle, `path` is NULL or a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_host_steer(
    host: *mut ggraft_host,
    path: *const c_char,
    strength: f32,
    first: u32,
    last: u32,
) -> ggraft_status {
    call(|| {
        let vector = match path.is_null() {
            true => None,
            false => {
                // SAFETY: the caller's promise.
                let path = unsafe { self::path(path, "path")? };
                Some(ControlVector::load(path)?.scaled(strength)?)
            }
        };
        let layers = first as usize..=last as usize;
        // SAFETY: the caller's promise.
        unsafe { with(host, |host| Ok(host.steer(vector.as_ref(), layers)?)) }
    })
}

/// Decodes a prompt of `n` tokens, without BOS, into the empty sequence `seq`, with the adapter's virtual tokens where its template places them. Returns the position behind
/// it, or a negative `ggraft_status`; the context's logits are those of the last token or row.
///
/// # Safety
/// `host` and `adapter` are live handles, `tokens` has `n` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_host_prompt(
    host: *mut ggraft_host,
    adapter: *const ggraft_adapter,
    tokens: *const i32,
    n: usize,
    seq: i32,
) -> i64 {
    // SAFETY: the caller's promise.
    number(|| unsafe {
        let adapter = &handle(adapter, "adapter")?.adapter;
        let tokens = array(tokens, n, "tokens")?;
        with(host, |host| Ok(host.prompt(adapter, tokens, seq)?))
    })
}

/// As `ggraft_host_prompt`, but hands out the parts of the prompt, in order, for batches of the application's own: tokens, and rows as `embd` of a batch takes them.
///
/// # Safety
/// As for `ggraft_host_prompt`; `callback` may be called with `user_data`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_host_compose(
    host: *mut ggraft_host,
    adapter: *const ggraft_adapter,
    tokens: *const i32,
    n: usize,
    callback: ggraft_piece_callback,
    user_data: *mut c_void,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let (width, pieces) = unsafe {
            let adapter = &handle(adapter, "adapter")?.adapter;
            let tokens = array(tokens, n, "tokens")?;
            with(host, |host| {
                let width = host.base().shape().n_embd;
                Ok((width, host.compose(adapter, tokens)?))
            })?
        };
        let Some(callback) = callback else {
            return Ok(());
        };
        for piece in &pieces {
            let (tokens, rows, n) = match piece {
                Piece::Tokens(ids) => (ids.as_ptr(), std::ptr::null(), ids.len()),
                Piece::Rows(rows) => (std::ptr::null(), rows.as_ptr(), rows.len() / width),
            };
            // SAFETY: the caller's promise.
            unsafe { callback(tokens, rows, n, user_data) };
        }
        Ok(())
    })
}

/// What `body` does with the host.
///
/// # Safety
/// `host` is NULL or a live handle.
unsafe fn with<T>(
    host: *const ggraft_host,
    body: impl FnOnce(&mut Host) -> Result<T, Failure>,
) -> Result<T, Failure> {
    // SAFETY: the caller's promise.
    let host = unsafe { handle(host, "host")? };
    body(&mut *host.host.lock("host")?)
}

/// The position behind what `body` does with both handles.
///
/// # Safety
/// Each is NULL or a live handle.
unsafe fn place_graft(
    host: *const ggraft_host,
    graft: *const ggraft_graft,
    body: impl FnOnce(&mut Host, &Graft) -> Result<usize, Failure>,
) -> i64 {
    // SAFETY: the caller's promise.
    number(|| unsafe {
        let graft = &handle(graft, "graft")?.graft;
        with(host, |host| body(host, graft))
    })
}

fn number(body: impl FnOnce() -> Result<usize, Failure>) -> i64 {
    call_number(|| body().map(|n| n as i64))
}
