//! Adapter types, the GGUF adapter format, PEFT import and export, templates.
//!
//! ```no_run
//! use ggraft::adapter::{Adapter, Library};
//!
//! let library = Library::new();
//! library.insert("pirate", Adapter::load("pirate.gguf".as_ref())?);
//! let pirate = library.get("pirate").expect("inserted above");
//! println!("{}: {} virtual tokens", pirate.kind(), pirate.length());
//! # Ok::<(), ggraft::Error>(())
//! ```

mod arrange;
mod checksum;
mod compiled;
mod concat;
mod control;
mod error;
mod format;
mod library;
mod matrix;
mod peft;
mod template;

pub(crate) use arrange::{Item, Words, arrange};
pub use concat::concat;
pub use control::ControlVector;
pub use error::AdapterError;
pub use format::FORMAT_VERSION;
pub use library::Library;
pub use matrix::{Matrix, Precision};
pub use peft::{ImportOptions, export_peft, import_peft};
pub(crate) use peft::{layers_from_peft, layers_to_peft};
pub use template::{Piece, Template, TemplateError};

use crate::model::{BaseShape, Fingerprint, PerLayer};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Most virtual tokens an adapter may have (P).
pub const MAX_LENGTH: usize = 65_536;
/// Most entries of [`Parts::provenance`].
const MAX_PROVENANCE: usize = 256;
/// Longest key of [`Parts::provenance`], in bytes.
const MAX_PROVENANCE_KEY: usize = 64;

/// What an adapter does to its base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterKind {
    /// Key and value rows in every layer (Li & Liang 2021; P-Tuning v2, Liu 2021).
    Prefix,
    /// Virtual tokens in front of the text (Lester 2021).
    Prompt,
    /// Virtual tokens where a template says, or in front of the text without one (Liu 2021).
    PTuning,
}

impl AdapterKind {
    /// The value of `adapter.type` in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefix => "prefix",
            Self::Prompt => "prompt",
            Self::PTuning => "p_tuning",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::Prefix, Self::Prompt, Self::PTuning]
            .into_iter()
            .find(|kind| kind.name() == name)
    }
}

impl fmt::Display for AdapterKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The trained rows of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefixLayer {
    /// Keys, `ne = [Hk*d, P]` (Hk and d of this layer), after RoPE and any k norm, in the base file's own row order.
    pub k: Matrix,
    /// Values, `ne = [Hk*d, P]`.
    pub v: Matrix,
}

impl PrefixLayer {
    /// Keys and values in single precision.
    pub(crate) fn to_f32(&self) -> [Vec<f32>; 2] {
        [self.k.to_f32(), self.v.to_f32()]
    }
}

/// The trained rows of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub enum Payload {
    /// One entry per layer of the base, first layer first.
    Prefix {
        /// L entries.
        layers: Vec<PrefixLayer>,
    },
    /// Virtual tokens, `ne = [D, P]`, in place of the output of the token embedding (Transformers' `inputs_embeds`).
    VirtualTokens(Matrix),
}

impl Payload {
    /// Keys and values `ne = [Hk*d, P]` of each layer of `base`, in its own row order.
    pub(crate) fn prefix(
        layers: Vec<[Vec<f32>; 2]>,
        base: &BaseShape,
    ) -> Result<Self, AdapterError> {
        let layer = |([k, v], width): ([Vec<f32>; 2], usize)| {
            Ok(PrefixLayer {
                k: Matrix::from_f32(width, k)?,
                v: Matrix::from_f32(width, v)?,
            })
        };
        let layers = layers.into_iter().zip(base.kv_widths()).map(layer);
        Ok(Self::Prefix {
            layers: layers.collect::<Result<_, AdapterError>>()?,
        })
    }

    /// P.
    pub(crate) fn length(&self) -> usize {
        match self {
            Self::VirtualTokens(rows) => rows.n_rows(),
            Self::Prefix { layers } => layers[0].k.n_rows(),
        }
    }

