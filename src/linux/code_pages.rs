//! The memory of the program's own code.

use std::fs;
use std::io;
use std::ops::Range;

/// Unmaps the pages of the program's code, most of which only ran at the start. A page that is needed again comes back
/// from the page cache or the file. The kernel counts code that is mapped as in use, also towards a container's limit.
///
/// # Errors
/// Fails if the process cannot read its own mappings, and as madvise(2) does.
pub fn unmap() -> io::Result<()> {
    let program = fs::read_link("/proc/self/exe")?;
    let maps = fs::read_to_string("/proc/self/maps")?;
    for Range { start, end } in maps.lines().filter_map(|line| code_in(line, program.to_str()?)) {
        // SAFETY: the mapping is private, of a file, and cannot be written. So its pages equal the file's, from which
        // the kernel reads them again, and the file cannot change while it is executed (ETXTBSY).
        if unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Returns the addresses of a line of `/proc/self/maps` (proc_pid_maps(5)), if it maps code of the program.
fn code_in(line: &str, program: &str) -> Option<Range<usize>> {
    let (addresses, rest) = line.split_once(' ')?;
    if !rest.starts_with("r-xp ") || !rest.ends_with(program) {
        return None;
    }
    let (start, end) = addresses.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_goes_on_without_its_pages() {
        for _ in 0..3 {
            unmap().expect("unmapped");
            assert_eq!(format!("{:?}", "7 8".split(' ').map(str::parse::<u8>).collect::<Vec<_>>()), "[Ok(7), Ok(8)]");
        }
    }

    #[test]
    fn only_code_that_cannot_be_written_is_unmapped() {
        let of =
            |permissions, file| code_in(&format!("1000-3000 {permissions} 00000000 fd:01 9    {file}"), "/vpn-exec");
        assert_eq!(of("r-xp", "/vpn-exec"), Some(0x1000..0x3000));
        for (permissions, file) in
            [("r--p", "/vpn-exec"), ("rwxp", "/vpn-exec"), ("r-xs", "/vpn-exec"), ("r-xp", "[vdso]")]
        {
            assert_eq!(of(permissions, file), None, "{permissions} {file}");
        }
    }
}
