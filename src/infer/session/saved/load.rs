//! From a file back into a session. The only gate: what passes here is a text that the session could have computed itself, but for the values.

use super::super::{Segment, Session};
use super::{LOGITS, SESSION, SavedError, VERSION, described, key, tensor_name};
use crate::adapter::Item;
use crate::error::Result;
use crate::file::gguf::{Gguf, GgufError, TensorInfo};
use crate::file::gguf_seal::Sealed;
use crate::file::types::GgmlType;
use crate::ggml::{KV_PAGE, KvPart};
use crate::infer::attached::Attached;
use crate::infer::core::{Input, check_logits};
use crate::infer::error::SessionError;
use crate::infer::kv::PagedText;
use crate::infer::memory::KvText;
use crate::infer::text::Utf8Stream;
use crate::model::Fingerprint;
use std::collections::HashMap;
use std::path::Path;

/// What a file says of its text.
struct Saved {
    history: Vec<Segment>,
    uncomputed: Option<i32>,
    unfinished: Utf8Stream,
    note: String,
    /// Positions behind the adapter's rows that are computed.
    n: usize,
}

/// What a tensor holds.
#[derive(Clone, Copy)]
enum Content {
    Logits,
    Rows(usize, KvPart),
}

impl Session {
    /// Goes on with the text that [`Session::save`] wrote to `path`, in place of the session's own, and returns the note. The model, the adapter
    /// and the type of the KV cache must be those it was saved with: open and attach them before. The context may have
    /// another length, the number of threads and batch size be others.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) and [`Error::Gguf`](crate::Error::Gguf) for what cannot be read, [`Error::Saved`](crate::Error::Saved) for a file that is damaged or does not belong here,
    /// [`SessionError::ContextFull`] if the text does not fit, [`SessionError::OutOfMemory`]. The session is then as it was.
    pub fn load(&mut self, path: &Path) -> Result<String> {
        self.read(path).map_err(|e| e.at(path))
    }

    fn read(&mut self, path: &Path) -> Result<String> {
        let mut file = Sealed::open(path)?;
        self.check_origin(file.gguf())?;
        let saved = self.read_text(&file)?;
        let (contents, mut text) = match self.text.paged() {
            Some(paged) => {
                let first = self.first_tokens(paged, file.gguf(), saved.n)?;
                let contents = self.contents(file.tensors(), &saved, Some((paged, &first)))?;
                let room = paged.with_room(saved.n, &first);
                let text = room.map_err(|_| SessionError::OutOfMemory)?;
                (contents, KvText::Pages(text))
            }
            None => {
                let contents = self.contents(file.tensors(), &saved, None)?;
                (contents, self.remembered(&saved)?)
            }
        };
        let mut logits = Vec::new();
        for (tensor, content) in file.tensors().to_vec().iter().zip(contents) {
            let bytes = file.read(tensor)?;
            match content {
                Content::Logits => {
                    let (values, _) = bytes.as_chunks();
                    logits.extend(values.iter().map(|&b| f32::from_le_bytes(b)));
                }
                Content::Rows(il, part) => text.paged_mut().put(il, part, &bytes),
            }
        }
        if !file.finish()? {
            return Err(SavedError::Damaged.into());
        }
        check_logits(&logits).map_err(|_| wrong(LOGITS, "holds values that are no numbers"))?;
        self.text = text;
        self.history = saved.history;
        self.uncomputed = saved.uncomputed;
        self.unfinished = saved.unfinished;
        self.logits = logits;
        Ok(saved.note)
    }

