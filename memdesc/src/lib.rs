//! Memory that someone else owns, described.
