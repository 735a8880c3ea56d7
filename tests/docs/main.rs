//! The documents: the README and the book in `docs/`. Their links resolve, and their examples work.

mod book;
mod commands;
mod examples;
mod pages;
