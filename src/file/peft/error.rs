//! Why a folder is refused.

use super::PeftType;
use std::path::PathBuf;

/// A PEFT folder that cannot be used, one variant per cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeftError {
    /// No adapter_config.json.
    #[error("{}: no adapter_config.json; is it a PEFT folder?", dir.display())]
    ConfigMissing {
        /// The folder.
        dir: PathBuf,
    },
    /// A folder without adapter_config.json whose subfolders have one, as PEFT saves named adapters.
    #[error(
        "{}: holds several adapters in folders of their own: use one of {}",
        dir.display(),
        names.join(", ")
    )]
    NamedAdapters {
        /// The folder.
        dir: PathBuf,
        /// Its subfolders that are adapters, sorted.
        names: Vec<String>,
    },
    /// adapter_config.json is larger than any real one.
    #[error("adapter_config.json has {size} bytes, the limit is {max}")]
    ConfigTooLarge {
        /// Size in bytes.
        size: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// adapter_config.json is no JSON object.
    #[error("adapter_config.json is malformed: {reason}")]
    ConfigSyntax {
        /// What the JSON parser said.
        reason: String,
    },
    /// A key is absent or null.
    #[error("adapter_config.json: {key} is missing")]
    ConfigKeyMissing {
        /// The key.
        key: &'static str,
    },
    /// A key has a value of another type.
    #[error("adapter_config.json: {key} must be {expected}")]
    ConfigKeyType {
        /// The key.
        key: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// A number that cannot be right.
    #[error("adapter_config.json: {key} is {got}, it must be {expected}")]
    ConfigValue {
        /// The key.
        key: &'static str,
        /// Its value.
        got: usize,
        /// What it should be.
        expected: String,
    },
    /// LoRA and all other methods that do not reduce to key/value or embedding rows.
    #[error(
        "PEFT type {peft_type} is not supported; supported are {}",
        PeftType::names()
    )]
    UnsupportedType {
        /// `peft_type` of the configuration.
        peft_type: String,
    },
    /// Only a pickle, whose loading executes code.
    #[error(
        "{}: only adapter_model.bin, a pickle, which can run code when it is read; if you trust it, convert it with: python3 -c \
         \"import sys, torch; from safetensors.torch import save_file; d = sys.argv[1]; t = torch.load(d + '/adapter_model.bin', \
         map_location='cpu', weights_only=True); save_file({{k: v.contiguous() for k, v in t.items()}}, d + \
         '/adapter_model.safetensors')\" '{}'",
        dir.display(),
        dir.display().to_string().replace('\'', "'\\''")
    )]
    PickleOnly {
        /// The folder.
        dir: PathBuf,
    },
    /// No adapter_model.safetensors.
    #[error("{}: no adapter_model.safetensors", dir.display())]
    TensorsMissing {
        /// The folder.
        dir: PathBuf,
    },
    /// adapter_model.safetensors is larger than any adapter.
    #[error("adapter_model.safetensors has {size} bytes, the limit is {max}")]
    TensorsTooLarge {
        /// Size in bytes.
        size: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// The header length field is beyond the limit or the file.
    #[error("adapter_model.safetensors: header of {size} bytes, at most {max} are possible here")]
    HeaderTooLarge {
        /// Declared size in bytes.
        size: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// Any other damage of the tensor file, data offsets beyond its end included.
    #[error("adapter_model.safetensors is malformed: {reason}")]
    TensorsMalformed {
        /// What the safetensors parser said.
        reason: String,
    },
    /// A tensor of the method is absent.
    #[error("adapter_model.safetensors: tensor {tensor} is missing")]
    TensorMissing {
        /// Its name.
        tensor: &'static str,
    },
    /// A tensor that the method does not have.
    #[error(
        "adapter_model.safetensors: unexpected tensor {tensor}; modules beside the adapter are not supported"
    )]
    TensorUnexpected {
        /// Its name.
        tensor: String,
    },
    /// A tensor of integers or of another float type.
    #[error(
        "adapter_model.safetensors: tensor {tensor} has type {dtype}; supported are F32, F16 and BF16"
    )]
    TensorDtype {
        /// Its name.
        tensor: &'static str,
        /// Its type.
        dtype: String,
    },
    /// Shape and configuration disagree.
    #[error(
        "adapter_model.safetensors: tensor {tensor} has shape {got:?}, adapter_config.json says {expected:?}"
    )]
    TensorShape {
        /// Its name.
        tensor: &'static str,
        /// Shape by the configuration, slowest dimension first.
        expected: Vec<usize>,
        /// Shape in the file, slowest dimension first.
        got: Vec<usize>,
    },
    /// An infinite value or not a number.
    #[error(
        "adapter_model.safetensors: tensor {tensor}, value {index} is {value}; the adapter is damaged or diverged in training"
    )]
    NonFinite {
        /// Its name.
        tensor: &'static str,
        /// Index of the value, rows contiguous.
        index: usize,
        /// The value.
        value: f32,
    },
}
