//! Byte-level BPE vocabularies that libllama loads.

use ggraft::file::gguf_write::{GgufWriter, MetaValue};

/// Token types of GGUF files.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;

/// A vocabulary before it is written.
pub(crate) struct Vocab {
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<String>,
    bos: u32,
    eos: u32,
    /// libllama's name of the pre-tokenizer.
    pre: &'static str,
    add_bos: bool,
}

/// The merges of the small vocabulary, as they read.
const PAIRS: [&str; 10] = [" t", "he", "in", " a", "er", "on", "re", "th", " s", "an"];

impl Vocab {
    /// Token b is byte b for 0..=255, 256 is bos, 257 is eos, then ten merged pairs, the rest is unused.
    pub(crate) fn bytes(n_vocab: usize) -> Self {
        let table = byte_table();
        let spell = |s: &str| s.bytes().map(|b| table[b as usize]).collect::<String>();
        let mut tokens: Vec<String> = table.iter().map(char::to_string).collect();
        tokens.extend(["<|bos|>", "<|eos|>"].map(str::to_owned));
        tokens.extend(PAIRS.iter().map(|p| spell(p)));
        let mut types = vec![NORMAL; tokens.len()];
        types[256..258].fill(CONTROL);
        assert!(
            n_vocab >= tokens.len(),
            "the vocabulary needs at least {} tokens",
            tokens.len()
        );
        tokens.extend((tokens.len()..n_vocab).map(|id| format!("<|unused_{id}|>")));
        types.resize(n_vocab, UNUSED);
        let merges = PAIRS
            .iter()
            .map(|p| format!("{} {}", spell(&p[..1]), spell(&p[1..])))
            .collect();
        Self {
            tokens,
            types,
            merges,
            bos: 256,
            eos: 257,
            pre: "gpt-2",
            add_bos: false,
        }
    }

    /// A synthetic vocabulary of a real size: the bytes, then words of one, two and three syllables (consonant + vowel), each
    /// without and with a space in front, then 256 control tokens of which the first is bos and the second eos. As in real
    /// vocabularies a word is the result of one to three merges: one for each word first, then further ones up to `n_merges`.
    ///
    /// # Panics
    /// If there are more words than merges, or fewer ways to merge them than `n_merges`.
    pub(crate) fn syllables(
        n_vocab: usize,
        n_merges: usize,
        pre: &'static str,
        add_bos: bool,
    ) -> Self {
        const N_CONTROL: usize = 256;
        const SPACE: &str = "\u{120}";
        let syllables: Vec<String> = "bcdfghjklmnpqrstvwxz"
            .chars()
            .flat_map(|c| "aeiou".chars().map(move |v| format!("{c}{v}")))
            .collect();
        let first_control = n_vocab - N_CONTROL;
        let mut tokens: Vec<String> = byte_table().iter().map(char::to_string).collect();
        let (mut merges, mut further) = (Vec::new(), Vec::new());
        'words: for n in 1..=3 {
            for index in 0..syllables.len().pow(n) {
                let parts: Vec<&str> = (0..n)
                    .rev()
                    .map(|i| syllables[index / syllables.len().pow(i) % syllables.len()].as_str())
                    .collect();
                let word = parts.concat();
                let cuts =
                    (1..parts.len()).map(|cut| (parts[..cut].concat(), parts[cut..].concat()));
                let plain = if n == 1 {
                    vec![(word[..1].to_owned(), word[1..].to_owned())]
                } else {
                    cuts.clone().collect()
                };
                // The space joins the first syllable before anything else does, so that is the way to have if there is one only.
                let spaced = cuts
                    .map(|(left, right)| (format!("{SPACE}{left}"), right))
                    .chain([(SPACE.to_owned(), word.clone())])
                    .collect();
                for (token, ways) in [(word.clone(), plain), (format!("{SPACE}{word}"), spaced)] {
                    if tokens.len() == first_control {
                        break 'words;
                    }
                    tokens.push(token);
                    let mut ways = ways
                        .into_iter()
                        .map(|(left, right)| format!("{left} {right}"));
                    merges.extend(ways.next());
                    further.extend(ways);
                }
            }
        }
        assert!(
            merges.len() <= n_merges,
            "{} words need as many merges, got {n_merges}",
            merges.len()
        );
        further.truncate(n_merges - merges.len());
        merges.append(&mut further);
        assert_eq!(
            (tokens.len(), merges.len()),
            (first_control, n_merges),
            "too few syllables for this vocabulary"
        );
        let mut types = vec![NORMAL; first_control];
        types.resize(n_vocab, CONTROL);
        tokens.extend(["<|begin_of_text|>", "<|end_of_text|>"].map(str::to_owned));
        tokens.extend((0..N_CONTROL - 2).map(|i| format!("<|reserved_special_token_{i}|>")));
        let bos = first_control as u32;
        Self {
            tokens,
            types,
            merges,
            bos,
            eos: bos + 1,
            pre,
            add_bos,
        }
    }

    /// Adds the tokenizer's keys.
    pub(crate) fn write(self, file: &mut GgufWriter) {
        file.set("tokenizer.ggml.model", MetaValue::String("gpt2".into()))
            .set("tokenizer.ggml.pre", MetaValue::String(self.pre.into()))
            .set("tokenizer.ggml.tokens", MetaValue::Strings(self.tokens))
            .set("tokenizer.ggml.token_type", MetaValue::I32s(self.types))
            .set("tokenizer.ggml.merges", MetaValue::Strings(self.merges))
            .set("tokenizer.ggml.bos_token_id", MetaValue::U32(self.bos))
            .set("tokenizer.ggml.eos_token_id", MetaValue::U32(self.eos))
            .set(
                "tokenizer.ggml.add_bos_token",
                MetaValue::Bool(self.add_bos),
            );
    }
}

/// GPT-2's printable character for each byte: printable bytes stand for themselves, the others for U+0100 onwards in order.
fn byte_table() -> [char; 256] {
    let mut next = 0x100u32;
    std::array::from_fn(|b| match b as u8 {
        b @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) => b as char,
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("U+0100..U+0144 are characters")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn real_sizes_are_consistent() {
        let vocab = Vocab::syllables(49_152, 48_900, "smollm", false);
        let known: HashSet<&str> = vocab.tokens.iter().map(String::as_str).collect();
        assert_eq!(
            (vocab.tokens.len(), known.len(), vocab.types.len()),
            (49_152, 49_152, 49_152)
        );
        let unique: HashSet<&str> = vocab.merges.iter().map(String::as_str).collect();
        assert_eq!(unique.len(), 48_900);
        for merge in &vocab.merges {
            let (left, right) = merge.split_once(' ').expect("a merge has two sides");
            assert!(
                known.contains(left)
                    && known.contains(right)
                    && known.contains(format!("{left}{right}").as_str()),
                "{merge}"
            );
        }
    }
}
