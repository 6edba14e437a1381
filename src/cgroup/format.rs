//! The formats of cgroup v2 files (pure), as the kernel's cgroup-v2.rst names them.
//!
//! Newer kernels add keys and lines: the parsers skip what they do not know.

/// A number. `max`, the value of a limit that is not set, is [`u64::MAX`].
pub fn number(text: &str) -> Option<u64> {
    match text.trim_ascii() {
        "max" => Some(u64::MAX),
        digits => digits.parse().ok(),
    }
}

/// The lines of a flat keyed file, each a key and a number.
pub fn flat(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, number(value)?))
    })
}

/// The lines of a nested keyed file, each a key and pairs `name=value`.
pub fn nested(text: &str) -> impl Iterator<Item = (&str, impl Iterator<Item = (&str, &str)>)> {
    text.lines().filter_map(|line| {
        // Kernels before 6.1 print a device without numbers at the beginning of the next device's line.
        let (head, _) = line.split_once('=')?;
        let (keys, _) = head.rsplit_once(' ')?;
        let key = keys.split_ascii_whitespace().next_back()?;
        let pairs = line[keys.len()..].split_ascii_whitespace();
        Some((key, pairs.filter_map(|pair| pair.split_once('='))))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn max_is_the_largest_number() {
        assert_eq!(number("max\n"), Some(u64::MAX));
        assert_eq!(number("18446744073709551615\n"), Some(u64::MAX));
        assert_eq!(number("0\n"), Some(0));
        for bad in ["", "\n", "-1\n", "many\n", "1 2\n", "18446744073709551616\n"] {
            assert_eq!(number(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_line_that_is_not_understood_hides_no_other() {
        let text = "low 1\nno_number\nhalf 1.5\n\nnew key 3\nhigh 2\n";
        assert_eq!(flat(text).collect::<Vec<_>>(), [("low", 1), ("high", 2)]);
    }

    fn all(text: &str) -> Vec<(&str, Vec<(&str, &str)>)> {
        nested(text).map(|(key, pairs)| (key, pairs.collect())).collect()
    }

    #[test]
    fn a_nested_line_has_a_key_and_its_pairs() {
        let expected = [("8:0", vec![("rbytes", "1"), ("wbytes", "2")]), ("some", vec![("avg10", "0.00")])];
        assert_eq!(all("8:0 rbytes=1 odd wbytes=2\n\nalone\n8:16 \nsome avg10=0.00\n=1\n"), expected);
    }

    #[test]
    fn numbers_belong_to_the_last_device_in_their_line() {
        assert_eq!(all("7:1 7:0 8:0 rbytes=1\n"), [("8:0", vec![("rbytes", "1")])]);
    }
}
