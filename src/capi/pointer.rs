//! Pointers from C, checked for what can be checked.

use super::status::{Failure, ggraft_status::*};
use std::ffi::{CStr, c_char};
use std::path::Path;

fn null(name: &str) -> Failure {
    Failure::new(GGRAFT_ERROR_NULL, format!("{name} is NULL"))
}

/// The object behind a handle.
///
/// # Safety
/// `ptr` is null or points to a live `T` that nobody changes during `'a`.
pub(crate) unsafe fn handle<'a, T>(ptr: *const T, name: &str) -> Result<&'a T, Failure> {
    // SAFETY: the caller's promise.
    unsafe { ptr.as_ref() }.ok_or_else(|| null(name))
}

/// A place for a result. Nothing is read from it, so it may be uninitialised.
pub(crate) fn place<T>(ptr: *mut T, name: &str) -> Result<*mut T, Failure> {
    if ptr.is_null() {
        Err(null(name))
    } else {
        Ok(ptr)
    }
}

/// A string.
///
/// # Safety
/// `ptr` is null or points to a NUL-terminated string that nobody changes during `'a`.
pub(crate) unsafe fn text<'a>(ptr: *const c_char, name: &str) -> Result<&'a str, Failure> {
    if ptr.is_null() {
        return Err(null(name));
    }
    // SAFETY: not null, so the caller's promise.
    unsafe { CStr::from_ptr(ptr) }
        .to_str()
        .map_err(|e| Failure::new(GGRAFT_ERROR_UTF8, format!("{name} is not UTF-8: {e}")))
}

/// As [`text`], for the name of a file or folder.
///
/// # Safety
/// As [`text`].
pub(crate) unsafe fn path<'a>(ptr: *const c_char, name: &str) -> Result<&'a Path, Failure> {
    // SAFETY: the caller's promise.
    unsafe { text(ptr, name) }.map(Path::new)
}

/// An array; null is allowed if it is empty.
///
/// # Safety
/// `ptr` is null or points to `len` values that nobody changes during `'a`.
pub(crate) unsafe fn array<'a, T>(
    ptr: *const T,
    len: usize,
    name: &str,
) -> Result<&'a [T], Failure> {
    if len == 0 {
        return Ok(&[]);
    }
    if ptr.is_null() {
        return Err(null(name));
    }
    if len > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Failure::new(
            GGRAFT_ERROR_ARGUMENT,
            format!("{name} has {len} entries, more than fit into memory"),
        ));
    }
    // SAFETY: not null and not beyond the address space, so the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(ptr, len) })
}

/// Hands `object` to C.
///
/// # Safety
/// `out` is valid for a write.
pub(crate) unsafe fn give<T>(out: *mut *mut T, object: T) {
    // SAFETY: the caller's promise.
    unsafe { out.write(Box::into_raw(Box::new(object))) };
}

/// Drops what [`give`] gave; null is nothing.
///
/// # Safety
/// `ptr` is null or came from [`give`] and is not used again.
pub(crate) unsafe fn take_back<T>(ptr: *mut T) {
    if !ptr.is_null() {
        // SAFETY: made by `Box::into_raw` in `give`, and freed once by the caller's promise.
        drop(unsafe { Box::from_raw(ptr) });
    }
}

/// Copies `values` into a caller's buffer, the buffer protocol of the header: `*needed` is stored in any case; a buffer that
/// is too small stays untouched.
///
/// # Safety
/// `buffer` is null or valid for writes of `capacity` values, `needed` for a write of one.
pub(crate) unsafe fn fill<T: Copy>(
    values: &[T],
    buffer: *mut T,
    capacity: usize,
    needed: *mut usize,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe { needed.write(values.len()) };
    if values.len() > capacity {
        return Err(too_small(values.len(), capacity));
    }
    if !values.is_empty() {
        if buffer.is_null() {
            return Err(null("buffer"));
        }
        // SAFETY: not null and not smaller than `values`; a buffer of the caller does not overlap memory of this library.
        unsafe { buffer.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    }
    Ok(())
}

/// As [`fill`], for text: `*length` does not count the NUL behind it, `capacity` must.
///
/// # Safety
/// As [`fill`].
pub(crate) unsafe fn fill_text(
    text: &str,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe { length.write(text.len()) };
    if text.len() >= capacity {
        return Err(too_small(text.len() + 1, capacity));
    }
    if buffer.is_null() {
        return Err(null("buffer"));
    }
    // SAFETY: not null and at least one byte longer than `text`; the buffers do not overlap, as in `fill`.
    unsafe {
        buffer.copy_from_nonoverlapping(text.as_ptr().cast(), text.len());
        buffer.add(text.len()).write(0);
    }
    Ok(())
}

fn too_small(needed: usize, capacity: usize) -> Failure {
    Failure::new(
        GGRAFT_ERROR_BUFFER,
        format!("the buffer holds {capacity}, {needed} are needed"),
    )
}
