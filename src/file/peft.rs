//! PEFT adapter folders: adapter_config.json + adapter_model.safetensors, read and written as PEFT does.
//!
//! Tensor shapes in this module are PEFT's own, slowest dimension first: `[P, W]` is P rows of W values.

use super::atomic::write_atomic;
use super::read::read_capped;
use crate::{Error, Result};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

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

/// The methods that reduce to key/value or embedding rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeftType {
    /// Key and value rows, with or without the folded projection.
    PrefixTuning,
    /// Key and value rows, some of them frozen.
    Cartridge,
    /// Embedding rows.
    PromptTuning,
    /// Embedding rows, the output of the discarded encoder.
    PTuning,
    /// Embedding rows times a low-rank matrix per task.
    MultitaskPromptTuning,
    /// Embedding rows of a context, with a projected change folded in.
    Cpt,
}

impl PeftType {
    const ALL: [Self; 6] = [
        Self::PrefixTuning,
        Self::Cartridge,
        Self::PromptTuning,
        Self::PTuning,
        Self::MultitaskPromptTuning,
        Self::Cpt,
    ];

    /// PEFT's name, as in `peft_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::PrefixTuning => "PREFIX_TUNING",
            Self::Cartridge => "CARTRIDGE",
            Self::PromptTuning => "PROMPT_TUNING",
            Self::PTuning => "P_TUNING",
            Self::MultitaskPromptTuning => "MULTITASK_PROMPT_TUNING",
            Self::Cpt => "CPT",
        }
    }

    fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// Whether `prompt_embeddings` holds key and value rows of every layer, `[P, 2*L*Hk*d]`, or embedding rows, `[P, D]`.
    pub fn is_prefix(self) -> bool {
        matches!(self, Self::PrefixTuning | Self::Cartridge)
    }
}

/// What adapter_config.json says. For prefix types `token_dim` and `num_attention_heads` are Hk*d and Hk, else D and H.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftConfig {
    /// The method.
    pub peft_type: PeftType,
    /// P, at least 1.
    pub num_virtual_tokens: usize,
    /// L, at least 1.
    pub num_layers: usize,
    /// Hk or H, at least 1.
    pub num_attention_heads: usize,
    /// Hk*d or D, a multiple of the heads.
    pub token_dim: usize,
    /// CARTRIDGE: leading rows that training left alone.
    pub num_frozen_tokens: Option<usize>,
    /// Name of the base.
    pub base_model_name_or_path: Option<String>,
    /// Version of PEFT that wrote the folder.
    pub peft_version: Option<String>,
}

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

impl PeftConfig {
    fn parse(bytes: &[u8]) -> Result<Self, PeftError> {
        let syntax = |e: serde_json::Error| PeftError::ConfigSyntax {
            reason: e.to_string(),
        };
        let map: Map<String, Value> = serde_json::from_slice(bytes).map_err(syntax)?;
        let peft_type =
            text(&map, "peft_type")?.ok_or(PeftError::ConfigKeyMissing { key: "peft_type" })?;
        let Some(peft_type) = PeftType::ALL.into_iter().find(|t| t.name() == peft_type) else {
            return Err(PeftError::UnsupportedType { peft_type });
        };
        let config = Self {
            peft_type,
            num_virtual_tokens: positive(&map, "num_virtual_tokens")?,
            num_layers: positive(&map, "num_layers")?,
            num_attention_heads: positive(&map, "num_attention_heads")?,
            token_dim: positive(&map, "token_dim")?,
            num_frozen_tokens: number(&map, "num_frozen_tokens")?,
            base_model_name_or_path: text(&map, "base_model_name_or_path")?,
            peft_version: text(&map, "peft_version")?,
        };
        let wrong = |key, got, expected| Err(PeftError::ConfigValue { key, got, expected });
        let (heads, p) = (config.num_attention_heads, config.num_virtual_tokens);
        if !config.token_dim.is_multiple_of(heads) {
            return wrong(
                "token_dim",
                config.token_dim,
                format!("a multiple of num_attention_heads ({heads})"),
            );
        }
        if let Some(frozen) = config.num_frozen_tokens.filter(|&frozen| frozen > p) {
            return wrong(
                "num_frozen_tokens",
                frozen,
                format!("at most num_virtual_tokens ({p})"),
            );
        }
        match number(&map, "num_transformer_submodules")? {
            None | Some(1) => Ok(config),
            Some(n) => wrong(
                "num_transformer_submodules",
                n,
                "1, a decoder-only base".to_owned(),
            ),
        }
    }
}

/// A string; absent and null are `None`.
fn text(map: &Map<String, Value>, key: &'static str) -> Result<Option<String>, PeftError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(s)) => Ok(Some(s.clone())),
        Some(_) => Err(PeftError::ConfigKeyType {
            key,
            expected: "a string",
        }),
    }
}

/// A whole number from 0; absent and null are `None`.
fn number(map: &Map<String, Value>, key: &'static str) -> Result<Option<usize>, PeftError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) => Ok(Some(n)),
            None => Err(PeftError::ConfigKeyType {
                key,
                expected: "a whole number from 0",
            }),
        },
    }
}

fn positive(map: &Map<String, Value>, key: &'static str) -> Result<usize, PeftError> {
    match number(map, key)? {
        None => Err(PeftError::ConfigKeyMissing { key }),
        Some(0) => Err(PeftError::ConfigValue {
            key,
            got: 0,
            expected: "at least 1".to_owned(),
        }),
        Some(n) => Ok(n),
    }
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

/// All keys that PEFT 0.21 writes for the type; BTreeMap: in its order, sorted.
fn config_json(config: &PeftConfig) -> BTreeMap<&'static str, Value> {
    let mut out = BTreeMap::from([
        ("auto_mapping", Value::Null),
        (
            "base_model_name_or_path",
            json!(config.base_model_name_or_path),
        ),
        ("inference_mode", json!(true)),
        ("modules_to_save", Value::Null),
        ("num_attention_heads", json!(config.num_attention_heads)),
        ("num_layers", json!(config.num_layers)),
        ("num_transformer_submodules", json!(1)),
        ("num_virtual_tokens", json!(config.num_virtual_tokens)),
        ("peft_type", json!(config.peft_type.name())),
        ("peft_version", json!(config.peft_version)),
        ("revision", Value::Null),
        ("task_type", json!("CAUSAL_LM")),
        ("token_dim", json!(config.token_dim)),
    ]);
    // PEFT builds no encoder in inference mode: the encoder keys are its defaults and have no effect.
    match config.peft_type {
        PeftType::PrefixTuning => out.extend([
            ("encoder_hidden_size", json!(config.token_dim)),
            ("init_weights", Value::Null),
            ("prefix_projection", json!(false)),
        ]),
        PeftType::PromptTuning => out.extend([
            ("prompt_tuning_init", json!("RANDOM")),
            ("prompt_tuning_init_text", Value::Null),
            ("tokenizer_kwargs", Value::Null),
            ("tokenizer_name_or_path", Value::Null),
        ]),
        PeftType::PTuning => out.extend([
            ("encoder_dropout", json!(0.0)),
            ("encoder_hidden_size", json!(config.token_dim)),
            ("encoder_num_layers", json!(2)),
            ("encoder_reparameterization_type", json!("MLP")),
        ]),
        other => panic!("{} folders hold more than rows", other.name()),
    }
    out
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
