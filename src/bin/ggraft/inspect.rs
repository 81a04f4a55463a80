//! `ggraft inspect`: what is in a file.

mod peft;

use crate::args::load_adapter_file;
use crate::failure::Result;
use crate::io;
use clap::Args;
use ggraft::file::gguf::{ArrayValue, Value, ValueType};
use ggraft::file::mmap::{MappedGguf, Part};
use ggraft::file::types::GgmlType;
use ggraft::model::Base;
use ggraft::{Model, ModelOptions};
use serde_json::{Map, json};
use std::collections::BTreeMap;
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  ggraft inspect model.gguf
  ggraft inspect adapter.gguf --json
  ggraft inspect my-peft-folder";

/// Elements of an array that are shown.
const SHOWN: usize = 8;
/// Characters of a text that are shown.
const SHOWN_TEXT: usize = 120;

/// Show what a model, an adapter file, a PEFT folder or a saved session contains
///
/// Prints metadata (long values cut short), tensors with type, shape (fastest dimension first) and size, and the fingerprint that
/// ties adapters to their model. Says why, if the file is well-formed and still cannot be used.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Inspect {
    /// A GGUF file: a model (of a split one: any part), an adapter or a saved session; or the folder of an adapter that PEFT saved
    #[arg(value_name = "FILE|FOLDER")]
    file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What the file is for.
enum Kind {
    Model,
    Adapter,
    /// A text that `Session::save` or `/save` wrote.
    Session,
}

struct Facts {
    file: MappedGguf,
    kind: Kind,
    fingerprint: Option<String>,
    /// Why it cannot be used, or not by ggraft alone.
    problem: Option<String>,
    /// What runs a model.
    engine: Option<Engine>,
}

/// Whose decoder knows a model's architecture.
#[derive(Clone, Copy)]
enum Engine {
    Ggraft,
    /// libllama's, linked or an application's: adapters are put into its contexts.
    Llama,
}

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Self::Ggraft => "ggraft",
            Self::Llama => "llama.cpp",
        }
    }
}

impl Inspect {
    pub(crate) fn execute(self) -> Result<()> {
        if self.file.is_dir() {
            let facts = peft::Facts::read(&self.file)?;
            return io::print(&match self.json {
                true => format!("{}\n", facts.json()),
                false => facts.text(),
            });
        }
        let file = MappedGguf::open(&self.file)?;
        let kind = match general_type(&file) {
            Some("adapter") => Kind::Adapter,
            Some("session") => Kind::Session,
            _ => Kind::Model,
        };
        let mut engine = None;
        let loaded = match kind {
            Kind::Adapter => {
                load_adapter_file(&self.file).map(|a| a.fingerprint().map(|f| f.to_string()))
            }
            Kind::Model => match Model::open(&self.file, &ModelOptions::default()) {
                Ok(model) => {
                    engine = Some(Engine::Ggraft);
                    Ok(Some(model.fingerprint().to_string()))
                }
                Err(e) => Err(e.into()),
            },
            // It is among the metadata, and whether the text can go on depends on a session.
            Kind::Session => Ok(None),
        };
        let (fingerprint, problem) = match loaded {
            Ok(fingerprint) => (fingerprint, None),
            Err(e) => {
                let base = Base::open(&self.file).ok();
                let base = base.filter(|_| e.is_unknown_architecture());
                engine = base.as_ref().map(|_| Engine::Llama);
                let fingerprint = base.map(|base| base.fingerprint().to_string());
                (fingerprint, Some(e.line()))
            }
        };
        let facts = Facts {
            file,
            kind,
            fingerprint,
            problem,
            engine,
        };
        if self.json {
            io::print(&format!("{}\n", facts.json()))
        } else {
            io::print(&facts.text())
        }
    }
}

