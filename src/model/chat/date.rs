//! `strftime_now`, as glibc writes it.

use chrono::format::{Item, StrftimeItems};
use chrono::{DateTime, Local};
use std::fmt::Write;

/// Directives that glibc and chrono write alike.
const SAME: &str = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZC";

/// The date and time now.
pub(super) fn now(format: &str) -> String {
    written(format, &Local::now())
}

/// What is no directive stays as it is.
fn written(format: &str, at: &DateTime<Local>) -> String {
    let mut out = String::new();
    let mut rest = format;
    while let Some(begin) = rest.find('%') {
        out.push_str(&rest[..begin]);
        rest = &rest[begin + 1..];
        let flag = rest.chars().next().filter(|c| "-_0^#".contains(*c));
        let letter = rest[flag.map_or(0, char::len_utf8)..].chars().next();
        let Some(letter) = letter else {
            // The end of the format.
            out.push('%');
            continue;
        };
        rest = &rest[flag.map_or(0, char::len_utf8) + letter.len_utf8()..];
        match (flag, letter) {
            (None, '%') => out.push('%'),
            (None, 'f') => {
                let _ = write!(out, "{:06}", at.timestamp_subsec_micros());
            }
            // As the C locale has them.
            (None, 'c') => directive("a %b %e %H:%M:%S %Y", at, &mut out),
            (None, 'x') => directive("m/%d/%y", at, &mut out),
            (None, 'X') => directive("T", at, &mut out),
            // The date of a moment within the zone of this machine has no name for it.
            (None, 'Z') => directive("Z", at, &mut out),
            (None | Some('-' | '_' | '0'), letter) if SAME.contains(letter) => {
                let flag = flag.map(String::from).unwrap_or_default();
                directive(&format!("{flag}{letter}"), at, &mut out);
            }
            (Some('^'), letter) if SAME.contains(letter) => {
                let mut text = String::new();
                directive(&letter.to_string(), at, &mut text);
                out.push_str(&text.to_uppercase());
            }
            (flag, letter) => {
                out.push('%');
                out.extend(flag);
                out.push(letter);
            }
        }
    }
    out + rest
}

/// One directive, without its percent sign.
fn directive(what: &str, at: &DateTime<Local>, out: &mut String) {
    let what = format!("%{what}");
    let items: Vec<Item<'_>> = StrftimeItems::new(&what).collect();
    // Writing fails for a directive that does not exist.
    match items.contains(&Item::Error) {
        true => out.push_str(&what),
        false => {
            let _ = write!(out, "{}", at.format_with_items(items.iter()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::written;
    use chrono::{Local, TimeZone};

    #[test]
    fn dates_are_those_of_glibc() {
        let at = Local
            .with_ymd_and_hms(2024, 3, 7, 9, 5, 2)
            .single()
            .unwrap();
        for (format, expected) in [
            ("%d %b %Y", "07 Mar 2024"),
            ("%Y-%m-%d", "2024-03-07"),
            ("%A, %B %e, %-d, %-m", "Thursday, March  7, 7, 3"),
            ("%H:%M:%S %p %I %j %y %C", "09:05:02 AM 09 067 24 20"),
            (
                "%c|%x|%X|%D|%F|%T|%R",
                "Thu Mar  7 09:05:02 2024|03/07/24|09:05:02|03/07/24|2024-03-07|09:05:02|09:05",
            ),
            ("%^a %^B %f", "THU MARCH 000000"),
            ("100%% %Q %é % x %", "100% %Q %é % x %"),
            ("%-", "%-"),
            ("", ""),
        ] {
            assert_eq!(written(format, &at), expected, "{format}");
        }
    }
}
