//! `adapter_config.json`, read and written.

use super::PeftError;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

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
    pub(super) const ALL: [Self; 6] = [
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

    pub(super) fn names() -> String {
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

impl PeftConfig {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, PeftError> {
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

/// All keys that PEFT 0.21 writes for the type; BTreeMap: in its order, sorted.
pub(super) fn config_json(config: &PeftConfig) -> BTreeMap<&'static str, Value> {
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
