//! The structure of the sources: who may use whom, where `unsafe` may be, how files begin and end.
//!
//! The rules are those of `docs/architecture.md`. Sources are read as tokens, so that comments,
//! strings and layout do not matter; paths are resolved against the module that they are in.

#![expect(clippy::expect_used, reason = "a test that cannot run has failed")]

use std::fmt;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// Most lines of a file, its tests at the end apart.
const MAX_LINES: usize = 800;

/// Files, and directories with a slash, where `unsafe` may be; `tests/` directories too.
const UNSAFE_ALLOWED: &[&str] = &[
    "memdesc/src/",
    "vhost/src/memory.rs",
    "vhost/src/handover/socket.rs",
    "nvmf/src/transport/watch.rs",
    "nvmf/src/transport/tcp/syscall.rs",
    "nvmf/src/backend/ram.rs",
    "nvmf/src/backend/syscall.rs",
    "bench/src/kernel.rs",
];

/// An edge that must not exist: sources under `from` may not use a path that begins with one of `to`.
struct Edge {
    from: &'static str,
    to: &'static [&'static str],
}

/// Names that a path begins with, its own crate spelt `crate`.
const FORBIDDEN: &[Edge] = &[
    Edge {
        from: "memdesc/",
        to: &[
            "nvmf",
            "vhost_user_blk",
            "vhost_nvmf",
            "virtio_queue",
            "vhost",
            "tokio",
        ],
    },
    Edge {
        from: "vhost/",
        to: &["nvmf", "vhost_nvmf"],
    },
    Edge {
        from: "nvmf/",
        to: &[
            "vhost",
            "vhost_user_blk",
            "vhost_nvmf",
            "virtio_bindings",
            "virtio_driver",
            "virtio_queue",
            "vm_memory",
        ],
    },
    Edge {
        from: "nvmf/src/spec/",
        to: &[
            "crate::backend",
            "crate::controller",
            "crate::host",
            "crate::tcp",
            "crate::transport",
        ],
    },
    Edge {
        from: "nvmf/src/tcp/",
        to: &[
            "crate::backend",
            "crate::controller",
            "crate::host",
            "crate::transport",
            "io_uring",
            "libc",
            // Payload never enters.
            "memdesc",
            "mio",
            "rustix",
            "socket2",
            "tokio",
            "tracing",
            "uuid",
        ],
    },
    // Its time is virtual, and its network is memory.
    Edge {
        from: "nvmf/src/sim/",
        to: &["rand", "std::net", "std::thread", "std::time", "tokio"],
    },
    Edge {
        from: "nvmf/src/host/",
        to: &["crate::tcp", "crate::controller", "crate::backend"],
    },
    Edge {
        from: "nvmf/src/controller/",
        to: &["crate::tcp", "crate::host"],
    },
    Edge {
        from: "nvmf/src/backend/",
        to: &["crate::tcp", "crate::host", "crate::controller"],
    },
    // The bridge is pure.
    Edge {
        from: "src/bridge/",
        to: &[
            "libc",
            "std::fs",
            "std::io",
            "std::net",
            "std::os",
            "std::sync",
            "std::thread",
            "std::time",
            "tokio",
        ],
    },
];

/// Sources that use nothing of the standard library but what is listed.
const CONFINED: &[Edge] = &[
    // No sockets, files, clocks, threads, locks or environment.
    Edge {
        from: "nvmf/src/tcp/",
        to: &[
            "std::collections",
            "std::fmt",
            "std::iter",
            "std::mem",
            "std::ops",
            "std::time::Duration",
        ],
    },
];

