//! What is in a PEFT folder, whatever the base.

use super::one_line;
use crate::args::read_peft;
use crate::failure::Result;
use ggraft::file::peft::{PeftFolder, PeftTensor};
use serde_json::{Map, Value, json};
use std::path::Path;

pub(super) struct Facts<'a> {
    path: &'a Path,
    folder: PeftFolder,
}

impl<'a> Facts<'a> {
    pub(super) fn read(path: &'a Path) -> Result<Self> {
        let folder = read_peft(path)?;
        Ok(Self { path, folder })
    }

    /// What the configuration says, by PEFT's names.
    fn metadata(&self) -> Map<String, Value> {
        let config = &self.folder.config;
        [
            ("peft_type", json!(config.peft_type.name())),
            ("num_virtual_tokens", json!(config.num_virtual_tokens)),
            ("num_layers", json!(config.num_layers)),
            ("num_attention_heads", json!(config.num_attention_heads)),
            ("token_dim", json!(config.token_dim)),
            ("num_frozen_tokens", json!(config.num_frozen_tokens)),
            (
                "base_model_name_or_path",
                json!(config.base_model_name_or_path),
            ),
            ("peft_version", json!(config.peft_version)),
        ]
        .into_iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
    }

    /// The tensors, by PEFT's names.
    fn tensors(&self) -> Vec<(&'static str, &PeftTensor)> {
        let mut tensors = vec![("prompt_embeddings", &self.folder.prompt_embeddings)];
        if let Some(tasks) = &self.folder.tasks {
            tensors.push(("prefix_task_cols", &tasks.cols));
            tensors.push(("prefix_task_rows", &tasks.rows));
        }
        tensors
    }

    fn elements(&self) -> usize {
        self.tensors().iter().map(|(_, t)| t.data.len()).sum()
    }

    pub(super) fn text(&self) -> String {
        let mut out = format!(
            "{}: adapter, PEFT folder\n\nmetadata\n",
            self.path.display()
        );
        for (key, value) in self.metadata() {
            let value = value.as_str().map_or(value.to_string(), one_line);
            out += &format!("  {key} = {value}\n");
        }
        out += "\ntensors\n";
        for (name, tensor) in self.tensors() {
            out += &format!("  {name:<32} {:?}\n", shape(tensor));
        }
        out += &format!("\ntotals\n  all      {} elements\n\n", self.elements());
        out + "fingerprint unknown; `ggraft import` makes an adapter file of it for a model that it fits\n"
    }

    pub(super) fn json(&self) -> Value {
        let tensors = self.tensors().into_iter();
        let tensors: Vec<_> = tensors
            .map(|(name, tensor)| json!({"name": name, "shape": shape(tensor)}))
            .collect();
        json!({
            "path": self.path.to_string_lossy(),
            "kind": "peft",
            "metadata": self.metadata(),
            "tensors": tensors,
            "elements": self.elements(),
            "fingerprint": null,
            "problem": null,
        })
    }
}

/// The fastest dimension first, as those of GGUF files are shown.
fn shape(tensor: &PeftTensor) -> Vec<usize> {
    tensor.shape.iter().rev().copied().collect()
}
