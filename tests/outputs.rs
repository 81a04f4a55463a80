//! The files that `ggraft` writes: never over those that it reads, never late, and into whatever they lead to.

use ggraft_testkit::command::{command, stderr, stdout};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tinylm-q8_0.gguf");
const PIRATE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/models/peft/persona_pirate-prefix"
);
const ROW: &str = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";

/// A folder with one of everything that commands read.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::copy(MODEL, place.path("model.gguf")).unwrap();
        fs::create_dir(place.path("peft")).unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            let from = Path::new(PIRATE).join(name);
            fs::copy(from, place.path("peft").join(name)).unwrap();
        }
        fs::write(place.path("rows.jsonl"), ROW).unwrap();
        fs::write(place.path("other.jsonl"), ROW).unwrap();
        fs::write(place.path("chat.jinja"), "{{ messages[0].content }}").unwrap();
        place.succeeds("import @peft -m @model.gguf -o @adapter.gguf");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A line of arguments, split at white space; `@` stands for the folder.
    fn command(&self, line: &str) -> Command {
        let folder = format!("{}/", self.0.path().display());
        let args: Vec<_> = line
            .split_whitespace()
            .map(|word| word.replace('@', &folder))
            .collect();
        command(env!("CARGO_BIN_EXE_ggraft"), &args)
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    #[track_caller]
    fn succeeds(&self, line: &str) -> String {
        stdout(&self.run(line))
    }

    /// The error of a line that must fail with `status`.
    #[track_caller]
    fn fails(&self, status: i32, line: &str) -> String {
        let output = self.run(line);
        assert_eq!(output.status.code(), Some(status), "{line}: {output:?}");
        let text = stderr(&output);
        assert!(text.starts_with("error: "), "{line}: {text}");
        assert_eq!(text.lines().count(), 1, "{line}: {text}");
        text
    }

    /// Every file and what is in it.
    fn contents(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut found = Vec::new();
        let mut folders = vec![self.0.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => found.push((path.clone(), fs::read(path).unwrap())),
                }
            }
        }
        found.sort();
        found
    }
}

/// Lines of commands, and the files that each of them reads.
const READERS: &[(&str, &[&str])] = &[
    (
        "logits -m @model.gguf -a @adapter.gguf --ids 1 -o",
        &["model.gguf", "adapter.gguf"],
    ),
    (
        "logits -m @model.gguf -a @peft --ids 1 -o",
        &["peft/adapter_model.safetensors"],
    ),
    (
        "predict -m @model.gguf -a @adapter.gguf --data @rows.jsonl --chat-template @chat.jinja -o",
        &["model.gguf", "adapter.gguf", "rows.jsonl", "chat.jinja"],
    ),
    (
        "import @peft -m @model.gguf -o",
        &[
            "model.gguf",
            "peft/adapter_config.json",
            "peft/adapter_model.safetensors",
        ],
    ),
    (
        "concat @adapter.gguf @second.gguf -o",
        &["adapter.gguf", "second.gguf"],
    ),
    (
        "train --method prefix -m @model.gguf --data @rows.jsonl --valid @other.jsonl --loss distill:@chat.jinja --overwrite -o",
        &["model.gguf", "rows.jsonl", "other.jsonl", "chat.jinja"],
    ),
    (
        "train --method prefix -m @model.gguf --data @rows.jsonl --init adapter:@adapter.gguf -o @out.gguf --plot",
        &["adapter.gguf"],
    ),
    (
        "train --method prefix -m @model.gguf --data @rows.jsonl -o @out.gguf --log",
        &["model.gguf", "rows.jsonl"],
    ),
    (
        "train --method prefix -m @model.gguf --data @rows.jsonl -o @out.gguf --plot",
        &["model.gguf", "rows.jsonl"],
    ),
];

#[test]
fn what_is_read_is_not_written_over() {
    let place = Place::new();
    fs::copy(place.path("adapter.gguf"), place.path("second.gguf")).unwrap();
    fs::create_dir(place.path("inner")).unwrap();
    let before = place.contents();
    let mut refused = 0;
    for (line, inputs) in READERS {
        for input in *inputs {
            let mut spellings = vec![input.to_string(), format!("inner/../{input}")];
            #[cfg(unix)]
            {
                let n = refused;
                let (soft, hard) = (format!("inner/soft{n}"), format!("inner/hard{n}"));
                std::os::unix::fs::symlink(place.path(input), place.path(&soft)).unwrap();
                fs::hard_link(place.path(input), place.path(&hard)).unwrap();
                spellings.extend([soft, hard]);
            }
            for output in spellings {
                let text = place.fails(2, &format!("{line} @{output}"));
                assert!(text.contains("which is read by this command"), "{text}");
                // Both are named, the input perhaps by its folder.
                let named = input.split('/').next().unwrap();
                for name in [place.path(&output), place.path(named)] {
                    assert!(text.contains(name.to_str().unwrap()), "{line}: {text}");
                }
                refused += 1;
            }
        }
    }
    assert!(refused >= 2 * 20, "{refused}");
    fs::remove_dir_all(place.path("inner")).unwrap();
    assert_eq!(place.contents(), before);
}