/// Packages that a manifest's package may not depend on, in whatever way.
const FORBIDDEN_PACKAGES: &[Edge] = &[
    Edge {
        from: "memdesc/Cargo.toml",
        to: &["nvmf", "vhost-user-blk", "vhost-nvmf"],
    },
    Edge {
        from: "vhost/Cargo.toml",
        to: &["nvmf", "vhost-nvmf"],
    },
    Edge {
        from: "nvmf/Cargo.toml",
        to: &[
            "vhost",
            "vhost-user-blk",
            "vhost-nvmf",
            "virtio-bindings",
            "virtio-queue",
            "vm-memory",
        ],
    },
    Edge {
        from: "guest-tests/Cargo.toml",
        to: &["vhost-nvmf"],
    },
    // It measures programs from outside, all of them in the same way.
    Edge {
        from: "bench/Cargo.toml",
        to: &["vhost-nvmf", "vhost-user-blk", "nvmf", "memdesc"],
    },
];

#[derive(Debug, PartialEq, Eq)]
struct Violation {
    file: String,
    line: usize,
    what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.what)
    }
}

/// A path as it is used in a source, from a crate's name or `crate` on.
struct Use {
    line: usize,
    path: Vec<String>,
}

/// Checks one source file, named by its path from the root.
fn check_source(file: &str, text: &str) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut violation = |line: usize, what: String| {
        found.push(Violation {
            file: file.to_owned(),
            line,
            what,
        });
    };
    if let Err(what) = check_beginning(text) {
        violation(1, what);
    }
    let lines = lines_without_tests(text);
    if lines > MAX_LINES {
        violation(lines, format!("more than {MAX_LINES} lines"));
    }
    let tokens: TokenStream = match text.parse() {
        Ok(tokens) => tokens,
        Err(error) => {
            violation(1, format!("cannot be read: {error}"));
            return found;
        }
    };
    let in_tests = file.split('/').any(|part| part == "tests");
    let unsafe_allowed = in_tests
        || UNSAFE_ALLOWED
            .iter()
            .any(|allowed| file.starts_with(allowed));
    if !unsafe_allowed {
        for line in words(&tokens, "unsafe") {
            violation(line, "`unsafe` has no place here".to_owned());
        }
    }
    for line in borrowed_sources(&tokens) {
        violation(
            line,
            "sources of another package are not taken in".to_owned(),
        );
    }
    let mut uses = Vec::new();
    collect_uses(tokens, &mut module_of(file), &mut uses);
    for edge in FORBIDDEN.iter().filter(|edge| file.starts_with(edge.from)) {
        for Use { line, path } in &uses {
            if let Some(to) = edge.to.iter().find(|to| begins(path, to)) {
                violation(*line, format!("{} may not use {to}", edge.from));
            }
        }
    }
    for edge in CONFINED.iter().filter(|edge| file.starts_with(edge.from)) {
        for Use { line, path } in &uses {
            let outside = path.first().is_some_and(|name| name == "std")
                && (path.contains(&"*".to_owned())
                    || !edge.to.iter().any(|allowed| begins(path, allowed)));
            if outside {
                violation(
                    *line,
                    format!("{} may not use {}", edge.from, path.join("::")),
                );
            }
        }
    }
    found
}

/// Checks one manifest: no forbidden package may be named in it.
fn check_manifest(file: &str, text: &str) -> Vec<Violation> {
    let edges = FORBIDDEN_PACKAGES.iter().filter(|edge| edge.from == file);
    let forbidden: Vec<_> = edges.flat_map(|edge| edge.to).collect();
    let mut found = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        let code = text.split('#').next().unwrap_or_default().trim();
        // A dependency is a key, dotted or not, a table's last name, or a value of `package`.
        let is_boundary = |c: char| !(c.is_alphanumeric() || c == '-' || c == '_');
        let mut words = code.split(is_boundary).filter(|word| !word.is_empty());
        let named = match words.next() {
            Some("name" | "description") => None,
            Some(first) => std::iter::once(first)
                .chain(words)
                .find(|word| forbidden.contains(&word)),
            None => None,
        };
        if let Some(package) = named {
            found.push(Violation {
                file: file.to_owned(),
                line,
                what: format!("may not depend on {package}"),
            });
        }
    }
    found
}

