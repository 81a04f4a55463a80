//! PEFT adapter folders: adapter_config.json + adapter_model.safetensors, read and written as PEFT does.
//!
//! Tensor shapes in this module are PEFT's own, slowest dimension first: `[P, W]` is P rows of W values.

mod config;
mod error;

use super::atomic::write_atomic;
use super::read::read_capped;
use crate::{Error, Result};
use config::config_json;
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::path::Path;

pub use config::{PeftConfig, PeftType};
pub use error::PeftError;

/// Name of the configuration in a folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the tensor file in a folder.
pub const TENSOR_FILE: &str = "adapter_model.safetensors";
/// Largest configuration, in bytes; real ones have hundreds, CPT's with its token lists some thousands.
const MAX_CONFIG: u64 = 1 << 20;
/// Largest tensor file, in bytes: a prefix of 8192 tokens for an 8 B model takes half.
const MAX_TENSORS: u64 = 4 << 30;
/// Largest header of the tensor file, in bytes; it describes at most three tensors.
const MAX_HEADER: u64 = 1 << 20;

/// A tensor's values in single precision.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftTensor {
    /// Slowest dimension first.
    pub shape: Vec<usize>,
    /// The values, all finite.
    pub data: Vec<f32>,
}

/// Per-task factors of MULTITASK_PROMPT_TUNING: rows of task t = `prompt_embeddings * (cols[t] @ rows[t])`, element-wise.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskFactors {
    /// `prefix_task_cols`, `[tasks, P, r]`.
    pub cols: PeftTensor,
    /// `prefix_task_rows`, `[tasks, r, D]`.
    pub rows: PeftTensor,
}

/// A validated folder: the tensors have the shapes that the configuration says.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftFolder {
    /// The configuration.
    pub config: PeftConfig,
    /// `prompt_embeddings`, `[P, 2*L*Hk*d]` or `[P, D]`.
    pub prompt_embeddings: PeftTensor,
    /// Only of MULTITASK_PROMPT_TUNING.
    pub tasks: Option<TaskFactors>,
}

impl PeftFolder {
    /// Reads the folder `dir`.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Peft`] with the cause.
    pub fn read(dir: &Path) -> Result<Self> {
        let (config, tensors) = (dir.join(CONFIG_FILE), dir.join(TENSOR_FILE));
        let present = |path: &Path| {
            path.try_exists().map_err(|source| Error::Io {
                path: path.to_owned(),
                source,
            })
        };
        if !present(&config)? {
            let (dir, names) = (dir.to_owned(), named_adapters(dir));
            return Err(if names.is_empty() {
                PeftError::ConfigMissing { dir }
            } else {
                PeftError::NamedAdapters { dir, names }
            }
            .into());
        }
        let config = read_capped(&config, MAX_CONFIG, |size| {
            PeftError::ConfigTooLarge {
                size,
                max: MAX_CONFIG,
            }
            .into()
        })?;
        // Before the tensors: LoRA folders and the like may hold tensors of any kind and size.
        let config = PeftConfig::parse(&config)?;
        if !present(&tensors)? {
            let dir = dir.to_owned();
            let pickle = present(&dir.join("adapter_model.bin"))?;
            return Err(if pickle {
                PeftError::PickleOnly { dir }
            } else {
                PeftError::TensorsMissing { dir }
            }
            .into());
        }
        let too_large = |size| {
            PeftError::TensorsTooLarge {
                size,
                max: MAX_TENSORS,
            }
            .into()
        };
        Ok(Self::parse_tensors(
            config,
            &read_capped(&tensors, MAX_TENSORS, too_large)?,
        )?)
    }

    /// Reads a folder from the bytes of its two files.
    pub fn parse(config: &[u8], tensors: &[u8]) -> Result<Self, PeftError> {
        Self::parse_tensors(PeftConfig::parse(config)?, tensors)
    }

    fn parse_tensors(config: PeftConfig, bytes: &[u8]) -> Result<Self, PeftError> {
        check_header(bytes)?;
        let malformed = |e: safetensors::SafeTensorError| PeftError::TensorsMalformed {
            reason: e.to_string(),
        };
        let file = SafeTensors::deserialize(bytes).map_err(malformed)?;
        let multitask = config.peft_type == PeftType::MultitaskPromptTuning;
        let names: &[&str] = if multitask {
            &[EMBEDDINGS, TASK_COLS, TASK_ROWS]
        } else {
            &[EMBEDDINGS]
        };

        let embeddings = view(&file, EMBEDDINGS)?;
        if let Some(tensor) = file
            .names()
            .into_iter()
            .filter(|name| !names.contains(name))
            .min()
        {
            return Err(PeftError::TensorUnexpected {
                tensor: tensor.to_owned(),
            });
        }
        let p = config.num_virtual_tokens;
        let width = if config.peft_type.is_prefix() {
            // A product beyond usize matches no tensor.
            config
                .token_dim
                .saturating_mul(config.num_layers)
                .saturating_mul(2)
        } else {
            config.token_dim
        };
        let prompt_embeddings = decode(EMBEDDINGS, &embeddings, &[p, width])?;
        let tasks = if multitask {
            Some(task_factors(&file, p, width)?)
        } else {
            None
        };
        Ok(Self {
            config,
            prompt_embeddings,
            tasks,
        })
    }
}

