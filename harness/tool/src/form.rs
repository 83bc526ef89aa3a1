//! In which form it is drawn what happened.

use std::path::Path;

use cowbell_sim::page::to_html;
use cowbell_sim::perfetto::to_json;
use cowbell_sim::timeline::Timeline;

use crate::fail::Fail;
use crate::out::to_file;

/// How it is drawn: a file's name ends so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `.html`: a page.
    Page,
    /// `.json`: for Perfetto.
    Perfetto,
}

impl Form {
    /// That of a file with this name.
    pub fn of(path: &Path) -> Result<Form, Fail> {
        match path.extension().and_then(|end| end.to_str()) {
            Some("html") => Ok(Form::Page),
            Some("json") => Ok(Form::Perfetto),
            _ => Err(Fail::at(path, "is drawn as a page, .html, or for Perfetto, .json")),
        }
    }

    /// Draws it into the file at `path`.
    pub fn draw(self, line: &Timeline, path: &Path) -> Result<(), Fail> {
        let text = match self {
            Form::Page => to_html(line),
            Form::Perfetto => to_json(line),
        };
        to_file(path, text)
    }
}
