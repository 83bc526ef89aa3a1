//! JSON, laid out as QEMU lays it out.

use std::ffi::OsStr;
use std::fmt::{self, Write as _};

/// A value. The members of an object stay in the order they were given in.
#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(u64),
    /// Another number.
    Float(f64),
    /// A string.
    Text(String),
    /// An array.
    List(Vec<Json>),
    /// An object.
    Object(Vec<(&'static str, Json)>),
}

impl Json {
    /// A string.
    pub fn text(text: impl ToString) -> Json {
        Json::Text(text.to_string())
    }

    /// The very name of a file, or text from an image. What is not UTF-8 in it JSON cannot say: U+FFFD
    /// stands there.
    pub fn name(name: impl AsRef<OsStr>) -> Json {
        Json::Text(name.as_ref().to_string_lossy().into_owned())
    }

    /// With one member a line, four columns a level.
    pub fn pretty(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut text, 0);
        text
    }

    fn write(&self, to: &mut String, level: usize) -> fmt::Result {
        let inside = "    ".repeat(level + 1);
        let outside = "    ".repeat(level);
        match self {
            Json::Bool(value) => write!(to, "{value}"),
            Json::Int(value) => write!(to, "{value}"),
            Json::Float(value) => write!(to, "{value}"),
            Json::Text(text) => write_text(to, text),
            Json::List(items) => {
                to.push('[');
                for (i, item) in items.iter().enumerate() {
                    write!(to, "{}\n{inside}", if i > 0 { "," } else { "" })?;
                    item.write(to, level + 1)?;
                }
                write!(to, "\n{outside}]")
            }
            Json::Object(members) => {
                to.push('{');
                for (i, (key, value)) in members.iter().enumerate() {
                    write!(to, "{}\n{inside}", if i > 0 { "," } else { "" })?;
                    write_text(to, key)?;
                    to.push_str(": ");
                    value.write(to, level + 1)?;
                }
                write!(to, "\n{outside}}}")
            }
        }
    }
}

/// A string in plain ASCII.
fn write_text(to: &mut String, text: &str) -> fmt::Result {
    to.push('"');
    for c in text.chars() {
        match c {
            '"' => to.push_str("\\\""),
            '\\' => to.push_str("\\\\"),
            '\u{8}' => to.push_str("\\b"),
            '\u{c}' => to.push_str("\\f"),
            '\n' => to.push_str("\\n"),
            '\r' => to.push_str("\\r"),
            '\t' => to.push_str("\\t"),
            ' '..='~' => to.push(c),
            c => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(to, "\\u{unit:04X}")?;
                }
            }
        }
    }
    to.push('"');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_ones_take_two_lines_as_qemu_writes_them() {
        let value = Json::Object(vec![("a", Json::List(vec![])), ("b", Json::text("é\"\u{1}"))]);
        assert_eq!(value.pretty(), "{\n    \"a\": [\n    ],\n    \"b\": \"\\u00E9\\\"\\u0001\"\n}");
    }
}
