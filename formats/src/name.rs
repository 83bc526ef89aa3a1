//! Names of images that say more than a path: `file:PATH`, `json:{...}`, lists of options, and the
//! addresses of disks that servers have (`nbd:...`, or options with the driver `nbd`).
//!
//! These are what QEMU's programs take on their command lines, and what they write into images as
//! names of backing files. One way through: each form becomes a list of options with dotted keys
//! (`file.filename`), and the list is taken apart. An option that would change what the disk holds and
//! that nobody here follows is refused by its name, never left out.
//!
//! Parsing is total and opens nothing. A name from an image is followed only where the caller
//! trusts it, see [`Policy`](crate::chain::Policy).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use cowbell_engine::sys::lock::Locking;

use crate::chain::{DEPTH_MAX, OpenOptions, driver_named};
use crate::error::{Error, Shown};
use crate::probe::Format;

/// Objects and lists in each other, in `json:{...}`.
const NESTED_MAX: usize = 64;

/// An image, named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// The image's own file; or an address, see [`is_remote`].
    pub path: PathBuf,
    /// Its format; `None`: nobody said.
    pub format: Option<Format>,
    /// What it is backed by.
    pub backing: Backing,
    /// It may not be written.
    pub read_only: bool,
    /// Others may write it meanwhile.
    pub force_share: bool,
    /// Whether to lock its file; `None`: nobody said.
    pub locking: Option<Locking>,
}

/// What a named image is backed by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// What the image itself says.
    AsImageSays,
    /// Nothing, whatever the image says.
    Nothing,
    /// This, whatever the image says.
    Named(Box<Name>),
}

impl Name {
    /// A plain path.
    pub fn plain(path: impl Into<PathBuf>, format: Option<Format>) -> Name {
        Name {
            path: path.into(),
            format,
            backing: Backing::AsImageSays,
            read_only: false,
            force_share: false,
            locking: None,
        }
    }

    /// The options with what the name says of locks. Who asked for none gets none.
    pub fn locking(&self, options: &OpenOptions) -> OpenOptions {
        let locking = self.locking.filter(|_| options.locking != Locking::Off);
        OpenOptions {
            locking: locking.unwrap_or(options.locking),
            force_share: options.force_share || self.force_share,
            ..options.clone()
        }
    }

    /// A path, `file:PATH`, `json:{...}` or the address of a server's disk, which is only told from
    /// a path here: it is the host's to understand. What has a colon before its first slash is no
    /// path: `./a:b` is.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for another protocol, driver or option, by its name;
    /// [`Error::Invalid`] for what is no JSON, or names no file.
    pub fn parse(text: &OsStr) -> Result<Name, Error> {
        let bytes = text.as_bytes();
        let path = match protocol(text) {
            None => text,
            Some(b"file") => OsStr::from_bytes(&bytes["file:".len()..]),
            Some(b"json") => return json(&bytes["json:".len()..])?.name(),
            Some(remote) if REMOTE.contains(&remote) => {
                return Ok(Name::plain(not_nul(text)?, None));
            }
            Some(other) => return Err(unknown_protocol(OsStr::from_bytes(other))),
        };
        Ok(Name::plain(checked(path)?, None))
    }

    /// A list of options, as `driver=qcow2,file.filename=PATH`; a comma in a value is doubled.
    ///
    /// # Errors
    ///
    /// As [`parse`](Self::parse).
    pub fn from_options(text: &OsStr) -> Result<Name, Error> {
        let mut options = Options::default();
        for item in split_at_commas(text.as_bytes()) {
            let at = item.iter().position(|&byte| byte == b'=');
            // A first item without a key is the name of a node.
            let (key, value) = match at {
                Some(at) => (String::from_utf8_lossy(&item[..at]).into_owned(), &item[at + 1..]),
                None if options.0.is_empty() => ("file".into(), &item[..]),
                None => (String::from_utf8_lossy(&item).into_owned(), &b"on"[..]),
            };
            options.0.retain(|(known, _)| *known != key);
            options.0.push((key, Some(OsString::from_vec(value.to_vec()))));
        }
        options.name()
    }
}

/// The protocol that a name starts with, if it does: what is before a colon with no slash before it.
pub fn protocol(name: &OsStr) -> Option<&[u8]> {
    let bytes = name.as_bytes();
    let at = bytes.iter().position(|byte| b":/".contains(byte))?;
    (bytes[at] == b':').then_some(&bytes[..at])
}

