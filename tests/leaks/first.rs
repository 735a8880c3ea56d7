//! A program that does nothing but send, from its first instruction on. The test assembles it, so that no loader and no
//! library runs before.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::launcher::text_of;
use lab::stamp::Stamp;
use lab::{Launcher, Peer, Reach, WEB, variables};

use crate::judge::Judge;

const STAGE: &str = "first-instruction";

/// The number of datagrams that it sends in the tunnel, and on the host, where all of them are captured.
const MANY: u32 = 20_000;
const FEW: u32 = 50;

/// The load address, and the length in bytes of the headers before the code.
const BASE: u32 = 0x0040_0000;
const HEADERS: u32 = 64 + 56;

/// An executable (elf(5)) for Linux on x86-64: socket(2), sendto(2) to the web server again and again, exit(2).
fn executable(times: u32) -> Vec<u8> {
    let text = Stamp::new("udp4-internet", STAGE).payload();
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
        &with(&[0x41, 0xbc], times),                 // mov r12d, the number of datagrams
        &send,
        &[0x75, back as u8],                   // jnz to the beginning of the loop
        &[0x31, 0xff],                         // xor edi, edi
        &with(&[0xb8], libc::SYS_exit as u32), // mov eax, exit
        &[0x0f, 0x05],                         // syscall
    ]
    .concat();
    assert_eq!(code.len() as u32, code_length);

    let length = u64::from(HEADERS) + (code.len() + text.len() + address.len()) as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    // Entry point, program headers, no sections, no flags; the sizes and the numbers of the headers.
    for number in [u64::from(BASE + HEADERS), 64, 0] {
        file.extend(number.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // One segment with the whole file, readable and executable.
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for number in [0, u64::from(BASE), u64::from(BASE), length, length, 0x1000] {
        file.extend(number.to_le_bytes());
    }
    [file, code, text, address].concat()
}

/// Returns an instruction that ends with a number of four bytes.
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
        // The agent of `stages` runs everywhere, but begins to send a little later.
        return lab::skipped("the program is machine code for x86-64");
    }
    lab::test(Peer::Ours, |lab| {
        lab.provider.stop()?;
        let judge = Judge::of_network(lab)?;
        let (many, few) = (write(MANY)?, write(FEW)?);
        let config = lab.wg_quick_file(Reach::Ipv4)?;
        let run = |program: &Path, broken: &str| {
            let output = Launcher::new(&config).program([program]).env(variables::BREAK, broken).run()?;
            ensure!(output.status.success(), "{}", text_of(&output));
            Ok(())
        };
        for _ in 0..5 {
            run(&many, "")?;
        }
        std::thread::sleep(lab::patience(Duration::from_millis(100)));
        judge.verdict(STAGE)?.expect_no_leak()?;

        let sends = |vector: &crate::vectors::Vector| vector.name == "udp4-internet";
        run(&few, "namespace")?;
        judge.verdict(STAGE)?.expect_leaks(sends)?;
        ensure!(Command::new(&few).status()?.success());
        judge.verdict(STAGE)?.expect_leaks(sends)
    });
}