    /// Every tensor with its name in adapter files, in file order.
    fn tensors(&self) -> Vec<(String, &Matrix)> {
        match self {
            Self::VirtualTokens(rows) => vec![(format::VIRTUAL_TOKENS.to_owned(), rows)],
            Self::Prefix { layers } => {
                let mut out = Vec::with_capacity(2 * layers.len());
                for (i, layer) in layers.iter().enumerate() {
                    out.push((format::k_name(i), &layer.k));
                    out.push((format::v_name(i), &layer.v));
                }
                out
            }
        }
    }
}

/// What an adapter knows of the shape of its base; letters as in [`BaseShape`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseSignature {
    /// `general.architecture`.
    pub architecture: String,
    /// L. Required of prefix adapters.
    pub n_layer: Option<usize>,
    /// D. Required of prompt and P-tuning adapters.
    pub n_embd: Option<usize>,
    /// H.
    pub n_head: Option<PerLayer>,
    /// Hk. Required of prefix adapters.
    pub n_head_kv: Option<PerLayer>,
    /// d. Required of prefix adapters.
    pub head_dim: Option<PerLayer>,
    /// V.
    pub n_vocab: Option<usize>,
}

impl From<&BaseShape> for BaseSignature {
    fn from(base: &BaseShape) -> Self {
        Self {
            architecture: base.architecture.clone(),
            n_layer: Some(base.n_layer),
            n_embd: Some(base.n_embd),
            n_head: Some(base.n_head.clone()),
            n_head_kv: Some(base.n_head_kv.clone()),
            head_dim: Some(base.head_dim.clone()),
            n_vocab: Some(base.n_vocab),
        }
    }
}

/// Everything an adapter consists of; [`Adapter::new`] checks it.
#[derive(Debug, Clone, PartialEq)]
pub struct Parts {
    /// Must agree with `payload`.
    pub kind: AdapterKind,
    /// The trained rows.
    pub payload: Payload,
    /// Only for [`AdapterKind::PTuning`]; places exactly P virtual tokens.
    pub template: Option<Template>,
    /// For people.
    pub name: Option<String>,
    /// The base the adapter was trained on.
    pub fingerprint: Option<Fingerprint>,
    /// Its shape.
    pub base: BaseSignature,
    /// Where the adapter comes from, for people: `method`, `source`, `base_name` and facts of the training run.
    /// Keys are 1 to 64 of `a-z 0-9 _ .`; at most 256 entries.
    pub provenance: BTreeMap<String, String>,
}

/// An immutable, validated adapter. Clones share the data; every session may hold one.
#[derive(Clone)]
pub struct Adapter(Arc<Inner>);

struct Inner {
    id: u64,
    length: usize,
    parts: Parts,
    compiled: compiled::Cache,
}

