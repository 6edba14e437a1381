//! Converts Markdown as in docs/ to the source of a man page (man(7)).

use std::fmt::Write;

use super::markdown::{Block, blocks};

/// From this number of columns on, a cell of a table is written with the name of its column.
const NAMED_FROM: usize = 3;

/// Makes a man page of Markdown text. Leaves out the first heading, which equals the title.
pub fn page(name: &str, section: u8, summary: &str, text: &str) -> String {
    let mut page = format!(
        ".\\\" Written by `make manual`.\n.TH {} {section} \"\" \"{} {}\"\n.nh\n.ad l\n.SH NAME\n{} \\- {}\n",
        quoted(&name.to_uppercase()),
        env!("CARGO_PKG_NAME"),
        env!("CARGO_PKG_VERSION"),
        escaped(name),
        escaped(summary),
    );
    for block in blocks(text) {
        // Writing to a string does not fail.
        let _ = match block {
            Block::Heading(1, _) => Ok(()),
            Block::Heading(2, title) => writeln!(page, ".SH {}", quoted(&plain(&title).to_uppercase())),
            Block::Heading(_, title) => writeln!(page, ".SS {}", quoted(&plain(&title))),
            Block::Paragraph(text) => writeln!(page, ".PP\n{}", inline(&text)),
            Block::Item(mark, text) => writeln!(page, ".IP {} 3\n{}", quoted(&mark), inline(&text)),
            Block::Code(lines) => {
                let lines: String =
                    lines.iter().map(|line| format!("{}\n", guarded(&escaped(line)))).collect();
                writeln!(page, ".PP\n.in +4n\n.nf\n{lines}.fi\n.in")
            }
            Block::Row(head, cells) => {
                let first = cells.first().map(|cell| inline(cell)).unwrap_or_default();
                let first = if first.is_empty() { "\\(bu".to_owned() } else { first };
                let named = |(column, cell): (usize, &String)| match head.get(column) {
                    Some(name) if head.len() >= NAMED_FROM && !name.is_empty() => {
                        format!("\\fI{}:\\fR {}", inline(name), inline(cell))
                    }
                    _ => inline(cell),
                };
                let rest = cells.iter().enumerate().skip(1).filter(|(_, cell)| !cell.is_empty());
                let rest: Vec<String> = rest.map(named).collect();
                writeln!(page, ".TP\n{first}\n{}", rest.join("\n.br\n"))
            }
        };
    }
    page
}

/// Escapes text so that roff interprets no part of it.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('`', "\\(ga")
        .replace('\'', "\\(aq")
        .replace('…', "...")
}

/// Escapes a line of text that begins like a request.
fn guarded(line: &str) -> String {
    if line.starts_with('.') { format!("\\&{line}") } else { line.to_owned() }
}

/// Quotes an argument of a request.
fn quoted(text: &str) -> String {
    format!("\"{}\"", escaped(text).replace('"', "\\(dq"))
}

/// Removes the marks of code, emphasis and links.
fn plain(text: &str) -> String {
    text.replace("**", "").replace('`', "")
}

/// Writes code and emphasis in bold, and the text of a link without its target.
fn inline(text: &str) -> String {
    let mut line = String::new();
    let mut is_code = false;
    let mut is_bold = false;
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if c == '`' {
            line += if is_code { "\\fR" } else { "\\fB" };
            is_code = !is_code;
            rest = &rest[1..];
        } else if !is_code && rest.starts_with("**") {
            line += if is_bold { "\\fR" } else { "\\fB" };
            is_bold = !is_bold;
            rest = &rest[2..];
        } else if !is_code
            && c == '['
            && let Some((label, after)) = link(rest)
        {
            line += &inline(label);
            rest = after;
        } else {
            line += &escaped(&c.to_string());
            rest = &rest[c.len_utf8()..];
        }
    }
    guarded(&line)
}

/// The label of `[label](target)` at the beginning of a text, and what follows.
fn link(text: &str) -> Option<(&str, &str)> {
    let (label, rest) = text.strip_prefix('[')?.split_once("](")?;
    let (_, after) = rest.split_once(')')?;
    (!label.contains(']')).then_some((label, after))
}

#[test]
fn markdown_becomes_a_page() {
    let text = "# Title\n\nRun `ps -q` and [see](x.md) **this**.\n\n## More\n\n* one\n  and two\n\n```\n.dot \\n\n```\n\n\
                | A | B |\n|---|---|\n| `x` | what |\n\n| A | B | C |\n|---|---|---|\n| y | | why |\n| z | 1 | |\n";
    let page = page("shim", 5, "a thing", text);
    let wanted = ".SH NAME\nshim \\- a thing\n.PP\nRun \\fBps \\-q\\fR and see \\fBthis\\fR.\n.SH \"MORE\"\n.IP \"\\(bu\" 3\n\
                  one and two\n.PP\n.in +4n\n.nf\n\\&.dot \\en\n.fi\n.in\n.TP\n\\fBx\\fR\nwhat\n.TP\ny\n\\fIC:\\fR why\n.TP\nz\n\\fIB:\\fR 1\n";
    assert!(page.replace("\"*\"", "\"\\(bu\"").ends_with(wanted), "{page}");
}
