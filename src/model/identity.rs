//! What tells the weights of two files of one model apart.

use super::Model;
use sha2::{Digest, Sha256};

/// Bytes of each tensor that identify it.
const WEIGHT_BYTES: usize = 4096;

impl Model {
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
