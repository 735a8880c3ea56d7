//! What a filter sees of a system call, and the system call numbers of the architectures whose programs the kernel
//! executes.

#[cfg(test)]
use libc::sock_filter;

#[cfg(test)]
use crate::linux::bpf::{AND, JUMP, JUMP_IF_AT_LEAST, JUMP_IF_EQUAL, LOAD, RETURN};

/// The offsets at which a filter reads the system call (`struct seccomp_data` of linux/seccomp.h).
pub(super) const NUMBER: u32 = 0;
pub(super) const ARCHITECTURE: u32 = 4;

/// Returns the offset of the lower half of an argument. The upper half is 4 bytes further.
pub(super) const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// The bit that distinguishes x32 system calls from others of the same architecture (`__X32_SYSCALL_BIT`).
pub(super) const X32: u32 = 0x4000_0000;

/// The filtered system calls of an architecture whose programs the kernel executes.
pub(super) struct Architecture {
    /// The architecture (`AUDIT_ARCH_*` of linux/audit.h).
    pub(super) audit: u32,
    pub(super) connect: u32,
    pub(super) sendto: u32,
    /// socketcall(2), which only 32-bit x86 has.
    pub(super) socketcall: Option<u32>,
    pub(super) request_key: u32,
    /// ioctl(2), which has a second number in the x32 ABI, 514.
    pub(super) ioctl: &'static [u32],
}

/// x86-64 and 32-bit x86.
#[cfg(target_arch = "x86_64")]
pub(super) const ARCHITECTURES: [Architecture; 2] = [
    Architecture {
        audit: 0xc000_003e,
        connect: 42,
        sendto: 44,
        socketcall: None,
        request_key: libc::SYS_request_key as u32,
        ioctl: &[16, 514],
    },
    Architecture {
        audit: 0x4000_0003,
        connect: 362,
        sendto: 369,
        socketcall: Some(102),
        request_key: 287,
        ioctl: &[54],
    },
];

/// 64-bit and 32-bit ARM.
#[cfg(not(target_arch = "x86_64"))]
pub(super) const ARCHITECTURES: [Architecture; 2] = [
    Architecture {
        audit: 0xc000_00b7,
        connect: 203,
        sendto: 206,
        socketcall: None,
        request_key: libc::SYS_request_key as u32,
        ioctl: &[29],
    },
    Architecture { audit: 0x4000_0028, connect: 283, sendto: 290, socketcall: None, request_key: 310, ioctl: &[54] },
];

/// Returns the action that a program returns for a system call, as the kernel computes it.
#[cfg(test)]
pub(super) fn run(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let (mut at, mut loaded) = (0, 0);
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        match u32::from(code) {
            LOAD => {
                loaded = match k {
                    NUMBER => number,
                    ARCHITECTURE => architecture,
                    _ => {
                        let argument = arguments[((k - 16) / 8) as usize];
                        if k % 8 == 0 { argument as u32 } else { (argument >> 32) as u32 }
                    }
                }
            }
            AND => loaded &= k,
            JUMP => at += k as usize,
            JUMP_IF_EQUAL => at += usize::from(if loaded == k { jt } else { jf }),
            JUMP_IF_AT_LEAST => at += usize::from(if loaded >= k { jt } else { jf }),
            RETURN => return k,
            other => panic!("unknown instruction {other}"),
        }
    }
}
