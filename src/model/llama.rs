//! A model whose weights libllama holds, because its decoder computes.

use super::ModelError;
use crate::error::{Error, Result};
use crate::file::mmap::MappedGguf;
use crate::ggml::log;
use ggml_sys as sys;
use std::ffi::CString;
use std::path::PathBuf;
use std::ptr::NonNull;

/// Owns a `llama_model`, mapped as the file is.
#[derive(Debug)]
pub(crate) struct LlamaModel {
    model: NonNull<sys::llama_model>,
    /// Of its first file.
    path: PathBuf,
}

// SAFETY: the model is plain heap data and a map, with one owner; nothing in it is tied to a thread.
unsafe impl Send for LlamaModel {}
// SAFETY: libllama only reads a model after it is loaded: contexts of several threads may share it.
unsafe impl Sync for LlamaModel {}

impl LlamaModel {
    /// Loads what was mapped and checked before, with weights in ggml's interleaved layouts where `repack` asks for them.
    ///
    /// # Errors
    /// [`ModelError::RefusedByLlama`].
    pub(crate) fn load(file: &MappedGguf, repack: bool) -> Result<Self> {
        let path = file.main().path.clone();
        let refused = |path: PathBuf| Error::Model {
            path,
            source: ModelError::RefusedByLlama,
        };
        let c_path = path.to_str().and_then(|path| CString::new(path).ok());
        let c_path = c_path.ok_or_else(|| refused(path.clone()))?;
        log::init();
        // SAFETY: the defaults are plain data; the path is a C string that outlives the call.
        let model = unsafe {
            let mut params = sys::llama_model_default_params();
            params.use_extra_bufts = repack;
            sys::llama_model_load_from_file(c_path.as_ptr(), params)
        };
        match NonNull::new(model) {
            Some(model) => Ok(Self { model, path }),
            None => Err(refused(path)),
        }
    }

    /// For contexts, which must not outlive it.
    pub(crate) fn as_ptr(&self) -> *mut sys::llama_model {
        self.model.as_ptr()
    }

    /// Of its first file.
    pub(crate) fn path(&self) -> &PathBuf {
        &self.path
    }
}

impl Drop for LlamaModel {
    fn drop(&mut self) {
        // SAFETY: live, freed once; contexts hold it by `Arc`.
        unsafe { sys::llama_model_free(self.model.as_ptr()) };
    }
}
