//! The search for pieces of a tunnel's secret keys, in data and in the memory of processes.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// The length of a piece that counts as a leak: 16 characters of base64 or hexadecimal digits, or 16 bytes.
pub const PIECE: usize = 16;

/// The file in which a test gives its pieces to the agent. They are inverted, so that the agent does not find what it
/// was given.
const INVERTED: &str = "/run/lab/inverted";

/// The pieces of keys to look for.
#[derive(Debug)]
pub struct Pieces {
    /// All pieces, each with its bytes inverted.
    inverted: HashSet<[u8; PIECE]>,
    /// Whether a piece begins with these two bytes, inverted. Nearly none does, which makes the search fast.
    begins: Vec<bool>,
}

impl Pieces {
    /// Returns the pieces of all forms of keys, which are given in base64: base64, hexadecimal digits and bytes.
    ///
    /// # Errors
    /// If a key is not 32 bytes in base64.
    pub fn of_keys(keys: &[&str]) -> io::Result<Self> {
        let mut inverted = HashSet::new();
        for key in keys {
            let bytes = STANDARD.decode(key).map_err(io::Error::other)?;
            if bytes.len() != 32 {
                return Err(io::Error::other("a key has 32 bytes"));
            }
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            let forms = [key.as_bytes().to_vec(), hex.to_uppercase().into_bytes(), hex.into_bytes(), bytes];
            for form in forms {
                for piece in form.windows(PIECE) {
                    inverted.insert(std::array::from_fn(|at| !piece[at]));
                }
            }
        }
        Ok(Self::of_inverted(inverted))
    }

    /// Returns the pieces of the base64 texts alone.
    pub fn of_texts(keys: &[&str]) -> Self {
        let pieces = keys.iter().flat_map(|key| key.as_bytes().windows(PIECE));
        Self::of_inverted(pieces.map(|piece| std::array::from_fn(|at| !piece[at])).collect())
    }

    fn of_inverted(inverted: HashSet<[u8; PIECE]>) -> Self {
        let mut begins = vec![false; 1 << 16];
        for piece in &inverted {
            begins[usize::from(u16::from_be_bytes([piece[0], piece[1]]))] = true;
        }
        Self { inverted, begins }
    }

    /// Writes the pieces into the file from which the agent reads them.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self) -> io::Result<()> {
        fs::write(INVERTED, self.inverted.iter().flatten().copied().collect::<Vec<u8>>())
    }

    /// Reads the pieces that a test has written.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read() -> io::Result<Self> {
        let text = fs::read(INVERTED)?;
        Ok(Self::of_inverted(text.chunks_exact(PIECE).filter_map(|piece| piece.try_into().ok()).collect()))
    }

    /// Returns one piece as it is.
    pub fn any(&self) -> Option<Vec<u8>> {
        Some(self.inverted.iter().next()?.iter().map(|byte| !byte).collect())
    }

    /// Counts the pieces in some data. Leaves no copy of a piece in memory.
    pub fn count_in(&self, data: &[u8]) -> usize {
        let is_piece = |window: &&[u8]| {
            self.begins[usize::from(u16::from_be_bytes([!window[0], !window[1]]))]
                && self.inverted.contains(&std::array::from_fn(|at| !window[at]))
        };
        data.windows(PIECE).filter(is_piece).count()
    }

    /// Counts the pieces in the memory of a process (`self` or a process ID), except in unchanged content of files.
    ///
    /// # Errors
    /// If the process cannot be inspected.
    pub fn count_in_memory(&self, pid: &str) -> io::Result<usize> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let memory = fs::File::open(format!("/proc/{pid}/mem"))?;
        let mut found = 0;
        for line in maps.lines() {
            // proc_pid_maps(5): range, permissions, offset, device, inode, path.
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let [range, permissions, _, _, inode, ..] = fields[..] else { return Err(io::Error::other(line)) };
            let is_file = inode != "0" && !permissions.contains('w');
            if !permissions.starts_with('r') || is_file || line.ends_with("[vvar]") {
                continue;
            }
            let end_of = |text: &str| u64::from_str_radix(text, 16).map_err(io::Error::other);
            let (begin, end) = range.split_once('-').ok_or_else(|| io::Error::other(line))?;
            let (begin, end) = (end_of(begin)?, end_of(end)?);
            let mut bytes = vec![0; usize::try_from(end - begin).map_err(io::Error::other)?];
            // No process can read the pages that are the kernel's own.
            if memory.read_exact_at(&mut bytes, begin).is_ok() {
                found += self.count_in(&bytes);
            }
            bytes.fill(0);
        }
        Ok(found)
    }
}

/// The findings of the agent inside a tunnel.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct Findings {
    /// The process ID of the launcher.
    pub launcher: i32,
    /// The process ID of the keeper.
    pub keeper: i32,
    /// The targets of the agent's descriptors beyond the standard ones.
    pub descriptors: Vec<String>,
    /// The ways by which the agent could look into vpn-exec's processes.
    pub opened: Vec<String>,
    /// The pieces of keys in the agent's memory.
    pub in_memory: usize,
    /// The same after the agent has put one there.
    pub in_memory_when_planted: usize,
    /// The pieces in the agent's arguments and environment.
    pub in_arguments: usize,
}