/// The protocols of servers that have disks. Not every [`Host`](crate::Host) reaches them.
const REMOTE: [&[u8]; 2] = [b"nbd", b"nbd+unix"];

/// Is that the address of a disk that a server has, and no path of a file? A file can be named so
/// that it is none: [`as_local`].
pub fn is_remote(path: &Path) -> bool {
    protocol(path.as_os_str()).is_some_and(|protocol| REMOTE.contains(&protocol))
}

/// The path of a file as one that is a path wherever it is named again: with `./` before a name that
/// would be taken for more.
pub fn as_local(path: PathBuf) -> PathBuf {
    if protocol(path.as_os_str()).is_some() { Path::new(".").join(path) } else { path }
}

/// `text` as the path of a file.
fn checked(text: &OsStr) -> Result<PathBuf, Error> {
    if text.is_empty() {
        return Err(Error::Invalid("The 'file' block driver requires a file name".into()));
    }
    Ok(as_local(not_nul(text)?))
}

fn not_nul(text: &OsStr) -> Result<PathBuf, Error> {
    if text.as_bytes().contains(&0) {
        return Err(Error::Invalid("a file name cannot have a NUL byte in it".into()));
    }
    Ok(text.into())
}

fn unknown_protocol(name: &OsStr) -> Error {
    Error::Unsupported(format!("Unknown protocol '{}'", Shown(Path::new(name))))
}

/// As a part of an address: any byte that is more than a letter, a digit or harmless is `%` and two digits.
fn escaped_in_uri(text: &OsStr) -> String {
    let mut escaped = String::new();
    for &byte in text.as_bytes() {
        match byte {
            _ if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) => {
                escaped.push(byte.into());
            }
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

/// Items between single commas; two commas are one within an item.
fn split_at_commas(text: &[u8]) -> Vec<Vec<u8>> {
    let mut items = Vec::new();
    let mut item = Vec::new();
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b',' if bytes.next_if_eq(&b',').is_some() => item.push(b','),
            b',' => items.push(std::mem::take(&mut item)),
            byte => item.push(byte),
        }
    }
    items.push(item);
    items.retain(|item| !item.is_empty());
    items
}

/// Options by their dotted keys; `None` is JSON's `null`.
#[derive(Debug, Default)]
struct Options(Vec<(String, Option<OsString>)>);

impl Options {
    fn take(&mut self, key: &str) -> Option<Option<OsString>> {
        let at = self.0.iter().position(|(known, _)| known == key)?;
        Some(self.0.remove(at).1)
    }

    fn take_text(&mut self, key: &str) -> Result<Option<OsString>, Error> {
        match self.take(key) {
            None => Ok(None),
            Some(Some(text)) => Ok(Some(text)),
            Some(None) => Err(invalid_value(key, "null")),
        }
    }

    /// An option of a few values; `None` if it is not there.
    fn take_one_of(&mut self, key: &str, values: &[&str]) -> Result<Option<String>, Error> {
        let Some(text) = self.take_text(key)? else { return Ok(None) };
        let text = Shown(Path::new(&text)).to_string();
        if values.contains(&&*text) { Ok(Some(text)) } else { Err(invalid_value(key, &text)) }
    }

    fn has_below(&self, prefix: &str) -> bool {
        self.0.iter().any(|(key, _)| key.starts_with(prefix))
    }

    /// All of them as one name.
    fn name(mut self) -> Result<Name, Error> {
        self.node("", 0)
    }

