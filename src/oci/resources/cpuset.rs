//! Lists of CPUs and of memory nodes, in the kernel's syntax (lib/bitmap.c, `bitmap_parselist`).

const SYNTAX: &str =
    "must be a list of numbers and ranges like \"0-3,7\", each range with the smaller number first";

/// Why no kernel can parse a list; `None` if one can.
///
/// The kernel checks whether the CPUs exist, and knows which one is the last.
pub fn wrong(list: &str) -> Option<&'static str> {
    // The kernel reads a C string.
    let mut rest = list.split('\0').next().unwrap_or_default();
    loop {
        rest = rest.trim_start_matches(is_between);
        if rest.is_empty() {
            return None;
        }
        match region(rest) {
            Some(after) => rest = after,
            None => return Some(SYNTAX),
        }
    }
}

/// The kernel's white space, or a comma.
fn is_between(c: char) -> bool {
    c.is_ascii_whitespace() || c == '\x0b' || c == ','
}

/// Reads one region: `3`, `0-7`, `0-7:1/4`, `all`, `all:1/4`. Returns the text after the region, which may follow a
/// pattern immediately.
fn region(text: &str) -> Option<&str> {
    let is_all = text.get(..3).is_some_and(|word| word.eq_ignore_ascii_case("all"));
    let rest = if is_all {
        text.get(3..)?
    } else {
        let (first, rest) = number(text)?;
        // A single number has no pattern.
        if let Some(after) = end_of_region(rest) {
            return Some(after);
        }
        let (last, rest) = number(rest.strip_prefix('-')?)?;
        in_order(first, last).then_some(rest)?
    };
    if let Some(after) = end_of_region(rest) {
        return Some(after);
    }
    let (used, rest) = number(rest.strip_prefix(':')?)?;
    let (of, rest) = number(rest.strip_prefix('/')?)?;
    (in_order(used, of) && of != Number::Is(0)).then_some(rest)
}

/// The text after a region that ends here. A line break ends the whole list.
fn end_of_region(rest: &str) -> Option<&str> {
    match rest.chars().next() {
        None | Some('\n') => Some(""),
        Some(c) => is_between(c).then_some(rest),
    }
}

/// A number in a list.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Number {
    Is(u32),
    /// `N`: the last CPU or memory node that exists.
    Last,
}

fn number(text: &str) -> Option<(Number, &str)> {
    if let Some(rest) = text.strip_prefix('N') {
        return Some((Number::Last, rest));
    }
    let rest = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let digits = text.strip_suffix(rest)?;
    Some((Number::Is(digits.parse().ok()?), rest))
}

fn in_order(first: Number, last: Number) -> bool {
    match (first, last) {
        (Number::Is(first), Number::Is(last)) => first <= last,
        // A kernel can have this many.
        (Number::Last, _) | (_, Number::Last) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_that_the_kernel_reads_are_accepted() {
        for list in [
            "0",
            "0-3",
            "0,2,4-7",
            "1-1",
            "0-15:2/4",
            "all",
            "ALL",
            "all:1/2",
            "0-N",
            "N",
            " 0 , 1\n",
            ",1,",
            "0\x0b1",
            "N-5",
            "0-7:1/23",
            "0-7:1/2all",
            "1\nx",
            "1\0x",
            "",
        ] {
            assert_eq!(wrong(list), None, "{list:?}");
        }
    }

    #[test]
    fn lists_that_the_kernel_refuses_are_refused() {
        for list in [
            "x",
            "0-",
            "-1",
            "3-1",
            "0..3",
            "0;1",
            "0x1",
            "1:1/2",
            "0-3:4",
            "0-3:3/2",
            "0-3:0/0",
            "99999999999",
            "0\u{a0}1",
            "all1",
            "\nx",
        ] {
            assert!(wrong(list).is_some(), "{list:?}");
        }
    }
}
