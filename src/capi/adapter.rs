//! Adapters: load, import, save, join.

use super::model::ggraft_model;
use super::params::{self, Params, choose};
use super::pointer::{give, handle, path, place, take_back, text};
use super::status::{Failure, c_string, call, ggraft_status, ggraft_status::*};
use ggraft::adapter::{self, Adapter, AdapterKind, ImportOptions, Precision};
use std::ffi::{CString, c_char};

/// An immutable adapter in memory. May be used by any number of threads and sessions at once.
pub struct ggraft_adapter {
    pub(crate) adapter: Adapter,
    name: Option<CString>,
    architecture: CString,
    fingerprint: Option<CString>,
    template: Option<CString>,
}

const _: fn() = || {
    fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<ggraft_adapter>();
};

impl ggraft_adapter {
    pub(crate) fn new(adapter: Adapter) -> Self {
        Self {
            name: adapter.name().map(c_string),
            architecture: c_string(&adapter.base().architecture),
            fingerprint: adapter.fingerprint().map(|f| c_string(&f.to_string())),
            template: adapter.template().map(|t| c_string(&t.to_string())),
            adapter,
        }
    }
}

/// What an adapter does to its base.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_adapter_kind {
    /// Key and value rows in every layer.
    GGRAFT_ADAPTER_PREFIX = 0,
    /// Virtual tokens in front of the text.
    GGRAFT_ADAPTER_PROMPT = 1,
    /// Virtual tokens where a template says.
    GGRAFT_ADAPTER_P_TUNING = 2,
}

/// The caller's `ggraft_adapter_kind` as the Rust API has it.
pub(crate) fn kind(value: i32) -> Result<AdapterKind, Failure> {
    choose!(value, ggraft_adapter_kind {
        GGRAFT_ADAPTER_PREFIX => AdapterKind::Prefix,
        GGRAFT_ADAPTER_PROMPT => AdapterKind::Prompt,
        GGRAFT_ADAPTER_P_TUNING => AdapterKind::PTuning,
    })
}

/// Precision of a written adapter file.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_precision {
    /// Two bytes a value. Tensors with values beyond 65504 are single precision all the same.
    GGRAFT_PRECISION_F16 = 0,
    /// Four bytes a value.
    GGRAFT_PRECISION_F32 = 1,
}

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

/// Facts about an adapter. The strings belong to the adapter.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_adapter_info {
    /// Its name, NULL if it has none.
    pub name: *const c_char,
    /// Architecture of the base it was made for.
    pub architecture: *const c_char,
    /// Fingerprint of that base, NULL if unknown.
    pub fingerprint: *const c_char,
    /// Where the virtual tokens stand, NULL: in front of everything.
    pub template_text: *const c_char,
    /// A `ggraft_adapter_kind`.
    pub kind: i32,
    /// Number of virtual tokens.
    pub length: u32,
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
        let adapter = if path.is_dir() {
            // SAFETY: the caller's promise.
            let base = &unsafe { handle(model, "model (a PEFT folder needs one)")? }.model;
            let options = ImportOptions::default();
            adapter::import_peft(path, base.shape(), Some(base.fingerprint()), &options)?
        } else {
            Adapter::load(path)?
        };
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, ggraft_adapter::new(adapter)) };
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

/// Writes `adapter` as a GGUF adapter file; it appears at `path` complete or not at all. `precision` is a `ggraft_precision`.
///
/// # Safety
/// `adapter` is a live handle, `path` a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_adapter_save(
    adapter: *const ggraft_adapter,
    path: *const c_char,
    precision: i32,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let (adapter, path) = unsafe {
            (
                &handle(adapter, "adapter")?.adapter,
                self::path(path, "path")?,
            )
        };
        let precision = choose!(precision, ggraft_precision {
            GGRAFT_PRECISION_F16 => Precision::F16,
            GGRAFT_PRECISION_F32 => Precision::F32,
        })?;
        adapter.save(path, precision)?;
        Ok(())
    })
}

/// Makes one adapter of two of the same base and kind: the rows of `first`, then those of `second`. Both stay as they are.
///
/// # Safety
/// `first` and `second` are live handles, `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_adapter_concat(
    first: *const ggraft_adapter,
    second: *const ggraft_adapter,
    out: *mut *mut ggraft_adapter,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let (first, second) = unsafe { (handle(first, "first")?, handle(second, "second")?) };
        let both = adapter::concat(&first.adapter, &second.adapter)?;
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, ggraft_adapter::new(both)) };
        Ok(())
    })
}

/// Stores facts about `adapter`: `ggraft_adapter_get_info(adapter, &info, sizeof info)`.
///
/// # Safety
/// `adapter` is a live handle, `info` valid for writes of `size` bytes. The strings live as long as the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_adapter_get_info(
    adapter: *const ggraft_adapter,
    info: *mut ggraft_adapter_info,
    size: usize,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let handle = unsafe { handle(adapter, "adapter")? };
        let or_null = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
        let kind = match handle.adapter.kind() {
            AdapterKind::Prefix => ggraft_adapter_kind::GGRAFT_ADAPTER_PREFIX,
            AdapterKind::Prompt => ggraft_adapter_kind::GGRAFT_ADAPTER_PROMPT,
            AdapterKind::PTuning => ggraft_adapter_kind::GGRAFT_ADAPTER_P_TUNING,
        };
        let value = ggraft_adapter_info {
            name: or_null(&handle.name),
            architecture: handle.architecture.as_ptr(),
            fingerprint: or_null(&handle.fingerprint),
            template_text: or_null(&handle.template),
            kind: kind as i32,
            // At most MAX_LENGTH.
            length: handle.adapter.length() as u32,
        };
        // SAFETY: the caller's promise.
        unsafe { params::write(info, size, value) }
    })
}

/// Frees the handle; NULL is allowed. Sessions that hold the adapter go on and keep it in memory.
///
/// # Safety
/// `adapter` is NULL or a live handle that no thread uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_adapter_free(adapter: *mut ggraft_adapter) {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { take_back(adapter) };
        Ok(())
    });
}
