//! The order of the modules, the places where `unsafe` may be, and what must not be in the sources at all: read from
//! the sources themselves.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What each module of the library may use, besides itself. Data flows `file -> model -> adapter -> {graph, host} -> {infer,
/// train} -> {capi, bin}`; ggml lies below the model, and the kernels below ggml, of which they know nothing. The C interface is a crate of its own in `src/capi`.
const MAY_USE: &[(&str, &[&str])] = &[
    ("file", &[]),
    // Types of tensors are facts of the file format.
    ("kernels", &["file"]),
    ("operation", &[]),
    ("ggml", &["file", "kernels", "operation"]),
    ("model", &["file", "kernels", "operation", "ggml"]),
    ("adapter", &["file", "model"]),
    ("graph", &["file", "kernels", "operation", "ggml", "model"]),
    (
        "infer",
        &[
            "file", "kernels", "ggml", "model", "adapter", "graph", "host",
        ],
    ),
    (
        "train",
        &[
            "file", "kernels", "ggml", "model", "adapter", "graph", "host",
        ],
    ),
    ("host", &["file", "ggml", "model", "adapter"]),
    ("capi", &["model", "adapter", "host", "infer", "train"]),
];

/// May be used by every module, and gathers the errors of all of them: it lies above the files that define these.
const ERROR: &str = "error";

/// Modules that may use ggml's raw interface.
const RAW_GGML: &[(&str, &str)] = &[
    ("ggml/", "the safe handles themselves"),
    (
        "host/llama.rs",
        "libllama's contexts, which have no other user",
    ),
    (
        "model/llama.rs",
        "libllama's models, which have no other user",
    ),
    (
        "model/vocab/native.rs",
        "libllama's tokenizer, which has no other user",
    ),
    (
        "infer/sampler.rs",
        "libllama's samplers, which have no other user",
    ),
];

/// Files that may contain `unsafe`.
const MAY_BE_UNSAFE: &[(&str, &str)] = &[
    ("ggml/", "the safe handles over ggml"),
    (
        "kernels/",
        "instructions of one CPU, operands that ggml owns",
    ),
    ("file/mmap.rs", "maps files, states the contract"),
    ("host/api.rs", "finds functions of llama.h by their names"),
    ("host/context.rs", "calls them"),
    ("host/mod.rs", "takes the context of an application"),
    ("host/llama.rs", "makes a context"),
    ("capi/", "the C interface"),
    ("model/llama.rs", "libllama's models"),
    ("model/vocab/native.rs", "libllama's tokenizer"),
    ("infer/sampler.rs", "libllama's samplers"),
    ("bin/ggraft/interrupt.rs", "asks which signals are ignored"),
    (
        "model/weights.rs",
        "promises that graphs never write the mapped file",
    ),
];

struct Source {
    /// Relative to `src`, with `/`.
    path: String,
    /// Without comments, strings and test modules.
    code: String,
}

impl Source {
    /// Name of the top-level module.
    fn module(&self) -> &str {
        let first = self.path.split('/').next().unwrap();
        first.strip_suffix(".rs").unwrap_or(first)
    }

    /// Whether it is a test module in a file of its own.
    fn is_a_test(&self) -> bool {
        self.path
            .split('/')
            .any(|part| part == "tests" || part == "tests.rs")
    }

    fn is_at(&self, places: &[(&str, &str)]) -> bool {
        places.iter().any(|(place, _)| match place.ends_with('/') {
            true => self.path.starts_with(place),
            false => self.path == *place,
        })
    }

    /// Words of the code, with the rest of it in between left out.
    fn has_word(&self, word: &str) -> bool {
        words(&self.code).any(|w| w == word)
    }
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|w| !w.is_empty())
}