impl Adapter {
    /// Whether both are clones of one.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Checks `parts` and makes an adapter with a new id.
    ///
    /// # Errors
    /// The variant of [`AdapterError`] that names the first part that is wrong: shapes that disagree with each other or with
    /// the signature, a template that does not fit, a value that is not finite, a malformed provenance key.
    pub fn new(parts: Parts) -> Result<Self, AdapterError> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let length = validate(&parts)?;
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Ok(Self(Arc::new(Inner {
            id,
            length,
            parts,
            compiled: compiled::Cache::default(),
        })))
    }

    /// Number of this adapter, different for every adapter made in this process, the same for clones: tells whether two
    /// handles are one adapter.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// P, the number of virtual tokens.
    pub fn length(&self) -> usize {
        self.0.length
    }

    /// Everything the adapter consists of.
    pub fn parts(&self) -> &Parts {
        &self.0.parts
    }

    /// What the adapter does.
    pub fn kind(&self) -> AdapterKind {
        self.parts().kind
    }

    /// The trained rows.
    pub fn payload(&self) -> &Payload {
        &self.parts().payload
    }

    /// Where the virtual tokens stand; `None` means in front of everything, before the beginning-of-sequence token.
    pub fn template(&self) -> Option<&Template> {
        self.parts().template.as_ref()
    }

    /// A name for people.
    pub fn name(&self) -> Option<&str> {
        self.parts().name.as_deref()
    }

    /// The base the adapter was trained on, if known.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.parts().fingerprint
    }

    /// The shape of that base, as far as known.
    pub fn base(&self) -> &BaseSignature {
        &self.parts().base
    }

    /// Where the adapter comes from.
    pub fn provenance(&self) -> &BTreeMap<String, String> {
        &self.parts().provenance
    }

    /// Checks that the adapter may run on a base of this shape and fingerprint.
    ///
    /// A different shape is always refused. A different fingerprint (a model of the same shape with other weights) is refused
    /// unless `override_fingerprint`. An adapter without a fingerprint is judged by its shape alone.
    pub fn check_fits(
        &self,
        base: &BaseShape,
        fp: &Fingerprint,
        override_fingerprint: bool,
    ) -> Result<(), AdapterError> {
        self.base().check_agrees(&BaseSignature::from(base))?;
        match self.fingerprint() {
            Some(adapter) if adapter != *fp && !override_fingerprint => {
                Err(AdapterError::FingerprintMismatch { adapter, base: *fp })
            }
            _ => Ok(()),
        }
    }
}

impl BaseSignature {
    /// Compares what both sides know. H and V are left to the fingerprint: no adapter row depends on them.
    fn check_agrees(&self, base: &BaseSignature) -> Result<(), AdapterError> {
        if self.architecture != base.architecture {
            return Err(AdapterError::ArchitectureMismatch {
                adapter: self.architecture.clone(),
                base: base.architecture.clone(),
            });
        }
        if let Some((adapter, base)) = differ(self.n_layer, base.n_layer) {
            return Err(AdapterError::LayerMismatch { adapter, base });
        }
        if let Some((adapter, base)) = differ(self.n_embd, base.n_embd) {
            return Err(AdapterError::EmbeddingMismatch { adapter, base });
        }
        let differ = |adapter: Option<&PerLayer>, base: Option<&PerLayer>| {
            adapter.zip(base).and_then(|(a, b)| a.difference(b))
        };
        if let Some((adapter, base)) = differ(self.kv_width().as_ref(), base.kv_width().as_ref()) {
            return Err(AdapterError::KvWidthMismatch { adapter, base });
        }
        if let Some((adapter, base)) = differ(self.n_head_kv.as_ref(), base.n_head_kv.as_ref()) {
            return Err(AdapterError::KvHeadMismatch { adapter, base });
        }
        Ok(())
    }

