//! Reading text from files and stdin, writing to stdout and stderr without ever panicking.

use crate::failure::{Failure, Result};
use ggraft::Adapter;
use ggraft::file::atomic::{is_stdout, write_atomic};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::Path;
use std::string::FromUtf8Error;
use std::sync::LazyLock;

/// Longest text read whole, in bytes: far beyond any context, and an endless device ends here.
const MAX_TEXT: u64 = 64 << 20;

/// Writes to stdout at once.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(Failure::Stdout)
}

/// Writes a line to stderr; a closed stderr is nobody's concern.
pub(crate) fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Somebody sits at both ends.
pub(crate) fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// The whole of a text file; `-` is stdin.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    if path == Path::new("-") {
        return read_all(io::stdin().lock(), Path::new("standard input"));
    }
    let file = File::open(path).map_err(|source| Failure::File {
        path: path.to_owned(),
        source,
    })?;
    read_all(file, path)
}

fn read_all(from: impl Read, path: &Path) -> Result<String> {
    let fail = |source| Failure::File {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    from.take(MAX_TEXT + 1)
        .read_to_end(&mut bytes)
        .map_err(fail)?;
    if bytes.len() as u64 > MAX_TEXT {
        return Err(fail(too_long()));
    }
    let text = String::from_utf8(bytes).map_err(|e| fail(not_utf8(e)))?;
    Ok(match text.strip_prefix(BYTE_ORDER_MARK) {
        Some(text) => text.to_owned(),
        None => text,
    })
}

/// What some editors put in front of a text; it is no part of it.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Control characters, which a terminal would obey, as escapes.
pub(crate) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// Lines of standard input, which may be of any length, one at a time.
pub(crate) struct Lines {
    stdin: io::StdinLock<'static>,
    /// Nothing was read yet.
    begins: bool,
}

impl Lines {
    pub(crate) fn stdin() -> Self {
        Self {
            stdin: io::stdin().lock(),
            begins: true,
        }
    }
}

impl Iterator for Lines {
    type Item = Result<String>;

    /// The next line without its end.
    fn next(&mut self) -> Option<Result<String>> {
        let mut bytes = Vec::new();
        let read = (&mut self.stdin)
            .take(MAX_TEXT + 1)
            .read_until(b'\n', &mut bytes);
        if matches!(read, Ok(0)) {
            return None;
        }
        let line = read.and_then(|_| {
            if bytes.len() as u64 > MAX_TEXT {
                return Err(too_long());
            }
            String::from_utf8(bytes).map_err(not_utf8)
        });
        let begins = std::mem::replace(&mut self.begins, false);
        Some(match line {
            Ok(mut line) => {
                if begins && line.starts_with(BYTE_ORDER_MARK) {
                    line.remove(0);
                }
                if line.ends_with('\n') {
                    line.pop();
                }
                if line.ends_with('\r') {
                    line.pop();
                }
                Ok(line)
            }
            Err(source) => Err(Failure::File {
                path: "standard input".into(),
                source,
            }),
        })
    }
}

fn too_long() -> io::Error {
    io::Error::other(format!(
        "longer than {MAX_TEXT} bytes, which no context holds"
    ))
}

fn not_utf8(e: FromUtf8Error) -> io::Error {
    let at = e.utf8_error().valid_up_to();
    io::Error::other(format!("not UTF-8 text (byte {at})"))
}

/// Writes a file that appears complete or not at all.
pub(crate) fn write_file(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    write_atomic(path, fill).map_err(|source| Failure::File {
        path: path.to_owned(),
        source,
    })
}

/// Prints what was written to `path`; to stderr, if standard output has the file itself.
pub(crate) fn report(path: &Path, what: &str) -> Result<()> {
    let line = format!("{}: {what}", path.display());
    if is_stdout(path) {
        note(&line);
        return Ok(());
    }
    print(&format!("{line}\n"))
}

/// Progress of reading a file of `size` bytes on stderr; nothing for a small one, and unless stderr is a terminal.
pub(crate) fn reading(path: &Path, size: u64) -> ProgressBar {
    // What is tokenized within a second.
    const LARGE: u64 = 1 << 20;
    if size < LARGE {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes}, {eta} left");
    let bar = ProgressBar::new(size)
        .with_style(style.expect("a constant template"))
        .with_message(path.display().to_string());
    shown(bar)
}

/// Progress of `n` rows on stderr; nothing unless that is a terminal.
pub(crate) fn progress(n: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} rows, {eta} left");
    shown(ProgressBar::new(n as u64).with_style(style.expect("a constant template")))
}

/// The bars on stderr, which make way for other lines.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// The bar, known to [`Stderr`].
pub(crate) fn shown(bar: ProgressBar) -> ProgressBar {
    BARS.add(bar)
}

/// Standard error, above the bars.
pub(crate) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// `prefix adapter, 20 virtual tokens`.
pub(crate) fn summary(adapter: &Adapter) -> String {
    format!(
        "{} adapter, {} virtual tokens",
        adapter.kind(),
        adapter.length()
    )
}