/// A file says its one job in the first lines, as a sentence.
fn check_beginning(text: &str) -> Result<(), String> {
    let documentation = text
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .map(str::trim)
        .take_while(|line| !line.is_empty());
    let sentence = documentation.collect::<Vec<_>>().join(" ");
    let first = sentence.chars().next();
    let starts = first.is_some_and(|c| c.is_uppercase() || c.is_numeric() || c == '`');
    if starts && sentence.ends_with(['.', ':']) {
        Ok(())
    } else {
        Err("does not begin with a `//!` sentence".to_owned())
    }
}

/// Lines before the module of tests that ends a file.
fn lines_without_tests(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    let tests = lines
        .windows(2)
        .position(|pair| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod tests"));
    tests.unwrap_or(lines.len())
}

/// Lines where an identifier is.
fn words(tokens: &TokenStream, word: &str) -> Vec<usize> {
    let mut lines = Vec::new();
    for token in tokens.clone() {
        match token {
            TokenTree::Group(group) => lines.extend(words(&group.stream(), word)),
            TokenTree::Ident(ident) if ident == word => lines.push(ident.span().start().line),
            _ => {}
        }
    }
    lines
}

/// Lines where `#[path = ".."]` or `include!("..")` reaches outside its directory.
fn borrowed_sources(tokens: &TokenStream) -> Vec<usize> {
    let tokens: Vec<TokenTree> = tokens.clone().into_iter().collect();
    let mut lines = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        if let TokenTree::Group(group) = token {
            lines.extend(borrowed_sources(&group.stream()));
        }
        let sign = match token {
            TokenTree::Ident(word) if word == "path" => "=",
            TokenTree::Ident(word) if word == "include" => "!",
            _ => continue,
        };
        let text = |at: usize| tokens.get(at).map(ToString::to_string).unwrap_or_default();
        if text(at + 1) == sign && text(at + 2).contains("..") {
            lines.push(token.span().start().line);
        }
    }
    lines
}

/// The modules from the crate's root to the one that a file is, such as `[tcp, pdu]`.
fn module_of(file: &str) -> Vec<String> {
    let inside = file.split_once("src/").map_or("", |(_, inside)| inside);
    let mut module: Vec<String> = inside
        .trim_end_matches(".rs")
        .split('/')
        .map(str::to_owned)
        .collect();
    if matches!(
        module.last().map(String::as_str),
        Some("mod" | "lib" | "main" | "")
    ) {
        module.pop();
    }
    module
}

/// Finds every path in a stream of tokens that is in `module`.
fn collect_uses(tokens: TokenStream, module: &mut Vec<String>, uses: &mut Vec<Use>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut at = 0;
    while let Some(token) = tokens.get(at) {
        match token {
            TokenTree::Ident(word) if word == "mod" => {
                if let (Some(TokenTree::Ident(name)), Some(TokenTree::Group(body))) =
                    (tokens.get(at + 1), tokens.get(at + 2))
                {
                    module.push(name.to_string());
                    collect_uses(body.stream(), module, uses);
                    module.pop();
                    at += 3;
                    continue;
                }
                at += 1;
            }
            TokenTree::Ident(_) => at = collect_path(&tokens, at, &[], module, uses),
            TokenTree::Group(group) => {
                collect_uses(group.stream(), module, uses);
                at += 1;
            }
            TokenTree::Punct(_) | TokenTree::Literal(_) => at += 1,
        }
    }
}

/// Reads a path, or a tree of paths, that begins with the identifier at `at` and continues `before`;
/// returns where it ends.
fn collect_path(
    tokens: &[TokenTree],
    mut at: usize,
    before: &[String],
    module: &mut Vec<String>,
    uses: &mut Vec<Use>,
) -> usize {
    let mut path = before.to_vec();
    let mut line = 0;
    while let Some(TokenTree::Ident(word)) = tokens.get(at) {
        path.push(word.to_string());
        line = word.span().start().line;
        at += 1;
        if !is_double_colon(tokens, at) {
            break;
        }
        at += 2;
        if let Some(TokenTree::Group(tree)) = tokens.get(at)
            && tree.delimiter() == Delimiter::Brace
        {
            collect_tree(tree, &path, module, uses);
            return at + 1;
        }
        if let Some(TokenTree::Punct(star)) = tokens.get(at)
            && star.as_char() == '*'
        {
            path.push("*".to_owned());
        }
    }
    uses.push(Use {
        line,
        path: resolve(&path, module),
    });
    at
}