#[cfg(unix)]
#[test]
fn standard_input_may_be_a_file_that_is_written() {
    let place = Place::new();
    let rows = fs::File::open(place.path("rows.jsonl")).unwrap();
    let line = "predict -n 1 -m @model.gguf --data - -o @rows.jsonl";
    let output = place.command(line).stdin(rows).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert_eq!(fs::read_to_string(place.path("rows.jsonl")).unwrap(), ROW);
}

#[test]
fn one_file_is_not_written_twice() {
    let place = Place::new();
    let train = "train --method prefix -m @model.gguf --data @rows.jsonl";
    for outputs in [
        "-o @out.gguf --log @out.gguf",
        "-o @out.gguf --log @peft/../out.gguf",
        "-o @out.gguf --plot @a --log @a",
        "-o @out.gguf --plot @out.gguf.ckpt",
    ] {
        let text = place.fails(2, &format!("{train} {outputs}"));
        assert!(text.contains("would be written twice"), "{text}");
    }
    assert!(!place.path("out.gguf").exists());
}

#[test]
fn models_are_not_replaced() {
    let place = Place::new();
    fs::copy(MODEL, place.path("precious.gguf")).unwrap();
    // Half of a download is somebody's, too.
    let bytes = fs::read(MODEL).unwrap();
    fs::write(place.path("half.gguf"), &bytes[..bytes.len() / 2]).unwrap();
    let before = place.contents();
    let train = "train --method prefix -m @model.gguf --data @rows.jsonl";
    for line in [
        "import @peft -m @model.gguf -o",
        "concat @adapter.gguf @adapter.gguf -o",
        "predict -m @model.gguf --data @rows.jsonl -o",
        "logits -m @model.gguf --ids 1 -o",
        &format!("{train} --overwrite -o"),
        &format!("{train} -o @out.gguf --log"),
    ] {
        for name in ["precious.gguf", "half.gguf"] {
            let text = place.fails(2, &format!("{line} @{name}"));
            assert!(text.contains(&format!("{name} is a GGUF model")), "{text}");
        }
    }
    assert_eq!(place.contents(), before);
    // An adapter is what these commands write.
    fs::copy(place.path("adapter.gguf"), place.path("again.gguf")).unwrap();
    place.succeeds("import @peft -m @model.gguf --f32 -o @again.gguf");
    let size = |name: &str| fs::metadata(place.path(name)).unwrap().len();
    assert!(size("again.gguf") > size("adapter.gguf"));
}

#[test]
fn an_adapter_in_a_folder_is_replaced_if_that_is_asked_for() {
    let place = Place::new();
    let export = "export @adapter.gguf -m @model.gguf -o";
    place.succeeds(&format!("{export} @a/new/folder"));
    let before = place.contents();
    let text = place.fails(2, &format!("{export} @a/new/folder"));
    assert!(text.contains("is there already: --overwrite"), "{text}");
    let text = place.fails(2, "export @peft -m @model.gguf --overwrite -o @peft");
    assert!(text.contains("is a file in "), "{text}");
    assert_eq!(place.contents(), before);
    place.succeeds(&format!("{export} @a/new/folder --overwrite"));
    // Other files of a folder are in nobody's way.
    fs::create_dir(place.path("notes")).unwrap();
    fs::write(place.path("notes/README.md"), "mine").unwrap();
    place.succeeds(&format!("{export} @notes"));
    let text = place.fails(1, &format!("{export} @rows.jsonl"));
    assert!(text.contains("rows.jsonl"), "{text}");
}

/// What cannot be written is said before the model is opened, which is not there.
#[test]
fn outputs_are_checked_first() {
    let place = Place::new();
    fs::create_dir(place.path("folder")).unwrap();
    for line in [
        "predict -m @none.gguf --data @rows.jsonl -o",
        "logits -m @none.gguf --ids 1 -o",
        "import @peft -m @none.gguf -o",
        "concat @none.gguf @none.gguf -o",
        "train --method prefix -m @none.gguf --data @rows.jsonl -o",
    ] {
        for (output, expected) in [
            ("@no/x", "there is no folder"),
            ("@folder", "is a directory"),
            ("@x/", "is no name of a file"),
            ("@rows.jsonl/x", "rows.jsonl"),
        ] {
            let text = place.fails(1, &format!("{line} {output}"));
            assert!(text.contains(expected), "{line} {output}: {text}");
        }
    }
    assert!(!place.path("x").exists());
}

