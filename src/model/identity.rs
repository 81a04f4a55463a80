//! What tells two models apart, and the weights of two files of one model.

use super::{BaseShape, Fingerprint, PerLayer};
use crate::file::mmap::MappedGguf;
use sha2::{Digest, Sha256};

/// Bytes of each tensor that identify it.
#[cfg(feature = "runtime")]
const WEIGHT_BYTES: usize = 4096;

#[cfg(feature = "runtime")]
impl super::Model {
    /// Identifies the weights as they are in the file, in hexadecimal digits: other quantizations of one model share its
    /// fingerprint, but what was computed with one is not what another computes. All tensors count, by names, types, shapes and
    /// their first bytes: reading the rest would take longer than many a use.
    pub(crate) fn weights_checksum(&self) -> String {
        let file = self.file();
        let mut tensors: Vec<_> = file.tensors().collect();
        tensors.sort_by(|a, b| a.1.name.cmp(&b.1.name));
        let mut hash = Sha256::new();
        for (part, info) in tensors {
            hash.update(format!("\n{} {:?} {:?}\n", info.name, info.ty, info.ne));
            let bytes = &file.parts()[part].bytes()[info.range.clone()];
            hash.update(&bytes[..bytes.len().min(WEIGHT_BYTES)]);
        }
        hex(hash)
    }
}

/// The hash of all that was put in, in hexadecimal digits.
pub(crate) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of the shape signature and of all norm tensors, by name. Quantization leaves norms in F32, so every file of one
/// model has the same fingerprint.
pub(super) fn fingerprint(file: &MappedGguf, shape: &BaseShape) -> Fingerprint {
    let mut hash = Sha256::new();
    hash.update(b"ggraft fingerprint 1\0");
    hash.update(shape.architecture.as_bytes());
    hash.update([0]);
    let one = |n: usize| PerLayer::from(n);
    for sizes in [
        &one(shape.n_layer),
        &one(shape.n_embd),
        &shape.n_head,
        &shape.n_head_kv,
        &shape.head_dim,
        &one(shape.n_vocab),
    ] {
        for &n in sizes.values() {
            hash.update((n as u64).to_le_bytes());
        }
    }
    let mut norms: Vec<_> = file
        .tensors()
        .filter(|(_, t)| t.name.ends_with("norm.weight") || t.name.ends_with("norm.bias"))
        .collect();
    norms.sort_by(|a, b| a.1.name.cmp(&b.1.name));
    for (part, info) in norms {
        hash.update(info.name.as_bytes());
        hash.update([0]);
        hash.update(&file.parts()[part].bytes()[info.range.clone()]);
    }
    Fingerprint(hash.finalize().into())
}
