//! The GGUF adapter format, docs/ADAPTER_FORMAT.md.

use super::{
    Adapter, AdapterError, AdapterKind, BaseSignature, Matrix, Parts, Payload, Precision,
    PrefixLayer, Template,
};
use crate::Result;
use crate::file::gguf::{Gguf, TensorInfo, Value};
use crate::file::gguf_write::{GgufWriter, MetaValue};
use crate::file::read::read_capped;
use crate::file::types::GgmlType;
use crate::model::PerLayer;
use half::{bf16, f16};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

/// Version of the format this build writes, and the latest it reads.
pub const FORMAT_VERSION: u32 = 1;
/// Largest file [`Adapter::load`] reads, in bytes: a prefix of 8192 tokens for an 8 B model in single precision takes half.
const MAX_FILE: u64 = 4 << 30;

pub(super) const VIRTUAL_TOKENS: &str = "virtual_tokens";

pub(super) fn k_name(layer: usize) -> String {
    format!("blk.{layer}.prefix_k")
}

pub(super) fn v_name(layer: usize) -> String {
    format!("blk.{layer}.prefix_v")
}

mod key {
    pub(super) const TYPE: &str = "general.type";
    pub(super) const ARCHITECTURE: &str = "general.architecture";
    pub(super) const NAME: &str = "general.name";
    pub(super) const KIND: &str = "adapter.type";
    pub(super) const VERSION: &str = "ggraft.format_version";
    pub(super) const LENGTH: &str = "ggraft.length";
    pub(super) const TEMPLATE: &str = "ggraft.template";
    pub(super) const FINGERPRINT: &str = "ggraft.fingerprint";
    pub(super) const BASE: &str = "ggraft.base.";
    pub(super) const PROVENANCE: &str = "ggraft.provenance.";
}

impl Adapter {
    /// Reads an adapter file.
    ///
    /// # Errors
    /// [`crate::Error::Io`], and everything [`Adapter::from_gguf`] refuses.
    pub fn load(path: &Path) -> Result<Self> {
        read_file(path, MAX_FILE, Self::from_gguf)
    }

    /// Reads an adapter from the bytes of a file.
    ///
    /// # Errors
    /// [`crate::Error::Gguf`] if the bytes are no GGUF file or a key is absent or of the wrong type,
    /// [`crate::Error::Adapter`] for everything that makes it no adapter of ours.
    pub fn from_gguf(bytes: &[u8]) -> Result<Self> {
        let gguf = Gguf::parse(bytes)?;
        let kind = read_kind(&gguf)?;
        let length = to_usize(gguf.require_u32(key::LENGTH)?);
        super::check_length(length)?;
        let base = read_signature(bytes, &gguf, kind)?;
        let payload = read_payload(bytes, &gguf, kind, length, &base)?;
        let text = |key| Ok::<_, crate::Error>(gguf.str(key)?.map(str::to_owned));
        let fingerprint = match gguf.str(key::FINGERPRINT)? {
            Some(hex) => Some(hex.parse().map_err(|()| AdapterError::BadFingerprint {
                found: hex.to_owned(),
            })?),
            None => None,
        };
        let template = match gguf.str(key::TEMPLATE)? {
            Some(source) => Some(Template::parse(source).map_err(AdapterError::from)?),
            None => None,
        };
        let provenance = read_provenance(&gguf)?;
        Ok(Self::new(Parts {
            kind,
            payload,
            template,
            name: text(key::NAME)?,
            fingerprint,
            base,
            provenance,
        })?)
    }

    /// The bytes of an adapter file. Tensors with values beyond ±65504 are single precision whatever `precision` says.
    pub fn to_gguf(&self, precision: Precision) -> Vec<u8> {
        let (writer, tensors) = self.writer(precision);
        writer.to_bytes(|i, out| tensors[i].0.write_le(tensors[i].1, out))
    }

    /// Writes an adapter file; it appears at `path` complete or not at all. Precision as in [`Adapter::to_gguf`].
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn save(&self, path: &Path, precision: Precision) -> Result<()> {
        let (writer, tensors) = self.writer(precision);
        writer
            .write(path, |i, out| tensors[i].0.write_le(tensors[i].1, out))
            .map_err(|source| crate::Error::Io {
                path: path.to_owned(),
                source,
            })
    }

