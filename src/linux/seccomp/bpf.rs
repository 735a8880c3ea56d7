//! An assembler for the kernel's classic BPF, in which seccomp filters are written (linux/bpf_common.h), and the system
//! call numbers of the architectures whose programs the kernel executes.

use libc::sock_filter;

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

/// An instruction, or a label that jumps refer to. A jump that is not taken continues with the next instruction.
#[derive(Clone, Copy)]
pub(super) enum Instruction<L> {
    /// Loads 32 bits of the system call.
    Load(u32),
    /// Clears all loaded bits but these.
    Mask(u32),
    /// Jumps if the loaded value is equal.
    IfEqual(u32, L),
    /// Jumps if the loaded value is not equal.
    Unless(u32, L),
    /// Ends the program with an action (`SECCOMP_RET_*`).
    Return(u32),
    /// Marks the place of the next instruction.
    Label(L),
}

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const JUMP_IF_AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Loads 32 bits of the system call, at an offset.
pub(super) fn load(offset: u32) -> sock_filter {
    instruction(LOAD, 0, 0, offset)
}

/// Skips `yes` instructions if the loaded value is equal, `no` instructions if not.
pub(super) fn if_equal(value: u32, yes: u8, no: u8) -> sock_filter {
    instruction(JUMP_IF_EQUAL, yes, no, value)
}

/// Skips `yes` instructions if the loaded value is equal or greater, `no` instructions if not.
pub(super) fn if_at_least(value: u32, yes: u8, no: u8) -> sock_filter {
    instruction(JUMP_IF_AT_LEAST, yes, no, value)
}

/// Skips instructions.
pub(super) fn skip(count: u32) -> sock_filter {
    instruction(JUMP, 0, 0, count)
}

/// Ends the program with an action (`SECCOMP_RET_*`).
pub(super) fn ret(action: u32) -> sock_filter {
    instruction(RETURN, 0, 0, action)
}

/// Returns an instruction. All codes are of 16 bits.
fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

/// Translates instructions into a program for the kernel.
///
/// # Panics
/// Panics if a label is missing, or is not within the next 256 instructions after a jump to it.
pub(super) fn assemble<L: Copy + PartialEq>(instructions: &[Instruction<L>]) -> Vec<sock_filter> {
    let is_code = |instruction: &&Instruction<L>| !matches!(instruction, Instruction::Label(_));
    let place = |label: L| {
        let is_label = |instruction: &Instruction<L>| matches!(instruction, Instruction::Label(l) if *l == label);
        let at = instructions.iter().position(is_label).expect("every label has a place");
        instructions[..at].iter().filter(is_code).count()
    };
    let mut program: Vec<sock_filter> = Vec::new();
    for instruction in instructions.iter().filter(is_code) {
        // Distances count from the instruction after the jump.
        let distance = |label: L| u8::try_from(place(label) - program.len() - 1).expect("labels are near");
        program.push(match *instruction {
            Instruction::Load(offset) => load(offset),
            Instruction::Mask(mask) => self::instruction(AND, 0, 0, mask),
            Instruction::IfEqual(value, label) => if_equal(value, distance(label), 0),
            Instruction::Unless(value, label) => if_equal(value, 0, distance(label)),
            Instruction::Return(action) => ret(action),
            Instruction::Label(_) => continue,
        });
    }
    program
}

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
