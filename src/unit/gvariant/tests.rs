use super::*;

/// Type and value, as zbus prints them.
fn read(text: &str) -> (String, String) {
    let value = parse(text).unwrap();
    (value.value_signature().to_string(), value.to_string())
}

fn kind(text: &str) -> String {
    read(text).0
}

fn wrong(text: &str) -> InvalidText {
    parse(text).map(|value| value.to_string()).expect_err(text)
}

#[test]
fn simple_values_have_the_types_of_the_format() {
    for (text, signature) in [
        ("'x'", "s"),
        ("\"x\"", "s"),
        ("true", "b"),
        ("false", "b"),
        ("5", "i"),
        ("-5", "i"),
        ("0x10", "i"),
        ("1.5", "d"),
        ("1e3", "d"),
        ("-.5", "d"),
        ("inf", "d"),
        ("  7 ", "i"),
    ] {
        assert_eq!(kind(text), signature, "{text}");
    }
    assert_eq!(parse("010").unwrap(), Variant::from(8_i32));
    assert_eq!(parse("-2147483648").unwrap(), Variant::from(i32::MIN));
}

#[test]
fn a_type_before_a_value_counts() {
    for (text, signature) in [
        ("byte 5", "y"),
        ("int16 -5", "n"),
        ("uint16 5", "q"),
        ("int32 5", "i"),
        ("uint32 5", "u"),
        ("int64 -5", "x"),
        ("uint64 5", "t"),
        ("double 5", "d"),
        ("boolean true", "b"),
        ("string 'x'", "s"),
        ("@t 5", "t"),
        ("@as []", "as"),
        ("@a(st) [('a', 1)]", "a(st)"),
        ("@as ['x']", "as"),
    ] {
        assert_eq!(kind(text), signature, "{text}");
    }
    assert_eq!(parse("uint64 18446744073709551615").unwrap(), Variant::from(u64::MAX));
}

#[test]
fn containers_have_the_types_of_what_is_in_them() {
    for (text, signature) in [
        ("['a', 'b']", "as"),
        ("[1, 2]", "ai"),
        ("[uint64 1, 2]", "at"),
        ("[1, uint64 2]", "at"),
        ("[1, 2.5]", "ad"),
        ("[byte 1, 0xff]", "ay"),
        ("('a', true)", "(sb)"),
        ("(5,)", "(i)"),
        ("[('a', 'b'), ('c', 'd')]", "a(ss)"),
        ("[('/dev/sda', uint64 1), ('/dev/sdb', 2)]", "a(st)"),
        ("([1, 2], [15])", "(aiai)"),
        ("(@ai [], [15])", "(aiai)"),
        ("[[], ['x']]", "aas"),
    ] {
        assert_eq!(kind(text), signature, "{text}");
    }
    assert_eq!(parse("['a', 'b']").unwrap(), Variant::from(vec!["a", "b"]));
    assert_eq!(parse("(@ai [], [15])").unwrap(), Variant::from((Vec::<i32>::new(), vec![15_i32])));
}

#[test]
fn strings_may_have_escapes() {
    let text = |text: &str| String::try_from(parse(text).unwrap()).unwrap();
    assert_eq!(text(r#"'it\'s "\\" \t\u00e9\U0001F600'"#), "it's \"\\\" \t\u{e9}\u{1f600}");
    assert_eq!(text("\"it's\""), "it's");
    assert_eq!(text("'one \\\nline'"), "one line");
}

#[test]
fn an_error_names_its_place() {
    for (text, at, reason) in [
        ("", 1, "missing"),
        ("x.service", 1, "quotes"),
        ("['a', b]", 7, "quotes"),
        ("'a", 3, "closing quote"),
        ("['a' 'b']", 7, "missing"),
        ("['a'", 5, "missing"),
        ("[1, 'a']", 5, "another type"),
        ("[]", 1, "@as []"),
        ("[1,]", 4, "begin with"),
        ("5 6", 3, "after the end"),
        ("byte 300", 6, "byte"),
        ("uint64 -1", 8, "uint64"),
        ("5000000000", 1, "int32"),
        ("08", 1, "int32"),
        ("--5", 1, "int32"),
        ("1G", 1, "no unit"),
        ("uint64 1G", 8, "no unit"),
        ("60s", 1, "no unit"),
        ("SIGTERM", 1, "15 for SIGTERM"),
        ("multi-user.target x", 1, "['multi-user.target']"),
        ("uint64 'x'", 8, "type uint64"),
        ("@as 5", 5, "a list of strings"),
        ("@zz 5", 1, "@zz"),
        ("@ 5", 1, "not a type"),
        ("objectpath '/x'", 1, "objectpath"),
        ("signature 'a(st)'", 1, "signature"),
        ("@g 'iii'", 4, "type g"),
        ("@o '/x'", 4, "type o"),
        ("'a\\u0000'", 9, "NUL"),
        ("'\\ud800'", 8, "no such character"),
        ("{'a': 1}", 1, "begin with"),
        ("()", 1, ""),
    ] {
        let error = wrong(text);
        assert!(error.at == at && error.reason.contains(reason), "{text}: {error}");
    }
    assert!(wrong(&"[".repeat(10_000)).reason.contains("deep"));
}

#[test]
fn values_that_are_too_large_for_d_bus_are_refused() {
    let fails = |text: &str| parse(text).expect_err("too large").reason;
    let numbers = |count: usize| vec!["1"; count].join(",");
    assert!(parse(&format!("({})", numbers(253))).is_ok());
    assert!(fails(&format!("({})", numbers(254))).contains("255"));
    assert!(fails(&format!("[({})]", numbers(300))).contains("255"));
    assert!(fails(&format!("@({}) ({})", "i".repeat(300), numbers(300))).contains("type"));
    assert!(fails(&format!("[{}]", numbers(5000))).contains("too many"));
    assert!(fails(&format!("'{}'", "x".repeat(20_000))).contains("bytes"));
    assert!(parse(&format!("'{}'", "x".repeat(12_000))).is_ok());
}

/// The value as zbus sends it: a variant after the name of a property.
fn serialized(value: &Variant<'static>) -> bool {
    let list = vec![("Name", value.clone())];
    zbus::Message::signal("/a", "a.b", "C").build(&list).is_ok()
}

#[test]
fn every_parsed_value_can_be_sent() {
    const PARTS: [&str; 30] = [
        "(",
        ")",
        "[",
        "]",
        ",",
        " ",
        "1",
        "-7",
        "1.5",
        "'a'",
        "\"b\\n\"",
        "true",
        "@",
        "@as",
        "@a(ss)",
        "@ay",
        "@v",
        "@a{sv}",
        "@g",
        "@o",
        "@h",
        "uint64",
        "byte",
        "signature",
        "objectpath",
        "string",
        "()",
        "[]",
        "@(ii)",
        "@aaaaaaaaaaaaaaaaaaaas",
    ];
    // A plain generator: the same texts on each run.
    let mut state = 88_172_645_463_325_252_u64;
    let mut below = |limit: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % limit as u64).unwrap()
    };
    let mut sent = 0;
    for _ in 0..200_000 {
        let text: String = (0..=below(9)).map(|_| PARTS[below(PARTS.len())]).collect();
        if let Ok(value) = parse(&text) {
            assert!(value.value_signature().to_string().len() <= MAX_SIGNATURE, "{text}");
            assert!(serialized(&value), "{text}");
            sent += 1;
        }
    }
    assert!(sent > 1000, "{sent}");
}
