//! The host's part in reaching local networks: a table of rules of its own, which lets a tunnel's packets go there and nowhere else, and
//! forwarding. Both are there only while a tunnel has local networks.
//!
//! The rules come before forwarding, and go after it: at no instant is anything forwarded that they do not let pass.

use std::io;

use super::forwarding;
use crate::failure::{Doing, Failure};
use crate::linux::nftables::{self, Nftables};
use crate::names::TunnelName;
use crate::plan::Plan;
use crate::registry::Mark;
use crate::ruleset::Table;

/// What the host does for a tunnel's local networks.
#[derive(Debug, Default)]
pub(super) struct HostPart {
    /// A socket for the host's rules, once these were looked at.
    rules: Option<Nftables>,
    /// What was loaded.
    table: Option<Table>,
}

impl HostPart {
    /// Makes it what a plan and the host's own forwarding say, whatever it was before, as long as it is this tunnel's.
    pub(super) fn open(&mut self, plan: &Plan, mark: &Mark) -> Result<(), Failure> {
        if plan.local.networks.is_empty() {
            return self.close(&plan.name, mark);
        }
        let closed = forwarding::reserve(&plan.name, &plan.local).doing("write down what is to forward")?;
        let Some(table) = plan.firewall.host_with(&closed) else { return Ok(()) };
        if !self.is_loaded(&table, mark)? {
            let what = format!("load the host's rules, the table {}", table.name);
            self.rules()?.replace(&table, mark.text()).doing(what).map_err(lacking)?;
            self.table = Some(table);
        }
        forwarding::switch_on()
            .and_then(|()| forwarding::switch_on_link(&plan.veth.host_interface, &plan.local))
            .doing("forward to the local networks")
    }

    /// Makes it again if rules of it are gone: whoever flushes all rules of the host takes these along.
    pub(super) fn mend(&mut self, plan: &Plan, mark: &Mark) -> Result<(), Failure> {
        let Some(table) = self.table.clone() else { return Ok(()) };
        if self.is_loaded(&table, mark)? {
            return Ok(());
        }
        tracing::info!("the host's rules for the local networks are gone, and made again");
        self.open(plan, mark)
    }

    /// Takes it away, if it is there.
    pub(super) fn close(&mut self, name: &TunnelName, mark: &Mark) -> Result<(), Failure> {
        let switched_off = forwarding::give_back(name).doing("put forwarding back");
        let table = format!("vpn-exec-{name}");
        let rules = self.rules()?;
        let removed = match rules.comment(&table) {
            Ok(Some(comment)) if comment == mark.text() => rules.delete(&table),
            Ok(_) => Ok(()),
            Err(error) if nftables::is_missing(&error) => Ok(()),
            Err(error) => Err(error),
        };
        self.table = None;
        switched_off.and(removed.doing(format!("remove the table {table}")))
    }

    /// Whether this very table is loaded, by us, and has all of its rules.
    fn is_loaded(&mut self, table: &Table, mark: &Mark) -> Result<bool, Failure> {
        let is_same = self.table.as_ref() == Some(table);
        let rules: usize = table.chains.iter().map(|chain| chain.rules.len()).sum();
        match self.rules()?.comment(&table.name) {
            Ok(Some(comment)) if comment == mark.text() => {
                // A table may be emptied and stay.
                Ok(is_same && self.rules()?.count_rules(&table.name).is_ok_and(|count| count == rules))
            }
            Ok(_) => Err(io::Error::from(io::ErrorKind::AlreadyExists))
                .doing(format!("load the host's rules, the table {}", table.name))
                .map_err(|failure| {
                    failure.advise(format!(
                        "it belongs to somebody else: choose another name for the tunnel, or remove it with `nft delete table inet {}`",
                        table.name
                    ))
                }),
            Err(error) if nftables::is_missing(&error) => Ok(false),
            Err(error) => Err(error).doing("look at the host's rules"),
        }
    }

    fn rules(&mut self) -> Result<&mut Nftables, Failure> {
        let opened = match self.rules.take() {
            Some(rules) => rules,
            None => Nftables::open().doing("open a socket for rules").map_err(lacking)?,
        };
        Ok(self.rules.insert(opened))
    }
}

/// Says what to do where the kernel lacks what rules take.
pub(super) fn lacking(error: Failure) -> Failure {
    if !error.errno.is_some_and(|errno| nftables::is_missing(&io::Error::from_raw_os_error(errno))) {
        return error;
    }
    let advice = "this kernel lacks nf_tables or a part of it: load the modules nf_tables, nft_ct, nft_masq (every distribution has them)";
    error.advise(advice)
}
