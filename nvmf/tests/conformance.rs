//! `docs/nvme-tcp-conformance.md` names places and tests that exist, and gives both for each
//! requirement.

use std::collections::HashMap;
use std::path::Path;

/// One requirement: what is kept where, and shown by what.
#[derive(Debug)]
struct Row<'a> {
    requirement: &'a str,
    places: Vec<(&'a str, &'a str)>,
    tests: Vec<(&'a str, &'a str)>,
}

/// `file:name` between backticks.
fn names(cell: &str) -> Vec<(&str, &str)> {
    let spans = cell.split('`').skip(1).step_by(2);
    spans
        .map(|span| span.split_once(':').unwrap_or((span, "")))
        .collect()
}

fn rows(text: &str) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for line in text.lines().filter(|line| line.starts_with('|')) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [requirement, places, tests] = cells[..] else {
            panic!("three cells: {line}")
        };
        if requirement != "Requirement" && requirement != "---" {
            rows.push(Row {
                requirement,
                places: names(places),
                tests: names(tests),
            });
        }
    }
    rows
}

/// The sources, each read once.
#[derive(Default)]
struct Sources(HashMap<String, Option<String>>);

impl Sources {
    fn text(&mut self, file: &str) -> Option<&str> {
        let text = self.0.entry(file.to_owned()).or_insert_with(|| {
            let root = Path::new(env!("CARGO_MANIFEST_DIR"));
            let path = match file.strip_prefix('/') {
                Some(outside) => root.join("..").join(outside),
                None => root.join(file),
            };
            std::fs::read_to_string(path).ok()
        });
        text.as_deref()
    }

    /// A place is a function, a type, a constant or a trait's item of this name.
    fn has_place(&mut self, file: &str, name: &str) -> bool {
        let Some(text) = self.text(file) else {
            return false;
        };
        ["fn", "struct", "enum", "const", "static"]
            .iter()
            .any(|kind| {
                let start = format!("{kind} {name}");
                text.match_indices(&start).any(|(at, found)| {
                    let next = text[at + found.len()..].chars().next();
                    !next.is_some_and(|c| c.is_alphanumeric() || c == '_')
                })
            })
    }

    /// A test is a function of this name right below an attribute that says so.
    fn has_test(&mut self, file: &str, name: &str) -> bool {
        let Some(text) = self.text(file) else {
            return false;
        };
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        lines.windows(2).any(|pair| {
            let function = pair[1].trim_start_matches("async ");
            (pair[0] == "#[test]" || pair[0].starts_with("#[tokio::test"))
                && function
                    .strip_prefix("fn ")
                    .and_then(|rest| rest.strip_suffix("() {"))
                    == Some(name)
        })
    }
}

fn complaints(text: &str) -> Vec<String> {
    let mut sources = Sources::default();
    let mut complaints = Vec::new();
    for row in rows(text) {
        if row.places.is_empty() || row.tests.is_empty() {
            complaints.push(format!("no place or no test: {}", row.requirement));
        }
        for (file, name) in &row.places {
            if !sources.has_place(file, name) {
                complaints.push(format!("no {name} in {file}"));
            }
        }
        for (file, name) in &row.tests {
            if !sources.has_test(file, name) {
                complaints.push(format!("no test {name} in {file}"));
            }
        }
    }
    complaints
}

#[test]
fn each_requirement_is_kept_somewhere_and_shown_by_a_test() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/nvme-tcp-conformance.md");
    let text = std::fs::read_to_string(path).unwrap();
    assert!(rows(&text).len() > 50, "the tables are not read");
    let complaints = complaints(&text);
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn what_is_missing_is_seen() {
    let row = |places: &str, tests: &str| format!("| A thing | {places} | {tests} |\n");
    let place = "`src/tcp/pdu.rs:check_common`";
    let test = "`tests/tcp_machine/main.rs:a_stream_may_be_cut_anywhere`";
    assert_eq!(complaints(&row(place, test)), [""; 0]);
    for (places, tests) in [
        ("", test),
        (place, ""),
        (place, "by review"),
        ("`src/tcp/pdu.rs:check_comm`", test),
        ("`src/tcp/pdus.rs:check_common`", test),
        ("`src/tcp/pdu.rs`", test),
        // A function that is no test.
        (place, "`tests/tcp_machine/main.rs:write_then_read`"),
        (place, "`tests/tcp_machine/main.rs:a_stream_may_be_cut`"),
    ] {
        assert_eq!(complaints(&row(places, tests)).len(), 1, "{places} {tests}");
    }
}