fn collect_tree(tree: &Group, before: &[String], module: &mut Vec<String>, uses: &mut Vec<Use>) {
    let tokens: Vec<TokenTree> = tree.stream().into_iter().collect();
    let mut at = 0;
    while at < tokens.len() {
        at = match &tokens[at] {
            TokenTree::Ident(_) => collect_path(&tokens, at, before, module, uses),
            _ => at + 1,
        };
    }
}

fn is_double_colon(tokens: &[TokenTree], at: usize) -> bool {
    let colon = |token: Option<&TokenTree>| match token {
        Some(TokenTree::Punct(punct)) => punct.as_char() == ':',
        _ => false,
    };
    colon(tokens.get(at)) && colon(tokens.get(at + 1))
}

/// Turns `self::` and `super::` into `crate::`.
fn resolve(path: &[String], module: &[String]) -> Vec<String> {
    let supers = path.iter().take_while(|part| *part == "super").count();
    let rest = match path.first().map(String::as_str) {
        Some("self") => &path[1..],
        Some("super") => &path[supers..],
        _ => return path.to_vec(),
    };
    let depth = module.len().saturating_sub(supers);
    std::iter::once("crate".to_owned())
        .chain(module[..depth].iter().cloned())
        .chain(rest.iter().cloned())
        .collect()
}

/// True when a path leads to `to` or into it; everything below a `*` counts.
fn begins(path: &[String], to: &str) -> bool {
    let mut path = path.iter().map(String::as_str);
    for part in to.split("::") {
        match path.next() {
            Some("*") => return true,
            Some(found) if found == part => {}
            _ => return false,
        }
    }
    true
}

/// Documents that a text names, such as `docs/testing.md`.
fn documents(text: &str) -> impl Iterator<Item = &str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_/.".contains(c);
    text.split(move |c| !is_name(c))
        .filter(|word| word.starts_with("docs/") && word.contains(".md"))
        .map(|word| word.trim_end_matches('.'))
}

/// Every file of the workspace with this ending, by its path from the root.
fn files(ending: &str) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut directories: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).expect("the sources can be read") {
            let path = entry.expect("the sources can be read").path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            if path.is_dir() {
                // What is made there holds sources of other packages, too.
                let made = directory == root && matches!(name, "target" | "build")
                    || path == root.join("fuzz/target");
                if !made && !name.starts_with('.') {
                    directories.push(path);
                }
            } else if name.ends_with(ending) {
                let text = std::fs::read_to_string(&path).expect("the sources are UTF-8");
                let file = path.strip_prefix(root).expect("below the root");
                found.push((file.to_str().expect("UTF-8").to_owned(), text));
            }
        }
    }
    found
}

#[track_caller]
fn none(violations: Vec<Violation>) {
    let list: Vec<String> = violations.iter().map(ToString::to_string).collect();
    assert!(violations.is_empty(), "\n{}", list.join("\n"));
}

#[test]
fn the_sources_keep_to_the_structure() {
    let sources = files(".rs");
    for place in ["src/", "memdesc/", "vhost/", "nvmf/"] {
        let any = sources.iter().any(|(file, _)| file.starts_with(place));
        assert!(any, "no sources in {place}: the walk is broken");
    }
    let check = |(file, text): &(String, String)| check_source(file, text);
    none(sources.iter().flat_map(check).collect());
}

#[test]
fn each_place_where_unsafe_may_be_has_some() {
    let sources = files(".rs");
    for place in UNSAFE_ALLOWED {
        let has_some = |(file, text): &(String, String)| {
            let tokens: TokenStream = text.parse().expect("Rust");
            file.starts_with(place) && !words(&tokens, "unsafe").is_empty()
        };
        assert!(sources.iter().any(has_some), "{place} needs no exception");
    }
}

