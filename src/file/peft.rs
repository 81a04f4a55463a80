//! PEFT adapter folders: adapter_config.json + adapter_model.safetensors, read and written as PEFT does.

/// A PEFT folder that cannot be used, one variant per cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeftError {}
