//! Results as tables: aligned for a terminal, or Markdown.

use std::fmt::Write as _;

use crate::results::{Cell, Reached, Results};
use crate::statistics::{Summary, summarize};

/// How a table looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Aligned,
    Markdown,
}

/// Everything that a run says to its reader.
pub(crate) fn render(results: &Results, style: Style) -> String {
    let machine = &results.machine;
    let mut out = format!(
        "{} × {}, {} MiB, Linux {}; load average {:.2} at the start\n\
         {} rounds of {} s for each row; disks of {} MiB; medians, ± half the range over the rounds\n\
         {}\n\n",
        machine.processors,
        machine.processor,
        machine.memory_mib,
        machine.kernel,
        machine.load_average,
        results.rounds,
        results.seconds,
        results.disk_bytes >> 20,
        results.placement.described(),
    );
    table(&mut out, style, 1, &calibration(results));
    table(&mut out, style, 2, &measurements(results));
    let goals = goals(results);
    if goals.len() > 1 {
        table(&mut out, style, 2, &goals);
        out.push_str("From … to: where the value lies with a probability of 95 %.\n");
    }
    for skipped in &results.skipped {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "NOT MEASURED: {}: {}", skipped.contender, skipped.why);
    }
    out
}

fn calibration(results: &Results) -> Vec<Vec<String>> {
    let mut lines = vec![line(["calibration", "median", "±%"])];
    let rows = [
        (
            "fixed work of one CPU, ms",
            summarize(results.calibration.iter().map(|c| c.cpu_ms)),
        ),
        (
            "socketpair ping-pong, µs",
            summarize(results.calibration.iter().map(|c| c.ping_pong_us)),
        ),
    ];
    for (name, summary) in rows {
        lines.push(vec![name.to_owned(), median(summary), spread(summary)]);
    }
    lines
}

fn measurements(results: &Results) -> Vec<Vec<String>> {
    let mut lines = vec![line([
        "row",
        "contender",
        "IOPS",
        "±%",
        "MB/s",
        "p50 µs",
        "p99 µs",
        "CPU µs/IO",
        "±%",
        "calls/IO",
        "copied B/IO",
    ])];
    let mut last = "";
    for cell in &results.cells {
        let row = if cell.row == last { "" } else { &cell.row };
        last = &cell.row;
        lines.push(measurement(row, cell));
    }
    lines
}

fn measurement(row: &str, cell: &Cell) -> Vec<String> {
    let iops = cell.summary(|m| Some(m.iops));
    let cpu = cell.summary(|m| m.cpu_us);
    vec![
        row.to_owned(),
        cell.contender.clone(),
        median(iops),
        spread(iops),
        median(cell.summary(|m| Some(m.mb_per_second))),
        median(cell.summary(|m| Some(m.p50_us))),
        median(cell.summary(|m| Some(m.p99_us))),
        median(cpu),
        spread(cpu),
        median(summarize(cell.counts.syscalls)),
        median(summarize(cell.counts.copied_bytes)),
    ]
}

fn goals(results: &Results) -> Vec<Vec<String>> {
    let mut lines = vec![line([
        "goal", "row", "value", "from", "to", "wanted", "reached",
    ])];
    for goal in results.goals() {
        let reached = match goal.reached {
            Reached::Yes => "yes",
            Reached::WithinNoise => "within noise",
            Reached::No => "NO",
        };
        lines.push(vec![
            goal.what,
            goal.row,
            short(goal.value),
            short(goal.interval.0),
            short(goal.interval.1),
            goal.goal,
            reached.to_owned(),
        ]);
    }
    lines
}

fn line<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

/// Three digits that matter.
fn median(summary: Option<Summary>) -> String {
    summary.map_or_else(|| "-".to_owned(), |summary| short(summary.median))
}

/// Three digits, more or less.
fn short(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

fn spread(summary: Option<Summary>) -> String {
    summary.map_or_else(
        || "-".to_owned(),
        |summary| format!("{:.0}", summary.spread),
    )
}

/// Appends lines, the first of them a heading; the first `words` columns are words, the others numbers.
fn table(out: &mut String, style: Style, words: usize, lines: &[Vec<String>]) {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for (index, line) in lines.iter().enumerate() {
        let cells: Vec<String> = line
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, width))| match column < words {
                true => format!("{cell:<width$}"),
                false => format!("{cell:>width$}"),
            })
            .collect();
        match style {
            Style::Aligned => {
                out.push_str(cells.join("  ").trim_end());
                out.push('\n');
            }
            Style::Markdown => {
                let _ = writeln!(out, "| {} |", cells.join(" | "));
                if index == 0 {
                    let rule = |column| if column < words { "---" } else { "---:" };
                    let rules: Vec<&str> = (0..columns).map(rule).collect();
                    let _ = writeln!(out, "| {} |", rules.join(" | "));
                }
            }
        }
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let lines = [
            line(["name", "µs"]),
            line(["a", "1.00"]),
            line(["long", "-"]),
        ];
        let mut out = String::new();
        table(&mut out, Style::Aligned, 1, &lines);
        assert_eq!(out, "name    µs\na     1.00\nlong     -\n\n");
        out.clear();
        table(&mut out, Style::Markdown, 1, &lines);
        let expected = "| name |   µs |\n| --- | ---: |\n| a    | 1.00 |\n| long |    - |\n\n";
        assert_eq!(out, expected);
    }

    #[test]
    fn numbers_have_three_digits_that_matter() {
        let shown = |value| median(summarize([value]));
        assert_eq!(median(None), "-");
        for (value, text) in [
            (0.0, "0"),
            (1.234, "1.23"),
            (12.34, "12.3"),
            (123_456.7, "123457"),
        ] {
            assert_eq!(shown(value), text);
        }
    }
}
