//! The handshake: what is answered to each option.

use crate::connection::{Connection, State, Style};
use crate::exports::{Export, named};
use crate::wire::{self, BASE_ALLOCATION, Reader, export, info, option, reply};

/// Zeros after the answer to EXPORT_NAME, for clients that want them.
const OLD_ZEROES: [u8; 124] = [0; 124];
/// The namespace of [`BASE_ALLOCATION`].
const BASE: &[u8] = b"base:";
/// Every size of request is taken.
const BLOCK_MIN: u32 = 1;

impl Connection {
    /// An option is there whole.
    pub(crate) fn option(&mut self, option: u32, data: &[u8]) {
        self.state = State::Option;
        match option {
            option::EXPORT_NAME => self.export_name(data),
            option::ABORT => {
                self.answer(option, reply::ACK, &[]);
                self.state = State::Ending;
            }
            option::LIST => self.list(data),
            option::INFO | option::GO => self.info(option, data),
            option::STRUCTURED_REPLY if !data.is_empty() => self.invalid(option),
            // With extended headers all replies are structured, and there is no way back.
            option::STRUCTURED_REPLY if self.style == Style::Extended => {
                self.answer(option, reply::ERR_EXT_HEADER_REQD, &[]);
            }
            option::STRUCTURED_REPLY => {
                self.style = Style::Structured;
                self.answer(option, reply::ACK, &[]);
            }
            option::EXTENDED_HEADERS if !data.is_empty() => self.invalid(option),
            option::EXTENDED_HEADERS => {
                self.style = Style::Extended;
                self.answer(option, reply::ACK, &[]);
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(option, data),
            // STARTTLS among them: see the crate.
            _ => self.answer(option, reply::ERR_UNSUP, &[]),
        }
    }

    pub(crate) fn answer(&mut self, option: u32, kind: u32, data: &[u8]) {
        self.out.put(&wire::option_reply(option, kind, data.len() as u32));
        self.out.put(data);
    }

    fn invalid(&mut self, option: u32) {
        self.answer(option, reply::ERR_INVALID, &[]);
    }

    fn export_name(&mut self, name: &[u8]) {
        let Some(number) = named(&self.exports, name) else {
            self.state = State::Broken("an export that is not there");
            return;
        };
        let (size, flags) = (self.exports[number].size, self.export_flags(number));
        self.out.put(&size.to_be_bytes());
        self.out.put(&flags.to_be_bytes());
        if !self.no_zeroes {
            self.out.put(&OLD_ZEROES);
        }
        self.begin(number);
    }

    fn begin(&mut self, number: usize) {
        self.export = Some(number);
        // Contexts of another export are of no use here.
        self.allocation = self.allocation.filter(|&other| other == number);
        self.state = State::Request;
    }

    /// `CAN_MULTI_CONN` is right: all connections to an export are one node of one engine. A write
    /// that was answered on any of them has finished there, and what has finished before a flush is
    /// submitted is stable when that has finished; and a read finds what any of them wrote.
    fn export_flags(&self, number: usize) -> u16 {
        let Export { read_only, .. } = self.exports[number];
        let all = export::HAS_FLAGS
            | export::SEND_FLUSH
            | export::SEND_FUA
            | export::SEND_CACHE
            | export::CAN_MULTI_CONN;
        let written = export::SEND_TRIM | export::SEND_WRITE_ZEROES | export::SEND_FAST_ZERO;
        let structured = if self.style == Style::Simple { 0 } else { export::SEND_DF };
        all | structured | if read_only { export::READ_ONLY } else { written }
    }

    fn list(&mut self, data: &[u8]) {
        if !data.is_empty() {
            return self.invalid(option::LIST);
        }
        for export in self.exports.clone().iter() {
            let mut entry = (export.name.len() as u32).to_be_bytes().to_vec();
            entry.extend_from_slice(export.name.as_bytes());
            self.answer(option::LIST, reply::SERVER, &entry);
        }
        self.answer(option::LIST, reply::ACK, &[]);
    }

    fn info(&mut self, option: u32, data: &[u8]) {
        let Some((name, asked)) = info_of(data) else { return self.invalid(option) };
        let Some(number) = named(&self.exports, name) else {
            return self.answer(option, reply::ERR_UNKNOWN, &[]);
        };
        let flags = self.export_flags(number);
        let exports = self.exports.clone();
        let Export { name, description, size, preferred, .. } = &exports[number];
        let mut tell = |what: u16, data: &[&[u8]]| {
            self.answer(
                option,
                reply::INFO,
                &[&what.to_be_bytes(), data.concat().as_slice()].concat(),
            );
        };
        tell(info::EXPORT, &[&size.to_be_bytes(), &flags.to_be_bytes()]);
        if asked.contains(&info::NAME) {
            tell(info::NAME, &[name.as_bytes()]);
        }
        if asked.contains(&info::DESCRIPTION) && !description.is_empty() {
            tell(info::DESCRIPTION, &[description.as_bytes()]);
        }
        if asked.contains(&info::BLOCK_SIZE) {
            let sizes = [BLOCK_MIN, *preferred, wire::PAYLOAD_MAX as u32];
            tell(info::BLOCK_SIZE, &[sizes.map(u32::to_be_bytes).as_flattened()]);
        }
        self.answer(option, reply::ACK, &[]);
        if option == option::GO {
            self.begin(number);
        }
    }

    fn contexts(&mut self, option: u32, data: &[u8]) {
        let is_set = option == option::SET_META_CONTEXT;
        if is_set {
            // Whatever becomes of this, what was set before is set no more.
            self.allocation = None;
        }
        let queries = contexts_of(data).filter(|_| self.style != Style::Simple);
        let Some((name, queries)) = queries else { return self.invalid(option) };
        let Some(number) = named(&self.exports, name) else {
            return self.answer(option, reply::ERR_UNKNOWN, &[]);
        };
        // To be told what there is one may ask for all, or for a namespace; what is set is named.
        let is_all = !is_set && queries.is_empty();
        let is_asked =
            |query: &&[u8]| *query == BASE_ALLOCATION.as_bytes() || !is_set && *query == BASE;
        if is_all || queries.iter().any(is_asked) {
            let id = if is_set { wire::ALLOCATION_ID } else { 0 };
            let data = [&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()].concat();
            self.answer(option, reply::META_CONTEXT, &data);
            if is_set {
                self.allocation = Some(number);
            }
        }
        self.answer(option, reply::ACK, &[]);
    }
}

/// The name and the things asked for in an INFO or GO.
fn info_of(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut data = Reader(data);
    let name = data.string()?;
    let count = data.u16()?;
    // No longer than the data is.
    let asked = (0..count).map(|_| data.u16()).collect::<Option<Vec<u16>>>()?;
    data.0.is_empty().then_some((name, asked))
}

/// The export and the queries in a question about contexts.
fn contexts_of(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut data = Reader(data);
    let name = data.string()?;
    let count = data.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(data.string()?);
    }
    data.0.is_empty().then_some((name, queries))
}
