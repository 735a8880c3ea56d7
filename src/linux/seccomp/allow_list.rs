//! The program of a filter that allows a list of system calls.
//!
//! When a filter is installed, the kernel runs it for each number of a system call, to remember the verdicts that
//! depend on the number alone (`seccomp_cache_prepare()` in kernel/seccomp.c). So the program is a binary search, whose
//! time grows with the logarithm of the list's length.

use std::collections::BTreeMap;

use libc::sock_filter;

use super::REFUSAL;
use super::architecture::{ARCHITECTURE, ARCHITECTURES, NUMBER, argument};
use crate::linux::bpf::{if_at_least, if_equal, load, ret, skip};

/// What a filter decides about a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Allow,
    Refuse,
    /// Allows the call if its first argument is one of the filter's address families.
    ByFamily,
}

/// A range of numbers with the same verdict. It ends where the next one begins.
#[derive(Clone, Copy, Debug)]
struct Range {
    first: u32,
    verdict: Verdict,
}

/// Returns the program that allows only `calls`, and socket(2) and socketpair(2) for the address families `families`.
/// Calls of another architecture kill the process.
pub(super) fn program(calls: &[libc::c_long], families: &[libc::c_int]) -> Vec<sock_filter> {
    let mut verdicts: BTreeMap<u32, Verdict> = calls.iter().map(|call| (*call as u32, Verdict::Allow)).collect();
    if !families.is_empty() {
        verdicts.extend([libc::SYS_socket, libc::SYS_socketpair].map(|call| (call as u32, Verdict::ByFamily)));
    }
    let mut program = vec![
        load(ARCHITECTURE),
        if_equal(ARCHITECTURES[0].audit, 1, 0),
        ret(libc::SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
    ];
    program.extend(search(&ranges(verdicts), &by_family(families)));
    program
}

/// Returns the ranges of all numbers in order. Unlisted numbers are refused.
fn ranges(verdicts: BTreeMap<u32, Verdict>) -> Vec<Range> {
    let mut ranges = vec![Range { first: 0, verdict: Verdict::Refuse }];
    for (number, verdict) in verdicts {
        // The range of the number before ends here at the latest.
        ranges.pop_if(|last| last.first == number);
        if ranges.last().is_none_or(|last| last.verdict != verdict) {
            ranges.push(Range { first: number, verdict });
        }
        ranges.push(Range { first: number + 1, verdict: Verdict::Refuse });
    }
    ranges
}

/// Returns a program that finds the loaded number in the ranges, and returns the verdict.
fn search(ranges: &[Range], by_family: &[sock_filter]) -> Vec<sock_filter> {
    if let [range] = ranges {
        return match range.verdict {
            Verdict::Allow => vec![ret(libc::SECCOMP_RET_ALLOW)],
            Verdict::Refuse => vec![refuse()],
            Verdict::ByFamily => by_family.to_vec(),
        };
    }
    let (below, above) = ranges.split_at(ranges.len() / 2);
    let first = above[0].first;
    let (below, above) = (search(below, by_family), search(above, by_family));
    let mut program = match u8::try_from(below.len()) {
        Ok(length) => vec![if_at_least(first, length, 0)],
        // A conditional jump reaches 255 instructions, another one reaches all.
        Err(_) => vec![if_at_least(first, 0, 1), skip(below.len() as u32)],
    };
    program.extend(below);
    program.extend(above);
    program
}

/// Returns a program that allows a call if its first argument is one of the families. It ignores the argument's upper
/// half, as the kernel does.
fn by_family(families: &[libc::c_int]) -> Vec<sock_filter> {
    let mut program = vec![load(argument(0))];
    for family in families {
        program.extend([if_equal(family.unsigned_abs(), 0, 1), ret(libc::SECCOMP_RET_ALLOW)]);
    }
    program.push(refuse());
    program
}

fn refuse() -> sock_filter {
    ret(libc::SECCOMP_RET_ERRNO | REFUSAL.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
    };

    use super::*;
    use crate::linux::bpf::{self, Instruction};
    use crate::linux::capabilities;
    use crate::linux::seccomp::architecture::{self, X32};

    /// Returns the program that seccompiler makes of the same lists, which compares the number with one after another.
    fn linear(calls: &[libc::c_long], families: &[libc::c_int]) -> Vec<sock_filter> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = calls.iter().map(|call| (*call, Vec::new())).collect();
        let sockets = families.iter().map(|family| {
            let (family, length) = (family.unsigned_abs().into(), SeccompCmpArgLen::Dword);
            let is = SeccompCondition::new(0, length, SeccompCmpOp::Eq, family).expect("a condition");
            SeccompRule::new(vec![is]).expect("a rule")
        });
        let sockets: Vec<SeccompRule> = sockets.collect();
        if !sockets.is_empty() {
            rules.insert(libc::SYS_socket, sockets.clone());
            rules.insert(libc::SYS_socketpair, sockets);
        }
        let (refuse, allow) = (SeccompAction::Errno(REFUSAL.unsigned_abs()), SeccompAction::Allow);
        let architecture = TargetArch::try_from(std::env::consts::ARCH).expect("an architecture");
        let filter = SeccompFilter::new(rules, refuse, allow, architecture).expect("a filter");
        let program: seccompiler::BpfProgram = filter.try_into().expect("a program");
        program.iter().map(|it| sock_filter { code: it.code, jt: it.jt, jf: it.jf, k: it.k }).collect()
    }

    /// Compares the search with the list, for all numbers of all architectures.
    fn compare(calls: &[libc::c_long], families: &[libc::c_int]) {
        /// x86-64, 32-bit x86, 64-bit and 32-bit ARM, 64-bit RISC-V, and none.
        const AUDIT: [u32; 6] = [0xc000_003e, 0x4000_0003, 0xc000_00b7, 0x4000_0028, 0xc000_00f3, 0];
        /// More numbers than any of these architectures has, including those of 32-bit ARM's own.
        const NUMBERS: u32 = 1024;
        const OF_ARM: u32 = 0x000f_0000;

        let (list, search) = (linear(calls, families), program(calls, families));
        let numbers =
            (0..NUMBERS).chain(OF_ARM..OF_ARM + 8).flat_map(|number| [number, number | X32, number | 1 << 31]);
        let sockets = [libc::SYS_socket, libc::SYS_socketpair].map(|number| number as u32);
        for number in numbers.chain([X32 - 1, u32::MAX - 1, u32::MAX]) {
            let first: &mut dyn Iterator<Item = u64> = match sockets.contains(&(number & !X32)) {
                true => &mut (0..64).flat_map(|family| [family, family | 1 << 32, family | 0xffff_ffff << 32]),
                false => &mut [0, u64::MAX].into_iter(),
            };
            for first in first {
                for audit in AUDIT {
                    let [list, search] = [&list, &search]
                        .map(|program| architecture::run(program, audit, number, [first, 1, 2, 3, 4, 5]));
                    assert_eq!(list, search, "call {number:#x} of {audit:#x}, first argument {first:#x}");
                }
            }
        }
    }

    #[test]
    fn the_search_decides_about_every_call_as_a_list_does() {
        let every_second: Vec<libc::c_long> = (0..512).step_by(2).collect();
        let families = [libc::AF_UNIX, libc::AF_INET6];
        assert!(program(&every_second, &families).len() > 512, "its jumps are longer than 255 instructions");
        for calls in [&[][..], &[0], &[libc::SYS_socket], &[0, 1, 2, 511, 512], &every_second] {
            compare(calls, &families);
            compare(calls, &[]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn the_search_decides_as_any_list_does(
            calls in prop::collection::vec(0..512_i64, 0..200),
            families in prop::collection::vec(0..46_i32, 0..5),
        ) {
            compare(&calls, &families);
        }
    }

    /// The verdict on an allowed call by a second filter, below the tested one. So no call is executed.
    const ALLOWED: i32 = libc::E2BIG;

    /// Installs a filter under which all calls but `needed` fail with [`ALLOWED`].
    fn install_below(needed: &[libc::c_long]) {
        let mut below = vec![Instruction::Load(NUMBER)];
        below.extend(needed.iter().map(|call| Instruction::IfEqual(*call as u32, ())));
        below.push(Instruction::Return(libc::SECCOMP_RET_ERRNO | ALLOWED.unsigned_abs()));
        below.extend([Instruction::Label(()), Instruction::Return(libc::SECCOMP_RET_ALLOW)]);
        super::super::install(&bpf::assemble(&below), 0).expect("installed");
    }

    #[test]
    fn the_kernel_decides_about_every_call_as_a_list_does() {
        // What the thread needs to install the second filter, to return its result and to end.
        let needed = [
            libc::SYS_seccomp,
            libc::SYS_futex,
            libc::SYS_mmap,
            libc::SYS_munmap,
            libc::SYS_mprotect,
            libc::SYS_madvise,
            libc::SYS_brk,
            libc::SYS_rt_sigprocmask,
            libc::SYS_sigaltstack,
            libc::SYS_gettid,
            libc::SYS_write,
            libc::SYS_exit,
        ];
        let every_third = (0..512).filter(|number| number % 3 == 0);
        let calls: Vec<libc::c_long> =
            every_third.filter(|number| *number != libc::SYS_socketpair).chain(needed).collect();
        let families = [libc::AF_INET, libc::AF_NETLINK];
        let (list, search) = (linear(&calls, &families), program(&calls, &families));
        let numbers = (0..1024).flat_map(|number| [number, number | X32]);
        // Two calls of x86-64 that serve uprobes pass every filter, and raise SIGILL elsewhere (since Linux 6.11).
        let numbers = numbers.filter(|number| !(cfg!(target_arch = "x86_64") && (335..=336).contains(number)));
        let numbers: Vec<u32> = numbers.filter(|number| !needed.contains(&(*number as libc::c_long))).collect();
        let thread = std::thread::spawn(move || {
            capabilities::set_no_new_privileges().expect("no new privileges");
            install_below(&needed);
            super::super::install(&search, 0).expect("installed");
            let mut verdicts = Vec::with_capacity(3 * numbers.len());
            for number in numbers {
                for first in [libc::AF_INET, libc::AF_UNIX, libc::AF_NETLINK] {
                    // SAFETY: one of the filters refuses the call, so that it does nothing.
                    let result = unsafe { libc::syscall(number as libc::c_long, first as libc::c_long, 0, 0, 0, 0, 0) };
                    let error = std::io::Error::last_os_error().raw_os_error().filter(|_| result == -1);
                    verdicts.push((number, first, error));
                }
            }
            verdicts
        });
        let verdicts = thread.join().expect("the thread ends normally");
        let mut seen = BTreeSet::new();
        for (number, first, error) in verdicts {
            let verdict = architecture::run(&list, ARCHITECTURES[0].audit, number, [first as u64, 0, 0, 0, 0, 0]);
            let expected = if verdict == libc::SECCOMP_RET_ALLOW { ALLOWED } else { REFUSAL };
            assert_eq!(error, Some(expected), "call {number:#x}, first argument {first}");
            seen.insert(expected);
        }
        assert_eq!(seen, BTreeSet::from([ALLOWED, REFUSAL]));
    }
}
