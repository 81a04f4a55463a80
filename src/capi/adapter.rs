//! Adapters: what they are, save, join.

use super::params::{self, choose};
use super::pointer::{give, handle, path, place, take_back};
use super::status::{Failure, c_string, call, ggraft_status};
use ggraft::adapter::{self, Adapter, AdapterKind, ImportOptions, Precision};
use ggraft::model::{BaseShape, Fingerprint};
use std::ffi::{CString, c_char};
use std::path::Path;

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

/// A GGUF adapter file, or a PEFT folder imported for the base that `base` tells.
pub(crate) fn open(
    path: &Path,
    base: impl FnOnce() -> Result<(BaseShape, Fingerprint), Failure>,
) -> Result<ggraft_adapter, Failure> {
    let adapter = if path.is_dir() {
        let (shape, fingerprint) = base()?;
        let options = ImportOptions::default();
        adapter::import_peft(path, &shape, Some(fingerprint), &options)?
    } else {
        Adapter::load(path)?
    };
    Ok(ggraft_adapter::new(adapter))
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

/// Precision of a written adapter file.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_precision {
    /// Two bytes a value. Tensors with values beyond 65504 are single precision all the same.
    GGRAFT_PRECISION_F16 = 0,
    /// Four bytes a value.
    GGRAFT_PRECISION_F32 = 1,
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