#[test]
fn rows_before_a_wrong_one_are_kept() {
    let place = Place::new();
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n";
    let good = "{\"prompt\": \"Linhaven\"}\n";
    fs::write(place.path("rows.jsonl"), [good, ROW, chat, ROW].concat()).unwrap();
    let line = "predict -t 1 -n 2 -m @model.gguf --data @rows.jsonl -o @out.jsonl";
    let text = place.fails(1, line);
    assert!(
        text.contains("rows.jsonl:3: ") && text.contains("out.jsonl has the rows before it"),
        "{text}"
    );
    let rows = fs::read_to_string(place.path("out.jsonl")).unwrap();
    assert_eq!(rows.lines().count(), 2);
    assert!(rows.starts_with("{\"prompt\":\"Linhaven\",\"prediction\":"));
    // Nothing is left of nothing.
    fs::remove_file(place.path("out.jsonl")).unwrap();
    fs::write(place.path("rows.jsonl"), [chat, ROW].concat()).unwrap();
    assert!(place.fails(1, line).contains("rows.jsonl:1: "));
    assert!(!place.path("out.jsonl").exists());
}

#[cfg(unix)]
mod leads_elsewhere {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::fs::symlink;

    const LINE: &str = "logits -t 1 -m @model.gguf --ids 1,2 -o";

    /// What the command writes to an ordinary file.
    fn expected(place: &Place) -> Vec<u8> {
        place.succeeds(&format!("{LINE} @plain"));
        fs::read(place.path("plain")).unwrap()
    }

    #[test]
    fn standard_output_stays_the_file_that_it_is() {
        let place = Place::new();
        let expected = expected(&place);
        let path = place.path("log");
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(b"before, ").unwrap();
        let line = format!("{LINE} /dev/stdout");
        let mut command = place.command(&line);
        let status = command.stdout(file.try_clone().unwrap()).status();
        assert!(status.unwrap().success());
        // Whoever opened it goes on behind what was written.
        file.write_all(b", after").unwrap();
        let found = fs::read(&path).unwrap();
        assert_eq!(found, [b"before, ", &expected[..], b", after"].concat());

        // Into a pipe, with nothing else among it.
        let output = place.run("import @peft -m @model.gguf -o /dev/stdout");
        assert_eq!(output.stdout, fs::read(place.path("adapter.gguf")).unwrap());
        assert!(stderr(&output).contains("20 virtual tokens"), "{output:?}");
    }

    #[test]
    fn pipes_and_devices_stay_what_they_are() {
        let place = Place::new();
        let expected = expected(&place);
        let pipe = place.path("pipe");
        assert!(
            Command::new("mkfifo")
                .arg(&pipe)
                .status()
                .unwrap()
                .success()
        );
        let reader = std::thread::spawn(move || fs::read(pipe).unwrap());
        place.succeeds(&format!("{LINE} @pipe"));
        assert_eq!(reader.join().unwrap(), expected);
        assert!(!place.path("pipe").is_file());
        place.succeeds(&format!("{LINE} /dev/null"));

        // Nobody reads, and a signal ends the waiting.
        let line = format!("{LINE} @pipe");
        let mut child = place.command(&line).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1500));
        assert!(child.try_wait().unwrap().is_none());
        let id = child.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &id]).status();
        assert!(sent.unwrap().success());
        assert!(!child.wait().unwrap().success());

        // A run saves its adapter several times, for which it needs a file; its log may go anywhere.
        let train = "train -t 1 --method prompt --length 2 --steps 2 --batch 1 -m @model.gguf --data @rows.jsonl";
        let text = place.fails(1, &format!("{train} -o /dev/null"));
        assert!(text.contains("is not a regular file"), "{text}");
        let pictured = "-o @out.gguf --log /dev/stdout --plot /dev/stderr";
        let output = place.run(&format!("{train} {pictured}"));
        let lines = stdout(&output);
        assert!(lines.starts_with("{\"step\":1,"), "{lines}");
        assert!(lines.contains("\n{\"step\":2,"), "{lines}");
        assert_eq!(stderr(&output).matches("<svg ").count(), 1, "{output:?}");
    }

    #[test]
    fn links_are_followed() {
        let place = Place::new();
        let expected = expected(&place);
        fs::create_dir(place.path("inner")).unwrap();
        symlink("inner/old", place.path("link")).unwrap();
        fs::write(place.path("inner/old"), "old").unwrap();
        // Nothing is there yet.
        symlink("inner/new", place.path("dangling")).unwrap();
        for (link, file) in [("link", "inner/old"), ("dangling", "inner/new")] {
            place.succeeds(&format!("{LINE} @{link}"));
            assert!(fs::symlink_metadata(place.path(link)).unwrap().is_symlink());
            assert_eq!(fs::read(place.path(file)).unwrap(), expected);
        }
        symlink("none/x", place.path("nowhere")).unwrap();
        let text = place.fails(1, &format!("{LINE} @nowhere"));
        assert!(text.contains("there is no folder"), "{text}");
    }
}
