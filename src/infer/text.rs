//! Text as it streams out of a model: whole UTF-8 characters only, and nothing that may turn out to be a stop string.

/// Turns pieces of bytes into text without ever splitting a character.
///
/// The concatenation of all returned strings equals [`String::from_utf8_lossy`] of all bytes, however they were cut.
#[derive(Clone, Debug, Default)]
pub struct Utf8Stream {
    /// The beginning of a character whose end has not arrived: at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// An empty stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// The beginning of a character whose end has not arrived.
    pub(super) fn pending(&self) -> &[u8] {
        &self.pending
    }

    /// Takes the next bytes and returns the characters that are complete. Bytes that cannot belong to any character
    /// become U+FFFD as soon as that is certain.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut out = String::new();
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            out.push_str(chunk.valid());
            done += chunk.valid().len();
            if chunk.invalid().is_empty() {
                continue;
            }
            // Only the last chunk can be a character that is merely unfinished.
            let at_end = done + chunk.invalid().len() == self.pending.len();
            let unfinished =
                std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
            if at_end && unfinished {
                break;
            }
            out.push(char::REPLACEMENT_CHARACTER);
            done += chunk.invalid().len();
        }
        self.pending.drain(..done);
        out
    }

    /// Ends the stream: an unfinished character becomes U+FFFD. The stream is empty afterwards and can be used again.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }
}

/// A stop string that could never be waited for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StopError {
    /// An empty string would stop every generation at once.
    #[error("stop string {index} is empty; leave it out")]
    Empty {
        /// Position in the list.
        index: usize,
    },
}

/// Finds stop strings in streamed text and holds back what may be the beginning of one.
///
/// The match that ends first counts; of several that end at the same place, the longest. So the result does not depend
/// on how the text is cut into pieces.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text not shown yet: the longest ending of the text so far that begins some stop string.
    held: String,
    matched: Option<usize>,
}

impl StopMatcher {
    /// A matcher for `stops`; without any it passes all text through.
    ///
    /// # Errors
    /// [`StopError::Empty`].
    pub fn new<S: Into<String>>(stops: impl IntoIterator<Item = S>) -> Result<Self, StopError> {
        let stops: Vec<String> = stops.into_iter().map(Into::into).collect();
        if let Some(index) = stops.iter().position(String::is_empty) {
            return Err(StopError::Empty { index });
        }
        Ok(Self {
            stops,
            held: String::new(),
            matched: None,
        })
    }

