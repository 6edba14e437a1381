//! Values of properties in GVariant text (pure).
//!
//! Supports the part of [GLib's format](https://docs.gtk.org/glib/gvariant-text-format.html) that systemd's properties
//! need: no dictionaries, variants, maybes, byte strings, object paths or signatures. A whole number is an int32, unless a
//! type precedes it: `uint64 5` or `@t 5`.

use std::iter::Peekable;
use std::str::Chars;

use zbus::{Array, Signature, Structure, Variant};

/// How deep arrays and tuples may be nested. No property of systemd needs more.
const MAX_DEPTH: usize = 8;
/// The longest text of a value, in bytes.
const MAX_TEXT: usize = 16 << 10;
/// The largest number of values in a value, at all levels together.
const MAX_NODES: usize = 4096;
/// How many characters of a text an error shows.
const MAX_SHOWN: usize = 128;
/// The longest type of D-Bus (D-Bus specification, "Valid Signatures"). zbus panics at a longer one.
const MAX_SIGNATURE: usize = 255;

/// The text is not a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}, at character {at}")]
pub struct InvalidText {
    /// The position of the error, counted from 1.
    pub at: usize,
    /// The error.
    pub reason: String,
}

/// Reads a value.
///
/// # Errors
/// The text is not a value, or its type is unknown.
pub fn parse(text: &str) -> Result<Variant<'static>, InvalidText> {
    if text.len() > MAX_TEXT {
        let reason = format!("the value has {} bytes, the limit is {MAX_TEXT}", text.len());
        return Err(InvalidText { at: 1, reason });
    }
    let mut reader = Reader { chars: text.chars().peekable(), at: 1, nodes: 0 };
    let node = reader.value(MAX_DEPTH)?;
    reader.skip_space();
    if let Some(c) = reader.peek() {
        return Err(reader.wrong(&format!("{c:?} after the end of the value")));
    }
    let signature = node.guess()?.settle().ok_or_else(|| InvalidText {
        at: node.at,
        reason: "an empty array needs a type, as in \"@as []\"".to_owned(),
    })?;
    // A value in a list of properties is a variant, and the length of its type is stored in one byte.
    let length = signature.to_string().len();
    if length > MAX_SIGNATURE {
        let reason = format!("the type of the value has {length} characters, the limit is {MAX_SIGNATURE}");
        return Err(InvalidText { at: node.at, reason });
    }
    node.build(&signature)
}

/// A parsed value whose type is not determined yet.
struct Node {
    at: usize,
    what: What,
}

enum What {
    Bool(bool),
    /// Digits and signs, not parsed yet.
    Number(String),
    Text(String),
    Array(Vec<Node>),
    Tuple(Vec<Node>),
    Typed(Signature, Box<Node>),
}

/// What is known about the type of a value.
enum Guess {
    /// The placeholder for the element of an empty array.
    Any,
    /// A number, of any type.
    Number,
    Basic(Signature),
    Array(Box<Guess>),
    Tuple(Vec<Guess>),
}

impl Guess {
    fn of(signature: &Signature) -> Self {
        match signature {
            Signature::Array(element) => Self::Array(Box::new(Self::of(element))),
            Signature::Structure(fields) => Self::Tuple(fields.iter().map(Self::of).collect()),
            basic => Self::Basic(basic.clone()),
        }
    }

    /// Combines what is known about two values of the same type. `None` if their types differ.
    fn unify(self, other: Self) -> Option<Self> {
        Some(match (self, other) {
            (Self::Any, known) | (known, Self::Any) => known,
            (Self::Number, Self::Number) => Self::Number,
            (Self::Number, Self::Basic(basic)) | (Self::Basic(basic), Self::Number) if is_number(&basic) => {
                Self::Basic(basic)
            }
            (Self::Basic(one), Self::Basic(other)) if one == other => Self::Basic(one),
            (Self::Array(one), Self::Array(other)) => Self::Array(Box::new(one.unify(*other)?)),
            (Self::Tuple(one), Self::Tuple(other)) if one.len() == other.len() => {
                let fields = one.into_iter().zip(other).map(|(one, other)| one.unify(other));
                Self::Tuple(fields.collect::<Option<_>>()?)
            }
            _ => return None,
        })
    }

