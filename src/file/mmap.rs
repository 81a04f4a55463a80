//! The base file (or its split parts), mapped read-only.

use super::gguf::Gguf;
use crate::error::Result;
use std::path::{Path, PathBuf};

/// A mapped GGUF model: one file, or all `-0000N-of-0000M.gguf` parts of a split one (any part may be named).
///
/// Contract of the map (memmap2): the file must not be changed or truncated by anyone while it is mapped.
#[derive(Debug)]
pub struct MappedGguf {
    /// In split order; a plain file is one part.
    pub parts: Vec<Part>,
}

/// One mapped file.
#[derive(Debug)]
pub struct Part {
    /// Where it is.
    pub path: PathBuf,
    /// Its facts.
    pub gguf: Gguf,
    map: memmap2::Mmap,
}

impl Part {
    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}

impl MappedGguf {
    /// Maps and validates.
    pub fn open(_path: &Path) -> Result<Self> {
        todo!()
    }
    /// The first part, which holds the model's metadata.
    pub fn main(&self) -> &Part {
        &self.parts[0]
    }
}
