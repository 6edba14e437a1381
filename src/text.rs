//! Text from clients and containers that systemd writes to files and that people read on terminals (pure).
//!
//! systemd writes the properties of a transient unit unchanged to the unit's file, one per line, and reads that file again at
//! every daemon-reload. Text with a line break would add lines to the file, and a backslash at the end of a line would join
//! the next line to it.

/// True for a character that must not be in a line of text: a control character, a separator of lines or paragraphs, an
/// invisible character, one that changes the direction of text, or a noncharacter, for which systemd refuses a message.
pub fn is_unfit(c: char) -> bool {
    c.is_control()
        || u32::from(c) & 0xfffe == 0xfffe
        || matches!(
            c,
            '\u{ad}'
                | '\u{61c}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fdd0}'..='\u{fdef}'
                | '\u{fff9}'..='\u{fffb}'
        )
}

/// Why text can't be a line of a unit's file, or the end of a line. `None` if it can.
pub fn flaw(text: &str) -> Option<String> {
    if let Some(c) = text.chars().find(|c| is_unfit(*c)) {
        return Some(format!("it contains the character {c:?}, which a unit's file can't have"));
    }
    text.ends_with('\\')
        .then(|| "it ends with a backslash, which would join two lines of the unit's file".to_owned())
}

/// Text without the characters that must not be in a line, with at most `limit` characters.
pub fn line(text: &str, limit: usize) -> String {
    let fit: String = text.chars().filter(|c| !is_unfit(*c)).take(limit).collect();
    fit.trim_end_matches('\\').to_owned()
}

/// The end of a text of several lines, as one line of at most `limit` characters.
pub fn end(text: &str, limit: usize) -> String {
    let words: Vec<_> = text.split_whitespace().map(|word| line(word, word.len())).collect();
    let joined = words.join(" ");
    let excess = joined.chars().count().saturating_sub(limit);
    joined.chars().skip(excess).collect()
}

/// Text of at most some `limit` bytes: where it is longer, its beginning and its end.
pub fn shortened(text: String, limit: usize) -> String {
    if text.len() <= limit {
        return text;
    }
    let is_boundary = |at: &usize| text.is_char_boundary(*at);
    // 0 and the length are boundaries.
    let end = (0..=limit / 2).rev().find(is_boundary).unwrap_or(0);
    let start = (text.len() - limit / 2..text.len()).find(is_boundary).unwrap_or(text.len());
    format!("{} … {}", &text[..end], &text[start..])
}

/// As [`line()`], for a word of a list in a unit's file: replaces blanks, which separate words, and quotes and backslashes, which
/// have a meaning there.
pub fn word(text: &str, limit: usize) -> String {
    let fit = |c: char| if c.is_whitespace() || ['"', '\'', '\\'].contains(&c) { '_' } else { c };
    line(text, limit).chars().map(fit).collect()
}

/// The byte that two hexadecimal digits stand for. `None` if one of them is no digit: `from_str_radix` takes a sign, too.
pub fn hex_byte(digits: [u8; 2]) -> Option<u8> {
    let [high, low] = digits.map(|digit| char::from(digit).to_digit(16));
    u8::try_from(high? * 16 + low?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_can_not_be_in_a_line_are_named() {
        for c in [
            '\n',
            '\r',
            '\t',
            '\0',
            '\u{1b}',
            '\u{7f}',
            '\u{85}',
            '\u{2028}',
            '\u{2029}',
            '\u{202e}',
            '\u{2066}',
            '\u{fdd0}',
            '\u{fffe}',
            '\u{10ffff}',
        ] {
            let flaw = flaw(&format!("a{c}b")).expect("a flaw");
            assert!(flaw.contains(&format!("{c:?}")), "{flaw}");
            assert_eq!(line(&format!("a{c}b"), 10), "ab");
        }
        assert!(flaw(r"a\").expect("a flaw").contains("backslash"));
        assert_eq!(flaw("web \u{fc}ber 100% \"x\" C:\\x \u{1f433}"), None);
    }

    #[test]
    fn a_line_does_not_absorb_the_next_one() {
        assert_eq!(line(r"name\\", 10), "name");
        assert_eq!(line(r"ab\cd", 3), "ab");
    }

    #[test]
    fn the_end_of_a_text_is_one_line() {
        assert_eq!(end("a: b\r\n\tc\u{1b}[1m\u{202e}d\0\n\n", 99), "a: b c[1md");
        assert_eq!(end("first\n\u{fc}\u{1f433}", 2), "\u{fc}\u{1f433}");
        assert_eq!(end(" \n", 9), "");
    }

    #[test]
    fn long_text_keeps_its_beginning_and_its_end() {
        assert_eq!(shortened("short".to_owned(), 5), "short");
        assert_eq!(shortened(format!("begin{}end", "\u{1f433}".repeat(1000)), 12), "begin … end");
        let text = shortened("\u{fc}".repeat(10_000), 101);
        assert!(
            text.len() <= 101 + " … ".len() && text.starts_with('\u{fc}') && text.ends_with('\u{fc}'),
            "{text}"
        );
    }

    #[test]
    fn a_word_contains_no_separator() {
        assert_eq!(word("x OBJECT_SYSTEMD_UNIT=ssh.service", 99), "x_OBJECT_SYSTEMD_UNIT=ssh.service");
        assert_eq!(word(r#"a"b'c\x0ad"#, 99), "a_b_c_x0ad");
    }

    #[test]
    fn two_hexadecimal_digits_are_a_byte_and_a_sign_is_no_digit() {
        for byte in 0..=u8::MAX {
            for digits in [format!("{byte:02x}"), format!("{byte:02X}")] {
                assert_eq!(hex_byte(digits.as_bytes().try_into().unwrap()), Some(byte));
            }
        }
        for digits in ["+f", "-0", " f", "f ", "0x", "g0", "0g"] {
            assert_eq!(hex_byte(digits.as_bytes().try_into().unwrap()), None, "{digits:?}");
        }
        assert_eq!(hex_byte([0xff, b'0']), None);
    }
}