    fn settle(&self) -> Option<Signature> {
        Some(match self {
            Self::Any => return None,
            Self::Number => Signature::I32,
            Self::Basic(basic) => basic.clone(),
            Self::Array(element) => Signature::array(element.settle()?),
            Self::Tuple(fields) => {
                let fields: Option<Vec<_>> = fields.iter().map(Self::settle).collect();
                Signature::structure(fields?.into_boxed_slice())
            }
        })
    }
}

impl Node {
    fn wrong(&self, reason: String) -> InvalidText {
        InvalidText { at: self.at, reason }
    }

    fn guess(&self) -> Result<Guess, InvalidText> {
        Ok(match &self.what {
            What::Bool(_) => Guess::Basic(Signature::Bool),
            What::Number(digits) if is_float(digits) => Guess::Basic(Signature::F64),
            What::Number(_) => Guess::Number,
            What::Text(_) => Guess::Basic(Signature::Str),
            What::Typed(signature, _) => Guess::of(signature),
            What::Tuple(fields) => Guess::Tuple(fields.iter().map(Self::guess).collect::<Result<_, _>>()?),
            What::Array(elements) => {
                let mut element = Guess::Any;
                for node in elements {
                    element = element.unify(node.guess()?).ok_or_else(|| {
                        node.wrong("this element has another type than the ones before it".to_owned())
                    })?;
                }
                Guess::Array(Box::new(element))
            }
        })
    }

    fn build(self, signature: &Signature) -> Result<Variant<'static>, InvalidText> {
        let at = self.at;
        let wrong = |reason: String| InvalidText { at, reason };
        let mismatch = || wrong(format!("the value is not {}", in_words(signature)));
        Ok(match (self.what, signature) {
            (What::Typed(own, node), _) if own == *signature => node.build(&own)?,
            (What::Bool(value), Signature::Bool) => value.into(),
            (What::Text(text), Signature::Str) => text.into(),
            (What::Number(digits), number) if is_number(number) => {
                read_number(&digits, number).ok_or_else(|| wrong(no_number(&digits, number)))?
            }
            (What::Array(elements), Signature::Array(element)) => {
                let mut array = Array::new(element);
                for node in elements {
                    array.append(node.build(element)?).map_err(|_| mismatch())?;
                }
                array.into()
            }
            (What::Tuple(values), Signature::Structure(fields)) if values.len() == fields.iter().count() => {
                let mut structure = Structure::builder();
                for (node, field) in values.into_iter().zip(fields.iter()) {
                    structure.push_value(node.build(field)?);
                }
                structure.build().map_err(|_| mismatch())?.into()
            }
            _ => return Err(mismatch()),
        })
    }
}

/// The types that may be named before a value.
const KEYWORDS: [(&str, Signature); 10] = [
    ("boolean", Signature::Bool),
    ("byte", Signature::U8),
    ("int16", Signature::I16),
    ("uint16", Signature::U16),
    ("int32", Signature::I32),
    ("uint32", Signature::U32),
    ("int64", Signature::I64),
    ("uint64", Signature::U64),
    ("double", Signature::F64),
    ("string", Signature::Str),
];

/// A type in words, for people.
pub fn in_words(signature: &Signature) -> String {
    match signature {
        Signature::Bool => "true or false".to_owned(),
        Signature::Str => "a string".to_owned(),
        Signature::Array(element) if **element == Signature::Str => "a list of strings".to_owned(),
        other => match KEYWORDS.iter().find(|(_, known)| known == other) {
            Some((name, _)) => format!("a number of type {name}"),
            None => format!("of the D-Bus type {other}"),
        },
    }
}

/// A value of this type as an example of how to write it, made of `text` if possible.
pub fn example(signature: &Signature, text: &str) -> Option<String> {
    Some(match signature {
        Signature::Bool => "true".to_owned(),
        Signature::Str => format!("'{}'", text.trim_matches(['\'', '"'])),
        Signature::Array(element) if **element == Signature::Str => {
            format!("['{}']", text.trim_matches(['\'', '"']))
        }
        Signature::I32 => "15".to_owned(),
        number => {
            let (keyword, _) = KEYWORDS.iter().find(|(_, known)| known == number)?;
            let digits = read_number(text, number).map_or("10", |_| text);
            format!("{keyword} {digits}")
        }
    })
}