    /// The file is a session's, and this session is made of what that one was made of.
    fn check_origin(&self, gguf: &Gguf) -> Result<()> {
        match gguf.str(key::TYPE)? {
            Some(SESSION) => {}
            found => {
                let found = shown(found.unwrap_or("absent"));
                return Err(SavedError::NotASession { found }.into());
            }
        }
        let found = gguf.require_u32(key::VERSION)?;
        if found != VERSION {
            let supported = VERSION;
            return Err(SavedError::Version { found, supported }.into());
        }
        let (model, mode) = (&self.core.model, self.core.mode);
        let saved = gguf.require_str(key::FINGERPRINT)?.parse();
        let saved: Fingerprint = saved.map_err(|()| wrong_text("its base has no fingerprint"))?;
        let base = model.fingerprint();
        if saved != base {
            return Err(SavedError::OtherBase { saved, base }.into());
        }
        if gguf.require_str(key::WEIGHTS)? != model.weights_checksum() {
            return Err(SavedError::OtherWeights.into());
        }
        let attached = self.attached.as_ref().map(Attached::adapter);
        let checksum = attached.map(|adapter| adapter.checksum());
        if gguf.str(key::ADAPTER)? != checksum.as_deref() {
            return Err(SavedError::OtherAdapter {
                saved: shown(gguf.require_str(key::ADAPTER_NAME)?),
                attached: described(attached),
            }
            .into());
        }
        let saved = GgmlType::from_u32(gguf.require_u32(key::KV_TYPE)?);
        let saved = saved.ok_or(wrong_text("the type of its KV cache is unknown"))?;
        let session = mode.ty.ggml();
        if saved != session {
            return Err(SavedError::OtherKvType { saved, session }.into());
        }
        let saved = flag(gguf, key::FLASH)?;
        if saved != mode.flash {
            return Err(SavedError::OtherAttention { saved }.into());
        }
        let saved = flag(gguf, key::LONG_CONTEXT)?;
        if saved != mode.long_context {
            return Err(SavedError::OtherContext { saved }.into());
        }
        Ok(())
    }

    fn read_text(&self, file: &Sealed) -> Result<Saved> {
        let (gguf, head) = (file.gguf(), file.head());
        let tokens = gguf.i32_array(head, key::TOKENS)?;
        let tokens = tokens.ok_or_else(|| missing(key::TOKENS))?;
        self.check_tokens(&tokens)?;
        let lengths = gguf.u32_array(head, key::SEGMENTS)?;
        let lengths = lengths.ok_or_else(|| missing(key::SEGMENTS))?;
        let prompts = gguf.u32_array(head, key::PROMPTS)?;
        let prompts = prompts.ok_or_else(|| missing(key::PROMPTS))?;
        if prompts.len() != lengths.len() {
            return Err(wrong_text("it does not say which of its segments are prompts").into());
        }
        let mut history = Vec::new();
        let (mut rest, mut positions) = (&tokens[..], 0usize);
        for (length, prompt) in lengths.into_iter().zip(prompts) {
            let split = rest.split_at_checked(length as usize);
            let (tokens, behind) =
                split.ok_or(wrong_text("its segments are longer than its tokens"))?;
            let segment = Segment {
                tokens: tokens.to_vec(),
                prompt: prompt != 0,
            };
            let attached = self.attached.as_ref();
            let items = self.items(attached, &segment, history.is_empty())?;
            let taken: usize = items.iter().map(Item::len).sum();
            if taken == 0 {
                return Err(wrong_text("a segment of it is empty").into());
            }
            positions += taken;
            history.push(segment);
            rest = behind;
        }
        if !rest.is_empty() {
            return Err(wrong_text("its segments are shorter than its tokens").into());
        }
        let uncomputed = match flag(gguf, key::UNCOMPUTED)? {
            false => None,
            true => {
                let last = tokens.last().copied();
                Some(last.ok_or(wrong_text("the last one of no tokens is not computed"))?)
            }
        };
        let n = positions - usize::from(uncomputed.is_some());
        self.check_room(self.prefix_len() + n)?;
        let unfinished = gguf.u32_array(head, key::UNFINISHED)?.unwrap_or_default();
        let unfinished = unfinished.into_iter().map(u8::try_from);
        let unfinished: Vec<u8> = (unfinished.collect::<Result<_, _>>())
            .map_err(|_| wrong_text("the bytes behind its last character are none"))?;
        let mut stream = Utf8Stream::new();
        stream.push(&unfinished);
        if stream.pending() != unfinished || (history.is_empty() && !unfinished.is_empty()) {
            return Err(wrong_text("the bytes behind its last character begin none").into());
        }
        Ok(Saved {
            history,
            uncomputed,
            unfinished: stream,
            note: gguf.str(key::NOTE)?.unwrap_or_default().to_owned(),
            n,
        })
    }