    /// The image whose options start with `prefix`. Takes those that it follows, refuses the others.
    fn node(&mut self, prefix: &str, depth: usize) -> Result<Name, Error> {
        if depth >= DEPTH_MAX {
            return Err(Error::Limit(format!("more than {DEPTH_MAX} images in one name")));
        }
        let key = |key: &str| format!("{prefix}{key}");
        let driver = self.take_text(&key("driver"))?;
        let driver = driver.map(|driver| driver.to_string_lossy().into_owned());
        let Common { read_only, force_share } = self.common(prefix)?;
        if let Some(driver @ ("file" | "host_device" | "nbd")) = driver.as_deref() {
            let (path, locking) = self.place(prefix, driver)?;
            let name = Name::plain(path, Some(Format::Raw));
            return Ok(Name { read_only, force_share, locking, ..name });
        }
        let format = driver.as_deref().map(driver_named).transpose()?;
        if let Some(node) = self.take_text(&key("file"))? {
            return Err(no_such_node(&node));
        }
        let below = key("file.");
        if !self.has_below(&below) {
            let what = match &driver {
                Some(_) => "A block device must be specified for \"file\"",
                None => "Must specify either driver or file",
            };
            return Err(Error::Invalid(what.into()));
        }
        let protocol = self.take_text(&key("file.driver"))?.unwrap_or_else(|| "file".into());
        if !["file", "host_device", "nbd"].contains(&&*protocol.to_string_lossy()) {
            return Err(unknown_protocol(&protocol));
        }
        let file = self.common(&below)?;
        let read_only = file.read_only || read_only;
        let force_share = file.force_share || force_share;
        let (path, locking) = self.place(&below, &protocol.to_string_lossy())?;
        let backing = match self.take(&key("backing")) {
            Some(Some(node)) if !node.is_empty() => return Err(no_such_node(&node)),
            Some(_) => Backing::Nothing,
            None if self.has_below(&key("backing.")) => {
                Backing::Named(Box::new(self.node(&key("backing."), depth + 1)?))
            }
            None => Backing::AsImageSays,
        };
        if let Some((option, _)) = self.0.iter().find(|(option, _)| option.starts_with(prefix)) {
            let option = Shown(Path::new(&option[prefix.len()..])).to_string();
            return Err(Error::Unsupported(match driver {
                Some(driver) => {
                    format!("Block format '{driver}' does not support the option '{option}'")
                }
                None => format!("Block format is not said, and has no option '{option}'"),
            }));
        }
        Ok(Name { path, format, backing, read_only, force_share, locking })
    }

    /// The file or the server's disk whose options start with `prefix`, with nothing left of them; and whether
    /// to lock it.
    fn place(&mut self, prefix: &str, driver: &str) -> Result<(PathBuf, Option<Locking>), Error> {
        let place = match driver {
            "nbd" => (self.address(prefix)?, None),
            _ => self.file(prefix)?,
        };
        match self.0.iter().find(|(option, _)| option.starts_with(prefix)) {
            None => Ok(place),
            Some((option, _)) => {
                let option = Shown(Path::new(&option[prefix.len()..])).to_string();
                let what =
                    format!("Block protocol '{driver}' doesn't support the option '{option}'");
                Err(Error::Unsupported(what))
            }
        }
    }

    /// A server's disk, as an address.
    fn address(&mut self, prefix: &str) -> Result<PathBuf, Error> {
        let export = self.take_text(&format!("{prefix}export"))?.unwrap_or_default();
        let kind = self.take_one_of(&format!("{prefix}server.type"), &["inet", "unix"])?;
        // The server's own options, or those of the first days, which have no type.
        let server = format!("{prefix}server.");
        let prefix = if kind.is_some() || self.has_below(&server) { &server } else { prefix };
        let mut take = |key: &str| self.take_text(&format!("{prefix}{key}"));
        let (path, host, port) = (take("path")?, take("host")?, take("port")?);
        let missing = |key: &str| Error::Invalid(format!("Parameter '{key}' is missing"));
        let export = escaped_in_uri(&export);
        match (kind.as_deref(), path, host) {
            (None, ..) if prefix == server => Err(missing("type")),
            (Some("unix"), None, _) => Err(missing("path")),
            (Some("inet"), _, None) => Err(missing("host")),
            (Some("inet"), None, _) if port.is_none() => Err(missing("port")),
            (None | Some("unix"), Some(path), None) if port.is_none() => {
                Ok(format!("nbd+unix:///{export}?socket={}", escaped_in_uri(&path)).into())
            }
            (None | Some("inet"), None, Some(host)) => {
                let port = port.unwrap_or_else(|| "10809".into()).to_string_lossy().into_owned();
                let host = host.to_string_lossy().into_owned();
                let is_host = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
                if host.is_empty() || !host.chars().all(is_host) {
                    return Err(invalid_value("host", &host));
                }
                if port.parse::<u16>().is_err() {
                    return Err(invalid_value("port", &port));
                }
                let host = if host.contains(':') { format!("[{host}]") } else { host };
                Ok(format!("nbd://{host}:{port}/{export}").into())
            }
            (None, None, None) => Err(Error::Invalid("NBD server address missing".into())),
            _ => Err(Error::Invalid("an NBD server has a path, or a host and a port".into())),
        }
    }

