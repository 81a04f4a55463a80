//! Lines of a file of any size.

use std::io::{self, BufRead};

/// Longest line, in bytes: far beyond any context, and an endless device ends here.
pub(super) const MAX_LINE: usize = 64 << 20;

/// Lines that end in LF, CR LF or CR.
#[derive(Default)]
pub(super) struct Lines {
    /// Of the last line, counted from 1.
    pub(super) number: usize,
    /// The last line ended in CR: an LF belongs to it.
    after_cr: bool,
}

impl Lines {
    /// Leaves out lines that are empty or blank; returns the white space that the first other line begins with and what stands
    /// behind it, which `from` still has.
    pub(super) fn skip_blank(
        &mut self,
        from: &mut impl BufRead,
    ) -> io::Result<(Vec<u8>, Option<u8>)> {
        let mut indent = Vec::new();
        loop {
            let buffer = match from.fill_buf() {
                Ok(buffer) => buffer,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            let blank = buffer.iter().take_while(|b| b.is_ascii_whitespace());
            let n = blank.count();
            for &b in &buffer[..n] {
                let after_cr = std::mem::replace(&mut self.after_cr, b == b'\r');
                match b {
                    b'\n' if after_cr => {}
                    b'\n' | b'\r' => {
                        self.number += 1;
                        indent.clear();
                    }
                    _ => indent.push(b),
                }
            }
            // Longer than a line may be: the caller says so.
            if n == 0 || indent.len() > MAX_LINE {
                return Ok((indent, buffer.first().copied()));
            }
            from.consume(n);
        }
    }

    /// The next line without its end, or more than [`MAX_LINE`] bytes of it; `None` at the end.
    pub(super) fn next(&mut self, from: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
        self.number += 1;
        let mut line = Vec::new();
        let mut begun = false;
        loop {
            let buffer = match from.fill_buf() {
                Ok(buffer) => buffer,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            if buffer.is_empty() {
                return Ok(begun.then_some(line));
            }
            if std::mem::take(&mut self.after_cr) && buffer[0] == b'\n' {
                from.consume(1);
                continue;
            }
            begun = true;
            let end = buffer.iter().position(|&b| b == b'\n' || b == b'\r');
            line.extend_from_slice(&buffer[..end.unwrap_or(buffer.len())]);
            let Some(end) = end else {
                let n = buffer.len();
                from.consume(n);
                if line.len() > MAX_LINE {
                    return Ok(Some(line));
                }
                continue;
            };
            self.after_cr = buffer[end] == b'\r';
            from.consume(end + 1);
            return Ok(Some(line));
        }
    }
}
