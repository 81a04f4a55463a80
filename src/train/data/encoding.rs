//! How a file writes its characters: found from its beginning, and read as UTF-8 whatever it is.

use std::io::{self, BufRead, Read};

/// What text may be written in besides UTF-8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Utf8,
    Utf16Le,
    Utf16Be,
    Utf32Le,
    Utf32Be,
}

/// The byte order mark, and what U+FEFF is at the beginning of a line where files were joined.
pub(super) const BOM: char = '\u{feff}';

/// Bytes of ASCII that no text in a wider encoding begins with.
const BEGIN: usize = 64;

/// Planes of Unicode that have characters. An ASCII letter and a line end in UTF-16 look like one of another plane in UTF-32.
const PLANES: [u32; 5] = [0, 1, 2, 3, 14];

impl Encoding {
    /// Of the file that begins with `head`. Without a byte order mark it is what makes text of the bytes.
    pub(super) fn of(head: &[u8]) -> Self {
        match head {
            [0xFF, 0xFE, 0, 0, ..] => return Self::Utf32Le,
            [0, 0, 0xFE, 0xFF, ..] => return Self::Utf32Be,
            [0xFF, 0xFE, ..] => return Self::Utf16Le,
            [0xFE, 0xFF, ..] => return Self::Utf16Be,
            [0xEF, 0xBB, 0xBF, ..] => return Self::Utf8,
            _ => {}
        }
        let plain = |b: &u8| is_plain((*b).into());
        // Letters of single bytes, and behind them perhaps a file that was joined.
        if head.iter().take(BEGIN).all(plain) {
            return Self::Utf8;
        }
        let count = |which: fn(u8) -> bool| head.iter().filter(|&&b| which(b)).count();
        let zeros = count(|b| b == 0);
        let controls = count(is_control) - zeros;
        let ascii = head.iter().filter(|b| plain(b)).count();
        // A few NUL bytes in text of single bytes, whose other bytes are no control characters.
        let single = is_utf8(head) && controls * 20 <= head.len() || ascii * 5 > head.len() * 4;
        if zeros == 0 || zeros * 5 < head.len() && single {
            return Self::Utf8;
        }
        for wide in [Self::Utf32Le, Self::Utf32Be] {
            if wide.plain(head).is_some() {
                return wide;
            }
        }
        let [le, be] = [Self::Utf16Le, Self::Utf16Be].map(|e| (e.plain(head).unwrap_or(0), e));
        match le.0.max(be.0) {
            0 => Self::of_damaged(head),
            most if most == le.0 => Self::Utf16Le,
            _ => Self::Utf16Be,
        }
    }

    /// What has a byte too many or too few is still mostly text of one encoding: it begins with a letter of ASCII, as half of its units
    /// are. Who reads it meets the wrong byte.
    fn of_damaged(head: &[u8]) -> Self {
        fn is_text(mut units: impl ExactSizeIterator<Item = u32>) -> bool {
            let all = units.len();
            units.next().is_some_and(is_plain) && 2 * units.filter(|&c| is_plain(c)).count() > all
        }
        let (two, four) = (head.as_chunks::<2>().0, head.as_chunks::<4>().0);
        for wide in [Self::Utf32Le, Self::Utf32Be] {
            if is_text(four.iter().map(|&four| wide.point(four))) {
                return wide;
            }
        }
        for wide in [Self::Utf16Le, Self::Utf16Be] {
            if is_text(two.iter().map(|&two| wide.unit(two).into())) {
                return wide;
            }
        }
        Self::Utf8
    }

    /// Its name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Utf8 => "UTF-8",
            Self::Utf16Le | Self::Utf16Be => "UTF-16",
            Self::Utf32Le | Self::Utf32Be => "UTF-32",
        }
    }

    /// What Python calls it, for a file that begins with `head`.
    pub(super) fn python(self, head: &[u8]) -> &'static str {
        match (self, head) {
            // With a byte order mark, which these take away.
            (Self::Utf16Le | Self::Utf16Be, [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..]) => "utf-16",
            (Self::Utf32Le, [0xFF, ..]) | (Self::Utf32Be, [0, 0, 0xFE, ..]) => "utf-32",
            (Self::Utf16Le, _) => "utf-16-le",
            (Self::Utf16Be, _) => "utf-16-be",
            (Self::Utf32Le, _) => "utf-32-le",
            (Self::Utf32Be, _) => "utf-32-be",
            (Self::Utf8, head) if is_utf8(head) => "utf-8-sig",
            (Self::Utf8, _) => "cp1252",
        }
    }

    /// So many characters of ASCII text are in `head`, if all of it is text.
    fn plain(self, head: &[u8]) -> Option<usize> {
        let text = |c: u32| c >= 0x20 || matches!(c, 9 | 10 | 12 | 13);
        let mut plain = 0;
        let mut count = |c: u32| {
            plain += usize::from(is_plain(c));
            text(c).then_some(())
        };
        match self {
            Self::Utf8 => return None,
            Self::Utf16Le | Self::Utf16Be => {
                let units = head.as_chunks::<2>().0.iter().map(|&pair| self.unit(pair));
                let mut decoded = char::decode_utf16(units).peekable();
                while let Some(c) = decoded.next() {
                    match c {
                        Ok(c) => count(c.into())?,
                        // Of a character that is cut here.
                        Err(_) if decoded.peek().is_none() => {}
                        Err(_) => return None,
                    }
                }
            }
            Self::Utf32Le | Self::Utf32Be => {
                for &four in head.as_chunks::<4>().0 {
                    let c = self.point(four);
                    if !PLANES.contains(&(c >> 16)) || char::from_u32(c).is_none() {
                        return None;
                    }
                    count(c)?;
                }
            }
        }
        (plain > 0).then_some(plain)
    }

    fn unit(self, pair: [u8; 2]) -> u16 {
        match self {
            Self::Utf16Be => u16::from_be_bytes(pair),
            _ => u16::from_le_bytes(pair),
        }
    }

    fn point(self, four: [u8; 4]) -> u32 {
        match self {
            Self::Utf32Be => u32::from_be_bytes(four),
            _ => u32::from_le_bytes(four),
        }
    }
}