/// Why a text that begins like a number is none.
fn no_number(text: &str, signature: &Signature) -> String {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let has_unit = digits.len() < text.len() && whole_number(digits).is_some();
    if has_unit {
        return format!("{text} is not a number: a value has no unit such as K or s, write the number alone");
    }
    format!("{text} is not {}", in_words(signature))
}

fn is_number(signature: &Signature) -> bool {
    !matches!(signature, Signature::Bool | Signature::Str)
        && KEYWORDS.iter().any(|(_, known)| known == signature)
}

fn is_float(digits: &str) -> bool {
    let unsigned = digits.trim_start_matches(['+', '-']);
    ["inf", "infinity", "nan"].contains(&unsigned)
        || (!unsigned.starts_with("0x") && !unsigned.starts_with("0X") && digits.contains(['.', 'e', 'E']))
}

fn read_number(digits: &str, signature: &Signature) -> Option<Variant<'static>> {
    if *signature == Signature::F64 {
        return digits.parse::<f64>().ok().map(Variant::from);
    }
    let number = whole_number(digits)?;
    Some(match signature {
        Signature::U8 => u8::try_from(number).ok()?.into(),
        Signature::I16 => i16::try_from(number).ok()?.into(),
        Signature::U16 => u16::try_from(number).ok()?.into(),
        Signature::I32 => i32::try_from(number).ok()?.into(),
        Signature::U32 => u32::try_from(number).ok()?.into(),
        Signature::I64 => i64::try_from(number).ok()?.into(),
        Signature::U64 => u64::try_from(number).ok()?.into(),
        _ => return None,
    })
}

/// Decimal, `0x…` or octal with a leading 0.
fn whole_number(digits: &str) -> Option<i128> {
    let (negative, unsigned) = match digits.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, digits.strip_prefix('+').unwrap_or(digits)),
    };
    let (base, figures) = match unsigned.strip_prefix("0x").or_else(|| unsigned.strip_prefix("0X")) {
        Some(figures) => (16, figures),
        None if unsigned.len() > 1 && unsigned.starts_with('0') => (8, unsigned),
        None => (10, unsigned),
    };
    // `from_str_radix` would accept another sign.
    let sound = figures.chars().all(|c| c.is_digit(base));
    let number = i128::from(u64::from_str_radix(figures, base).ok().filter(|_| sound)?);
    Some(if negative { -number } else { number })
}

/// Why a word without quotes is no value.
fn no_value(word: &str, rest: &str) -> String {
    // What follows the word is a part of the string that somebody has written without quotes.
    let end = rest.find(|c: char| c.is_ascii_whitespace() || "'\"[](),".contains(c)).unwrap_or(rest.len());
    let word = format!("{word}{}", &rest[..end]);
    if word.starts_with("SIG") {
        return format!("{word} is not a value: write the number of the signal, such as 15 for SIGTERM");
    }
    format!(
        "{word} is not a value: a string needs quotes, '{word}'; a list of strings also needs brackets, ['{word}']"
    )
}

struct Reader<'t> {
    chars: Peekable<Chars<'t>>,
    at: usize,
    /// The number of values so far.
    nodes: usize,
}

