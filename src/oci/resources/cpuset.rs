//! Lists of CPUs and of memory nodes, in the kernel's syntax (lib/bitmap.c, `bitmap_parselist`).

/// Why the kernel can't parse a list; `None` if it can.
///
/// The kernel checks whether the CPUs exist.
pub(super) fn wrong(list: &str) -> Option<&'static str> {
    list.split(|c: char| c == ',' || c.is_ascii_whitespace())
        .filter(|region| !region.is_empty())
        .find_map(wrong_region)
}

/// Checks one region: `3`, `0-7`, `0-7:1/4`, `all`, `all:1/4`; `N` is the last number.
fn wrong_region(region: &str) -> Option<&'static str> {
    const SYNTAX: Option<&str> =
        Some("must be a list of numbers and ranges like \"0-3,7\", each range with the smaller number first");
    let (range, pattern) = match region.split_once(':') {
        Some((range, pattern)) => (range, Some(pattern)),
        None => (region, None),
    };
    let ordered = if range.eq_ignore_ascii_case("all") {
        true
    } else {
        match range.split_once('-') {
            Some((first, last)) => in_order(first, last),
            // A single number has no pattern.
            None => number(range).is_some() && pattern.is_none(),
        }
    };
    let sound = ordered
        && pattern.is_none_or(|pattern| {
            pattern.split_once('/').is_some_and(|(used, of)| in_order(used, of) && number(of) != Some(0))
        });
    if sound { None } else { SYNTAX }
}

fn in_order(first: &str, last: &str) -> bool {
    number(first).zip(number(last)).is_some_and(|(first, last)| first <= last)
}

fn number(text: &str) -> Option<u32> {
    match text {
        "N" => Some(u32::MAX),
        text if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_that_the_kernel_reads_are_accepted() {
        for list in
            ["0", "0-3", "0,2,4-7", "1-1", "0-15:2/4", "all", "ALL", "all:1/2", "0-N", "N", " 0 , 1\n", ",1,"]
        {
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
        ] {
            assert!(wrong(list).is_some(), "{list:?}");
        }
    }
}
