//! Files that llama-server restores a slot from, and `llama_state_seq_load_file` a sequence.

use super::Graft;
use super::state::without_envelope;
use crate::error::{Error, Result};
use crate::file::atomic::write_atomic;
use std::path::Path;

/// `LLAMA_STATE_SEQ_MAGIC`.
const MAGIC: u32 = u32::from_be_bytes(*b"ggsq");
/// `LLAMA_STATE_SEQ_VERSION` that such files have; llama.cpp refuses others.
pub const SLOT_VERSION: u32 = 4;

impl Graft {
    /// Writes a file that `llama_state_seq_load_file` and `POST /slots/0?action=restore` of llama-server load; it appears at `path` complete or not at all.
    ///
    /// llama-server remembers what text a slot has as tokens, and goes on behind what a prompt has in common with it. The rows of an adapter have no text: `token` stands for
    /// each of them, and a prompt that begins with as many of it goes on behind the adapter. It should be one that no other prompt begins with.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save_slot(&self, path: &Path, token: i32) -> Result<()> {
        write_atomic(path, |file| {
            file.write_all(&MAGIC.to_le_bytes())?;
            file.write_all(&SLOT_VERSION.to_le_bytes())?;
            file.write_all(&(self.n_rows as u32).to_le_bytes())?;
            for _ in 0..self.n_rows {
                file.write_all(&token.to_le_bytes())?;
            }
            file.write_all(without_envelope(&self.state))
        })
        .map_err(|source| Error::Io {
            path: path.to_owned(),
            source,
        })
    }
}