    /// Takes the next text and returns what is safe to show. Once a stop string is complete ([`StopMatcher::matched`]),
    /// the text before it is returned and everything after it is swallowed.
    pub fn push(&mut self, text: &str) -> String {
        if self.matched.is_some() {
            return String::new();
        }
        // `held` alone contains no match, so a match ends within the new text.
        let from = self.held.len() + 1;
        self.held.push_str(text);
        for end in from..=self.held.len() {
            let seen = &self.held.as_bytes()[..end];
            let longest = (0..self.stops.len())
                .filter(|&i| seen.ends_with(self.stops[i].as_bytes()))
                // Of equal stop strings the first is reported.
                .max_by_key(|&i| (self.stops[i].len(), std::cmp::Reverse(i)));
            if let Some(index) = longest {
                self.matched = Some(index);
                // A match of valid UTF-8 in valid UTF-8 begins and ends at character boundaries.
                self.held.truncate(end - self.stops[index].len());
                return std::mem::take(&mut self.held);
            }
        }
        let keep = self.hold_from();
        let rest = self.held.split_off(keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// Where the longest ending of `held` that begins a stop string starts.
    fn hold_from(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = (self.held.len() + 1).saturating_sub(longest);
        (first..self.held.len())
            .filter(|&at| self.held.is_char_boundary(at))
            .find(|&at| self.stops.iter().any(|s| s.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len())
    }

    /// Position in the list of the stop string that ended the text.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    /// Ends the text: returns what was held back and turned out not to be a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds `items` in pieces of the given lengths, the rest in one piece.
    fn chunks<'a, T>(mut items: &'a [T], lens: &[usize]) -> Vec<&'a [T]> {
        let mut out = Vec::new();
        for &len in lens {
            let (head, tail) = items.split_at(len.min(items.len()));
            out.push(head);
            items = tail;
        }
        out.push(items);
        out
    }

    /// What [`StopMatcher`] promises, character by character: shown text and the index of the stop string.
    fn naive(stops: &[String], text: &str) -> (String, Option<usize>) {
        let mut seen = String::new();
        for c in text.chars() {
            seen.push(c);
            let mut best: Option<usize> = None;
            for (i, stop) in stops.iter().enumerate() {
                if seen.ends_with(stop.as_str()) && best.is_none_or(|b| stops[b].len() < stop.len())
                {
                    best = Some(i);
                }
            }
            if let Some(i) = best {
                return (seen[..seen.len() - stops[i].len()].to_owned(), Some(i));
            }
        }
        (seen, None)
    }

    #[test]
    fn an_invalid_byte_is_shown_at_once() {
        let mut s = Utf8Stream::new();
        assert_eq!(s.push(b"a\xff"), "a\u{fffd}");
        assert_eq!(s.push(b"\xe2\x82"), "");
        // 0x28 cannot continue the character: what was pending is invalid now.
        assert_eq!(s.push(b"("), "\u{fffd}(");
        assert_eq!(s.push(b"\xf0\x9f"), "");
        assert_eq!(s.finish(), "\u{fffd}");
        assert_eq!(s.push("é".as_bytes()), "é");
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        assert_eq!(
            StopMatcher::new(["a", ""]).unwrap_err(),
            StopError::Empty { index: 1 }
        );
    }

    #[test]
    fn text_is_held_back_only_while_it_may_become_a_stop_string() {
        let mut m = StopMatcher::new(["<end>", "<e"]).unwrap();
        assert_eq!(m.push("a <"), "a ");
        assert_eq!(m.push("b"), "<b");
        assert_eq!(m.push("<"), "");
        assert_eq!(m.finish(), "<");
        assert_eq!(m.push("x<e"), "x");
        assert_eq!(m.matched(), Some(1));
        assert_eq!(m.push("nd>"), "");
        assert_eq!(m.finish(), "");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn utf8_equals_lossy_decoding(
            bytes in prop::collection::vec(
                prop_oneof![any::<u8>(), Just(b'a'), Just(0xe2), Just(0x82), Just(0xac), Just(0xf0), Just(0x9f), Just(0x98), Just(0x80)],
                0..40,
            ),
            lens in prop::collection::vec(0usize..4, 0..20),
        ) {
            let mut stream = Utf8Stream::new();
            let mut got = String::new();
            for piece in chunks(&bytes, &lens) {
                got.push_str(&stream.push(piece));
                // Only the beginning of a character is ever kept back.
                let kept = std::str::from_utf8(&stream.pending);
                prop_assert!(stream.pending.is_empty() || kept.is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none()));
            }
            got.push_str(&stream.finish());
            prop_assert_eq!(got, String::from_utf8_lossy(&bytes).into_owned());
        }

        #[test]
        fn stop_strings_equal_the_naive_search(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            text in "[abcé]{0,30}",
            lens in prop::collection::vec(0usize..5, 0..20),
        ) {
            let (want, want_index) = naive(&stops, &text);
            let chars: Vec<char> = text.chars().collect();
            let mut m = StopMatcher::new(stops.clone()).unwrap();
            let mut got = String::new();
            for piece in chunks(&chars, &lens) {
                got.push_str(&m.push(&piece.iter().collect::<String>()));
                prop_assert!(want.starts_with(&got), "showed too much: {got:?} of {want:?}");
                if m.matched().is_none() {
                    // Only a beginning of a stop string is held back.
                    prop_assert!(m.held.is_empty() || stops.iter().any(|s| s.starts_with(&m.held)));
                }
            }
            got.push_str(&m.finish());
            prop_assert_eq!(got, want);
            prop_assert_eq!(m.matched(), want_index);
        }
    }
}