    /// The file whose options start with `prefix`; and whether to lock it.
    fn file(&mut self, prefix: &str) -> Result<(PathBuf, Option<Locking>), Error> {
        let name = self.take_text(&format!("{prefix}filename"))?.unwrap_or_default();
        let path = checked(&name)?;
        let locking = self.take_one_of(&format!("{prefix}locking"), &["auto", "on", "off"])?;
        let locking = locking.map(|how| match &*how {
            "on" => Locking::On,
            "off" => Locking::Off,
            _ => Locking::Auto,
        });
        self.take_one_of(&format!("{prefix}aio"), &["threads"])?;
        Ok((path, locking))
    }

    /// What every node has: names that nothing refers to, hints, values that change nothing; and who
    /// may write it.
    fn common(&mut self, prefix: &str) -> Result<Common, Error> {
        const SWITCH: &[&str] = &["on", "off"];
        let key = |key: &str| format!("{prefix}{key}");
        self.take_text(&key("node-name"))?;
        self.take_one_of(&key("auto-read-only"), SWITCH)?;
        self.take_one_of(&key("discard"), &["unmap", "on", "ignore", "off"])?;
        for key in ["cache.direct", "cache.no-flush", "detect-zeroes"].map(key) {
            self.take_one_of(&key, &["off"])?;
        }
        let mut is_on = |option: &str| {
            let value = self.take_one_of(&key(option), SWITCH)?;
            Ok::<_, Error>(value.as_deref() == Some("on"))
        };
        Ok(Common { read_only: is_on("read-only")?, force_share: is_on("force-share")? })
    }
}

/// Who may write a node.
struct Common {
    /// We may not.
    read_only: bool,
    /// Others may, meanwhile.
    force_share: bool,
}

fn invalid_value(key: &str, value: &str) -> Error {
    let key = Shown(Path::new(key));
    Error::Unsupported(format!("option '{key}' does not support the value '{value}'"))
}

fn no_such_node(name: &OsStr) -> Error {
    let name = Shown(Path::new(name));
    Error::Invalid(format!("Cannot find device='{name}' nor node-name='{name}'"))
}

/// The options in a JSON object, nested ones with dotted keys.
fn json(bytes: &[u8]) -> Result<Options, Error> {
    let bad = |what: &str| Error::Invalid(format!("Could not parse the JSON options: {what}"));
    let text = std::str::from_utf8(bytes).map_err(|_| bad("it is not UTF-8"))?;
    let mut parser = Json { rest: text, options: Options::default() };
    parser.space();
    if !parser.rest.starts_with('{') {
        return Err(Error::Invalid("Invalid JSON object given".into()));
    }
    parser.value("", 0).map_err(bad)?;
    parser.space();
    if !parser.rest.is_empty() {
        return Err(bad("Expecting at most one JSON value"));
    }
    Ok(parser.options)
}

struct Json<'a> {
    rest: &'a str,
    options: Options,
}