/// All of a folder, sorted.
fn rust_files(dir: &Path) -> Vec<PathBuf> {
    fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    walk(dir, &mut paths);
    paths.sort();
    paths
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let paths = rust_files(&root);
    assert!(paths.len() > 30, "{paths:?}");
    let source = |path: PathBuf| {
        let relative = path.strip_prefix(&root).unwrap();
        let parts: Vec<_> = relative.iter().map(|c| c.to_str().unwrap()).collect();
        let code = without_tests(&strip(&fs::read_to_string(&path).unwrap()));
        // Relative paths that lead to the root.
        let depth = parts.len() - usize::from(parts.ends_with(&["mod.rs"]));
        let mut code = code.replace(&"super::".repeat(depth), "crate::");
        if parts[0] == "capi" {
            // A crate of its own, whose parts may use each other.
            code = code
                .replace("crate::", "self::")
                .replace("ggraft::", "crate::");
        }
        Source {
            path: parts.join("/"),
            code,
        }
    };
    paths.into_iter().map(source).collect()
}

/// Replaces comments and the contents of strings and characters by spaces.
fn strip(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let rest = &text[i..];
        let word_before = out
            .chars()
            .next_back()
            .is_some_and(|c| c.is_alphanumeric() || c == '_');
        let skip = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if !word_before
            && (rest.starts_with("r\"") || rest.starts_with("r#\"") || rest.starts_with("br\""))
        {
            raw_string(rest)
        } else if rest.starts_with('"') {
            quoted(rest, b'"')
        } else if rest.starts_with('\'') && is_char(rest) {
            quoted(rest, b'\'')
        } else {
            0
        };
        if skip > 0 {
            out.extend(
                rest[..skip]
                    .chars()
                    .map(|c| if c == '\n' { '\n' } else { ' ' }),
            );
            i += skip;
        } else {
            let c = rest.chars().next().unwrap();
            out.push(c);
            i += c.len_utf8();
        }
    }
    out
}

