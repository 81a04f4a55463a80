//! What a command reads and what it writes: a slip in a name costs an error line and no file.

use crate::failure::{Failure, Result};
use crate::inspect::is_adapter;
use ggraft::file::atomic::{check_writable, is_stream, target};
use ggraft::file::mmap::MappedGguf;
use ggraft::file::peft::{CONFIG_FILE, TENSOR_FILE};
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// A file or folder, and the option that names it: nothing for an argument without one.
struct Named {
    option: &'static str,
    path: PathBuf,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.option {
            "" => write!(f, "{}", self.path.display()),
            option => write!(f, "{option} {}", self.path.display()),
        }
    }
}

/// The files of a command, checked before anything is computed.
#[derive(Default)]
pub(crate) struct Files {
    read: Vec<Named>,
    written: Vec<Named>,
    /// Folders that are made if they are missing.
    made: Vec<PathBuf>,
}

impl Files {
    /// Files, or folders of files, that the command reads.
    pub(crate) fn reads<P: AsRef<Path>>(
        mut self,
        option: &'static str,
        paths: impl IntoIterator<Item = P>,
    ) -> Self {
        let named = |path: P| Named {
            option,
            path: path.as_ref().to_owned(),
        };
        self.read.extend(paths.into_iter().map(named));
        self
    }

    /// As [`Files::reads`]; `-` is standard input, which may come from a file, too.
    pub(crate) fn reads_data(self, option: &'static str, path: Option<&Path>) -> Self {
        let stdin = Path::new(if cfg!(unix) { "/dev/stdin" } else { "-" });
        self.reads(
            option,
            path.map(|path| if path == Path::new("-") { stdin } else { path }),
        )
    }

    /// A file that the command writes.
    pub(crate) fn writes(mut self, option: &'static str, path: Option<&Path>) -> Self {
        let path = path.map(Path::to_owned);
        self.written.extend(path.map(|path| Named { option, path }));
        self
    }

    /// The files of PEFT that the command writes to `folder`, which it makes.
    pub(crate) fn writes_peft(mut self, option: &'static str, folder: &Path) -> Self {
        self.made.push(folder.to_owned());
        [CONFIG_FILE, TENSOR_FILE]
            .into_iter()
            .fold(self, |files, name| {
                files.writes(option, Some(&folder.join(name)))
            })
    }

    /// Fails if the command would write over a file that it reads, over a model, or twice to one file, and if it cannot write
    /// one at all.
    pub(crate) fn check(&self) -> Result<()> {
        for (i, output) in self.written.iter().enumerate() {
            // What is written directly replaces nothing.
            if !is_stream(&output.path) {
                self.check_replaced(output, &self.written[..i])?;
            }
        }
        self.written
            .iter()
            .try_for_each(|output| self.check_writable(&output.path))
    }

    fn check_replaced(&self, output: &Named, others: &[Named]) -> Result<()> {
        let path = &output.path;
        for input in &self.read {
            let how = match same_file(&input.path, path) {
                true => "is the file of",
                false if is_of_peft(&input.path, path) => "is a file in",
                false => continue,
            };
            return Err(Failure::Usage(format!(
                "{output} {how} {input}, which is read by this command: write to another file"
            )));
        }
        if let Some(other) = others.iter().find(|other| same_file(&other.path, path)) {
            return Err(Failure::Usage(format!(
                "{output} is the file of {other} and would be written twice: use different names"
            )));
        }
        if is_model(path) {
            return Err(Failure::Usage(format!(
                "{output} is a GGUF model, which no command of ggraft writes: write to another file, or remove it before"
            )));
        }
        Ok(())
    }

    fn check_writable(&self, path: &Path) -> Result<()> {
        let fail = |source| Failure::File {
            path: path.to_owned(),
            source,
        };
        let place = target(path).map_err(fail)?;
        // Of a folder that is still to be made: what is made first.
        let mut place = place.as_path();
        let made = self.made.iter().any(|folder| path.starts_with(folder));
        while let Some(folder) = place.parent().filter(|f| !f.as_os_str().is_empty())
            && !folder.exists()
        {
            if !made {
                return Err(Failure::Unsuitable(format!(
                    "{}: there is no folder {}",
                    path.display(),
                    folder.display()
                )));
            }
            place = folder;
        }
        check_writable(place).map_err(fail)
    }
}

/// What two paths have in common that lead to one file.
#[derive(PartialEq)]
enum Identity {
    #[cfg(unix)]
    Inode(u64, u64),
    /// Without links and `..`.
    Path(PathBuf),
}

impl Identity {
    fn of(path: &Path) -> Option<Self> {
        #[cfg(unix)]
        if let Ok(meta) = fs::metadata(path) {
            use std::os::unix::fs::MetadataExt;
            return Some(Self::Inode(meta.dev(), meta.ino()));
        }
        if let Ok(path) = path.canonicalize() {
            return Some(Self::Path(path));
        }
        // Nothing is there yet.
        let path = target(path).ok()?;
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.canonicalize().ok()?,
            _ => std::env::current_dir().ok()?.canonicalize().ok()?,
        };
        let name = path.file_name()?;
        // Where file systems usually do not tell upper from lower case.
        Some(Self::Path(match cfg!(any(windows, target_os = "macos")) {
            true => folder.join(name.to_string_lossy().to_lowercase()),
            false => folder.join(name),
        }))
    }
}

/// Whether both paths lead to one file, by whatever links and spellings, or would if it were there.
pub(crate) fn same_file(a: &Path, b: &Path) -> bool {
    a == b || Identity::of(a).is_some_and(|a| Some(a) == Identity::of(b))
}

/// Whether `path` is one of the files that are read if `folder` is one of PEFT's.
fn is_of_peft(folder: &Path, path: &Path) -> bool {
    let read = [CONFIG_FILE, TENSOR_FILE].map(|name| folder.join(name));
    folder.is_dir() && read.iter().any(|file| same_file(file, path))
}

/// A GGUF file that is not known to be an adapter: perhaps gigabytes that took a night to download.
fn is_model(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && magic == *b"GGUF" && !MappedGguf::open(path).is_ok_and(|file| is_adapter(&file))
}