/// A letter of ASCII or what stands between them.
fn is_plain(c: u32) -> bool {
    (0x20..0x7F).contains(&c) || matches!(c, 9 | 10 | 13)
}

/// A byte that is in no text.
pub(super) fn is_control(b: u8) -> bool {
    b < 0x20 && !matches!(b, b'\t' | b'\n' | b'\r' | 0x0C | 0x1B) || b == 0x7F
}

/// Whether it is UTF-8, apart from a character that is cut at the end.
pub(super) fn is_utf8(head: &[u8]) -> bool {
    match std::str::from_utf8(head) {
        Ok(_) => true,
        Err(e) => e.error_len().is_none(),
    }
}

/// Bytes that are not what the beginning of the file says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotText {
    /// Of a file in another encoding.
    #[error("not valid {} (byte {byte})", encoding.name())]
    Wide { encoding: Encoding, byte: u64 },
    /// Lines, and bytes of a line, are counted from 1.
    #[error("not UTF-8 (byte {byte} of line {line})")]
    Utf8 {
        line: usize,
        byte: usize,
        value: u8,
        hint: &'static str,
    },
    #[error("NUL (byte {byte} of line {line})")]
    Nul { line: usize, byte: usize },
}

impl From<NotText> for io::Error {
    fn from(e: NotText) -> Self {
        Self::new(io::ErrorKind::InvalidData, e)
    }
}

/// Text in another encoding as UTF-8, without its byte order mark, as it comes.
pub(super) struct Decoder<R> {
    from: R,
    encoding: Encoding,
    /// Bytes of a character that is not complete.
    begun: Vec<u8>,
    /// Bytes that were taken from `from`.
    taken: u64,
    text: Vec<u8>,
    /// So much of `text` was read.
    at: usize,
}

impl<R: BufRead> Decoder<R> {
    pub(super) fn new(from: R, encoding: Encoding) -> Self {
        Self {
            from,
            encoding,
            begun: Vec::new(),
            taken: 0,
            text: Vec::new(),
            at: 0,
        }
    }

    /// Adds one byte, and the character that it completes to the text.
    fn push(&mut self, byte: u8) -> Result<(), NotText> {
        self.begun.push(byte);
        self.taken += 1;
        let decoded = match (self.encoding, &self.begun[..]) {
            (Encoding::Utf8, _) => unreachable!("UTF-8 is not decoded"),
            (Encoding::Utf16Le | Encoding::Utf16Be, &[a, b]) => {
                let unit = self.encoding.unit([a, b]);
                // The first half of a character waits for the other.
                if (0xD800..0xDC00).contains(&unit) {
                    return Ok(());
                }
                char::from_u32(unit.into())
            }
            (Encoding::Utf16Le | Encoding::Utf16Be, &[a, b, c, d]) => {
                let units = [[a, b], [c, d]].map(|pair| self.encoding.unit(pair));
                char::decode_utf16(units).next().and_then(Result::ok)
            }
            (Encoding::Utf32Le | Encoding::Utf32Be, &[a, b, c, d]) => {
                char::from_u32(self.encoding.point([a, b, c, d]))
            }
            _ => return Ok(()),
        };
        let c = decoded.ok_or_else(|| self.not_text())?;
        let is_mark = c == BOM && self.taken == self.begun.len() as u64;
        if !is_mark {
            let mut utf8 = [0; 4];
            self.text
                .extend_from_slice(c.encode_utf8(&mut utf8).as_bytes());
        }
        self.begun.clear();
        Ok(())
    }

    /// Where what is not complete begins, counted from 1.
    fn not_text(&self) -> NotText {
        NotText::Wide {
            encoding: self.encoding,
            byte: self.taken - self.begun.len() as u64 + 1,
        }
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(into)?;
        self.consume(n);
        Ok(n)
    }
}

