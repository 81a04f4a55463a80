//! Template source, as minijinja must see it to do what Jinja does.

use super::grammar::Parser;
use super::pieces::quoted;
use super::tokens::{self, Tag, Token};

/// `elif`s of one `if`: minijinja's compiler calls itself for each.
const MAX_ELIFS: usize = 100;

/// Bytes of text between tags whose repetition has to be counted.
const LONG: usize = 128;

/// Between a tag and one behind it that begins a scope, or ends it; neither touches white space where they meet.
const BEGIN_SCOPE: &str = "+%}{%+ with";
const END_SCOPE: &str = "endwith +%}{%+";

/// What makes a template no Jinja.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unreadable(pub(super) String);

/// Rewrites a template:
///
/// - the operators, subscripts and literals of its expressions become filters of our own, which compute as Python does;
/// - Transformers' `{% generation %}`, which marks what the assistant says and changes nothing in the text, becomes a scope.
///
/// Lines stay where they are.
///
/// # Errors
/// What is no Jinja, with its line.
pub(super) fn for_minijinja(source: &str) -> Result<String, Unreadable> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut writer = Writer {
        out: String::with_capacity(2 * source.len()),
        elifs: Vec::new(),
    };
    let mut rest = source.as_str();
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        writer.raw(before);
        let len = writer.tag(tag).map_err(|e| {
            let line = source[..source.len() - tag.len()].matches('\n').count() + 1;
            Unreadable(format!("{e} (line {line})"))
        })?;
        rest = &tag[len..];
    }
    writer.raw(rest);
    Ok(writer.out)
}

struct Writer {
    out: String,
    /// How many there are so far in each `if` that is open.
    elifs: Vec<usize>,
}

impl Writer {
    /// Writes text between tags. Long ones become values, whose length is counted wherever they go; white space at their ends, which
    /// the tags may take away, stays as it is.
    fn raw(&mut self, text: &str) {
        // An opening brace before it must not become part of a tag.
        let kept = match self.out.ends_with('{') {
            true => text.chars().next().map_or(0, char::len_utf8),
            false => 0,
        };
        self.out.push_str(&text[..kept]);
        let text = &text[kept..];
        let inside = text.trim();
        if inside.len() < LONG {
            self.out.push_str(text);
            return;
        }
        let begin = text.len() - text.trim_start().len();
        self.out.push_str(&text[..begin]);
        self.out.extend(["{{ ", &quoted(inside)]);
        let lines = inside.matches('\n').count();
        self.out.extend(std::iter::repeat_n('\n', lines));
        self.out.push_str(" }}");
        self.out.push_str(&text[begin + inside.len()..]);
    }

    /// Writes the tag at the start of `text` and returns its length, or that of a brace that begins none.
    fn tag(&mut self, text: &str) -> Result<usize, Unreadable> {
        match text.as_bytes().get(1) {
            Some(b'#') => {
                let end = text[2..].find("#}");
                let len = end.ok_or_else(|| Unreadable("a comment has no end".to_owned()))? + 4;
                self.out.push_str(&text[..len]);
                Ok(len)
            }
            Some(b'{') => {
                let control = control(&text[2..]);
                let begin = 2 + control.len();
                let tag = tokens::tag(&text[begin..], "}}")?;
                let mut parser = Parser::new(&tag.tokens);
                let value = parser.tuple(true)?;
                parser.end()?;
                let len = begin + tag.len;
                // A plus says nothing here.
                let control = control.trim_matches('+');
                self.write("{{", control, &value, &tag, "}}", &text[..len]);
                Ok(len)
            }
            Some(b'%') => {
                let control = control(&text[2..]);
                let begin = 2 + control.len();
                if let Some(raw) = raw(&text[begin..])? {
                    self.out.push_str(&raw.written(control));
                    return Ok(begin + raw.len);
                }
                let tag = tokens::tag(&text[begin..], "%}")?;
                let statement = self.statement(&tag.tokens)?;
                let len = begin + tag.len;
                self.write("{%", control, &statement, &tag, "%}", &text[..len]);
                Ok(len)
            }
            _ => {
                self.out.push('{');
                Ok(1)
            }
        }
    }

    fn write(
        &mut self,
        begin: &str,
        control: &str,
        inside: &str,
        tag: &Tag,
        end: &str,
        written: &str,
    ) {
        self.out.extend([begin, control, " ", inside]);
        // Lines keep their numbers.
        let lines = written.matches('\n').count() - inside.matches('\n').count();
        self.out.extend(std::iter::repeat_n('\n', lines));
        self.out.extend([" ", tag.control, end]);
    }

