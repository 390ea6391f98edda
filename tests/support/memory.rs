//! Comparison of the RAM of two stopped QEMUs, block by block, page by page.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, MetadataExt as _},
};

use super::Qemu;

const PIECE: usize = 1 << 20;
const PAGE: usize = 4096;

/// A RAM block, whose bytes can be read without changing anything.
struct Block {
    name: String,
    length: u64,
    file: File,
    offset: u64,
}

impl Block {
    fn read(&self, at: u64, buffer: &mut [u8]) {
        self.file.read_exact_at(buffer, self.offset + at).unwrap();
    }
}

/// All blocks of QEMU 8.2 and newer; of older versions those in guest-physical memory.
fn blocks(qemu: &mut Qemu) -> Vec<Block> {
    let table = qemu.qmp.hmp("info ramblock");
    let (pid, maps) =
        (qemu.pid(), fs::read_to_string(format!("/proc/{}/maps", qemu.pid())).unwrap());
    let mut blocks = Vec::new();
    for line in table.lines().skip(1).filter(|line| !line.trim().is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        // A backend that no device uses has no name and is not part of the guest.
        if words[1] == "KiB" || words[1] == "MiB" {
            continue;
        }
        let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap();
        let (name, length) = (words[0].to_owned(), hex(words[4]));
        let address = match words.get(6) {
            Some(address) => Some(hex(address)),
            None => address_of(qemu, &name),
        };
        let Some(address) = address else { continue };
        let (file, offset) = backing(pid, &maps, address);
        blocks.push(Block { name, length, file, offset });
    }
    blocks
}

/// The address of a block in an older QEMU, found through guest-physical memory.
fn address_of(qemu: &mut Qemu, name: &str) -> Option<u64> {
    let tree = qemu.qmp.hmp("info mtree -f");
    let region = name.rsplit('/').next().unwrap();
    let line = tree.lines().find(|line| {
        line.split_once("): ").is_some_and(|(_, rest)| rest.split(" @").next() == Some(region))
    })?;
    let start = line.trim().split('-').next().unwrap();
    let offset =
        line.split_once(" @").map_or(0, |(_, at)| u64::from_str_radix(at.trim(), 16).unwrap());
    let text = qemu.qmp.hmp(&format!("gpa2hva 0x{start}"));
    let address = text.trim().rsplit_once(" is 0x")?.1;
    Some(u64::from_str_radix(address, 16).unwrap() - offset)
}

/// The mapped file, so that holes stay holes; otherwise the process's memory.
fn backing(pid: u32, maps: &str, address: u64) -> (File, u64) {
    for line in maps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (start, end) = words[0].split_once('-').unwrap();
        let hex = |word: &str| u64::from_str_radix(word, 16).unwrap();
        if words[1] == "rw-s" && (hex(start)..hex(end)).contains(&address) {
            let path = format!("/proc/{pid}/map_files/{}", words[0]);
            let file = File::options().read(true).write(true).open(path).unwrap();
            return (file, hex(words[2]) + address - hex(start));
        }
    }
    (File::open(format!("/proc/{pid}/mem")).unwrap(), address)
}

/// Compare all blocks. Return a line for each that differs.
pub fn compare(source: &mut Qemu, destination: &mut Qemu) -> Vec<String> {
    let (mut ours, mut theirs) = (blocks(source), blocks(destination));
    let names =
        |blocks: &[Block]| -> Vec<String> { blocks.iter().map(|b| b.name.clone()).collect() };
    if source.config.version != destination.config.version {
        // The older QEMU shows fewer.
        let (known, shown) = (names(&ours), names(&theirs));
        ours.retain(|block| shown.contains(&block.name));
        theirs.retain(|block| known.contains(&block.name));
    }
    assert_eq!(names(&ours), names(&theirs));
    assert!(ours.iter().any(|block| block.length >= 16 << 20), "no RAM was found");
    let mut differences = Vec::new();
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours.length, theirs.length, "{}", ours.name);
        let mut pages = Vec::new();
        let (mut a, mut b) = (vec![0; PIECE], vec![0; PIECE]);
        for at in (0..ours.length).step_by(PIECE) {
            let length = PIECE.min((ours.length - at) as usize);
            ours.read(at, &mut a[..length]);
            theirs.read(at, &mut b[..length]);
            if a[..length] != b[..length] {
                let differs = |page: &usize| a[*page..][..PAGE] != b[*page..][..PAGE];
                pages
                    .extend((0..length).step_by(PAGE).filter(differs).map(|page| at + page as u64));
            }
        }
        if let Some(first) = pages.first() {
            differences.push(format!(
                "{}: {} pages, the first at {first:#x}",
                ours.name,
                pages.len()
            ));
        }
    }
    differences
}

/// The file that backs a block, and the offset in it.
pub fn file_of(qemu: &mut Qemu, name: &str) -> (File, u64) {
    let block = blocks(qemu).into_iter().find(|block| block.name == name).unwrap();
    (block.file, block.offset)
}

/// Bytes allocated for the file that backs a block.
pub fn allocated(qemu: &mut Qemu, name: &str) -> u64 {
    file_of(qemu, name).0.metadata().unwrap().blocks() * 512
}
