//! The first instruction: a program that does nothing but send, from the first one that it executes on. It is made here, instruction by
//! instruction, so that no loader and no library runs before.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::agent::launcher;
use lab::{Peer, Reach, WEB};

use crate::VPN_EXEC;
use crate::judge::Witnesses;
use crate::stages::BREAK;
use crate::vectors::Stamp;

const STAGE: &str = "first-instruction";

/// How many datagrams it sends where none is to be seen, and where so many have to be captured.
const MANY: u32 = 20_000;
const FEW: u32 = 50;

/// Where it is loaded, and how long the headers before its code are.
const BASE: u32 = 0x0040_0000;
const HEADERS: u32 = 64 + 56;

/// An executable (elf(5)) for Linux on x86-64: socket(2), sendto(2) to the web server again and again, exit(2).
fn executable(times: u32) -> Vec<u8> {
    let text = Stamp::new("udp4-internet", STAGE).text();
    let code_length = 75;
    let [text_at, address_at] = [0, text.len() as u32].map(|at| BASE + HEADERS + code_length + at);
    let [family, port] = [(libc::AF_INET as u16).to_le_bytes(), 9_u16.to_be_bytes()];
    let address = [&family[..], &port, &WEB.ipv4.octets(), &[0; 8]].concat();
    let send = [
        &[0x89, 0xdf][..],                       // mov edi, ebx
        &with(&[0xbe], text_at),                 // mov esi, the text
        &with(&[0xba], text.len() as u32),       // mov edx, its length
        &[0x45, 0x31, 0xd2],                     // xor r10d, r10d
        &with(&[0x41, 0xb8], address_at),        // mov r8d, the address
        &with(&[0x41, 0xb9], 16),                // mov r9d, its length
        &with(&[0xb8], libc::SYS_sendto as u32), // mov eax, sendto
        &[0x0f, 0x05],                           // syscall
        &[0x41, 0xff, 0xcc],                     // dec r12d
    ]
    .concat();
    let back = -(send.len() as i8 + 2);
    let code = [
        &with(&[0xb8], libc::SYS_socket as u32)[..], // mov eax, socket
        &with(&[0xbf], libc::AF_INET as u32),        // mov edi, AF_INET
        &with(&[0xbe], libc::SOCK_DGRAM as u32),     // mov esi, SOCK_DGRAM
        &[0x31, 0xd2, 0x0f, 0x05, 0x89, 0xc3],       // xor edx, edx; syscall; mov ebx, eax
        &with(&[0x41, 0xbc], times),                 // mov r12d, how often
        &send,
        &[0x75, back as u8],                   // jnz to the beginning of that
        &[0x31, 0xff],                         // xor edi, edi
        &with(&[0xb8], libc::SYS_exit as u32), // mov eax, exit
        &[0x0f, 0x05],                         // syscall
    ]
    .concat();
    assert_eq!(code.len() as u32, code_length);

    let length = u64::from(HEADERS) + (code.len() + text.len() + address.len()) as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    // The entry, the program headers, no sections, no flags; the sizes of the headers, and how many there are.
    for number in [u64::from(BASE + HEADERS), 64, 0] {
        file.extend(number.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // One segment, readable and executable: all of the file.
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for number in [0, u64::from(BASE), u64::from(BASE), length, length, 0x1000] {
        file.extend(number.to_le_bytes());
    }
    [file, code, text, address].concat()
}

/// An instruction with a number of four bytes at its end.
fn with(operation: &[u8], number: u32) -> Vec<u8> {
    [operation, &number.to_le_bytes()].concat()
}

fn write(times: u32) -> Result<PathBuf> {
    let path = Path::new(lab::world::FILES).join(format!("sends-{times}"));
    fs::write(&path, executable(times))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

#[test]
fn nothing_leaks_from_the_first_instruction_on() {
    if cfg!(not(target_arch = "x86_64")) {
        // `stages` has a program that can be run everywhere, and begins a little later.
        return;
    }
    lab::test(Peer::Ours, |lab| {
        lab.provider.stop()?;
        let witnesses = Witnesses::gather_in_network(lab)?;
        let (many, few) = (write(MANY)?, write(FEW)?);
        let config = lab.wg_quick_file(Reach::Ipv4)?;
        let run = |program: &Path, broken: &str| {
            let output = launcher(VPN_EXEC, &config, &[]).arg(program).env(BREAK, broken).output()?;
            ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        for _ in 0..5 {
            run(&many, "")?;
        }
        std::thread::sleep(lab::patience(Duration::from_millis(100)));
        witnesses.verdict(STAGE)?.is_silence()?;

        let sends = |vector: &crate::vectors::Vector| vector.name == "udp4-internet";
        run(&few, "namespace")?;
        witnesses.verdict(STAGE)?.reports(sends)?;
        ensure!(Command::new(&few).status()?.success());
        witnesses.verdict(STAGE)?.reports(sends)
    });
}
