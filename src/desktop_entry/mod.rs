//! Desktop entries, by which menus start programs ([Desktop Entry
//! Specification](https://specifications.freedesktop.org/desktop-entry-spec/latest/)), and those that start a program
//! in a tunnel.
//!
//! - `exec`: the words of a command line. `entry`: the text of an entry, and the one that starts its program inside.
//! - `installed`: where entries are, and which one a word stands for. `profile`: programs that need a profile of their
//!   own.

mod entry;
mod exec;
mod installed;
mod profile;
#[cfg(test)]
mod tests;

pub(crate) use entry::{Confined, Entry};
pub(crate) use installed::{DataFolders, NotFound, find, read};