    fn statement(&mut self, tokens: &[Token]) -> Result<String, Unreadable> {
        let mut parser = Parser::new(tokens);
        let word = parser.name()?;
        let p = &mut parser;
        let statement = match word {
            "if" => {
                self.elifs.push(0);
                format!("if {}", p.tuple(false)?)
            }
            "elif" => {
                let n = self.elifs.last_mut();
                let n = n.ok_or_else(|| Unreadable("elif without if".to_owned()))?;
                *n += 1;
                if *n > MAX_ELIFS {
                    return Err(Unreadable(format!("an if has more than {MAX_ELIFS} elif")));
                }
                format!("elif {}", p.tuple(false)?)
            }
            "endif" => {
                self.elifs.pop();
                "endif".to_owned()
            }
            "for" => for_loop(p)?,
            "set" => set(p)?,
            "with" => with(p)?,
            "macro" => {
                let name = p.name()?;
                let Parameters { list, defaults } = parameters(p)?;
                format!("macro {name}{list}{defaults}")
            }
            "call" => {
                let Parameters { list, defaults } = match p.at_sign("(") {
                    true => parameters(p)?,
                    false => Parameters::default(),
                };
                format!("call{list} {}{defaults}", p.expression()?)
            }
            // What is set inside stays inside.
            "filter" => format!("filter {} {BEGIN_SCOPE}", filters(p)?),
            "endfilter" | "endset" => format!("{END_SCOPE} {word}"),
            "generation" => "with".to_owned(),
            "endgeneration" => "endwith".to_owned(),
            "else" | "endfor" | "endwith" | "endmacro" | "endcall" | "break" | "continue" => {
                word.to_owned()
            }
            "block" | "endblock" => match p.is_done() {
                true => word.to_owned(),
                false => format!("{word} {}", p.name()?),
            },
            "include" | "import" | "from" | "extends" => {
                return Err(Unreadable(format!(
                    "{word} needs other templates, and there are none"
                )));
            }
            _ => {
                return Err(Unreadable(format!(
                    "unknown tag {:?}",
                    word.chars().take(40).collect::<String>()
                )));
            }
        };
        parser.end()?;
        Ok(statement)
    }
}

/// The sign behind the beginning of a tag, for white space.
fn control(text: &str) -> &str {
    &text[..usize::from(text.starts_with(['-', '+']))]
}

/// Text that is taken as it is.
struct Raw<'a> {
    /// Between the tags, with the white space that they take away.
    text: &'a str,
    /// Signs for white space: behind the first tag, before and behind the last.
    controls: [&'a str; 3],
    /// Bytes from behind the beginning of the first tag to the end of the last.
    len: usize,
    lines: usize,
}

/// If a tag begins text that is taken as it is: that text.
fn raw(tag: &str) -> Result<Option<Raw<'_>>, Unreadable> {
    // Sign and length of the end of a tag that is but one word.
    let closed = |text: &'_ str, word: &str, plus: bool| {
        let rest = text.trim_start().strip_prefix(word)?.trim_start();
        let signs = ["-", "+", ""];
        let sign = signs.into_iter().find(|sign| rest.starts_with(sign))?;
        let rest = rest[sign.len()..].strip_prefix("%}")?;
        (plus || sign != "+").then_some((sign, text.len() - rest.len()))
    };
    let Some((first, begin)) = closed(tag, "raw", false) else {
        return Ok(None);
    };
    let ends = tag[begin..].match_indices("{%").find_map(|(at, _)| {
        let inside = begin + at + 2;
        let before = control(&tag[inside..]);
        let inside = inside + before.len();
        let (behind, len) = closed(&tag[inside..], "endraw", true)?;
        Some((begin + at, before, behind, inside + len))
    });
    let (end, before, behind, len) =
        ends.ok_or_else(|| Unreadable("raw has no endraw".to_owned()))?;
    Ok(Some(Raw {
        text: &tag[begin..end],
        controls: [first, before, behind],
        len,
        lines: tag[..len].matches('\n').count(),
    }))
}

