//! What several formats are made of. A part has no policy: the format says what is to happen.

pub(crate) mod attempts;
pub(crate) mod claims;
pub(crate) mod cow;
pub mod growth;
pub(crate) mod past_end;