    /// All sizes, by their names in adapter files after `ggraft.base.`.
    fn sizes(&self) -> [(&'static str, Option<PerLayer>); 6] {
        [
            ("block_count", self.n_layer.map(PerLayer::from)),
            ("embedding_length", self.n_embd.map(PerLayer::from)),
            ("head_count", self.n_head.clone()),
            ("head_count_kv", self.n_head_kv.clone()),
            ("head_length", self.head_dim.clone()),
            ("vocab_size", self.n_vocab.map(PerLayer::from)),
        ]
    }

    /// Widths of K and V rows, Hk*d; `None` if unknown or beyond any address space.
    fn kv_width(&self) -> Option<PerLayer> {
        self.n_head_kv.as_ref()?.product(self.head_dim.as_ref()?)
    }

    /// Sizes that fit the file format, and one for each layer where layers differ.
    fn check(&self, kind: AdapterKind) -> Result<(), AdapterError> {
        for (field, sizes) in self.sizes() {
            let Some(sizes) = sizes else { continue };
            let too_large = |&&n: &&usize| u32::try_from(n).is_err();
            if let Some(&got) = sizes.values().iter().find(too_large) {
                return Err(AdapterError::SignatureTooLarge { field, got });
            }
            if sizes.uniform().is_some() {
                continue;
            }
            let declared = self.n_layer.ok_or(AdapterError::SignatureIncomplete {
                kind,
                field: "block_count",
            })?;
            let got = sizes.values().len();
            if got != declared {
                return Err(AdapterError::SignatureLayers {
                    field,
                    declared,
                    got,
                });
            }
        }
        Ok(())
    }
}

fn differ(adapter: Option<usize>, base: Option<usize>) -> Option<(usize, usize)> {
    adapter.zip(base).filter(|(a, b)| a != b)
}

/// Checks everything [`Adapter`] promises; returns P.
fn validate(parts: &Parts) -> Result<usize, AdapterError> {
    let Parts {
        kind,
        payload,
        template,
        base,
        provenance,
        ..
    } = parts;
    base.check(*kind)?;
    let incomplete = |field| AdapterError::SignatureIncomplete { kind: *kind, field };
    // Widths of the tensors of each layer.
    let (widths, length) = match (kind, payload) {
        (AdapterKind::Prefix, Payload::Prefix { layers }) => {
            let declared = base.n_layer.ok_or(incomplete("block_count"))?;
            base.n_head_kv.as_ref().ok_or(incomplete("head_count_kv"))?;
            let head_dim = base.head_dim.as_ref().ok_or(incomplete("head_length"))?;
            let Some(first) = layers.first().filter(|_| layers.len() == declared) else {
                return Err(AdapterError::LayerCount {
                    declared,
                    got: layers.len(),
                });
            };
            let widths = base.kv_width().ok_or(AdapterError::SignatureTooLarge {
                field: "head_length",
                got: head_dim.values().iter().copied().max().unwrap_or(0),
            })?;
            (widths, first.k.n_rows())
        }
        (AdapterKind::Prompt | AdapterKind::PTuning, Payload::VirtualTokens(rows)) => {
            let width = base.n_embd.ok_or(incomplete("embedding_length"))?;
            (PerLayer::from(width), rows.n_rows())
        }
        _ => return Err(AdapterError::PayloadKind { kind: *kind }),
    };
    check_length(length)?;
    for (i, (tensor, rows)) in payload.tensors().into_iter().enumerate() {
        let width = widths.get(i / 2).expect("one or as many as layers");
        let (expected, got) = ([width, length], [rows.width(), rows.n_rows()]);
        if got != expected {
            return Err(AdapterError::TensorShape {
                tensor,
                expected,
                got,
            });
        }
        if let Some((index, value)) = rows.first_non_finite() {
            return Err(AdapterError::NonFinite {
                tensor,
                index,
                value,
            });
        }
    }
    if let Some(template) = template {
        if *kind != AdapterKind::PTuning {
            return Err(AdapterError::TemplateKind { kind: *kind });
        }
        template.check_length(length)?;
    }
    check_provenance(provenance)?;
    Ok(length)
}

fn check_length(length: usize) -> Result<(), AdapterError> {
    if (1..=MAX_LENGTH).contains(&length) {
        return Ok(());
    }
    Err(AdapterError::Length {
        got: length,
        max: MAX_LENGTH,
    })
}

fn check_provenance(provenance: &BTreeMap<String, String>) -> Result<(), AdapterError> {
    if provenance.len() > MAX_PROVENANCE {
        return Err(AdapterError::ProvenanceTooLong {
            got: provenance.len(),
            max: MAX_PROVENANCE,
        });
    }
    let allowed = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.');
    match provenance
        .keys()
        .find(|k| k.is_empty() || k.len() > MAX_PROVENANCE_KEY || !k.bytes().all(allowed))
    {
        Some(key) => Err(AdapterError::ProvenanceKey {
            key: key.clone(),
            max: MAX_PROVENANCE_KEY,
        }),
        None => Ok(()),
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapter")
            .field("id", &self.id())
            .field("kind", &self.kind())
            .field("length", &self.length())
            .field("name", &self.name())
            .field("architecture", &self.base().architecture)
            .finish_non_exhaustive()
    }
}
