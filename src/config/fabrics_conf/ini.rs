//! Lines of an INI file, with their numbers: sections, assignments, and what is neither.

/// What a line says. Comments and blank lines say nothing.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// `[name]`.
    Section(&'a str),
    /// `key = value`; the value may be empty.
    Assignment {
        /// Not empty.
        key: &'a str,
        /// Without blanks around it.
        value: &'a str,
    },
    /// Anything else.
    Junk(&'a str),
}

/// The lines that say something, with their numbers from 1. A `#` begins a comment at the start of a line only:
/// values may have one.
pub(super) fn lines(text: &str) -> impl Iterator<Item = (usize, Line<'_>)> {
    let numbered = (1..).zip(text.lines().map(str::trim));
    numbered
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(number, line)| (number, classify(line)))
}

fn classify(line: &str) -> Line<'_> {
    if let Some(rest) = line.strip_prefix('[') {
        return match rest.split_once(']') {
            Some((name, "")) if !name.trim().is_empty() => Line::Section(name.trim()),
            _ => Line::Junk(line),
        };
    }
    match line.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Line::Assignment {
            key: key.trim(),
            value: value.trim(),
        },
        _ => Line::Junk(line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_told_apart_and_has_its_number() {
        let text =
            "# comment\n\n[ Host ]\r\n a-b =  c = d # e \nempty =\n[open\n[]\n[a] b\n= x\nword";
        let expected = [
            (3, Line::Section("Host")),
            (
                4,
                Line::Assignment {
                    key: "a-b",
                    value: "c = d # e",
                },
            ),
            (
                5,
                Line::Assignment {
                    key: "empty",
                    value: "",
                },
            ),
            (6, Line::Junk("[open")),
            (7, Line::Junk("[]")),
            (8, Line::Junk("[a] b")),
            (9, Line::Junk("= x")),
            (10, Line::Junk("word")),
        ];
        assert_eq!(lines(text).collect::<Vec<_>>(), expected);
    }
}