const EMBEDDINGS: &str = "prompt_embeddings";
const TASK_COLS: &str = "prefix_task_cols";
const TASK_ROWS: &str = "prefix_task_rows";

/// Refuses a header length that would have the JSON parser read megabytes.
fn check_header(bytes: &[u8]) -> Result<(), PeftError> {
    let Some((size, rest)) = bytes.split_first_chunk() else {
        return Err(PeftError::TensorsMalformed {
            reason: "shorter than its header length field".to_owned(),
        });
    };
    let (size, max) = (u64::from_le_bytes(*size), MAX_HEADER.min(rest.len() as u64));
    if size > max {
        return Err(PeftError::HeaderTooLarge { size, max });
    }
    Ok(())
}

fn view<'a>(file: &SafeTensors<'a>, tensor: &'static str) -> Result<TensorView<'a>, PeftError> {
    file.tensor(tensor)
        .map_err(|_| PeftError::TensorMissing { tensor })
}

fn task_factors(file: &SafeTensors<'_>, p: usize, width: usize) -> Result<TaskFactors, PeftError> {
    let (cols, rows) = (view(file, TASK_COLS)?, view(file, TASK_ROWS)?);
    // Tasks and rank are what the first tensor says; the second must agree. `num_ranks` is not checked: old folders lack it.
    let (tasks, rank) = match *cols.shape() {
        [tasks, _, rank] if tasks > 0 && rank > 0 => (tasks, rank),
        _ => {
            return Err(PeftError::TensorShape {
                tensor: TASK_COLS,
                expected: vec![1, p, 1],
                got: cols.shape().to_vec(),
            });
        }
    };
    Ok(TaskFactors {
        cols: decode(TASK_COLS, &cols, &[tasks, p, rank])?,
        rows: decode(TASK_ROWS, &rows, &[tasks, rank, width])?,
    })
}

fn decode(
    tensor: &'static str,
    view: &TensorView<'_>,
    expected: &[usize],
) -> Result<PeftTensor, PeftError> {
    let shape = view.shape().to_vec();
    if shape != expected {
        return Err(PeftError::TensorShape {
            tensor,
            expected: expected.to_vec(),
            got: shape,
        });
    }
    let data = match view.dtype() {
        Dtype::F32 => values(view.data(), f32::from_le_bytes),
        Dtype::F16 => values(view.data(), |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => values(view.data(), |b| bf16::from_le_bytes(b).to_f32()),
        other => {
            return Err(PeftError::TensorDtype {
                tensor,
                dtype: format!("{other:?}"),
            });
        }
    };
    match data.iter().position(|x| !x.is_finite()) {
        Some(index) => Err(PeftError::NonFinite {
            tensor,
            index,
            value: data[index],
        }),
        None => Ok(PeftTensor { shape, data }),
    }
}

fn values<const N: usize>(data: &[u8], decode: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    data.as_chunks::<N>()
        .0
        .iter()
        .map(|&chunk| decode(chunk))
        .collect()
}

/// Writes a folder that PEFT 0.21 loads: the keys that version writes, `prompt_embeddings` in single precision.
/// Each file appears complete or not at all, the configuration last.
///
/// `prompt_embeddings` is `[num_virtual_tokens, width]`, row-major.
///
/// # Errors
/// [`Error::Io`].
///
/// # Panics
/// If `prompt_embeddings` is not `num_virtual_tokens` whole rows, or the type is one that PEFT cannot represent by rows alone
/// (CARTRIDGE, MULTITASK_PROMPT_TUNING, CPT: export those as PREFIX_TUNING or PROMPT_TUNING).
pub fn write_folder(dir: &Path, config: &PeftConfig, prompt_embeddings: &[f32]) -> Result<()> {
    let p = config.num_virtual_tokens;
    assert!(
        p > 0 && prompt_embeddings.len().is_multiple_of(p),
        "whole rows"
    );
    let data: Vec<u8> = prompt_embeddings
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let shape = vec![p, prompt_embeddings.len() / p];
    let tensor =
        TensorView::new(Dtype::F32, shape, &data).expect("shape and data come from one slice");
    let meta = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let tensors =
        safetensors::serialize([(EMBEDDINGS, tensor)], Some(meta)).expect("one valid tensor");
    let mut json = serde_json::to_vec_pretty(&config_json(config)).expect("strings and numbers");
    json.push(b'\n');

    let io = |path: &Path, source| Error::Io {
        path: path.to_owned(),
        source,
    };
    std::fs::create_dir_all(dir).map_err(|e| io(dir, e))?;
    for (name, bytes) in [(TENSOR_FILE, &tensors), (CONFIG_FILE, &json)] {
        let path = dir.join(name);
        write_atomic(&path, |out| out.write_all(bytes)).map_err(|e| io(&path, e))?;
    }
    Ok(())
}

/// Subfolders that are adapters themselves, sorted.
fn named_adapters(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .filter(|entry| entry.path().join(CONFIG_FILE).is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
