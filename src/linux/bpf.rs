//! An assembler for the kernel's classic BPF, in which filters of system calls and of sockets are written
//! (linux/bpf_common.h; the kernel's Documentation/networking/filter.rst).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::sock_filter;

/// An instruction, or a label that jumps refer to. A jump that is not taken continues with the next instruction.
#[derive(Clone, Copy)]
pub(in crate::linux) enum Instruction<L> {
    /// Loads 32 bits of the system call or of the packet, at an offset. A packet's bytes count from the highest.
    Load(u32),
    /// Loads 16 bits of the packet.
    LoadHalf(u32),
    /// Loads 8 bits of the packet.
    LoadByte(u32),
    /// Loads 32 bits of the packet, at an offset from the index register.
    LoadIndexed(u32),
    /// Loads a number.
    LoadNumber(u32),
    /// Sets the index register to a number.
    SetIndex(u32),
    /// Sets the index register to the loaded value.
    MoveToIndex,
    /// Clears all loaded bits but these.
    Mask(u32),
    /// Jumps.
    Jump(L),
    /// Jumps if the loaded value is equal.
    IfEqual(u32, L),
    /// Jumps if the loaded value is not equal.
    Unless(u32, L),
    /// Ends the program with an action (`SECCOMP_RET_*`), or the number of bytes of the packet to keep.
    Return(u32),
    /// Marks the place of the next instruction.
    Label(L),
}

pub(in crate::linux) const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const LOAD_INDEXED: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_IND;
const LOAD_NUMBER: u32 = libc::BPF_LD | libc::BPF_IMM;
const SET_INDEX: u32 = libc::BPF_LDX | libc::BPF_IMM;
const MOVE_TO_INDEX: u32 = libc::BPF_MISC | libc::BPF_TAX;
pub(in crate::linux) const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
pub(in crate::linux) const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
pub(in crate::linux) const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
pub(in crate::linux) const JUMP_IF_AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
pub(in crate::linux) const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Loads 32 bits of the system call, at an offset.
pub(in crate::linux) fn load(offset: u32) -> sock_filter {
    instruction(LOAD, 0, 0, offset)
}

/// Skips `yes` instructions if the loaded value is equal, `no` instructions if not.
pub(in crate::linux) fn if_equal(value: u32, yes: u8, no: u8) -> sock_filter {
    instruction(JUMP_IF_EQUAL, yes, no, value)
}

/// Skips `yes` instructions if the loaded value is equal or greater, `no` instructions if not.
pub(in crate::linux) fn if_at_least(value: u32, yes: u8, no: u8) -> sock_filter {
    instruction(JUMP_IF_AT_LEAST, yes, no, value)
}

/// Skips instructions.
pub(in crate::linux) fn skip(count: u32) -> sock_filter {
    instruction(JUMP, 0, 0, count)
}

/// Ends the program with an action (`SECCOMP_RET_*`).
pub(in crate::linux) fn ret(action: u32) -> sock_filter {
    instruction(RETURN, 0, 0, action)
}

/// Returns an instruction. All codes are of 16 bits.
fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

/// The kernel's form of a program (`struct sock_fprog` of linux/filter.h).
#[repr(C)]
pub(in crate::linux) struct Program {
    length: libc::c_ushort,
    filter: *const sock_filter,
}

impl Program {
    /// Points at a program, which must outlive the value.
    ///
    /// # Errors
    /// Fails with `InvalidInput` if the program is too long.
    pub(in crate::linux) fn of(filter: &[sock_filter]) -> io::Result<Self> {
        let length = libc::c_ushort::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(Self { length, filter: filter.as_ptr() })
    }
}

/// Attaches a program to a socket (`SO_ATTACH_FILTER` of socket(7)), which drops the packets for which it returns 0.
///
/// # Errors
/// Fails as setsockopt(2) does.
pub(in crate::linux) fn attach(socket: BorrowedFd<'_>, program: &[sock_filter]) -> io::Result<()> {
    let program = Program::of(program)?;
    let length = std::mem::size_of::<Program>() as libc::socklen_t;
    let value = (&raw const program).cast();
    // SAFETY: the kernel reads the program and the filter that it points to, both of which live until the call returns.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, value, length) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Detaches the program of a socket, if it has one.
///
/// # Errors
/// Fails as setsockopt(2) does.
pub(in crate::linux) fn detach(socket: BorrowedFd<'_>) -> io::Result<()> {
    let (unused, length) = (0_i32, std::mem::size_of::<i32>() as libc::socklen_t);
    let value = (&raw const unused).cast();
    // SAFETY: the kernel reads a number, which lives until the call returns.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_DETACH_FILTER, value, length) } {
        -1 => Err(io::Error::last_os_error()).or_else(|error| match error.raw_os_error() {
            Some(libc::ENOENT) => Ok(()),
            _ => Err(error),
        }),
        _ => Ok(()),
    }
}

/// Translates instructions into a program for the kernel.
///
/// # Panics
/// Panics if a label is missing, or is not within the next 256 instructions after a jump to it.
pub(in crate::linux) fn assemble<L: Copy + PartialEq>(instructions: &[Instruction<L>]) -> Vec<sock_filter> {
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
            Instruction::LoadHalf(offset) => self::instruction(LOAD_HALF, 0, 0, offset),
            Instruction::LoadByte(offset) => self::instruction(LOAD_BYTE, 0, 0, offset),
            Instruction::LoadIndexed(offset) => self::instruction(LOAD_INDEXED, 0, 0, offset),
            Instruction::LoadNumber(number) => self::instruction(LOAD_NUMBER, 0, 0, number),
            Instruction::SetIndex(number) => self::instruction(SET_INDEX, 0, 0, number),
            Instruction::MoveToIndex => self::instruction(MOVE_TO_INDEX, 0, 0, 0),
            Instruction::Mask(mask) => self::instruction(AND, 0, 0, mask),
            Instruction::Jump(label) => skip(distance(label).into()),
            Instruction::IfEqual(value, label) => if_equal(value, distance(label), 0),
            Instruction::Unless(value, label) => if_equal(value, 0, distance(label)),
            Instruction::Return(action) => ret(action),
            Instruction::Label(_) => continue,
        });
    }
    program
}
