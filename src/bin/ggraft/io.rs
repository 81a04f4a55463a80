//! Reading text from files and stdin, writing to stdout and stderr without ever panicking.

use crate::failure::{Failure, Result};
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;

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
        return Err(fail(io::Error::other(format!(
            "longer than {MAX_TEXT} bytes, which no context holds"
        ))));
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        fail(io::Error::other(format!("not UTF-8 text (byte {at})")))
    })
}
