//! Adapters for a model: load, import from PEFT and export to it.

use super::adapter::{ggraft_adapter, open};
use super::model::ggraft_model;
use super::params::{self, Params};
use super::pointer::{give, handle, path, place, text};
use super::status::{Failure, call, ggraft_status, ggraft_status::*};
use ggraft::adapter::{self, ImportOptions};
use std::ffi::c_char;

/// Choices of `ggraft_adapter_import`. Fill it with `ggraft_import_params_init`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_import_params {
    /// Size of the struct, set by the init function.
    pub struct_size: usize,
    /// Name of the new adapter; NULL: none.
    pub name: *const c_char,
    /// Which task of a multi-task adapter, from 0; required there, refused elsewhere. Default -1: none.
    pub task: i32,
    /// Multiplies the rows of prompt and P-tuning adapters. Default 0: rows stay as they are.
    pub row_factor: f32,
}

// SAFETY: `repr(C)`, numbers and a raw pointer, 4 + 4 bytes at the end: no padding.
unsafe impl Params for ggraft_import_params {
    const FIRST_SIZE: usize = size_of::<Self>();
    fn defaults() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            name: std::ptr::null(),
            task: -1,
            row_factor: 0.0,
        }
    }
}

/// Loads an adapter: a GGUF adapter file, or a PEFT folder that fits `model` (with no choices; see `ggraft_adapter_import`).
/// For a file `model` may be NULL. Whether an adapter fits is checked when it is attached.
///
/// # Safety
/// `model` is NULL or a live handle, `path` a NUL-terminated string, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_adapter_load(
    model: *const ggraft_model,
    path: *const c_char,
    out: *mut *mut ggraft_adapter,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let path = unsafe { self::path(path, "path")? };
        let adapter = open(path, || {
            // SAFETY: the caller's promise.
            let base = &unsafe { handle(model, "model (a PEFT folder needs one)")? }.model;
            Ok((base.shape().clone(), base.fingerprint()))
        })?;
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, adapter) };
        Ok(())
    })
}

/// Fills `params` with the defaults: `ggraft_import_params_init(&params, sizeof params)`.
///
/// # Safety
/// `params` is NULL (an error) or valid for writes of `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_import_params_init(
    params: *mut ggraft_import_params,
    size: usize,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    call(|| unsafe { params::init(params, size) })
}

/// Imports the PEFT folder `dir` for `model`. `params` may be NULL. PEFT does not say which weights an adapter was trained on:
/// the caller states that it was this model. `ggraft_adapter_save` makes a file of it.
///
/// # Safety
/// `model` is a live handle, `dir` a NUL-terminated string, `params` NULL or an initialised struct, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_adapter_import(
    model: *const ggraft_model,
    dir: *const c_char,
    params: *const ggraft_import_params,
    out: *mut *mut ggraft_adapter,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let (base, dir, params) = unsafe {
            (
                &handle(model, "model")?.model,
                path(dir, "dir")?,
                params::read(params, "params")?,
            )
        };
        let options = ImportOptions {
            task: match params.task {
                -1 => None,
                task => Some(usize::try_from(task).map_err(|_| {
                    Failure::new(
                        GGRAFT_ERROR_ARGUMENT,
                        format!("task is {task}, it must be -1 (none) or from 0"),
                    )
                })?),
            },
            row_factor: (params.row_factor != 0.0).then_some(params.row_factor),
            name: if params.name.is_null() {
                None
            } else {
                // SAFETY: the caller's promise.
                Some(unsafe { text(params.name, "name")? }.to_owned())
            },
        };
        let adapter = adapter::import_peft(dir, base.shape(), Some(base.fingerprint()), &options)?;
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, ggraft_adapter::new(adapter)) };
        Ok(())
    })
}

/// Writes `adapter` as a PEFT folder `dir` for `model`, which Transformers knows as `base_name`.
///
/// # Safety
/// `adapter` and `model` are live handles, `dir` and `base_name` NUL-terminated strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_adapter_export(
    adapter: *const ggraft_adapter,
    model: *const ggraft_model,
    dir: *const c_char,
    base_name: *const c_char,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let (adapter, base, dir, base_name) = unsafe {
            (
                &handle(adapter, "adapter")?.adapter,
                &handle(model, "model")?.model,
                path(dir, "dir")?,
                text(base_name, "base_name")?,
            )
        };
        adapter::export_peft(adapter, base.shape(), dir, base_name)?;
        Ok(())
    })
}