impl<'a> Json<'a> {
    fn space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
    }

    /// Is `what` next? Then it is passed over.
    fn is_next(&mut self, what: char) -> bool {
        self.space();
        let rest = self.rest.strip_prefix(what);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn expect(&mut self, what: char) -> Result<(), &'static str> {
        if self.is_next(what) { Ok(()) } else { Err("a bracket, comma or colon is missing") }
    }

    /// A value, for the option `key`.
    fn value(&mut self, key: &str, depth: usize) -> Result<(), &'static str> {
        if depth > NESTED_MAX {
            return Err("it is nested too deep");
        }
        let below = |name: &str| match key {
            "" => name.to_string(),
            key => format!("{key}.{name}"),
        };
        self.space();
        let value = match self.rest.chars().next() {
            Some('{') => {
                self.expect('{')?;
                let mut first = true;
                while !self.is_next('}') {
                    if !std::mem::take(&mut first) {
                        self.expect(',')?;
                    }
                    let name = self.text()?;
                    self.expect(':')?;
                    self.value(&below(&name), depth + 1)?;
                }
                return Ok(());
            }
            Some('[') => {
                self.expect('[')?;
                let mut count = 0;
                while !self.is_next(']') {
                    if count > 0 {
                        self.expect(',')?;
                    }
                    self.value(&below(&count.to_string()), depth + 1)?;
                    count += 1;
                }
                return Ok(());
            }
            Some('"' | '\'') => Some(self.text()?),
            _ => {
                let is_end = |c: char| !c.is_ascii_alphanumeric() && !"+-.".contains(c);
                let (word, rest) =
                    self.rest.split_at(self.rest.find(is_end).unwrap_or(self.rest.len()));
                self.rest = rest;
                match word {
                    "null" => None,
                    "true" => Some("on".into()),
                    "false" => Some("off".into()),
                    word if word.parse::<f64>().is_ok_and(f64::is_finite) => Some(word.into()),
                    _ => return Err("there is a word that is no value"),
                }
            }
        };
        if self.options.0.iter().any(|(known, _)| known == key) {
            return Err("an option is said twice");
        }
        self.options.0.push((key.to_string(), value.map(OsString::from)));
        Ok(())
    }

    /// A string, in quotes of either kind.
    fn text(&mut self) -> Result<String, &'static str> {
        self.space();
        let mut chars = self.rest.chars();
        let quote = chars.next().filter(|quote| ['"', '\''].contains(quote));
        let quote = quote.ok_or("a string is missing")?;
        let mut text = String::new();
        loop {
            match chars.next().ok_or("a string has no end")? {
                c if c == quote => break,
                '\\' => text.push(escaped(&mut chars)?),
                c if c.is_control() => return Err("a control character is in a string"),
                c => text.push(c),
            }
        }
        self.rest = chars.as_str();
        Ok(text)
    }
}

