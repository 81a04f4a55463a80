//! Expressions of Jinja, written as minijinja must see them to compute what Jinja computes: operators become filters of our own.

use super::pieces::{Piece, is_method, listed, quoted};
use super::source::Unreadable;
use super::tokens::Token;

/// Brackets within brackets: minijinja itself takes 150.
const MAX_NESTING: usize = 60;
/// Parts of one expression that follow upon each other. minijinja's compiler calls itself for each.
const MAX_LINKS: usize = 400;

type Parsed<T = Piece> = Result<T, Unreadable>;

/// Reads tokens from the left.
pub(super) struct Parser<'a> {
    tokens: &'a [Token],
    nesting: usize,
    links: usize,
}

impl<'a> Parser<'a> {
    pub(super) fn new(tokens: &'a [Token]) -> Self {
        Self {
            tokens,
            nesting: 0,
            links: 0,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.tokens.is_empty()
    }

    fn peek(&self) -> Option<&'a Token> {
        self.tokens.first()
    }

    fn next(&mut self) -> Option<&'a Token> {
        let (first, rest) = self.tokens.split_first()?;
        self.tokens = rest;
        Some(first)
    }

    pub(super) fn at_sign(&self, sign: &str) -> bool {
        self.peek().is_some_and(|t| t.is_sign(sign))
    }

    pub(super) fn skip_sign(&mut self, sign: &str) -> bool {
        let found = self.at_sign(sign);
        if found {
            self.next();
        }
        found
    }

    pub(super) fn skip_name(&mut self, name: &str) -> bool {
        let found = self.peek().is_some_and(|t| t.is_name(name));
        if found {
            self.next();
        }
        found
    }

    pub(super) fn expect_sign(&mut self, sign: &str) -> Parsed<()> {
        match self.skip_sign(sign) {
            true => Ok(()),
            false => Err(self.unexpected(&format!("{sign:?}"))),
        }
    }

    pub(super) fn name(&mut self) -> Parsed<&'a str> {
        match self.peek() {
            Some(Token::Name(name)) => {
                self.next();
                Ok(name)
            }
            _ => Err(self.unexpected("a name")),
        }
    }

    fn unexpected(&self, expected: &str) -> Unreadable {
        let got = match self.peek() {
            Some(Token::Name(name)) => format!("{:?}", name.chars().take(40).collect::<String>()),
            Some(Token::Text(_)) => "a text".to_owned(),
            Some(Token::Int(_) | Token::Float(_)) => "a number".to_owned(),
            Some(Token::Sign(sign)) => format!("{sign:?}"),
            None => "the end of the tag".to_owned(),
        };
        Unreadable(format!("unexpected {got}, expected {expected}"))
    }

    /// Nothing may follow.
    pub(super) fn end(&self) -> Parsed<()> {
        match self.is_done() {
            true => Ok(()),
            false => Err(self.unexpected("the end of the tag")),
        }
    }

    fn link(&mut self) -> Parsed<()> {
        self.links += 1;
        match self.links > MAX_LINKS {
            true => Err(Unreadable(format!(
                "an expression has more than {MAX_LINKS} parts in a row"
            ))),
            false => Ok(()),
        }
    }

    fn nested<T>(&mut self, read: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        self.nesting += 1;
        if self.nesting > MAX_NESTING {
            return Err(Unreadable(format!(
                "an expression is nested more than {MAX_NESTING} deep"
            )));
        }
        let read = read(self);
        self.nesting -= 1;
        read
    }

    /// A whole expression.
    pub(super) fn expression(&mut self) -> Parsed<String> {
        Ok(self.condition()?.text)
    }

    /// An expression, or several of them between commas, which are a tuple. `condition`: whether `a if b else c` may be one.
    pub(super) fn tuple(&mut self, condition: bool) -> Parsed<String> {
        let ends = |p: &Self| {
            p.is_done()
                || p.at_sign("=")
                || p.peek()
                    .is_some_and(|t| t.is_name("recursive") || t.is_name("if"))
        };
        Ok(self.tuple_until(condition, &ends)?.text)
    }

    fn tuple_until(&mut self, condition: bool, ends: &dyn Fn(&Self) -> bool) -> Parsed {
        let item = match condition {
            true => Self::condition,
            false => Self::or,
        };
        let first = item(self)?;
        if !self.at_sign(",") {
            return Ok(first);
        }
        let mut items = vec![first.text];
        while self.skip_sign(",") && !ends(self) {
            items.push(item(self)?.text);
        }
        Ok(listed("__tuple__", &items))
    }

    fn condition(&mut self) -> Parsed {
        self.nested(|p| {
            let mut value = p.or()?;
            while p.skip_name("if") {
                p.link()?;
                let test = p.or()?;
                let other = match p.skip_name("else") {
                    true => format!(" else {}", p.condition()?.text),
                    false => String::new(),
                };
                value = Piece::closed(format!("({} if {}{other})", value.text, test.text));
            }
            Ok(value)
        })
    }

    fn or(&mut self) -> Parsed {
        let mut items = vec![self.and()?];
        while self.skip_name("or") {
            self.link()?;
            items.push(self.and()?);
        }
        Ok(Self::either(items, " or ", true))
    }

    fn and(&mut self) -> Parsed {
        let mut items = vec![self.not()?];
        while self.skip_name("and") {
            self.link()?;
            items.push(self.not()?);
        }
        Ok(Self::either(items, " and ", false))
    }

    /// Operands of which the first that is as `decides` counts, or the last. Literals are decided here.
    fn either(items: Vec<Piece>, operator: &str, decides: bool) -> Piece {
        let mut kept: Vec<Piece> = Vec::new();
        let last = items.len() - 1;
        for (i, item) in items.into_iter().enumerate() {
            match item.truth {
                Some(truth) if truth == decides => {
                    kept.push(item);
                    break;
                }
                Some(_) if i < last => {}
                _ => kept.push(item),
            }
        }
        if kept.len() == 1 {
            return kept.swap_remove(0);
        }
        let texts: Vec<_> = kept.into_iter().map(|p| p.text).collect();
        Piece::closed(format!("({})", texts.join(operator)))
    }

    fn not(&mut self) -> Parsed {
        if !self.skip_name("not") {
            return self.comparison();
        }
        let value = self.nested(Self::not)?;
        Ok(Piece {
            truth: value.truth.map(|truth| !truth),
            ..Piece::closed(format!("(not {})", value.text))
        })
    }

    fn comparison(&mut self) -> Parsed {
        let value = self.sum()?;
        let mut compared: Vec<String> = Vec::new();
        loop {
            let operator = match self.tokens {
                [
                    Token::Sign(sign @ ("==" | "!=" | "<" | "<=" | ">" | ">=")),
                    ..,
                ] => sign,
                [first, ..] if first.is_name("in") => "in",
                [first, second, ..] if first.is_name("not") && second.is_name("in") => {
                    self.next();
                    "not in"
                }
                _ => break,
            };
            self.next();
            self.link()?;
            compared.push(format!("'{operator}',{}", self.sum()?.text));
        }
        Ok(match compared.is_empty() {
            true => value,
            // `a < b < c`: both hold.
            false => value.filtered("__compare__", &compared.join(",")),
        })
    }

    fn sum(&mut self) -> Parsed {
        let mut value = self.joined()?;
        loop {
            let name = match self.peek() {
                Some(Token::Sign("+")) => "__add__",
                Some(Token::Sign("-")) => "__sub__",
                _ => return Ok(value),
            };
            self.next();
            self.link()?;
            let other = self.joined()?;
            value = value.filtered(name, &other.text);
        }
    }

    fn joined(&mut self) -> Parsed {
        let value = self.product()?;
        let mut others = Vec::new();
        while self.skip_sign("~") {
            self.link()?;
            others.push(self.product()?.text);
        }
        Ok(match others.is_empty() {
            true => value,
            false => value.filtered("__join__", &others.join(",")),
        })
    }

    fn product(&mut self) -> Parsed {
        let mut value = self.power()?;
        loop {
            let name = match self.peek() {
                Some(Token::Sign("*")) => "__mul__",
                Some(Token::Sign("/")) => "__div__",
                Some(Token::Sign("//")) => "__floordiv__",
                Some(Token::Sign("%")) => "__mod__",
                _ => return Ok(value),
            };
            self.next();
            self.link()?;
            let other = self.power()?;
            value = value.filtered(name, &other.text);
        }
    }

    fn power(&mut self) -> Parsed {
        let mut value = self.unary(true)?;
        while self.skip_sign("**") {
            self.link()?;
            let other = self.unary(true)?;
            value = value.filtered("__pow__", &other.text);
        }
        Ok(value)
    }

    /// What stands before is the last to be done, but for filters.
    fn unary(&mut self, filters: bool) -> Parsed {
        let value = match self.peek() {
            Some(Token::Sign("-")) => {
                self.next();
                match self.tokens {
                    // A literal; what follows it belongs to it.
                    [Token::Int(n), rest @ ..] if !begins_postfix(rest.first()) => {
                        self.next();
                        Piece::literal(format!("(-{n})"), *n != 0)
                    }
                    _ => self.nested(|p| p.unary(false))?.filtered("__neg__", ""),
                }
            }
            Some(Token::Sign("+")) => {
                self.next();
                self.nested(|p| p.unary(false))?.filtered("__pos__", "")
            }
            _ => self.primary()?,
        };
        let value = self.postfix(value)?;
        match filters {
            true => self.filters(value),
            false => Ok(value),
        }
    }

    fn primary(&mut self) -> Parsed {
        let Some(token) = self.next() else {
            return Err(self.unexpected("an expression"));
        };
        Ok(match token {
            Token::Name(name) => match name.as_str() {
                "true" | "True" => Piece::literal("true", true),
                "false" | "False" => Piece::literal("false", false),
                "none" | "None" => Piece::literal("none", false),
                _ => Piece::closed(name),
            },
            Token::Text(text) => {
                let mut text = text.clone();
                while let Some(Token::Text(more)) = self.peek() {
                    self.next();
                    text.push_str(more);
                }
                Piece::literal(quoted(&text), !text.is_empty())
            }
            Token::Int(n) => Piece::literal(n.to_string(), *n != 0),
            Token::Float(x) if x.is_infinite() => Piece::closed("'inf'").filtered("float", ""),
            Token::Float(x) => Piece::literal(format!("{x:?}"), *x != 0.0),
            Token::Sign("(") => self.nested(|p| {
                if p.skip_sign(")") {
                    return Ok(listed("__tuple__", &[]));
                }
                let value = p.tuple_until(true, &|p| p.at_sign(")"))?;
                p.expect_sign(")")?;
                Ok(value.bracketed())
            })?,
            Token::Sign("[") => listed("__list__", &self.items("]", Self::expression)?),
            Token::Sign("{") => {
                let entries = self.items("}", |p| {
                    let key = p.expression()?;
                    p.expect_sign(":")?;
                    Ok([key, p.expression()?])
                })?;
                listed("__dict__", &entries.concat())
            }
            _ => {
                return Err(Unreadable(match token {
                    Token::Sign(sign) => format!("unexpected {sign:?}, expected an expression"),
                    _ => "expected an expression".to_owned(),
                }));
            }
        })
    }

    /// What stands between commas, behind the bracket that begins them; a last comma may be there.
    fn items<T>(
        &mut self,
        close: &str,
        mut item: impl FnMut(&mut Self) -> Parsed<T>,
    ) -> Parsed<Vec<T>> {
        self.nested(|p| {
            let mut items = Vec::new();
            while !p.skip_sign(close) {
                if !items.is_empty() {
                    p.expect_sign(",")?;
                    if p.skip_sign(close) {
                        break;
                    }
                }
                items.push(item(p)?);
            }
            Ok(items)
        })
    }

    fn postfix(&mut self, mut value: Piece) -> Parsed {
        while let Some(Token::Sign(sign @ ("." | "[" | "("))) = self.peek() {
            self.link()?;
            self.next();
            value = match *sign {
                "." => self.attribute(value)?,
                "[" => self.nested(|p| p.subscript(value))?,
                _ => {
                    let arguments = self.arguments()?;
                    Piece::closed(format!("{}({arguments})", value.bracketed().text))
                }
            };
        }
        Ok(value)
    }

    fn attribute(&mut self, value: Piece) -> Parsed {
        let name = match self.next() {
            Some(Token::Name(name)) => name.as_str(),
            Some(Token::Int(n)) => return Ok(value.filtered("__item__", &n.to_string())),
            _ => return Err(Unreadable("expected a name behind a dot".to_owned())),
        };
        if !name.is_ascii() || is_method(name) || !value.closed || value.truth.is_some() {
            if self.skip_sign("(") {
                let arguments = self.arguments()?;
                let comma = if arguments.is_empty() { "" } else { "," };
                return Ok(value.filtered("__call__", &format!("'{name}'{comma}{arguments}")));
            }
            return Ok(value.filtered("__attr__", &quoted(name)));
        }
        Ok(Piece::closed(format!("{}.{name}", value.text)))
    }

    fn subscript(&mut self, value: Piece) -> Parsed {
        let mut items = Vec::new();
        while !self.skip_sign("]") {
            if !items.is_empty() {
                self.expect_sign(",")?;
            }
            items.push(self.subscribed()?);
        }
        match items.as_slice() {
            [] => Err(Unreadable("expected an index".to_owned())),
            [bounds, ..] if bounds.len() > 1 => Ok(value.filtered("__slice__", &bounds.join(","))),
            [one] => Ok(value.filtered("__item__", &one[0])),
            _ => Ok(value.filtered("__item__", &listed("__tuple__", &items.concat()).text)),
        }
    }

    /// An index, or three bounds of a slice.
    fn subscribed(&mut self) -> Parsed<Vec<String>> {
        let mut bounds = Vec::new();
        if !self.at_sign(":") {
            bounds.push(self.expression()?);
            if !self.at_sign(":") {
                return Ok(bounds);
            }
        } else {
            bounds.push("none".to_owned());
        }
        while bounds.len() < 3 && self.skip_sign(":") {
            bounds.push(match self.peek() {
                Some(Token::Sign("]" | "," | ":")) => "none".to_owned(),
                _ => self.expression()?,
            });
        }
        Ok(bounds)
    }

    /// Behind the bracket that begins them.
    fn arguments(&mut self) -> Parsed<String> {
        let mut named = false;
        let all = self.items(")", |p| {
            Ok(match p.tokens {
                [Token::Sign(stars @ ("*" | "**")), ..] => {
                    p.next();
                    named |= *stars == "**";
                    format!("{stars}{}", p.expression()?)
                }
                [Token::Name(name), Token::Sign("="), ..] => {
                    p.next();
                    p.next();
                    named = true;
                    format!("{name}={}", p.expression()?)
                }
                _ if named => {
                    return Err(Unreadable(
                        "an argument without a name follows one with a name".to_owned(),
                    ));
                }
                _ => p.expression()?,
            })
        })?;
        Ok(all.join(","))
    }

    fn filters(&mut self, mut value: Piece) -> Parsed {
        loop {
            match self.peek() {
                Some(Token::Sign("|")) => {
                    self.next();
                    let (name, arguments) = self.filter()?;
                    value = value.filtered(&name, &arguments);
                }
                Some(Token::Name(name)) if name == "is" => {
                    self.next();
                    value = self.test(value)?;
                }
                // What a filter gives may be called.
                Some(Token::Sign("(")) => value = self.postfix(value)?,
                _ => return Ok(value),
            }
            self.link()?;
        }
    }

    /// Name and arguments of a filter.
    pub(super) fn filter(&mut self) -> Parsed<(String, String)> {
        let name = self.dotted()?;
        let arguments = match self.skip_sign("(") {
            true => self.arguments()?,
            false => String::new(),
        };
        Ok((name, arguments))
    }

    fn dotted(&mut self) -> Parsed<String> {
        let mut name = self.name()?.to_owned();
        while self.skip_sign(".") {
            name.push('.');
            name.push_str(self.name()?);
        }
        Ok(name)
    }

    fn test(&mut self, value: Piece) -> Parsed {
        let negated = self.skip_name("not");
        let name = self.dotted()?;
        let takes = |t: &Token| match t {
            Token::Name(name) => !matches!(name.as_str(), "else" | "or" | "and"),
            Token::Text(_) | Token::Int(_) | Token::Float(_) => true,
            Token::Sign(sign) => matches!(*sign, "[" | "{"),
        };
        let arguments = if self.skip_sign("(") {
            self.arguments()?
        } else if self.peek().is_some_and(takes) {
            if self.peek().is_some_and(|t| t.is_name("is")) {
                return Err(Unreadable(
                    "tests cannot follow upon each other with is".to_owned(),
                ));
            }
            let argument = self.primary()?;
            self.postfix(argument)?.text
        } else {
            String::new()
        };
        let test = format!("({} is {name}({arguments}))", value.text);
        Ok(Piece::closed(match negated {
            true => format!("(not {test})"),
            false => test,
        }))
    }
}

fn begins_postfix(token: Option<&Token>) -> bool {
    matches!(token, Some(Token::Sign("." | "[" | "(")))
}
