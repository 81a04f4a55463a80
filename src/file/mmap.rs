//! The base file (or its split parts), mapped read-only.

use super::gguf::{Gguf, GgufError, TensorInfo};
use crate::error::{Error, Result};
use memmap2::Mmap;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// A mapped GGUF model: one file, or all `-0000N-of-0000M.gguf` parts of a split one (any part may be named).
///
/// # Contract of the map
/// The file must not be changed or truncated by anyone, this process included, while it is mapped. The operating system
/// cannot enforce that: bytes that change under a running computation give wrong results, and reading beyond the end of a
/// file that was truncated ends the process with SIGBUS. Replacing the file by renaming another one over it is safe: the map
/// keeps the old content.
#[derive(Debug)]
pub struct MappedGguf {
    parts: Vec<Part>,
}

/// One mapped file.
#[derive(Debug)]
pub struct Part {
    /// Where it is.
    pub path: PathBuf,
    /// Its facts.
    pub gguf: Gguf,
    map: Mmap,
}

impl Part {
    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    fn open(path: &Path) -> Result<Self> {
        let map = map_file(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            source,
        })?;
        let gguf = Gguf::parse(&map).map_err(|e| Error::from(e).at(path))?;
        Ok(Self {
            path: path.to_owned(),
            gguf,
            map,
        })
    }

    /// `key` as this part of a split file must have it.
    fn require(&self, key: &'static str, expected: u32) -> Result<()> {
        match self.gguf.require_u32(key) {
            Ok(got) if got == expected => Ok(()),
            Ok(got) => Err(self.error(GgufError::SplitMismatch { key, expected, got })),
            Err(e) => Err(self.error(e)),
        }
    }

    fn error(&self, e: GgufError) -> Error {
        Error::from(e).at(&self.path)
    }
}

fn map_file(path: &Path) -> io::Result<Mmap> {
    // Looked at before opening: opening a pipe would wait for a writer.
    let kind = fs::metadata(path)?;
    if !kind.is_file() {
        let what = if kind.is_dir() {
            "is a directory, expected a gguf file"
        } else {
            "is not a regular file and cannot be mapped"
        };
        return Err(io::Error::new(ErrorKind::InvalidInput, what));
    }
    let file = File::open(path)?;
    // SAFETY: the map is private to `Part`, which only hands out shared slices of it; that nobody changes the file
    // underneath is the caller's part of the contract stated at `MappedGguf`.
    unsafe { Mmap::map(&file) }
}

impl MappedGguf {
    /// Maps and validates, with all other parts if `path` is a part of a split model. See the [contract of the
    /// map](Self#contract-of-the-map).
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be mapped, [`Error::Gguf`] if one is malformed or the parts do not belong together.
    pub fn open(path: &Path) -> Result<Self> {
        let named = Part::open(path)?;
        let count = named.gguf.u32("split.count").map_err(|e| named.error(e))?;
        let parts = match count {
            None | Some(0 | 1) => vec![named],
            Some(count) => open_parts(named, count)?,
        };
        Ok(Self { parts })
    }

    /// In split order; a plain file is one part. Never empty.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The first part, which holds the model's metadata.
    pub fn main(&self) -> &Part {
        &self.parts[0]
    }

    /// All tensors in file order, each with the index of its part.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, &TensorInfo)> {
        self.parts
            .iter()
            .enumerate()
            .flat_map(|(i, part)| part.gguf.tensors.iter().map(move |t| (i, t)))
    }

    /// The tensor called `name` and the part it lies in. Costs one hash lookup per part.
    pub fn tensor(&self, name: &str) -> Option<(&Part, &TensorInfo)> {
        self.parts
            .iter()
            .find_map(|part| Some((part, part.gguf.tensor(name)?)))
    }

    /// The bytes of the tensor called `name`, in the map.
    pub fn tensor_bytes(&self, name: &str) -> Option<&[u8]> {
        let (part, tensor) = self.tensor(name)?;
        Some(&part.bytes()[tensor.range.clone()])
    }
}

/// How the name of part `number`, counted from 0, ends.
fn suffix(number: u32, count: u32) -> String {
    format!("-{:05}-of-{count:05}.gguf", u64::from(number) + 1)
}

/// Opens the other parts of the split model that `named` belongs to and checks that they fit together.
fn open_parts(named: Part, count: u32) -> Result<Vec<Part>> {
    let number = named
        .gguf
        .require_u32("split.no")
        .map_err(|e| named.error(e))?;
    if number >= count {
        return Err(named.error(GgufError::SplitNumber { number, count }));
    }
    let path = named.path.clone();
    let expected = suffix(number, count);
    let Some(stem) = path
        .file_name()
        .and_then(|name| name.to_str()?.strip_suffix(&expected))
    else {
        return Err(named.error(GgufError::SplitName { expected }));
    };

    let mut named = Some(named);
    let mut parts: Vec<Part> = Vec::new();
    for i in 0..count {
        let part = match named.take_if(|_| i == number) {
            Some(part) => part,
            None => open_part(
                &path.with_file_name(format!("{stem}{}", suffix(i, count))),
                i,
                count,
            )?,
        };
        part.require("split.no", i)?;
        part.require("split.count", count)?;
        let twice = part
            .gguf
            .tensors
            .iter()
            .find(|t| parts.iter().any(|p| p.gguf.tensor(&t.name).is_some()));
        if let Some(t) = twice {
            return Err(part.error(GgufError::DuplicateTensor {
                tensor: t.name.clone(),
            }));
        }
        parts.push(part);
    }
    let main = &parts[0];
    let expected = main
        .gguf
        .require_u32("split.tensors.count")
        .map_err(|e| main.error(e))?;
    let got = parts.iter().map(|p| p.gguf.tensors.len()).sum();
    if expected as usize != got {
        return Err(main.error(GgufError::SplitTensorCount { expected, got }));
    }
    Ok(parts)
}

fn open_part(path: &Path, number: u32, count: u32) -> Result<Part> {
    match Part::open(path) {
        Err(Error::Io { path, source }) if source.kind() == ErrorKind::NotFound => {
            Err(Error::from(GgufError::SplitPartMissing {
                part: number + 1,
                count,
            })
            .at(&path))
        }
        other => other,
    }
}