/// The character that an escape stands for.
fn escaped(chars: &mut std::str::Chars<'_>) -> Result<char, &'static str> {
    const BAD: &str = "a string has an invalid escape";
    fn unit(chars: &mut std::str::Chars<'_>) -> Result<u16, &'static str> {
        let digits = chars.as_str().get(..4).ok_or(BAD)?;
        if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(BAD);
        }
        *chars = chars.as_str()[4..].chars();
        u16::from_str_radix(digits, 16).map_err(|_| BAD)
    }
    Ok(match chars.next().ok_or(BAD)? {
        c @ ('"' | '\'' | '\\' | '/') => c,
        'b' => '\u{8}',
        'f' => '\u{c}',
        'n' => '\n',
        'r' => '\r',
        't' => '\t',
        'u' => {
            let mut units = vec![unit(chars)?];
            if (0xd800..0xdc00).contains(&units[0]) && chars.as_str().starts_with("\\u") {
                *chars = chars.as_str()[2..].chars();
                units.push(unit(chars)?);
            }
            let mut decoded = char::decode_utf16(units);
            match (decoded.next(), decoded.next()) {
                (Some(Ok(c)), None) if c != '\0' => c,
                _ => return Err(BAD),
            }
        }
        _ => return Err(BAD),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use quickcheck::quickcheck;

    fn parse(text: &str) -> Result<Name, String> {
        Name::parse(text.as_ref()).map_err(|why| why.to_string())
    }

    fn options(text: &str) -> Result<Name, String> {
        Name::from_options(text.as_ref()).map_err(|why| why.to_string())
    }

    #[test]
    fn a_path_is_itself_and_may_be_marked_as_one() {
        for (text, path) in [
            ("a", "a"),
            ("./a:b", "./a:b"),
            ("/x:y/z", "/x:y/z"),
            ("file:a:b", "./a:b"),
            ("-x", "-x"),
        ] {
            assert_eq!(parse(text), Ok(Name::plain(path, None)), "{text}");
        }
        assert_eq!(parse("a:b"), Err("Unknown protocol 'a'".into()));
        assert_eq!(parse("nbds://host/x"), Err("Unknown protocol 'nbds'".into()));
        for empty in ["", "file:"] {
            assert_eq!(parse(empty), Err("The 'file' block driver requires a file name".into()));
        }
        let bytes = OsStr::from_bytes(b"file:\xff\n\"");
        let path = Name::parse(bytes).expect("any byte may be in a name").path;
        assert_eq!(path.as_os_str().as_bytes(), b"\xff\n\"");
    }

    #[test]
    fn an_address_is_one_only_where_a_name_begins_with_it() {
        for address in ["nbd://host/x", "nbd+unix:///x?socket=s", "nbd:unix:s:exportname=x"] {
            let name = parse(address).expect("an address");
            assert!(name == Name::plain(address, None) && is_remote(&name.path), "{address}");
            for file in [
                parse(&format!("file:{address}")),
                options(&format!("file.filename={address}")),
                options(&format!("driver=file,filename={address}")),
                parse(&format!("./{address}")),
                parse(&format!("/{address}")),
            ] {
                assert!(!is_remote(&file.expect("a path").path), "{address}");
            }
        }
        assert!(parse("nbd:a\0").is_err());
    }

    #[test]
    fn options_nest_or_have_dots() {
        let qcow2 = Name::plain("p,q", Some(Format::Qcow2));
        for text in [
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"p,q"}}"#,
            r#"json: { "file.filename" : "p\u002cq" , "driver" : "qcow2" } "#,
            r#"json:{'driver':'qcow2','file':{'filename':'p,q'},"node-name":"x"}"#,
        ] {
            assert_eq!(parse(text), Ok(qcow2.clone()), "{text}");
        }
        assert_eq!(options("driver=qcow2,file.filename=p,,q"), Ok(qcow2.clone()));
        assert_eq!(options("file.filename=no,driver=qcow2,file.filename=p,,q"), Ok(qcow2));
        assert_eq!(options("file.filename=a:b"), Ok(Name::plain("./a:b", None)));
        assert_eq!(options("driver=file,filename=a"), Ok(Name::plain("a", Some(Format::Raw))));
        let named = parse(
            r#"json:{"driver":"qcow2","read-only":true,"file.filename":"a","backing":
                {"driver":"raw","file":{"filename":"\ud83d\ude00"}}}"#,
        )
        .expect("legal");
        assert!(named.read_only);
        let below = Name::plain("\u{1f600}", Some(Format::Raw));
        assert_eq!(named.backing, Backing::Named(Box::new(below)));
        let none = parse(r#"json:{"file.filename":"a","backing":null}"#).expect("legal");
        assert_eq!(none.backing, Backing::Nothing);
    }

    #[test]
    fn a_servers_disk_is_an_address() {
        let unix = "nbd+unix:///a%20b/c?socket=/x%3F";
        for (text, address) in [
            (r#"{"driver":"nbd","server":{"type":"unix","path":"/x?"},"export":"a b/c"}"#, unix),
            (r#"{"driver":"nbd","path":"/x?","export":"a b/c"}"#, unix),
            (
                r#"{"driver":"nbd","server":{"type":"inet","host":"::1","port":7}}"#,
                "nbd://[::1]:7/",
            ),
            (r#"{"driver":"nbd","host":"h.x","export":"e"}"#, "nbd://h.x:10809/e"),
        ] {
            let raw = Name::plain(address, Some(Format::Raw));
            assert_eq!(parse(&format!("json:{text}")), Ok(raw.clone()), "{text}");
            assert!(is_remote(&raw.path));
            let below = format!("json:{{\"driver\":\"qcow2\",\"file\":{text}}}");
            assert_eq!(parse(&below), Ok(Name::plain(address, Some(Format::Qcow2))), "{text}");
        }
        let text = "driver=qcow2,file.driver=nbd,file.server.type=unix,file.server.path=s,,1,\
                    file.export=d,read-only=on,backing.driver=nbd,backing.host=h";
        let named = options(text).expect("legal");
        assert_eq!(named.path, Path::new("nbd+unix:///d?socket=s%2C1"));
        let below = Name::plain("nbd://h:10809/", Some(Format::Raw));
        assert_eq!((named.read_only, named.backing), (true, Backing::Named(Box::new(below))));
    }

    #[test]
    fn what_is_not_followed_is_refused_by_name() {
        for (text, why) in [
            (r#"{"driver":"qcow2","file.filename":"a","foo":1}"#, "option 'foo'"),
            (r#"{"driver":"qcow2","file.filename":"a","file.foo":"1"}"#, "option 'foo'"),
            (r#"{"driver":"raw","offset":512,"file.filename":"a"}"#, "option 'offset'"),
            (r#"{"driver":"qcow2","file.filename":"a","encrypt.key-secret":"s"}"#, "encrypt.key"),
            (r#"{"driver":"qcow2","file.filename":"a","data-file.filename":"b"}"#, "data-file."),
            (r#"{"driver":"foo","file.filename":"a"}"#, "Unknown driver 'foo'"),
            (r#"{"driver":"vhdx","file.filename":"a"}"#, "VHDX images are not supported"),
            (r#"{"file":{"driver":"ssh","host":"a"}}"#, "Unknown protocol 'ssh'"),
            (r#"{"driver":"nbd","export":"a"}"#, "NBD server address missing"),
            (r#"{"driver":"nbd","filename":"nbd://h/"}"#, "NBD server address missing"),
            (r#"{"driver":"nbd","host":"h","filename":"a"}"#, "'nbd' doesn't support the option"),
            (r#"{"driver":"nbd","host":"h","tls-creds":"a"}"#, "the option 'tls-creds'"),
            (r#"{"driver":"nbd","server.path":"a"}"#, "'type' is missing"),
            (r#"{"driver":"nbd","server":{"type":"inet","host":"h"}}"#, "'port' is missing"),
            (r#"{"driver":"nbd","server":{"type":"inet","port":"1"}}"#, "'host' is missing"),
            (r#"{"driver":"nbd","server":{"type":"unix","host":"h"}}"#, "'path' is missing"),
            (r#"{"driver":"nbd","server":{"type":"vsock","cid":"1"}}"#, "the value 'vsock'"),
            (r#"{"driver":"nbd","server":{"type":"unix","path":"a","port":"1"}}"#, "or a host"),
            (r#"{"driver":"nbd","path":"a","host":"h"}"#, "a path, or a host"),
            (r#"{"driver":"nbd","host":"h/x"}"#, "the value 'h/x'"),
            (r#"{"driver":"nbd","host":"h","port":"65536"}"#, "the value '65536'"),
            (r#"{"driver":"nbd","host":"h","path2":"1"}"#, "the option 'path2'"),
            (r#"{"driver":"nbd","server":{"type":"unix","path":"a"},"host":"b"}"#, "option 'host'"),
            (r#"{"driver":"qcow2"}"#, "A block device must be specified for \"file\""),
            (r#"{"filename":"a"}"#, "Must specify either driver or file"),
            (r#"{"driver":"qcow2","file":"a"}"#, "node-name='a'"),
            (r#"{"file.filename":"a","cache.direct":true}"#, "'cache.direct' does not support"),
            (r#"{"file.filename":"a","file":{"filename":"b"}}"#, "said twice"),
            (r#"{"file.filename":"a\u0000"}"#, "escape"),
            (r#"{"file.filename":"\ud83d"}"#, "escape"),
            (r#"{"file.filename":""}"#, "requires a file name"),
            (r#"{"file.filename":"a"} x"#, "Expecting at most one JSON value"),
            (r#"{"file.filename":"a",}"#, "a string is missing"),
            (r#"{"file.filename":"a""#, "missing"),
            ("{bad", "a string is missing"),
            ("[]", "Invalid JSON object given"),
        ] {
            let error = parse(&format!("json:{text}")).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
        assert!(options("p.qcow2").expect_err("a node's name").contains("node-name='p.qcow2'"));
        assert!(options("filename=a").expect_err("no driver").contains("either driver or file"));
    }

    #[test]
    fn no_name_is_too_deep() {
        let deep = format!("json:{}", "{\"a\":".repeat(100_000));
        assert!(parse(&deep).expect_err("too deep").contains("nested too deep"));
        let long = format!("{}x=1,file.filename=a", "backing.".repeat(10_000));
        options(&long).expect_err("too many images");
    }

    quickcheck! {
        fn any_bytes_are_a_name_or_are_refused(bytes: Vec<u8>) -> bool {
            let nbd = "json:{\"driver\":\"nbd\",\"host\":";
            for start in ["", "json:", "json:{\"file.filename\":", "file:", nbd] {
                let text = [start.as_bytes(), &bytes].concat();
                let _ = Name::parse(OsStr::from_bytes(&text));
                let _ = Name::from_options(OsStr::from_bytes(&text));
            }
            true
        }
    }
}
