//! The parts of Markdown that docs/ uses.

/// A piece of a page.
#[derive(Debug, PartialEq, Eq)]
pub enum Block {
    /// A heading: its level and its text.
    Heading(usize, String),
    /// A paragraph: its lines, joined.
    Paragraph(String),
    /// An item of a list: its mark and its text.
    Item(String, String),
    /// A block of code: its lines, unchanged.
    Code(Vec<String>),
    /// A row of a table: the cells of the head, and its own.
    Row(Vec<String>, Vec<String>),
}

pub fn blocks(text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut lines = text.lines().peekable();
    let mut head = Vec::new();
    while let Some(line) = lines.next() {
        if let Some(fence) = line.strip_prefix("```") {
            let _ = fence;
            blocks.push(Block::Code(
                lines.by_ref().take_while(|line| !line.starts_with("```")).map(str::to_owned).collect(),
            ));
        } else if line.starts_with('#') {
            let level = line.chars().take_while(|c| *c == '#').count();
            blocks.push(Block::Heading(level, line[level..].trim().to_owned()));
        } else if line.starts_with('|') {
            let row = cells(line);
            let is_rule = row.iter().all(|cell| !cell.is_empty() && cell.chars().all(|c| "-:".contains(c)));
            // The head is the row above the rule.
            let is_head = lines.peek().is_some_and(|next| next.starts_with("|--") || next.starts_with("|:-"));
            if is_head {
                head = row;
            } else if !is_rule {
                blocks.push(Block::Row(head.clone(), row));
            }
        } else if let Some((mark, rest)) = item(line) {
            blocks.push(Block::Item(mark, joined(rest, &mut lines)));
        } else if !line.trim().is_empty() {
            blocks.push(Block::Paragraph(joined(line, &mut lines)));
        }
    }
    blocks
}

/// The lines up to one that begins another block.
fn joined<'a>(first: &str, lines: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>) -> String {
    let mut text = first.trim().to_owned();
    let ends = |line: &str| {
        line.trim().is_empty()
            || line.starts_with(['#', '|'])
            || line.starts_with("```")
            || item(line).is_some()
    };
    while let Some(line) = lines.next_if(|line| !ends(line)) {
        text = format!("{text} {}", line.trim());
    }
    text
}

/// `* text`, `1. text`
fn item(line: &str) -> Option<(String, &str)> {
    let line = line.trim_start();
    if let Some(rest) = line.strip_prefix("* ") {
        return Some(("*".to_owned(), rest));
    }
    let (number, rest) = line.split_once(". ")?;
    (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| (format!("{number}."), rest))
}

/// A cell ends at a bar that is not in code.
fn cells(line: &str) -> Vec<String> {
    let mut cells = vec![String::new()];
    let mut is_code = false;
    for c in line.trim().trim_start_matches('|').trim_end_matches('|').chars() {
        is_code ^= c == '`';
        match cells.last_mut() {
            Some(cell) if c != '|' || is_code => cell.push(c),
            _ => cells.push(String::new()),
        }
    }
    cells.iter().map(|cell| cell.trim().to_owned()).collect()
}
