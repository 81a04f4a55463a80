//! Files that appear complete or not at all.

use std::fs;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Writes to a temporary name in the target's folder, fsyncs, renames over `path`, fsyncs the folder.
///
/// Whatever happens before the rename (an error, a panic in `fill`, a full disk), `path` keeps its old content or stays
/// absent. A new file gets mode 0644 as narrowed by the umask, a replaced one keeps its mode, a symbolic link keeps
/// pointing at the file that is replaced. `fill` gets a buffered writer.
///
/// # Errors
/// What the operating system or `fill` reports, and [`ErrorKind::InvalidInput`] if `path` exists and is not a regular
/// file: a rename would destroy a device or pipe.
pub fn write_atomic(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let target = Target::find(path)?;
    let mut out = BufWriter::with_capacity(1 << 18, target.temporary()?);
    fill(&mut out)?;
    let temporary = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    if let Some(permissions) = &target.permissions {
        temporary.as_file().set_permissions(permissions.clone())?;
    }
    temporary.as_file().sync_all()?;
    temporary.persist(&target.path).map_err(|e| e.error)?;
    sync_folder(target.folder())
}

/// Fails where [`write_atomic`] would fail for reasons that are there beforehand: `path` is a directory or no regular file,
/// its folder is missing, or nothing can be created in it. For work that takes long and writes at its end. Removes what
/// writers of `path` have left behind that were killed.
///
/// # Errors
/// As [`write_atomic`].
pub fn check_writable(path: &Path) -> io::Result<()> {
    let target = Target::find(path)?;
    target.remove_stale();
    target.temporary().map(drop)
}

/// What a file will be renamed over.
struct Target {
    /// With symbolic links followed, if it exists.
    path: PathBuf,
    /// Those of the file that is replaced.
    permissions: Option<fs::Permissions>,
}

impl Target {
    fn find(path: &Path) -> io::Result<Self> {
        match fs::metadata(path) {
            Ok(meta) if !meta.is_file() => {
                let what = if meta.is_dir() {
                    "is a directory"
                } else {
                    "is not a regular file"
                };
                Err(io::Error::new(ErrorKind::InvalidInput, what))
            }
            Ok(meta) => Ok(Self {
                path: fs::canonicalize(path)?,
                permissions: Some(meta.permissions()),
            }),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Self {
                path: path.to_owned(),
                permissions: None,
            }),
            Err(e) => Err(e),
        }
    }

    fn folder(&self) -> &Path {
        match self.path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        }
    }

    /// What names of temporary files for it begin with.
    fn prefix(&self) -> String {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        // Names may have 255 bytes.
        let end = (0..=name.len().min(200)).rfind(|&i| name.is_char_boundary(i));
        format!(".ggraft-{}-", &name[..end.unwrap_or(0)])
    }

    /// A new file beside it that is deleted when dropped. Readable by others: tempfile's own default is 0600.
    fn temporary(&self) -> io::Result<tempfile::NamedTempFile> {
        let prefix = self.prefix();
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(SUFFIX).rand_bytes(RANDOM);
        #[cfg(unix)]
        let mode = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o644);
        #[cfg(unix)]
        builder.permissions(mode);
        let file = builder.tempfile_in(self.folder())?;
        // Held as long as its writer lives. Where files cannot be locked, stale ones stay.
        #[cfg(unix)]
        let _ = file.as_file().try_lock();
        Ok(file)
    }

    /// Removes temporary files that nobody writes any more.
    #[cfg(unix)]
    fn remove_stale(&self) {
        let prefix = self.prefix();
        let is_temporary = |name: &std::ffi::OsStr| {
            name.len() == prefix.len() + RANDOM + SUFFIX.len()
                && name
                    .to_str()
                    .is_some_and(|n| n.starts_with(&prefix) && n.ends_with(SUFFIX))
        };
        let entries = fs::read_dir(self.folder()).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| is_temporary(&entry.file_name())) {
            let path = entry.path();
            let file = fs::OpenOptions::new().write(true).open(&path);
            if file.is_ok_and(|file| file.try_lock().is_ok()) {
                let _ = fs::remove_file(path);
            }
        }
    }

    #[cfg(not(unix))]
    fn remove_stale(&self) {}
}

/// How names of temporary files end, behind so many random characters.
const SUFFIX: &str = ".tmp";
const RANDOM: usize = 6;

/// Makes the rename itself survive a power failure.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}

/// Folders cannot be opened for this here; the file system journals the rename.
#[cfg(not(unix))]
fn sync_folder(_folder: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_failed_write_leaves_the_old_content_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        check_writable(&path).unwrap();
        write_atomic(&path, |out| out.write_all(b"old")).unwrap();
        check_writable(&path).unwrap();

        let failed = write_atomic(&path, |out| {
            out.write_all(&[0; 1 << 20])?;
            Err(io::Error::other("enough"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "enough");
        let panicked = std::panic::catch_unwind(|| write_atomic(&path, |_| panic!("enough")));
        assert!(panicked.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["f"]);

        write_atomic(&path, |out| out.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["f"]);
    }

    #[cfg(unix)]
    #[test]
    fn what_killed_writers_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let writing = Target::find(&path).unwrap().temporary().unwrap();
        let name = writing.path().file_name().unwrap().to_str().unwrap();
        // Of this file, of another one, and no temporary file at all.
        let stale = [
            ".ggraft-f-abcdef.tmp",
            ".ggraft-f-x-abcdef.tmp",
            ".ggraft-f-.tmp",
        ];
        for name in stale {
            fs::write(folder.path().join(name), "").unwrap();
        }
        check_writable(&path).unwrap();
        let mut left = names(folder.path());
        left.sort();
        let mut expected = vec![stale[2], stale[1], name];
        expected.sort();
        assert_eq!(left, expected);

        // Whatever the name.
        for name in ["\u{1f980}".repeat(60), "x".repeat(255)] {
            let path = folder.path().join(name);
            check_writable(&path).unwrap();
            write_atomic(&path, |out| out.write_all(b"1")).unwrap();
        }
    }

    #[test]
    fn targets_that_a_rename_would_destroy_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |path: &Path| {
            let early = check_writable(path).unwrap_err();
            let late = write_atomic(path, |_| unreachable!("refused before")).unwrap_err();
            assert_eq!(early.kind(), late.kind());
            late
        };
        assert_eq!(refused(folder.path()).to_string(), "is a directory");
        assert_eq!(
            refused(&folder.path().join("absent/f")).kind(),
            ErrorKind::NotFound
        );
        #[cfg(unix)]
        assert_eq!(
            refused(Path::new("/dev/null")).to_string(),
            "is not a regular file"
        );
    }

    #[cfg(unix)]
    #[test]
    fn modes_and_links_survive() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let (path, link) = (folder.path().join("f"), folder.path().join("link"));

        // The same open(2) mode by another way tells what the umask leaves of it.
        let probe = folder.path().join("probe");
        let options = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&probe);
        drop(options.unwrap());
        write_atomic(&path, |out| out.write_all(b"1")).unwrap();
        assert_eq!(mode(&path), mode(&probe) & 0o644);

        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        symlink(&path, &link).unwrap();
        write_atomic(&link, |out| out.write_all(b"2")).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(
            (fs::read(&path).unwrap(), mode(&path)),
            (b"2".to_vec(), 0o640)
        );
    }
}