impl Facts {
    fn kind(&self) -> &'static str {
        match self.kind {
            Kind::Model => "model",
            Kind::Adapter => "adapter",
            Kind::Session => "saved session",
        }
    }

    fn elements(&self) -> u64 {
        self.file.tensors().map(|(_, t)| t.n_elements()).sum()
    }

    fn bytes(&self) -> usize {
        self.file.tensors().map(|(_, t)| t.range.len()).sum()
    }

    /// Tensors and bytes of each type.
    fn by_type(&self) -> BTreeMap<GgmlType, (usize, usize)> {
        let mut types = BTreeMap::new();
        for (_, tensor) in self.file.tensors() {
            let (count, bytes) = types.entry(tensor.ty).or_insert((0, 0));
            *count += 1;
            *bytes += tensor.range.len();
        }
        types
    }

    fn text(&self) -> String {
        let main = self.file.main();
        let mut out = format!(
            "{}: {}, GGUF version {}",
            main.path.display(),
            self.kind(),
            main.gguf.version
        );
        if self.file.parts().len() > 1 {
            out += &format!(", {} parts", self.file.parts().len());
        }
        out += "\n\nmetadata\n";
        for (key, value) in main.gguf.keys() {
            let (key, value) = (one_line(key), one_line(&show(main, key, value)));
            out += &format!("  {key} = {value}\n");
        }
        out += "\ntensors\n";
        for (_, tensor) in self.file.tensors() {
            let shape: Vec<_> = tensor.ne[..tensor.n_dims]
                .iter()
                .map(u64::to_string)
                .collect();
            out += &format!(
                "  {:<32} {:<8} [{}]  {} bytes\n",
                one_line(&tensor.name),
                tensor.ty,
                shape.join(", "),
                tensor.range.len()
            );
        }
        out += "\ntotals\n";
        for (ty, (count, bytes)) in self.by_type() {
            out += &format!("  {ty:<8} {count} tensors, {bytes} bytes\n");
        }
        out += &format!(
            "  all      {} tensors, {} elements, {} bytes\n\n",
            self.file.tensors().count(),
            self.elements(),
            self.bytes()
        );
        match (&self.problem, &self.fingerprint) {
            (Some(problem), Some(fingerprint)) => {
                out + &format!(
                    "fingerprint {fingerprint}\nnot computed by ggraft's own decoder: {problem}\nlibllama computes it, if it knows the architecture (docs/PLUGIN.md)\n"
                )
            }
            (Some(problem), None) => out + &format!("cannot be used: {problem}\n"),
            (None, Some(fingerprint)) => out + &format!("fingerprint {fingerprint}\n"),
            (None, None) => out + "fingerprint unknown\n",
        }
    }

    fn json(&self) -> serde_json::Value {
        let main = self.file.main();
        let metadata: Map<_, _> = main
            .gguf
            .keys()
            .map(|(key, value)| (key.to_owned(), to_json(main, key, value)))
            .collect();
        let tensors: Vec<_> = self
            .file
            .tensors()
            .map(|(_, t)| {
                json!({
                    "name": t.name,
                    "type": t.ty.name(),
                    "shape": t.ne[..t.n_dims],
                    "bytes": t.range.len(),
                })
            })
            .collect();
        json!({
            "path": main.path.to_string_lossy(),
            "kind": self.kind(),
            "version": main.gguf.version,
            "parts": self.file.parts().len(),
            "metadata": metadata,
            "tensors": tensors,
            "elements": self.elements(),
            "bytes": self.bytes(),
            "fingerprint": self.fingerprint,
            "engine": self.engine.map(Engine::name),
            "problem": self.problem,
        })
    }
}

/// Whether a file says that it is an adapter.
pub(crate) fn is_adapter(file: &MappedGguf) -> bool {
    general_type(file) == Some("adapter")
}

fn general_type(file: &MappedGguf) -> Option<&str> {
    match file.main().gguf.get("general.type") {
        Some(Value::String(kind)) => Some(kind),
        _ => None,
    }
}

/// Control characters, which a terminal would obey, as escapes; long text cut short.
fn one_line(text: &str) -> String {
    match text.char_indices().nth(SHOWN_TEXT) {
        Some((end, _)) => io::printable(&text[..end]) + "...",
        None => io::printable(text),
    }
}

fn show(part: &Part, key: &str, value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(array) => {
            let elements = elements(part, key, array);
            let shown: Vec<_> = elements.iter().map(ToString::to_string).collect();
            let more = if array.len > shown.len() { ", ..." } else { "" };
            format!(
                "{} x {}: [{}{more}]",
                array.len,
                array.elem,
                shown.join(", ")
            )
        }
        other => to_json(part, key, other).to_string(),
    }
}

/// Long arrays as their type, length and first elements.
fn to_json(part: &Part, key: &str, value: &Value) -> serde_json::Value {
    match value {
        Value::U8(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::F32(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::String(v) => json!(v),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        Value::F64(v) => json!(v),
        Value::Array(array) => {
            let first = elements(part, key, array);
            if first.len() == array.len {
                json!(first)
            } else {
                json!({"type": array.elem.to_string(), "length": array.len, "first": first})
            }
        }
    }
}

/// The first elements of an array; none of the types that hold nothing a model is described by.
fn elements(part: &Part, key: &str, array: &ArrayValue) -> Vec<serde_json::Value> {
    let (gguf, bytes) = (&part.gguf, part.bytes());
    fn first<T>(
        values: Result<Option<Vec<T>>, impl std::error::Error>,
        show: impl Fn(T) -> serde_json::Value,
    ) -> Vec<serde_json::Value> {
        let values = values.ok().flatten().unwrap_or_default();
        values.into_iter().take(SHOWN).map(show).collect()
    }
    match array.elem {
        ValueType::String => first(gguf.str_array(bytes, key), |text| {
            json!(one_line(&String::from_utf8_lossy(text)))
        }),
        ValueType::F32 => first(gguf.f32_array(bytes, key), |v| json!(v)),
        ValueType::Bool => first(gguf.i32_array(bytes, key), |v| json!(v != 0)),
        ValueType::U32 => first(gguf.u32_array(bytes, key), |v| json!(v)),
        _ => first(gguf.i32_array(bytes, key), |v| json!(v)),
    }
}