impl Raw<'_> {
    /// As a value in a scope: minijinja takes a line end behind the first tag away, which Jinja does not.
    fn written(&self, control: &str) -> String {
        let [first, before, behind] = self.controls;
        let mut text = self.text;
        let mut line_begins = false;
        if first == "-" {
            text = text.trim_start();
            line_begins = self.text[..self.text.len() - text.len()].ends_with('\n');
        }
        match before {
            "-" => text = text.trim_end(),
            "+" => {}
            _ => {
                let line = text.rfind('\n').map(|at| at + 1);
                let line = line.or(line_begins.then_some(0));
                if let Some(line) = line.filter(|&at| text[at..].trim().is_empty()) {
                    text = &text[..line];
                }
            }
        }
        let lines = "\n".repeat(self.lines);
        let text = quoted(text);
        format!("{{%{control} with +%}}{{{{ {text}{lines} }}}}{{%+ endwith {behind}%}}")
    }
}

fn for_loop(p: &mut Parser) -> Result<String, Unreadable> {
    let target = target(p)?;
    if !p.skip_name("in") {
        return Err(Unreadable("for without in".to_owned()));
    }
    let mut out = format!("for {target} in ({})|__iter__", p.tuple(false)?);
    if p.skip_name("if") {
        out += &format!(" if {}", p.expression()?);
    }
    if p.skip_name("recursive") {
        out += " recursive";
    }
    Ok(out)
}

/// A name, or names between commas or in brackets.
fn target(p: &mut Parser) -> Result<String, Unreadable> {
    let mut out = String::new();
    // As many as are open: there is no recursion.
    let mut open = 0_usize;
    loop {
        while p.skip_sign("(") {
            out.push('(');
            open += 1;
        }
        let name = p.name()?;
        if matches!(
            name,
            "true" | "false" | "none" | "True" | "False" | "None" | "loop" | "self"
        ) {
            return Err(Unreadable(format!("{name} cannot be assigned to")));
        }
        out.push_str(name);
        while open > 0 && p.skip_sign(")") {
            out.push(')');
            open -= 1;
        }
        if !p.skip_sign(",") {
            break;
        }
        out.push(',');
        while open > 0 && p.skip_sign(")") {
            out.push(')');
            open -= 1;
        }
    }
    match open {
        0 => Ok(out),
        _ => Err(Unreadable("a bracket is not closed".to_owned())),
    }
}

fn set(p: &mut Parser) -> Result<String, Unreadable> {
    let name = target(p)?;
    let attribute = match p.skip_sign(".") {
        true => Some(p.name()?),
        false => None,
    };
    let to = attribute.map_or_else(|| name.clone(), |attribute| format!("{name}.{attribute}"));
    if p.skip_sign("=") {
        let value = p.tuple(true)?;
        return Ok(match attribute {
            // A macro must see that it needs the namespace.
            Some(_) => format!("set {to} = ({value})|__set__({name})"),
            None => format!("set {to} = {value}"),
        });
    }
    match p.skip_sign("|") {
        true => Ok(format!("set {to} | {} {BEGIN_SCOPE}", filters(p)?)),
        false => Ok(format!("set {to} {BEGIN_SCOPE}")),
    }
}

fn with(p: &mut Parser) -> Result<String, Unreadable> {
    let mut all = Vec::new();
    while !p.is_done() {
        if !all.is_empty() {
            p.expect_sign(",")?;
        }
        let name = p.name()?;
        p.expect_sign("=")?;
        all.push((name, p.expression()?));
    }
    // No value sees the names of the others, which minijinja sets one after the other.
    let values = (all.iter().enumerate()).map(|(i, (_, value))| format!("__with{i}__ = {value}"));
    let names = (all.iter().enumerate()).map(|(i, (name, _))| format!("{name} = __with{i}__"));
    let both: Vec<_> = values.chain(names).collect();
    Ok(format!("with {}", both.join(", ")))
}

/// Parameters of a macro or of a caller.
#[derive(Default)]
struct Parameters {
    /// In parentheses.
    list: String,
    /// Statements behind the one that has the list.
    defaults: String,
}

/// Some have defaults. minijinja's do not see the parameters before them: where one speaks of these, it is set inside.
fn parameters(p: &mut Parser) -> Result<Parameters, Unreadable> {
    p.expect_sign("(")?;
    let (mut all, mut names): (Vec<String>, Vec<&str>) = Default::default();
    let (mut has_defaults, mut defaults) = (false, String::new());
    while !p.skip_sign(")") {
        if !all.is_empty() {
            p.expect_sign(",")?;
        }
        let name = target_name(p)?;
        if p.skip_sign("=") {
            has_defaults = true;
            let value = p.expression()?;
            if names.iter().any(|name| has_word(&value, name)) {
                defaults +=
                    &format!(" %}}{{% set {name} = {name} if {name} is defined else ({value})");
                all.push(format!("{name}=__undefined__"));
            } else {
                all.push(format!("{name}={value}"));
            }
        } else if has_defaults {
            return Err(Unreadable(
                "a parameter without a default follows one with a default".to_owned(),
            ));
        } else {
            all.push(name.to_owned());
        }
        names.push(name);
    }
    let list = format!("({})", all.join(", "));
    Ok(Parameters { list, defaults })
}