impl<R: BufRead> BufRead for Decoder<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.at == self.text.len() {
            self.at = 0;
            self.text.clear();
            let bytes = self.from.fill_buf()?.to_vec();
            if bytes.is_empty() {
                match self.begun.is_empty() {
                    true => break,
                    false => return Err(self.not_text().into()),
                }
            }
            for &byte in &bytes {
                if let Err(e) = self.push(byte) {
                    return Err(e.into());
                }
            }
            self.from.consume(bytes.len());
        }
        Ok(&self.text[self.at..])
    }

    fn consume(&mut self, n: usize) {
        self.at += n;
    }
}

/// Bytes that are text in UTF-8, or an error that says where they are not.
pub(super) struct Utf8Only<R> {
    from: R,
    block: Vec<u8>,
    /// So much of `block` was read, and so much of it may be.
    at: usize,
    valid: usize,
    /// The line in which `block` begins, and the bytes of it before that.
    line: usize,
    in_line: usize,
}

/// Bytes that are looked at in one go.
const BLOCK: usize = 16 << 10;

impl<R: Read> Utf8Only<R> {
    /// For bytes of which the first is in line `line`.
    pub(super) fn new(from: R, line: usize) -> Self {
        Self {
            from,
            block: Vec::new(),
            at: 0,
            valid: 0,
            line,
            in_line: 0,
        }
    }

    /// Takes more bytes behind those that were read, and finds how many of them are whole characters.
    fn fill(&mut self) -> io::Result<()> {
        for &byte in &self.block[..self.valid] {
            self.in_line += 1;
            if byte == b'\n' {
                self.line += 1;
                self.in_line = 0;
            }
        }
        self.block.drain(..self.valid);
        (self.at, self.valid) = (0, 0);
        let left = self.block.len();
        self.block.resize(left + BLOCK, 0);
        let n = match self.from.read(&mut self.block[left..]) {
            Ok(n) => n,
            Err(e) => {
                self.block.truncate(left);
                return Err(e);
            }
        };
        self.block.truncate(left + n);
        let (valid, is_cut) = match std::str::from_utf8(&self.block) {
            Ok(text) => (text.len(), true),
            Err(e) => (e.valid_up_to(), n > 0 && e.error_len().is_none()),
        };
        let text = self.block[..valid].iter();
        self.valid = text.take_while(|&&b| b != 0).count();
        // What can be read is read first.
        let (line, byte) = (self.line, self.in_line + 1);
        match self.block.first() {
            Some(0) => Err(NotText::Nul { line, byte }.into()),
            Some(&value) if valid == 0 && !is_cut => {
                let hint = not_utf8(&self.block);
                let e = NotText::Utf8 {
                    line,
                    byte,
                    value,
                    hint,
                };
                Err(e.into())
            }
            _ => Ok(()),
        }
    }
}

impl<R: Read> Read for Utf8Only<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.at == self.valid {
            self.fill()?;
            if self.block.is_empty() {
                return Ok(0);
            }
        }
        let n = (&self.block[self.at..self.valid]).read(into)?;
        self.at += n;
        Ok(n)
    }
}

/// What bytes that are not UTF-8 seem to be, and what to do.
pub(super) fn not_utf8(bytes: &[u8]) -> &'static str {
    // Characters of UTF-8 beyond ASCII; other bytes that stand alone or in pairs, as accents do, and those that stand in longer rows, as
    // letters of other scripts do.
    let (mut utf8, mut alone, mut together) = (0, 0, 0);
    let mut row = 0;
    let mut undefined = false;
    for chunk in bytes.utf8_chunks() {
        if !chunk.valid().is_empty() {
            row = 0;
        }
        utf8 += chunk.valid().chars().filter(|c| !c.is_ascii()).count();
        let n = chunk.invalid().len();
        match row + n {
            0..=2 => alone += n,
            3.. if row < 3 => {
                alone -= row;
                together += row + n;
            }
            _ => together += n,
        }
        row += n;
        // Bytes that Windows-1252 gives no meaning.
        let mut found = chunk.invalid().iter();
        undefined |= found.any(|b| matches!(b, 0x81 | 0x8D | 0x8F | 0x90 | 0x9D));
    }
    let cut = std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none());
    if bytes.contains(&0) {
        MIXED
    } else if cut && (utf8 > 0 || bytes.trim_ascii_start().starts_with(b"{")) {
        CUT
    } else if utf8 > alone + together {
        MIXED
    } else if alone > together && !undefined {
        LATIN1
    } else {
        OTHER
    }
}

const CUT: &str = "a character is cut off, the file is damaged or not complete";
const MIXED: &str = "only a part of it has another encoding: convert files before they are joined";
const LATIN1: &str = "the file seems to be Latin-1 (Windows-1252), iconv -f WINDOWS-1252 -t UTF-8 IN > OUT converts it";
const OTHER: &str = "the file has another encoding, iconv -f ENCODING -t UTF-8 IN > OUT converts it (iconv -l lists them)";