#[test]
fn the_manifests_keep_to_the_structure() {
    let manifests = files("Cargo.toml");
    for edge in FORBIDDEN_PACKAGES {
        let exists = manifests.iter().any(|(file, _)| file == edge.from);
        assert!(exists, "{} is gone; change the rule", edge.from);
    }
    let check = |(file, text): &(String, String)| check_manifest(file, text);
    none(manifests.iter().flat_map(check).collect());
}

#[test]
fn the_simulation_is_in_no_ordinary_build() {
    for (file, text) in files("Cargo.toml") {
        let mut lines = text.lines();
        let on =
            lines.find(|line| line.contains("\"sim\"") && !line.starts_with("required-features"));
        assert_eq!(on, None, "{file} turns the simulation on");
        if file == "nvmf/Cargo.toml" {
            assert!(text.contains("\nsim = []\n") && !text.contains("\ndefault ="));
        }
    }
}

#[test]
fn documents_that_are_named_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut named = 0;
    for (file, text) in [files(".rs"), files(".md"), files(".toml")].concat() {
        for document in documents(&text).filter(|_| file != "tests/structure.rs") {
            assert!(root.join(document).is_file(), "{file} names {document}");
            named += 1;
        }
    }
    assert!(named > 0, "the search is broken");
    let text = "see [x](docs/a.md), `docs/adr/0001-b.md`.";
    assert!(documents(text).eq(["docs/a.md", "docs/adr/0001-b.md"]));
}

/// What the checker says about a file with this code after a proper beginning.
fn said(file: &str, code: &str) -> Vec<String> {
    let text = format!("//! A file.\n{code}\n");
    let violations = check_source(file, &text);
    violations.into_iter().map(|v| v.what).collect()
}

#[test]
fn a_forbidden_edge_is_seen_in_every_spelling() {
    let machine = "nvmf/src/tcp/pdu.rs";
    for code in [
        "use std::io;",
        "use std::{fmt, io::Read};",
        "use std::{self, net::{TcpStream, UdpSocket}};",
        "fn f() -> ::std::io::Result<()> { todo() }",
        "fn f() { let _ = std::time::Instant::now(); }",
        "use std::time::{Duration, Instant};",
        "mod tests { use std::thread; }",
        "macro_rules! m { () => { std::thread::sleep(d) }; }",
        "use tokio::sync::mpsc;",
        "use crate::transport::QueuePair;",
        "use super::super::transport::QueuePair;",
        "use crate::{spec::Sqe, host};",
        "use std::*;",
        "use std::sync::Mutex;",
        "fn f() { std::process::abort() }",
        "use memdesc::MemSink;",
        "use crate::*;",
        "mod inner { use super::super::super::host::Association; }",
    ] {
        assert!(!said(machine, code).is_empty(), "{code}");
    }
    for (file, code) in [
        ("vhost/src/lib.rs", "use nvmf::spec::Sqe;"),
        ("nvmf/src/lib.rs", "use vhost_user_blk::Queue;"),
        ("nvmf/src/host/connect.rs", "use crate::tcp::negotiate;"),
        ("nvmf/src/host/connect.rs", "use super::super::tcp;"),
        ("nvmf/src/host/mod.rs", "use super::controller::Subsystem;"),
        ("nvmf/src/controller/io.rs", "use crate::host::Association;"),
        ("src/bridge/translate.rs", "use std::fs::File;"),
    ] {
        assert_eq!(said(file, code).len(), 1, "{file}: {code}");
    }
}

#[test]
fn an_allowed_edge_is_not_complained_about() {
    for (file, code) in [
        ("nvmf/src/tcp/pdu.rs", "use std::{fmt, time::Duration};"),
        (
            "nvmf/src/tcp/pdu.rs",
            "use super::error::FatalError; use crate::spec::Sqe;",
        ),
        (
            "nvmf/src/tcp/pdu.rs",
            "// use std::io;\nconst A: &str = \"std::io\";",
        ),
        ("nvmf/src/tcp/pdu.rs", "fn io(host: u8) -> u8 { host }"),
        (
            "nvmf/src/host/connect.rs",
            "use crate::transport::tcp::connect;",
        ),
        (
            "nvmf/src/transport/tcp/mod.rs",
            "use crate::tcp::QPair; use std::io;",
        ),
        (
            "src/bridge/translate.rs",
            "use nvmf::spec::Sqe; use vhost_user_blk::Queue;",
        ),
    ] {
        assert_eq!(said(file, code), [""; 0], "{file}: {code}");
    }
}

