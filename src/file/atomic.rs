//! Files that appear complete or not at all; pipes, devices and open descriptors, which are written as they are.

use std::fs;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Writes to a temporary name in the target's folder, fsyncs, renames over `path`, fsyncs the folder.
///
/// Whatever happens before the rename (an error, a panic in `fill`, a full disk), `path` keeps its old content or stays
/// absent. A new file gets mode 0644 as narrowed by the umask, a replaced one keeps its mode, a symbolic link keeps
/// pointing at the file that is replaced or, if that was missing, made. `fill` gets a buffered writer. A rename would
/// destroy a pipe or a device: what [`open_stream`] opens is written directly, and a reader sees what a failed write began.
///
/// # Errors
/// What the operating system or `fill` reports, and [`ErrorKind::InvalidInput`] if `path` is a directory.
pub fn write_atomic(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    if let Some(stream) = open_stream(path)? {
        let mut out = BufWriter::with_capacity(BUFFER, stream);
        fill(&mut out)?;
        return out.flush();
    }
    let target = Target::find(path)?;
    let temporary = target.temporary()?;
    // The file itself: errors of its handle have its name, which nobody asked for.
    let mut out = BufWriter::with_capacity(BUFFER, temporary.as_file());
    fill(&mut out)?;
    out.flush()?;
    drop(out);
    if let Some(permissions) = &target.permissions {
        temporary.as_file().set_permissions(permissions.clone())?;
    }
    temporary.as_file().sync_all()?;
    temporary.persist(&target.path).map_err(|e| e.error)?;
    sync_folder(target.folder())
}

/// Fails where [`write_atomic`] would fail for reasons that are there beforehand: `path` is a directory or no name of a file, its folder is
/// missing, nothing can be created in it, or a device may not be written. For work that takes long and writes at its end.
/// Removes what writers of `path` have left behind that were killed. A named pipe is not opened: that would wait for its
/// reader.
///
/// # Errors
/// As [`write_atomic`].
pub fn check_writable(path: &Path) -> io::Result<()> {
    match Place::of(path)? {
        Place::Descriptor(..) => Ok(()),
        Place::Special(_) if is_pipe(path) => Ok(()),
        Place::Special(path) => fs::OpenOptions::new().write(true).open(path).map(drop),
        Place::File(_) => {
            let target = Target::find(path)?;
            target.remove_stale();
            target.temporary().map(drop)
        }
    }
}

/// Opens `path` for writing if it is no file to be replaced but a pipe, a device or, as `/dev/stdout` and `/dev/fd/3` are,
/// an open descriptor of this process; `None` otherwise. A file behind a descriptor is written where it ends: it belongs to
/// whoever opened it. Waits for the reader of a named pipe.
///
/// # Errors
/// What the operating system reports.
pub fn open_stream(path: &Path) -> io::Result<Option<Box<dyn Write + Send>>> {
    let mut options = fs::OpenOptions::new();
    Ok(Some(match Place::of(path)? {
        Place::File(_) => return Ok(None),
        Place::Descriptor(_, 1) => Box::new(io::stdout()),
        Place::Descriptor(_, 2) => Box::new(io::stderr()),
        Place::Descriptor(path, _) => Box::new(options.append(true).open(path)?),
        Place::Special(path) => Box::new(options.write(true).open(path)?),
    }))
}

/// Whether [`open_stream`] would open `path`.
pub fn is_stream(path: &Path) -> bool {
    !matches!(Place::of(path), Ok(Place::File(_)) | Err(_))
}

/// Whether what is written to `path` goes to standard output.
pub fn is_stdout(path: &Path) -> bool {
    matches!(Place::of(path), Ok(Place::Descriptor(_, 1)))
}

/// The file that [`write_atomic`] makes or replaces: `path` with symbolic links followed, whether or not there is a file
/// behind the last one.
///
/// # Errors
/// What the operating system reports, for example of links that lead to each other.
pub fn target(path: &Path) -> io::Result<PathBuf> {
    match Place::of(path)? {
        Place::File(path) | Place::Special(path) | Place::Descriptor(path, _) => Ok(path),
    }
}

/// Bytes that are written at once.
const BUFFER: usize = 1 << 18;
/// Links that lead to links at most; Linux gives up there.
const MAX_LINKS: usize = 40;

/// What a path leads to, symbolic links followed.
enum Place {
    /// A file, or nothing yet; also a directory, which is refused later.
    File(PathBuf),
    /// A pipe or a device.
    Special(PathBuf),
    /// A descriptor of this process, whatever is behind it.
    Descriptor(PathBuf, u32),
}

impl Place {
    fn of(path: &Path) -> io::Result<Self> {
        let mut place = path.to_owned();
        for _ in 0..MAX_LINKS {
            if let Some(n) = descriptor(&place) {
                return Ok(Self::Descriptor(place, n));
            }
            match fs::read_link(&place) {
                Ok(to) => place = place.parent().map_or(to.clone(), |folder| folder.join(to)),
                Err(_) => {
                    return Ok(match fs::metadata(&place) {
                        Ok(meta) if !meta.is_file() && !meta.is_dir() => Self::Special(place),
                        _ => Self::File(place),
                    });
                }
            }
        }
        // The operating system knows the words for it, unless it follows even more.
        fs::metadata(path)?;
        Err(io::Error::other("too many symbolic links"))
    }
}