    fn writer(&self, precision: Precision) -> (GgufWriter, Vec<(&Matrix, Precision)>) {
        let mut writer = GgufWriter::new();
        let parts = self.parts();
        let text = |s: &str| MetaValue::String(s.to_owned());
        let number = |n: usize| u32::try_from(n).expect("Adapter::new checks the sizes");
        writer.set(key::TYPE, text("adapter"));
        writer.set(key::ARCHITECTURE, text(&parts.base.architecture));
        if let Some(name) = &parts.name {
            writer.set(key::NAME, text(name));
        }
        writer.set(key::KIND, text(parts.kind.name()));
        writer.set(key::VERSION, MetaValue::U32(FORMAT_VERSION));
        writer.set(key::LENGTH, MetaValue::U32(number(self.length())));
        if let Some(template) = &parts.template {
            writer.set(key::TEMPLATE, text(&template.to_string()));
        }
        if let Some(fingerprint) = &parts.fingerprint {
            writer.set(key::FINGERPRINT, text(&fingerprint.to_string()));
        }
        for (field, sizes) in parts.base.sizes() {
            if let Some(sizes) = sizes {
                let value = match sizes.uniform() {
                    Some(size) => MetaValue::U32(number(size)),
                    None => MetaValue::U32s(sizes.values().iter().map(|&n| number(n)).collect()),
                };
                writer.set(format!("{}{field}", key::BASE), value);
            }
        }
        for (name, value) in &parts.provenance {
            writer.set(format!("{}{name}", key::PROVENANCE), text(value));
        }
        let mut tensors = Vec::new();
        for (name, rows) in parts.payload.tensors() {
            let stored = rows.stored_as(precision);
            let ty = match stored {
                Precision::F16 => GgmlType::F16,
                Precision::F32 => GgmlType::F32,
            };
            writer.tensor(name, ty, &[rows.width() as u64, rows.n_rows() as u64]);
            tensors.push((rows, stored));
        }
        (writer, tensors)
    }
}

/// What `parse` makes of a file of at most `max` bytes; its errors name the file.
pub(super) fn read_file<T>(
    path: &Path,
    max: u64,
    parse: impl FnOnce(&[u8]) -> Result<T>,
) -> Result<T> {
    let bytes = read_capped(path, max, |size| {
        AdapterError::FileTooLarge { size, max }.into()
    })?;
    parse(&bytes).map_err(|e| e.at(path))
}

/// Tells our adapters from models, LoRA adapters and files of later versions.
fn read_kind(gguf: &Gguf) -> Result<AdapterKind> {
    match gguf.str(key::TYPE)? {
        Some("adapter") => {}
        found => {
            return Err(AdapterError::NotAnAdapter {
                found: found.unwrap_or("absent").to_owned(),
            }
            .into());
        }
    }
    let kind = gguf.require_str(key::KIND)?;
    if kind == "lora" {
        return Err(AdapterError::Lora.into());
    }
    // Before the kind: a later version may have kinds of its own.
    match gguf.require_u32(key::VERSION)? {
        FORMAT_VERSION => {}
        0 => return Err(AdapterError::BadVersion { found: 0 }.into()),
        found => {
            return Err(AdapterError::NewerVersion {
                found,
                supported: FORMAT_VERSION,
            }
            .into());
        }
    }
    Ok(
        AdapterKind::from_name(kind).ok_or_else(|| AdapterError::UnknownKind {
            found: kind.to_owned(),
        })?,
    )
}

fn read_signature(bytes: &[u8], gguf: &Gguf, kind: AdapterKind) -> Result<BaseSignature> {
    let name = |field| format!("{}{field}", key::BASE);
    let size = |field| Ok::<_, crate::Error>(gguf.u32(&name(field))?.map(to_usize));
    let n_layer = size("block_count")?;
    let per_layer = |field| -> Result<Option<PerLayer>> {
        let name = name(field);
        if !matches!(gguf.get(&name), Some(Value::Array(_))) {
            return Ok(gguf.u32(&name)?.map(|n| to_usize(n).into()));
        }
        let n_layer = n_layer.ok_or(AdapterError::SignatureIncomplete {
            kind,
            field: "block_count",
        })?;
        let sizes = gguf.u32_or_array(bytes, &name, n_layer)?;
        Ok(sizes.map(|sizes| sizes.into_iter().map(to_usize).collect()))
    };
    Ok(BaseSignature {
        architecture: gguf.require_str(key::ARCHITECTURE)?.to_owned(),
        n_layer,
        n_embd: size("embedding_length")?,
        n_head: per_layer("head_count")?,
        n_head_kv: per_layer("head_count_kv")?,
        head_dim: per_layer("head_length")?,
        n_vocab: size("vocab_size")?,
    })
}

