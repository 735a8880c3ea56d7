//! What the program gets and what it does not: privileges, descriptors, identity, signals, the terminal, its own view of files;
//! and what its caller gets back. The tunnels here lead nowhere, and need not.
//!
//! - `privileges`: what it may do, and as whom.
//! - `view`: what it sees of files.
//! - `hidden`: what it does not see of the host, whatever the host does meanwhile.
//! - `terminal`: how it lives with one.
//! - `lent`: what its caller does not lend it.
//! - `service`: whom it names the main process of a service.
//! - `expects`: what it may expect to work.
//! - `gains`: programs that gain or change privileges.
//! - `ends`: its exit status, its signals, and what it leaves behind.

mod ends;
mod expects;
mod gains;
mod hidden;
mod lent;
mod privileges;
mod renewed;
mod service;
mod support;
mod terminal;
mod view;