/// N of `/dev/fd/N` and of what else means this process's descriptors.
#[cfg(unix)]
fn descriptor(path: &Path) -> Option<u32> {
    let path = std::path::absolute(path).ok()?;
    let own = format!("/proc/{}/fd", std::process::id());
    ["/dev/fd", "/proc/self/fd", "/proc/thread-self/fd", &own]
        .into_iter()
        .find_map(|folder| path.strip_prefix(folder).ok()?.to_str()?.parse().ok())
}

#[cfg(not(unix))]
fn descriptor(_path: &Path) -> Option<u32> {
    None
}

#[cfg(unix)]
fn is_pipe(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo())
}

#[cfg(not(unix))]
fn is_pipe(_path: &Path) -> bool {
    false
}

/// What a file will be renamed over.
struct Target {
    /// With symbolic links followed.
    path: PathBuf,
    /// Those of the file that is replaced.
    permissions: Option<fs::Permissions>,
}

impl Target {
    fn find(path: &Path) -> io::Result<Self> {
        let path = target(path)?;
        let text = path.as_os_str().to_string_lossy();
        if text.is_empty() || text.ends_with(std::path::is_separator) && !path.is_dir() {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                "is no name of a file",
            ));
        }
        match fs::metadata(&path) {
            Ok(meta) if meta.is_dir() => {
                Err(io::Error::new(ErrorKind::InvalidInput, "is a directory"))
            }
            Ok(meta) => Ok(Self {
                path,
                permissions: Some(meta.permissions()),
            }),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Self {
                path,
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

    /// A new file beside it that is deleted when dropped. Readable by others: tempfile's own default is 0600. Errors are the
    /// system's own, without the name of the temporary file.
    fn temporary(&self) -> io::Result<tempfile::NamedTempFile> {
        let prefix = self.prefix();
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(SUFFIX).rand_bytes(RANDOM);
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o644);
        let file = builder.make_in(self.folder(), |path| options.open(path))?;
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
        for wrong in ["", "none/"] {
            assert_eq!(
                refused(Path::new(wrong)).to_string(),
                "is no name of a file"
            );
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::symlink;
            let link = |name: &str, to: &str| {
                let link = folder.path().join(name);
                symlink(to, &link).unwrap();
                link
            };
            link("one", "two");
            refused(&link("two", "one"));
            let nowhere = link("nowhere", "absent/f");
            assert_eq!(refused(&nowhere).kind(), ErrorKind::NotFound);
        }
    }

    /// The name of the temporary file is nobody's concern.
    #[test]
    fn errors_are_those_of_the_system() {
        let folder = tempfile::tempdir().unwrap();
        let error = write_atomic(&folder.path().join("absent/f"), |_| Ok(())).unwrap_err();
        let expected = fs::read(folder.path().join("absent/f")).unwrap_err();
        assert_eq!(error.to_string(), expected.to_string());
    }

    /// A rename would put a file in their place.
    #[cfg(unix)]
    #[test]
    fn pipes_and_devices_are_written_as_they_are() {
        use std::os::fd::AsRawFd;
        let folder = tempfile::tempdir().unwrap();
        let null = Path::new("/dev/null");
        assert!(is_stream(null) && !is_stdout(null));
        check_writable(null).unwrap();
        write_atomic(null, |out| out.write_all(b"1")).unwrap();
        assert!(!fs::metadata(null).unwrap().is_file());

        let pipe = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        // Nobody reads it yet.
        check_writable(&pipe).unwrap();
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || fs::read(pipe).unwrap()
        });
        write_atomic(&pipe, |out| out.write_all(b"through the pipe")).unwrap();
        assert_eq!(reader.join().unwrap(), b"through the pipe");
        assert_eq!(names(folder.path()), ["pipe"]);

        // What was opened for appending keeps what it had, and stays the file that it is.
        let path = folder.path().join("f");
        fs::write(&path, "old, ").unwrap();
        let open = fs::OpenOptions::new().append(true).open(&path).unwrap();
        let link = folder.path().join("link");
        let number = format!("/dev/fd/{}", open.as_raw_fd());
        std::os::unix::fs::symlink(&number, &link).unwrap();
        assert!(is_stream(&link) && !is_stdout(&link));
        for path in [Path::new(&number), &link] {
            check_writable(path).unwrap();
            write_atomic(path, |out| out.write_all(b"new ")).unwrap();
        }
        (&open).write_all(b"and newer").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old, new new and newer");

        assert!(is_stdout(Path::new("/dev/stdout")) && is_stdout(Path::new("/dev/fd/1")));
        assert!(is_stream(Path::new("/dev/stderr")) && !is_stdout(Path::new("/dev/stderr")));
        assert!(!is_stream(&path) && !is_stream(&folder.path().join("absent")));
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

        // A link to a link to nothing: what is made is where they point.
        symlink("absent", folder.path().join("inner")).unwrap();
        let outer = folder.path().join("outer");
        symlink("inner", &outer).unwrap();
        check_writable(&outer).unwrap();
        write_atomic(&outer, |out| out.write_all(b"3")).unwrap();
        let made = folder.path().join("absent");
        assert_eq!(fs::read(&made).unwrap(), b"3");
        assert!(fs::symlink_metadata(&made).unwrap().is_file());
        assert!(fs::symlink_metadata(&outer).unwrap().is_symlink());
        assert_eq!(target(&outer).unwrap(), made);
    }
}