fn read_payload(
    bytes: &[u8],
    gguf: &Gguf,
    kind: AdapterKind,
    length: usize,
    base: &BaseSignature,
) -> Result<Payload> {
    let mut known = HashSet::new();
    let mut take = |name: String, width: Option<usize>| -> Result<Matrix, AdapterError> {
        let Some(info) = gguf.tensor(&name) else {
            return Err(AdapterError::MissingTensor { tensor: name });
        };
        known.insert(name);
        read_rows(bytes, info, width, length)
    };
    let payload = match kind {
        AdapterKind::Prefix => {
            let n_layer = base.n_layer.ok_or(AdapterError::SignatureIncomplete {
                kind,
                field: "block_count",
            })?;
            let widths = base.kv_width();
            // A declared count beyond the file ends at the first missing tensor.
            let mut layers = Vec::new();
            for i in 0..n_layer {
                let width = widths.as_ref().and_then(|w| w.get(i));
                let k = take(k_name(i), width)?;
                let v = take(v_name(i), width)?;
                layers.push(PrefixLayer { k, v });
            }
            Payload::Prefix { layers }
        }
        AdapterKind::Prompt | AdapterKind::PTuning => {
            Payload::VirtualTokens(take(VIRTUAL_TOKENS.to_owned(), base.n_embd)?)
        }
    };
    match gguf.tensors.iter().find(|t| !known.contains(&t.name)) {
        Some(extra) => Err(AdapterError::UnknownTensor {
            tensor: extra.name.clone(),
        }
        .into()),
        None => Ok(payload),
    }
}

/// The values of one tensor, `ne = [width, length]`; without a declared `width` the tensor's own, which [`Adapter::new`] checks.
fn read_rows(
    bytes: &[u8],
    info: &TensorInfo,
    width: Option<usize>,
    length: usize,
) -> Result<Matrix, AdapterError> {
    let saturate = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    let got = [
        saturate(info.ne[0]),
        saturate(
            info.ne[1]
                .saturating_mul(info.ne[2])
                .saturating_mul(info.ne[3]),
        ),
    ];
    let expected = [width.unwrap_or(got[0]), length];
    if got != expected || info.ne[2..] != [1, 1] {
        return Err(AdapterError::TensorShape {
            tensor: info.name.clone(),
            expected,
            got,
        });
    }
    let data = &bytes[info.range.clone()];
    match info.ty {
        GgmlType::F16 => Matrix::from_f16(got[0], values(data, f16::from_le_bytes)),
        GgmlType::F32 => Matrix::from_f32(got[0], values(data, f32::from_le_bytes)),
        GgmlType::BF16 => {
            Matrix::from_f32(got[0], values(data, |b| bf16::from_le_bytes(b).to_f32()))
        }
        other => Err(AdapterError::TensorType {
            tensor: info.name.clone(),
            found: other.name(),
        }),
    }
}

fn values<const N: usize, T>(data: &[u8], decode: impl Fn([u8; N]) -> T) -> Vec<T> {
    data.as_chunks::<N>()
        .0
        .iter()
        .map(|&chunk| decode(chunk))
        .collect()
}

fn read_provenance(gguf: &Gguf) -> Result<BTreeMap<String, String>, AdapterError> {
    let entries = gguf
        .keys()
        .filter_map(|(key, value)| Some((key, key.strip_prefix(key::PROVENANCE)?, value)));
    entries
        .map(|(key, name, value)| match value {
            Value::String(text) => Ok((name.to_owned(), text.clone())),
            _ => Err(AdapterError::ProvenanceValue {
                key: key.to_owned(),
            }),
        })
        .collect()
}

fn to_usize(n: u32) -> usize {
    usize::try_from(n).expect("usize has at least 32 bits")
}