#[test]
fn unsafe_is_seen_outside_its_files_only() {
    let code = "fn f() { g(unsafe { h() }) }";
    for file in [
        "src/main.rs",
        "vhost/src/queue.rs",
        "nvmf/src/backend/mod.rs",
    ] {
        assert_eq!(said(file, code).len(), 1, "{file}");
    }
    for file in [
        "memdesc/src/sink.rs",
        "vhost/src/memory.rs",
        "vhost/tests/ring.rs",
    ] {
        assert_eq!(said(file, code), [""; 0], "{file}");
    }
    assert_eq!(
        said(
            "src/main.rs",
            "#![deny(unsafe_code)] // unsafe\nconst A: &str = \"unsafe\";"
        ),
        [""; 0]
    );
}

#[test]
fn sources_taken_from_elsewhere_are_seen() {
    for code in [
        "#[path = \"../../src/config/uri.rs\"]\nmod uri;",
        "include!(\"../../src/limits.rs\");",
    ] {
        assert_eq!(said("guest-tests/src/lib.rs", code).len(), 1, "{code}");
    }
    for code in [
        "#[path = \"uri_tests.rs\"]\nmod tests;",
        "fn path(x: [u8; 4]) { f(&x[..2]) }",
    ] {
        assert_eq!(said("guest-tests/src/lib.rs", code), [""; 0], "{code}");
    }
}

#[test]
fn a_file_without_a_first_sentence_is_seen() {
    for text in [
        "",
        "fn main() {}\n",
        "//!\n//! Late.\n",
        "//! no sentence\n",
        "// A comment.\n",
    ] {
        assert_eq!(check_source("src/x.rs", text).len(), 1, "{text:?}");
    }
    for text in [
        "//! One line.\n",
        "//! Two\n//! lines.\n\nfn f() {}\n",
        "//! A list:\n//!\n//! - x\n",
    ] {
        assert!(check_source("src/x.rs", text).is_empty(), "{text:?}");
    }
}

#[test]
fn a_file_that_is_too_long_is_seen_and_its_tests_do_not_count() {
    let long = |lines: usize| format!("//! A file.\n{}", "fn f() {}\n".repeat(lines - 1));
    assert!(check_source("src/x.rs", &long(800)).is_empty());
    assert_eq!(check_source("src/x.rs", &long(801)).len(), 1);
    let body = "fn t() {}\n".repeat(100);
    let tests = format!("{}#[cfg(test)]\nmod tests {{\n{body}}}\n", long(800));
    assert!(check_source("src/x.rs", &tests).is_empty());
}

#[test]
fn a_file_that_is_not_rust_is_seen() {
    assert_eq!(said("src/x.rs", "fn f( {").len(), 1);
}

#[test]
fn a_forbidden_dependency_is_seen_in_every_spelling() {
    for line in [
        "nvmf.workspace = true",
        "nvmf = { path = \"../nvmf\" }",
        "[dev-dependencies.nvmf]",
        "fabrics = { package = \"nvmf\", path = \"../nvmf\" }",
    ] {
        assert_eq!(check_manifest("vhost/Cargo.toml", line).len(), 1, "{line}");
    }
    for line in [
        "name = \"nvmf\"",
        "# nvmf",
        "nvmf-types = \"1\"",
        "description = \"no nvmf here\"",
    ] {
        assert!(
            check_manifest("vhost/Cargo.toml", line).is_empty(),
            "{line}"
        );
    }
    assert!(check_manifest("Cargo.toml", "nvmf.workspace = true").is_empty());
}
