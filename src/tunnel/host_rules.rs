//! The host's rules for local networks: a table of its own that lets a tunnel's packets pass to these networks and
//! nowhere else. It exists only while the tunnel has local networks, like the forwarding that it limits
//! ([`super::forwarding`]).
//!
//! The rules come before forwarding is switched on, and go after it is switched off. So nothing is ever forwarded that
//! they would not let pass.

use std::io;

use super::forwarding;
use crate::failure::{Doing, Failure};
use crate::linux::nftables::{self, Nftables};
use crate::names::TunnelName;
use crate::plan::Plan;
use crate::registry::Mark;
use crate::ruleset::Table;

/// The host's rules for a tunnel's local networks.
#[derive(Debug, Default)]
pub(super) struct HostRules {
    /// A socket for the host's rules, opened at the first use.
    socket: Option<Nftables>,
    /// The table that was loaded.
    table: Option<Table>,
}

impl HostRules {
    /// Loads the rules of a plan and switches forwarding on, or removes both if the plan has no local networks.
    /// Whatever was loaded before is replaced if it carries the tunnel's mark.
    pub(super) fn open(&mut self, plan: &Plan, mark: &Mark) -> Result<(), Failure> {
        if plan.local.networks.is_empty() {
            return self.close(&plan.name, mark);
        }
        let switched_on = forwarding::reserve(&plan.name, &plan.local).doing("write down which interfaces forward")?;
        let Some(table) = plan.firewall.host_with(&switched_on) else { return Ok(()) };
        if !self.is_loaded(&table, mark)? {
            let what = format!("load the host's rules, the table {}", table.name);
            self.socket()?.replace(&table, mark.text()).doing(what).map_err(advise_on_kernel)?;
            self.table = Some(table);
        }
        forwarding::switch_on()
            .and_then(|()| match &plan.veth {
                Some(veth) => forwarding::switch_on_link(&veth.host_interface, &plan.local),
                None => Ok(()),
            })
            .doing("forward to the local networks")
    }

    /// Loads the rules again if some are gone: a program that flushes all rules of the host removes these, too.
    pub(super) fn repair(&mut self, plan: &Plan, mark: &Mark) -> Result<(), Failure> {
        let Some(table) = self.table.clone() else { return Ok(()) };
        if self.is_loaded(&table, mark)? {
            return Ok(());
        }
        tracing::info!("another program removed the host's rules for the local networks: loading them again");
        self.open(plan, mark)
    }

    /// Switches forwarding off and removes the rules, if they are loaded.
    pub(super) fn close(&mut self, name: &TunnelName, mark: &Mark) -> Result<(), Failure> {
        let switched_off = forwarding::release(name).doing("restore forwarding");
        let table = format!("vpn-exec-{name}");
        let socket = self.socket()?;
        let removed = match socket.comment(&table) {
            Ok(Some(comment)) if comment == mark.text() => socket.delete(&table),
            Ok(_) => Ok(()),
            Err(error) if nftables::is_missing(&error) => Ok(()),
            Err(error) => Err(error),
        };
        self.table = None;
        switched_off.and(removed.doing(format!("remove the table {table}")))
    }

    /// Returns whether this tunnel has loaded this table and all of its rules are present.
    fn is_loaded(&mut self, table: &Table, mark: &Mark) -> Result<bool, Failure> {
        let is_same = self.table.as_ref() == Some(table);
        let rules: usize = table.chains.iter().map(|chain| chain.rules.len()).sum();
        match self.socket()?.comment(&table.name) {
            Ok(Some(comment)) if comment == mark.text() => {
                // A flush can empty the table without removing it.
                Ok(is_same && self.socket()?.count_rules(&table.name).is_ok_and(|count| count == rules))
            }
            Ok(_) => Err(io::Error::from(io::ErrorKind::AlreadyExists))
                .doing(format!("load the host's rules, the table {}", table.name))
                .map_err(|failure| {
                    failure.advise(format!(
                        "another program created this table: choose another name for the tunnel, or remove the table \
                         with `nft delete table inet {}`",
                        table.name
                    ))
                }),
            Err(error) if nftables::is_missing(&error) => Ok(false),
            Err(error) => Err(error).doing("read the host's rules"),
        }
    }

    fn socket(&mut self) -> Result<&mut Nftables, Failure> {
        let opened = match self.socket.take() {
            Some(socket) => socket,
            None => Nftables::open().doing("open a socket for nftables").map_err(advise_on_kernel)?,
        };
        Ok(self.socket.insert(opened))
    }
}

/// Adds advice to a failure to load rules, if the kernel lacks a part of nf_tables.
pub(super) fn advise_on_kernel(failure: Failure) -> Failure {
    if !failure.errno.is_some_and(|errno| nftables::is_missing(&io::Error::from_raw_os_error(errno))) {
        return failure;
    }
    failure.advise(
        "this kernel lacks nf_tables or a part of it: load the modules nf_tables, nft_ct, nft_reject_inet, nft_masq \
         (every distribution has them)",
    )
}
