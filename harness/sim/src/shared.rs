//! The one place where worlds share memory: what never changes once it was made.
#![expect(clippy::disallowed_types, reason = "millions of worlds share one plan")]

/// A value that several worlds look at.
pub type Shared<T> = std::rc::Rc<T>;