/// Whether a text has a name as a word.
fn has_word(text: &str, name: &str) -> bool {
    text.split(|c: char| c != '_' && !c.is_alphanumeric())
        .any(|word| word == name)
}

fn target_name<'a>(p: &mut Parser<'a>) -> Result<&'a str, Unreadable> {
    match p.name()? {
        name @ ("true" | "false" | "none" | "True" | "False" | "None") => {
            Err(Unreadable(format!("{name} cannot be a parameter")))
        }
        name => Ok(name),
    }
}

/// Names of filters with arguments, between bars.
fn filters(p: &mut Parser) -> Result<String, Unreadable> {
    let mut all = Vec::new();
    loop {
        let (name, arguments) = p.filter()?;
        all.push(match arguments.is_empty() {
            true => name,
            false => format!("{name}({arguments})"),
        });
        if !p.skip_sign("|") {
            return Ok(all.join(" | "));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::for_minijinja;

    #[test]
    fn operators_become_filters_and_text_stays() {
        for (source, expected) in [
            ("{{ a[1:] }}", "{{ a|__slice__(1,none) }}"),
            ("{{ -a.b + 1 }}", "{{ a.b|__neg__|__add__(1) }}"),
            ("{{ 0 and b or c }}", "{{ c }}"),
            (
                "{{ a['items'].b }}",
                "{{ a|__item__('items')|__attr__('b') }}",
            ),
            ("{{ a.items() }}", "{{ a|__call__('items') }}"),
            (
                "{%- for m in a if b is defined -%}",
                "{%- for m in (a)|__iter__ if (b is defined()) -%}",
            ),
            ("{%+ set a = 'b\n' +%}", "{%+ set a = 'b\\n'\n +%}"),
            (
                "{%- raw %}{{ a[1:] }} {%- endraw -%}",
                "{%- with +%}{{ '{{ a[1:] }}' }}{%+ endwith -%}",
            ),
            (
                "{% generation %}x{%- endgeneration -%}",
                "{% with %}x{%- endwith -%}",
            ),
        ] {
            assert_eq!(for_minijinja(source).as_deref(), Ok(expected), "{source}");
        }
        for same in [
            "a[1:] { } [:] {",
            "{# a[1:] {{ #}b[1:]",
            "{% if a %}{% elif b %}{% else %}{% endif %}",
            "{",
            "",
        ] {
            assert_eq!(for_minijinja(same).as_deref(), Ok(same));
        }
        let long = "x".repeat(200);
        let source = format!("{{{long}{{% if a %}}");
        let expected = format!("{{x{{{{ '{}' }}}}{{% if a %}}", &long[1..]);
        assert_eq!(for_minijinja(&source).as_deref(), Ok(&*expected));
    }

    #[test]
    fn faults_are_said_with_their_line() {
        for (source, expected) in [
            ("a\n{{ b", "a tag has no end, \"}}\" (line 2)"),
            (
                "\n\n{% if %}",
                "unexpected the end of the tag, expected an expression (line 3)",
            ),
            ("{{ a) }}", "unexpected ')' (line 1)"),
            ("{% do a %}", "unknown tag \"do\" (line 1)"),
        ] {
            let error = for_minijinja(source).unwrap_err().to_string();
            assert_eq!(error, expected);
        }
    }

    /// A template comes from strangers: neither brackets within brackets nor long rows may use up the stack.
    #[test]
    fn depth_and_length_are_bounded() {
        let n = 20_000;
        for source in [
            format!("{{{{ {}", "a[1:".repeat(n)),
            format!("{{{{ {}1{} }}}}", "(".repeat(n), ")".repeat(n)),
            format!("{{{{ {}1 }}}}", "not ".repeat(n)),
            format!("{{{{ {}1 }}}}", "- ".repeat(n)),
            format!("{{{{ 1{} }}}}", " + 1".repeat(n)),
            format!("{{{{ a{} }}}}", ".a".repeat(n)),
            format!("{{{{ a{} }}}}", "|upper".repeat(n)),
            format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(n)),
            format!("{{% if a %}}{}", "{% elif a %}".repeat(n)),
        ] {
            assert!(for_minijinja(&source).is_err(), "{}", &source[..20]);
        }
    }
}
