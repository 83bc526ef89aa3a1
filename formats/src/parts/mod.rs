//! What several formats are made of. A part has no policy: the format says what is to happen.

pub mod access;
pub(crate) mod attempts;
pub mod backing;
pub(crate) mod changed;
pub(crate) mod claims;
pub mod cow;
pub(crate) mod entries;
pub mod growth;
pub(crate) mod in_place;
pub mod length;
pub(crate) mod name_place;
pub(crate) mod past_end;
pub(crate) mod pieces;
pub mod report;
pub(crate) mod units;
pub mod writeback;
