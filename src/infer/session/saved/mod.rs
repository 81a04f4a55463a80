//! A session on disk: its text, and what was computed of it. docs/SERVING.md says what for.
//!
//! A GGUF file that ends with a checksum of itself. Metadata hold the text and what the session was made of, tensors the logits of
//! the last token and, of each layer, the keys and values of all tokens that the next ones see, as they lie in the cache: `ne = [d, tokens, Hk]`.

mod error;
mod load;

pub use error::SavedError;

use super::Session;
use crate::adapter::Adapter;
use crate::error::{Error, Result};
use crate::file::gguf_seal::write_sealed;
use crate::file::gguf_write::{GgufWriter, MetaValue};
use crate::file::types::GgmlType;
use crate::ggml::KvPart;
use crate::infer::attached::Attached;
use crate::infer::error::SessionError;
use crate::infer::kv::PagedText;
use std::path::Path;

/// Grows when the meaning of anything in the file changes.
const VERSION: u32 = 1;
/// Bytes of a note at most.
const MAX_NOTE: usize = 16 << 20;

/// The value of `general.type`.
const SESSION: &str = "session";
const LOGITS: &str = "logits";

mod key {
    pub(super) const TYPE: &str = "general.type";
    pub(super) const ARCHITECTURE: &str = "general.architecture";
    pub(super) const VERSION: &str = "ggraft.session.version";
    pub(super) const FINGERPRINT: &str = "ggraft.session.fingerprint";
    pub(super) const WEIGHTS: &str = "ggraft.session.weights";
    /// Absent without an adapter.
    pub(super) const ADAPTER: &str = "ggraft.session.adapter";
    /// For people.
    pub(super) const ADAPTER_NAME: &str = "ggraft.session.adapter_name";
    /// ggml's number.
    pub(super) const KV_TYPE: &str = "ggraft.session.kv_type";
    pub(super) const FLASH: &str = "ggraft.session.flash_attention";
    pub(super) const LONG_CONTEXT: &str = "ggraft.session.long_context";
    pub(super) const TOKENS: &str = "ggraft.session.tokens";
    /// How many tokens each segment of the text has, and whether it came as a prompt.
    pub(super) const SEGMENTS: &str = "ggraft.session.segments";
    pub(super) const PROMPTS: &str = "ggraft.session.prompts";
    /// Whether the last token is not computed.
    pub(super) const UNCOMPUTED: &str = "ggraft.session.uncomputed";
    /// Bytes of the character that the text ends in the middle of.
    pub(super) const UNFINISHED: &str = "ggraft.session.unfinished";
    pub(super) const NOTE: &str = "ggraft.session.note";
}

/// The name of a layer's keys or values.
fn tensor_name(il: usize, part: KvPart) -> String {
    match part {
        KvPart::K => format!("blk.{il}.k"),
        KvPart::V => format!("blk.{il}.v"),
    }
}

/// An adapter in words.
fn described(adapter: Option<&Adapter>) -> String {
    let Some(adapter) = adapter else {
        return "no adapter".to_owned();
    };
    let name = adapter.name().map(|name| format!(" {name:?}"));
    format!(
        "the {} adapter{} of {} virtual tokens (checksum {})",
        adapter.kind(),
        name.unwrap_or_default(),
        adapter.length(),
        &adapter.checksum()[..8]
    )
}