/// Length of a block comment; they nest.
fn block_comment(rest: &str) -> usize {
    let (mut depth, mut i) = (0, 0);
    while i < rest.len() {
        match &rest.as_bytes()[i..] {
            [b'/', b'*', ..] => (depth, i) = (depth + 1, i + 2),
            [b'*', b'/', ..] => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

fn raw_string(rest: &str) -> usize {
    let open = rest.find('"').unwrap();
    let close = format!("\"{}", "#".repeat(rest[..open].matches('#').count()));
    open + 1 + rest[open + 1..].find(&close).unwrap() + close.len()
}

/// Length of a literal in quotes, escapes respected.
fn quoted(rest: &str, quote: u8) -> usize {
    let bytes = rest.as_bytes();
    let mut i = 1;
    while bytes[i] != quote {
        i += if bytes[i] == b'\\' { 2 } else { 1 };
    }
    i + 1
}

/// A character, not a lifetime: an escape, or one character and a quote.
fn is_char(rest: &str) -> bool {
    let mut chars = rest.chars().skip(1);
    match chars.next() {
        Some('\\') => true,
        Some(_) => chars.next() == Some('\''),
        None => false,
    }
}

/// Cuts out every item under `#[cfg(test)]`.
fn without_tests(code: &str) -> String {
    let mut out = String::new();
    let mut rest = code;
    while let Some(at) = rest.find("#[cfg(test)]") {
        out.push_str(&rest[..at]);
        let item = &rest[at..];
        let end = match (item.find('{'), item.find(';')) {
            (Some(open), semicolon) if semicolon.is_none_or(|s| open < s) => {
                open + block(&item[open..])
            }
            (_, semicolon) => semicolon.unwrap() + 1,
        };
        rest = &item[end..];
    }
    out + rest
}

/// Length of a block in braces.
fn block(rest: &str) -> usize {
    let mut depth = 0;
    for (i, c) in rest.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    panic!("unbalanced braces");
}

/// Modules of this crate that the code names: `crate::x`, and `crate::{x::y, z}`.
fn used_modules(code: &str) -> BTreeSet<String> {
    let squeezed: String = code.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut out = BTreeSet::new();
    for (at, path) in squeezed.match_indices("crate::") {
        let rest = &squeezed[at + path.len()..];
        if let Some(list) = rest.strip_prefix('{') {
            let list = &list[..block(rest) - 2];
            let mut depth = 0;
            let entries = list.split(|c| {
                depth += i32::from(c == '{') - i32::from(c == '}');
                c == ',' && depth == 0
            });
            out.extend(entries.map(|entry| first_name(entry.trim())));
        } else {
            out.insert(first_name(rest));
        }
    }
    // Types that the root re-exports belong to the modules they come from.
    out.into_iter()
        .filter_map(|name| match name.as_str() {
            "" | "Result" | "Error" => None,
            "Adapter" => Some("adapter".to_owned()),
            "Session" | "SessionOptions" => Some("infer".to_owned()),
            "Model" | "ModelOptions" => Some("model".to_owned()),
            _ => Some(name),
        })
        .collect()
}

fn first_name(path: &str) -> String {
    path.chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}

#[test]
fn modules_use_only_what_lies_below_them() {
    let known: BTreeSet<&str> = MAY_USE.iter().map(|(m, _)| *m).collect();
    let mut wrong = Vec::new();
    let mut edges = 0;
    for source in sources() {
        if source.is_a_test() {
            continue;
        }
        let module = source.module();
        match module {
            // The root declares the modules; the command line is a program of its own.
            "lib" | "bin" => continue,
            ERROR => continue,
            _ => assert!(
                known.contains(module),
                "{}: which layer is '{module}'?",
                source.path
            ),
        }
        let (_, allowed) = MAY_USE.iter().find(|(m, _)| *m == module).unwrap();
        for used in used_modules(&source.code) {
            edges += 1;
            if used != module && used != ERROR && !allowed.contains(&used.as_str()) {
                wrong.push(format!("{} uses crate::{used}", source.path));
            }
        }
    }
    assert!(edges > 30, "{edges}");
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Names that the file's own `use` statements bring in, with the module they are looked for in. Names that it passes on are
/// not its own business.
fn imports(source: &Source) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for (at, _) in source.code.match_indices("\nuse ") {
        let statement = source.code[at + 5..].split(';').next().unwrap();
        let module = match statement.trim().strip_prefix("crate::") {
            Some(rest) => first_name(rest),
            None => source.module().to_owned(),
        };
        let words = statement.split(|c: char| !c.is_alphanumeric() && c != '_');
        let names = words.filter(|w| w.starts_with(char::is_uppercase));
        out.extend(names.map(|name| (module.clone(), name.to_owned())));
    }
    out
}

/// Whether the file defines the type or constant.
fn defines(source: &Source, name: &str) -> bool {
    let words: Vec<_> = words(&source.code).collect();
    words.windows(2).any(|w| {
        ["struct", "enum", "trait", "type", "const", "static"].contains(&w[0]) && w[1] == name
    })
}

#[test]
fn the_error_lies_above_the_errors_that_it_gathers() {
    let sources = sources();
    let error = sources.iter().find(|s| s.path == "error.rs").unwrap();
    let mut left = imports(error);
    let n_errors = left
        .iter()
        .filter(|(_, name)| name.ends_with("Error"))
        .count();
    assert!(n_errors >= 10, "{left:?}");
    let mut seen = BTreeSet::new();
    while let Some((module, name)) = left.pop() {
        for source in &sources {
            if source.module() == module && defines(source, &name) && seen.insert(&source.path) {
                let used = used_modules(&source.code);
                let names_it = ["crate::Result", "crate::Error", "crate::{Error"]
                    .iter()
                    .any(|path| source.code.contains(path));
                assert!(
                    source.path == "error.rs" || !(used.contains(ERROR) || names_it),
                    "{} is needed by crate::error and uses it: define the error in a file of its own",
                    source.path
                );
                left.extend(imports(source));
            }
        }
    }
    assert!(seen.len() > n_errors, "{seen:?}");
}

#[test]
fn no_permission_is_stale() {
    let sources = sources();
    let mut stale = Vec::new();
    for (module, allowed) in MAY_USE {
        let of_module = sources.iter().filter(|s| s.module() == *module);
        let used: BTreeSet<_> = of_module.flat_map(|s| used_modules(&s.code)).collect();
        let unused = allowed.iter().filter(|name| !used.contains(**name));
        stale.extend(unused.map(|name| format!("{module} does not use {name}")));
    }
    for &(place, why) in RAW_GGML {
        let mut there = sources.iter().filter(|s| s.is_at(&[(place, why)]));
        if !there.any(|s| s.has_word("ggml_sys")) {
            stale.push(format!("{place} does not use ggml_sys"));
        }
    }
    assert!(stale.is_empty(), "\n{}", stale.join("\n"));
}

#[test]
fn the_command_line_uses_the_public_interface_only() {
    for source in sources().iter().filter(|s| s.module() == "bin") {
        for forbidden in ["ggml_sys", "memmap2"] {
            assert!(
                !source.has_word(forbidden),
                "{} uses {forbidden}",
                source.path
            );
        }
    }
}

#[test]
fn raw_ggml_stays_where_it_is() {
    for source in sources() {
        assert!(
            !source.has_word("ggml_sys") || source.is_at(RAW_GGML),
            "{} uses ggml_sys: wrap what it needs in src/ggml",
            source.path
        );
    }
}

#[test]
fn what_is_bound_of_ggml_is_used() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap();
    let build = read("vendor/ggml-sys/build.rs");
    let list = build.split("const FUNCTIONS").nth(1).unwrap();
    let list = list.split("];").next().unwrap();
    let bound = list.split('"').skip(1).step_by(2);
    let bound: Vec<_> = bound.filter(|name| !name.ends_with(".h")).collect();
    assert!(bound.len() > 100, "{bound:?}");

    let mut code = String::new();
    for folder in ["src", "tests"] {
        for path in rust_files(&root.join(folder)) {
            code += &strip(&fs::read_to_string(path).unwrap());
        }
    }
    let words: BTreeSet<_> = words(&code).collect();
    let unused: Vec<_> = bound
        .iter()
        .filter(|name| !words.contains(**name))
        .collect();
    assert!(unused.is_empty(), "nobody uses {unused:?}");
}

#[test]
fn unsafe_stays_where_it_is() {
    let sources = sources();
    for source in &sources {
        assert!(
            !source.has_word("unsafe") || source.is_at(MAY_BE_UNSAFE),
            "{} contains unsafe code",
            source.path
        );
    }
    // Exceptions that are none any more are taken off the list.
    for &(place, why) in MAY_BE_UNSAFE {
        let there = sources
            .iter()
            .filter(|s| s.is_at(&[(place, why)]))
            .collect::<Vec<_>>();
        assert!(
            there.iter().any(|s| s.has_word("unsafe")),
            "{place} needs no exception any more"
        );
    }
}

/// A C symbol in the library would be in every Rust program, and twice in tests whose helpers link the library again.
#[test]
fn only_the_c_interface_has_c_symbols() {
    for source in sources() {
        let symbols = ["no_mangle", "export_name"].map(|word| source.has_word(word));
        assert!(
            !symbols.contains(&true) || source.module() == "capi",
            "{} defines a C symbol",
            source.path
        );
    }
}

/// One function says how many threads compute by default.
#[test]
fn cores_are_counted_in_one_place() {
    const MAY_COUNT: &[(&str, &str)] = &[
        ("ggml/cores.rs", "the one place"),
        (
            "bin/ggraft/args.rs",
            "more threads than processors are a mistake, whatever the default is",
        ),
    ];
    for source in sources().iter().filter(|s| !s.is_at(MAY_COUNT)) {
        for word in ["available_parallelism", "num_cpus"] {
            assert!(!source.has_word(word), "{} counts by itself", source.path);
        }
    }
}

#[test]
fn nothing_is_left_unfinished() {
    for source in sources() {
        for word in ["todo", "unimplemented", "dbg"] {
            assert!(
                !source.code.contains(&format!("{word}!")),
                "{}: {word}!",
                source.path
            );
        }
    }
}

/// The reader above sees what it is meant to see.
#[test]
fn the_reader_of_sources() {
    let code = without_tests(&strip(
        "use crate::{file::{a, b}, model::C};\n// use crate::wrong;\nfn f<'a>(x: &'a str) { \"crate::wrong\"; '\"'; '\\''; \
         r#\"crate::\"wrong\"#; /* unsafe /* { */ */ crate::graph::g() }\n#[cfg(test)]\nmod tests { use crate::infer::X; }\n\
         #[cfg(test)]\nuse crate::infer;\nfn h() { dbg!(crate::Session::new) }",
    ));
    let used: Vec<_> = used_modules(&code).into_iter().collect();
    assert_eq!(used, ["file", "graph", "infer", "model"]);
    assert!(code.contains("dbg!") && !code.contains("unsafe") && !code.contains("wrong"));
}
