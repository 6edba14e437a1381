//! Replaces links between the pages of docs/ by references to the man pages, in which they have no meaning.

use super::NAME;

/// Where packages put what is in no man page.
const INSTALLED: &str = "/usr/share/doc/containerd-shim-systemd-v1";

/// A page of docs/.
pub struct Doc {
    /// `options.md`
    pub name: &'static str,
    /// The section of the manual in which its text is.
    pub section: u8,
    pub text: String,
}

impl Doc {
    /// Its headings without marks, the title first.
    fn headings(&self) -> impl Iterator<Item = String> {
        let headings = self.text.lines().filter_map(|line| line.split_once("# "));
        let headings = headings.filter(|(marks, _)| marks.chars().all(|c| c == '#'));
        headings.map(|(_, heading)| heading.trim().replace('`', ""))
    }

    /// The heading with this anchor, as the man page writes it.
    #[allow(clippy::panic)]
    fn heading(&self, anchor: &str) -> String {
        let mut headings = self.headings();
        let found = match anchor {
            "" => headings.next().map(|title| title.to_uppercase()),
            _ => headings.find(|heading| slug(heading) == anchor).map(|heading| format!("\"{heading}\"")),
        };
        found.unwrap_or_else(|| panic!("{} has a heading with the anchor {anchor:?}", self.name))
    }
}

/// The anchor of a heading.
fn slug(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The text of a page of docs/, with references in place of its links.
pub fn with_references(doc: &Doc, docs: &[Doc]) -> String {
    let mut text = String::new();
    let mut rest = doc.text.as_str();
    while let Some((before, after)) = rest.split_once("](") {
        let link = before.rsplit_once('[').zip(after.split_once(')'));
        let Some(((before, label), (target, after))) = link else {
            text = format!("{text}{before}](");
            rest = after;
            continue;
        };
        let reference = reference(doc, docs, target);
        let reference = reference.unwrap_or_else(|| format!("[{label}]({target})"));
        text = format!("{text}{before}{reference}");
        rest = after;
    }
    text + rest
}

/// `None` for the target of a link that leads out of docs/, or of none.
fn reference(from: &Doc, docs: &[Doc], target: &str) -> Option<String> {
    if let Some(example) = target.strip_prefix("../packaging/").and_then(|path| path.rsplit('/').next()) {
        return Some(format!("{INSTALLED}/examples/{example}"));
    }
    let (page, anchor) = target.split_once('#').unwrap_or((target, ""));
    let page = if page.is_empty() { from.name } else { page };
    match docs.iter().find(|doc| doc.name == page) {
        Some(doc) if doc.section == from.section => Some(doc.heading(anchor)),
        Some(doc) => Some(format!("{NAME}({}), {}", doc.section, doc.heading(anchor))),
        None if page.ends_with(".md") && !page.contains('/') => Some(format!("{INSTALLED}/{page}")),
        None => None,
    }
}

#[test]
fn links_become_references() {
    let doc = |name, section, text: &str| Doc { name, section, text: text.to_owned() };
    let text = "# Own\n\nSee [below](#two-words), [b.md](b.md), [b.md](b.md#what-it-does)\nand [c.md](c.md#x).\n\n\
                ## Two words\n\n`a[0](b)` [e.toml](../packaging/x/e.toml) [src/x.rs](../src/x.rs)\n";
    let docs = [doc("a.md", 5, text), doc("b.md", 7, "# The other\n\n### What `it` does\n")];
    let found = with_references(&docs[0], &docs);
    let of_b = "containerd-shim-systemd-v1(7)";
    let wanted = format!(
        "# Own\n\nSee \"Two words\", {of_b}, THE OTHER, {of_b}, \"What it does\"\nand {INSTALLED}/c.md.\n\n\
         ## Two words\n\n`a[0](b)` {INSTALLED}/examples/e.toml [src/x.rs](../src/x.rs)\n"
    );
    assert_eq!(found, wanted);
    let own = with_references(&doc("b.md", 5, "# X\n\n[a.md](a.md)\n"), &docs);
    assert_eq!(own, "# X\n\nOWN\n");
}