impl Session {
    /// Writes the text, and what was computed of it, to a file: [`Session::load`] goes on with it in another process without computing it again,
    /// and says, bit for bit, what this session will say (on the same kind of CPU, with the same kernels). The adapter's own rows
    /// are not in the file, but its checksum is. `note` is for the application, which gets it back: the messages of a conversation, say.
    ///
    /// `path` is replaced when the file is complete, and not touched before. The file is about as large as the part of the KV cache that is in use. Of a model that
    /// [libllama computes](crate::model::DecoderChoice) it holds the text only, which is computed again when it goes on.
    ///
    /// # Errors
    /// [`Error::Io`]; [`SessionError::BadOption`] for a note of more than 16 MiB.
    pub fn save(&self, path: &Path, note: &str) -> Result<()> {
        if note.len() > MAX_NOTE {
            return Err(SessionError::BadOption {
                option: "note",
                value: format!("{} bytes", note.len()),
                why: format!("must be at most {MAX_NOTE}"),
            }
            .into());
        }
        let mut writer = self.described_text(note);
        if !self.logits.is_empty() {
            writer.tensor(LOGITS, GgmlType::F32, &[self.logits.len() as u64]);
        }
        let first = usize::from(!self.logits.is_empty());
        // What libllama has computed is computed again.
        let paged = self.text.paged();
        let mut tensors = Vec::new();
        for (text, il) in paged.into_iter().flat_map(PagedText::each_layer) {
            let (class, layer) = text.layout().layer(il);
            let tokens = text.kept(class);
            let ne = [layer.heads.d, tokens.len(), layer.heads.hk].map(|n| n as u64);
            for part in KvPart::BOTH.into_iter().filter(|_| !tokens.is_empty()) {
                writer.tensor(tensor_name(il, part), layer.ty, &ne);
                tensors.push((text, il, part, tokens.clone()));
            }
        }
        let data = |i: usize, out: &mut Vec<u8>| match i.checked_sub(first) {
            None => out.extend_from_slice(bytemuck::cast_slice(&self.logits)),
            Some(i) => {
                let (text, il, part, tokens) = &tensors[i];
                for head in 0..text.layout().layer(*il).1.heads.hk {
                    out.extend(text.head(*il, *part, head, tokens.clone()));
                }
            }
        };
        write_sealed(writer, path, data).map_err(|source| Error::Io {
            path: path.to_owned(),
            source,
        })
    }

    /// The file's metadata.
    fn described_text(&self, note: &str) -> GgufWriter {
        let (model, mode) = (&self.core.model, self.core.mode);
        let text = |s: &str| MetaValue::String(s.to_owned());
        let mut writer = GgufWriter::new();
        writer.set(key::TYPE, text(SESSION));
        writer.set(key::ARCHITECTURE, text(&model.shape().architecture));
        writer.set(key::VERSION, MetaValue::U32(VERSION));
        writer.set(key::FINGERPRINT, text(&model.fingerprint().to_string()));
        writer.set(key::WEIGHTS, text(&model.weights_checksum()));
        let adapter = self.attached.as_ref().map(Attached::adapter);
        if let Some(adapter) = adapter {
            writer.set(key::ADAPTER, text(&adapter.checksum()));
        }
        writer.set(key::ADAPTER_NAME, text(&described(adapter)));
        writer.set(key::KV_TYPE, MetaValue::U32(mode.ty.ggml() as u32));
        writer.set(key::FLASH, MetaValue::Bool(mode.flash));
        writer.set(key::LONG_CONTEXT, MetaValue::Bool(mode.long_context));
        writer.set(key::TOKENS, MetaValue::I32s(self.tokens()));
        // A segment has a position of the context for each token, of which there are at most as many as an i32 counts.
        let lengths = self.history.iter().map(|s| s.tokens.len() as u32);
        writer.set(key::SEGMENTS, MetaValue::U32s(lengths.collect()));
        let prompts = self.history.iter().map(|s| s.prompt);
        writer.set(key::PROMPTS, MetaValue::Bools(prompts.collect()));
        let uncomputed = self.uncomputed.is_some();
        writer.set(key::UNCOMPUTED, MetaValue::Bool(uncomputed));
        let unfinished = self.unfinished.pending().iter().map(|&b| b.into());
        writer.set(key::UNFINISHED, MetaValue::U32s(unfinished.collect()));
        writer.set(key::NOTE, text(note));
        writer
    }
}
