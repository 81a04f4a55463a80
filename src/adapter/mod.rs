//! Adapter types, the GGUF adapter format, PEFT import and export, templates.

/// An adapter that is malformed or does not fit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {}