impl Reader<'_> {
    fn peek(&mut self) -> Option<char> {
        self.chars.peek().copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.chars.next()?;
        self.at += 1;
        Some(c)
    }

    fn wrong(&self, reason: &str) -> InvalidText {
        InvalidText { at: self.at, reason: reason.to_owned() }
    }

    fn skip_space(&mut self) {
        while self.peek().is_some_and(|c| c.is_ascii_whitespace()) {
            self.next();
        }
    }

    fn value(&mut self, depth: usize) -> Result<Node, InvalidText> {
        self.skip_space();
        let at = self.at;
        let deeper = depth.checked_sub(1).ok_or_else(|| self.wrong("the value is nested too deeply"))?;
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(self.wrong("the value has too many elements"));
        }
        let what = match self.peek() {
            None => return Err(self.wrong("a value is missing")),
            Some('\'' | '"') => What::Text(self.text()?),
            Some('[') => What::Array(self.list(']', deeper)?),
            Some('(') => What::Tuple(self.list(')', deeper)?),
            Some('@') => {
                self.next();
                let word = self.take_while(|c| c.is_ascii_alphabetic() || ['(', ')', '{', '}'].contains(&c));
                let signature = Signature::try_from(word.as_str()).ok().filter(|_| !word.is_empty());
                let signature = signature
                    .ok_or_else(|| InvalidText { at, reason: format!("\"@{word}\" is not a type") })?;
                What::Typed(signature, Box::new(self.value(deeper)?))
            }
            Some(c) if c.is_ascii_digit() || ['+', '-', '.'].contains(&c) => {
                What::Number(self.take_while(|c| c.is_ascii_alphanumeric() || ['+', '-', '.'].contains(&c)))
            }
            Some(c) if c.is_ascii_alphabetic() => {
                let word = self.take_while(|c| c.is_ascii_alphanumeric());
                match word.as_str() {
                    "true" => What::Bool(true),
                    "false" => What::Bool(false),
                    "inf" | "nan" => What::Number(word),
                    _ => match KEYWORDS.iter().find(|(name, _)| *name == word) {
                        Some((_, signature)) => What::Typed(signature.clone(), Box::new(self.value(deeper)?)),
                        None => {
                            let rest: String = self.chars.by_ref().take(MAX_SHOWN).collect();
                            return Err(InvalidText { at, reason: no_value(&word, &rest) });
                        }
                    },
                }
            }
            Some(c) => return Err(self.wrong(&format!("a value can't begin with {c:?}"))),
        };
        Ok(Node { at, what })
    }

    fn take_while(&mut self, fits: impl Fn(char) -> bool) -> String {
        let mut word = String::new();
        while let Some(c) = self.peek().filter(|c| fits(*c)) {
            word.push(c);
            self.next();
        }
        word
    }

    fn list(&mut self, end: char, depth: usize) -> Result<Vec<Node>, InvalidText> {
        self.next();
        let mut values = Vec::new();
        loop {
            self.skip_space();
            // A tuple of one element is written as `(x,)`.
            if self.peek() == Some(end) && (values.is_empty() || end == ')') {
                self.next();
                return Ok(values);
            }
            values.push(self.value(depth)?);
            self.skip_space();
            match self.next() {
                Some(',') => {}
                Some(c) if c == end => return Ok(values),
                _ => {
                    return Err(self.wrong(&format!("\",\" or {:?} is missing before this", end.to_string())));
                }
            }
        }
    }

    fn text(&mut self) -> Result<String, InvalidText> {
        let quote = self.next();
        let mut text = String::new();
        loop {
            let c = self.next().ok_or_else(|| self.wrong("the closing quote is missing"))?;
            if Some(c) == quote {
                return Ok(text);
            }
            let c = if c == '\\' { self.escape()? } else { Some(c) };
            match c {
                Some('\0') => return Err(self.wrong("a string can't contain a NUL character")),
                Some(c) => text.push(c),
                None => {}
            }
        }
    }

    /// The character after a backslash, or `None` for a continued line.
    fn escape(&mut self) -> Result<Option<char>, InvalidText> {
        let c = self.next().ok_or_else(|| self.wrong("the closing quote is missing"))?;
        Ok(Some(match c {
            'a' => '\x07',
            'b' => '\x08',
            'f' => '\x0c',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'v' => '\x0b',
            'u' => self.code_point(4)?,
            'U' => self.code_point(8)?,
            '\n' => return Ok(None),
            other => other,
        }))
    }

    fn code_point(&mut self, digits: usize) -> Result<char, InvalidText> {
        let mut code = 0;
        for _ in 0..digits {
            let digit = self.next().and_then(|c| c.to_digit(16));
            code = code * 16 + digit.ok_or_else(|| self.wrong("a hexadecimal digit is missing"))?;
        }
        char::from_u32(code).ok_or_else(|| self.wrong("there is no such character"))
    }
}

#[cfg(test)]
mod tests;