    /// The text for libllama's memory, where it is computed when it goes on.
    fn remembered(&self, saved: &Saved) -> Result<KvText> {
        let attached = self.attached.as_ref();
        let mut text = self.core.memory().text();
        text.restart(attached.and_then(Attached::block));
        let mut left = saved.n;
        for (i, segment) in saved.history.iter().enumerate() {
            for item in self.items(attached, segment, i == 0)? {
                let n = item.len().min(left);
                left -= n;
                let input = match &item {
                    _ if n == 0 => continue,
                    Item::Tokens(tokens) => Input::Tokens(&tokens[..n]),
                    Item::Virtual(rows) => {
                        let attached = attached.expect("items are its template's");
                        Input::Virtual(attached.placed(rows.start..rows.start + n))
                    }
                };
                text.llama_mut().push(input);
            }
        }
        Ok(text)
    }

    /// Of each class, the first token whose keys and values are in the file, of the `n` that were computed.
    fn first_tokens(&self, text: &PagedText, gguf: &Gguf, n: usize) -> Result<Vec<usize>> {
        let layout = text.layout();
        let mut first = vec![n; layout.n_classes()];
        for il in 0..layout.n_layers() {
            let name = tensor_name(il, KvPart::K);
            let Some(tensor) = gguf.tensor(&name) else {
                continue;
            };
            let kept = usize::try_from(tensor.ne[1]).unwrap_or(usize::MAX);
            let gone = n.checked_sub(kept).filter(|n| n.is_multiple_of(KV_PAGE));
            first[layout.layer(il).0] =
                gone.ok_or_else(|| wrong(&name, "has another number of tokens than the text"))?;
        }
        let needed = |class| text.seen(class, self.prefix_len() + n);
        match (0..first.len()).any(|class| first[class] > needed(class)) {
            true => Err(wrong_text("keys and values that the next token sees are missing").into()),
            false => Ok(first),
        }
    }

    /// What each tensor holds, of a text in pages whose classes have the tokens from `first` on, or of one that is only remembered.
    fn contents(
        &self,
        tensors: &[TensorInfo],
        saved: &Saved,
        paged: Option<(&PagedText, &[usize])>,
    ) -> Result<Vec<Content>> {
        let mut expected = HashMap::new();
        let layers = paged.map(|(text, first)| text.each_layer().map(move |l| (l, first)));
        for ((text, il), first) in layers.into_iter().flatten() {
            let (class, layer) = text.layout().layer(il);
            let tokens = saved.n - first[class];
            let ne = [layer.heads.d, tokens, layer.heads.hk, 1].map(|n| n as u64);
            for part in KvPart::BOTH.into_iter().filter(|_| tokens > 0) {
                let content = Content::Rows(il, part);
                expected.insert(tensor_name(il, part), (layer.ty, ne, content));
            }
        }
        let n_vocab = self.core.model.shape().n_vocab as u64;
        let logits = (GgmlType::F32, [n_vocab, 1, 1, 1], Content::Logits);
        expected.insert(LOGITS.to_owned(), logits);
        let mut contents = Vec::new();
        for tensor in tensors {
            let found = expected.remove(&tensor.name);
            let (ty, ne, content) = found.ok_or_else(|| wrong(&tensor.name, "is unknown"))?;
            if (tensor.ty, tensor.ne) != (ty, ne) {
                let why = "has another type or shape than text and model demand";
                return Err(wrong(&tensor.name, why).into());
            }
            contents.push(content);
        }
        let has_logits = expected.remove(LOGITS).is_none();
        if let Some(name) = expected.keys().min() {
            return Err(wrong(name, "is missing").into());
        }
        match (saved.history.is_empty(), has_logits) {
            (true, true) => Err(wrong(LOGITS, "belongs to no token").into()),
            (false, false) if saved.uncomputed.is_none() => Err(wrong(LOGITS, "is missing").into()),
            _ => Ok(contents),
        }
    }
}

/// What a stranger wrote, as far as a message has room for it.
fn shown(text: &str) -> String {
    const MOST: usize = 200;
    text.chars().take(MOST).collect()
}

fn wrong_text(why: &'static str) -> SavedError {
    SavedError::Text { why }
}

fn wrong(tensor: &str, why: &'static str) -> SavedError {
    SavedError::Tensor {
        tensor: tensor.to_owned(),
        why,
    }
}

fn missing(key: &str) -> GgufError {
    GgufError::KeyMissing {
        key: key.to_owned(),
    }
}

fn flag(gguf: &Gguf, key: &str) -> Result<bool, GgufError> {
    gguf.bool(key)?.ok_or_else(|| missing(key))
}
