//! The environment of a program in a tunnel: privileges, identity, descriptors, signals, terminal and files. The
//! tunnels here have no peer that answers, and need none.
//!
//! - `privileges`: capabilities and identity.
//! - `view`: files, working directory and umask.
//! - `hidden`: files of the host that stay hidden.
//! - `renewed`: files of the host that appear, change and vanish meanwhile.
//! - `shared`: the view of files that the programs of a tunnel share.
//! - `terminal`: keys, signals and job control.
//! - `lent`: resources of the caller that it cannot use.
//! - `service`: the main process of a systemd service.
//! - `expects`: facilities that programs expect.
//! - `gains`: programs that gain or change privileges.
//! - `ends`: exit status, signals and orphans.
//! - `children`: waiting for orphans, as PID 1 of a container must.

mod children;
mod ends;
mod expects;
mod gains;
mod hidden;
mod lent;
mod privileges;
mod renewed;
mod service;
mod shared;
mod support;
mod terminal;
mod view;
