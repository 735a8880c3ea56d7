//! The documents: the README and the book in `docs/`. Their links resolve, and their examples work.

mod benchmarks;
mod book;
mod commands;
mod deploy;
mod examples;
mod pages;
