//! GGUF files that end with a checksum of themselves, read one tensor at a time: whatever a file claims, no more of it is in memory than its head and
//! the tensor that is being read.

use super::atomic::write_atomic;
use super::gguf::{Gguf, GgufError, TensorInfo};
use super::gguf_write::GgufWriter;
use super::types::GgmlType;
use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Name of the last tensor: SHA-256 of all bytes in front of it.
pub(crate) const SEAL: &str = "sha256";
const SEAL_BYTES: usize = 32;
/// Bytes of the head that are read first, and at most.
const FIRST_HEAD: u64 = 1 << 16;
const MAX_HEAD: u64 = 1 << 26;

/// As [`GgufWriter::write`], with the seal behind the tensors of `writer`.
pub(crate) fn write_sealed(
    mut writer: GgufWriter,
    path: &Path,
    mut data: impl FnMut(usize, &mut Vec<u8>),
) -> io::Result<()> {
    let n_tensors = writer.n_tensors();
    writer.tensor(SEAL, GgmlType::I8, &[SEAL_BYTES as u64]);
    write_atomic(path, |out| {
        let hash = RefCell::new(Sha256::new());
        let mut out = Hashed { out, hash: &hash };
        writer.stream(&mut out, |i, bytes| match i == n_tensors {
            true => bytes.extend_from_slice(&hash.borrow().clone().finalize()),
            false => data(i, bytes),
        })
    })
}

/// Hashes what it passes on.
struct Hashed<'a> {
    out: &'a mut dyn Write,
    hash: &'a RefCell<Sha256>,
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.hash.borrow_mut().update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A sealed file that is being read. What comes out of it is certain only when [`Sealed::finish`] has said so.
pub(crate) struct Sealed {
    path: PathBuf,
    file: File,
    len: u64,
    head: Vec<u8>,
    gguf: Gguf,
    /// Of all bytes that were read.
    hash: Sha256,
    /// How many these are.
    at: usize,
}

impl Sealed {
    /// Reads the head.
    ///
    /// # Errors
    /// [`Error::Io`], of what is no regular file too; [`Error::Gguf`].
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io {
            path: path.to_owned(),
            source,
        };
        // Before it is opened: that waits for the other end of a pipe.
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            let why = "not a regular file";
            return Err(io(io::Error::new(ErrorKind::InvalidInput, why)));
        }
        let mut file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let mut head = Vec::new();
        let mut wanted = FIRST_HEAD;
        let gguf = loop {
            let more = wanted.min(len).saturating_sub(head.len() as u64);
            let got = (&mut file).take(more).read_to_end(&mut head).map_err(io)?;
            let ended = wanted >= len || (got as u64) < more;
            match Gguf::parse_head(&head, usize::try_from(len).unwrap_or(usize::MAX)) {
                Err(GgufError::Truncated { .. }) if !ended && wanted < MAX_HEAD => wanted *= 8,
                result => break result.map_err(|e| Error::from(e).at(path))?,
            }
        };
        // What was understood is what counts, whatever becomes of the file meanwhile.
        let start = gguf.tensors.first().map_or(0, |t| t.range.start);
        let at = start.min(head.len());
        file.seek(SeekFrom::Start(at as u64)).map_err(io)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            len,
            hash: Sha256::new_with_prefix(&head[..at]),
            at,
            head,
            gguf,
        })
    }

    /// What the head says.
    pub(crate) fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// The bytes that [`Gguf`] wants to see again for its arrays.
    pub(crate) fn head(&self) -> &[u8] {
        &self.head
    }

    /// The tensors, without the seal.
    pub(crate) fn tensors(&self) -> &[TensorInfo] {
        match self.gguf.tensors.split_last() {
            Some((last, tensors)) if last.name == SEAL => tensors,
            _ => &self.gguf.tensors,
        }
    }

    /// The bytes of a tensor. Tensors must be read in their order.
    ///
    /// # Errors
    /// [`Error::Io`], also if the file has become shorter.
    pub(crate) fn read(&mut self, tensor: &TensorInfo) -> Result<Vec<u8>> {
        self.skip_to(tensor.range.start)?;
        let bytes = self.take(tensor.range.len())?;
        self.hash.update(&bytes);
        Ok(bytes)
    }

    /// Reads what is left. Whether the seal is there, ends the file and is that of what was read.
    ///
    /// # Errors
    /// As [`Sealed::read`].
    pub(crate) fn finish(mut self) -> Result<bool> {
        let Some(seal) = self.gguf.tensors.last().cloned() else {
            return Ok(false);
        };
        if seal.name != SEAL || seal.range.len() != SEAL_BYTES || seal.range.end as u64 != self.len
        {
            return Ok(false);
        }
        self.skip_to(seal.range.start)?;
        let found = self.take(SEAL_BYTES)?;
        Ok(self.hash.finalize()[..] == found)
    }

    /// Hashes everything up to byte `end` of the file.
    fn skip_to(&mut self, end: usize) -> Result<()> {
        const STEP: usize = 1 << 16;
        while self.at < end {
            let bytes = self.take(STEP.min(end - self.at))?;
            self.hash.update(&bytes);
        }
        Ok(())
    }

    /// The next `n` bytes.
    fn take(&mut self, n: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut read = || {
            (bytes.try_reserve_exact(n)).map_err(|_| io::Error::from(ErrorKind::OutOfMemory))?;
            match (&mut self.file).take(n as u64).read_to_end(&mut bytes)? {
                got if got < n => Err(io::Error::from(ErrorKind::UnexpectedEof)),
                _ => Ok(()),
            }
        };
        read().map_err(|source| Error::Io {
            path: self.path.clone(),
            source,
        })?;
        self.at += n;
        Ok(bytes)
    }
}
