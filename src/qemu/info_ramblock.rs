//! Parsers of QEMU's output for people: `info ramblock`, `info mtree -f` and `gpa2hva`.

/// A row of `info ramblock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    /// The block's idstr.
    pub name: String,
    /// Page size of the backing in bytes.
    pub page_size: u64,
    /// Used length in bytes.
    pub used: u64,
    /// Maximum length in bytes.
    pub total: u64,
    /// Host virtual address in QEMU; printed from 8.2 on.
    pub address: Option<u64>,
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// Parse the table (QEMU's `ram_block_format`, softmmu/physmem.c or system/physmem.c).
///
/// # Errors
/// The line that can't be parsed.
pub(super) fn rows(text: &str) -> Result<Vec<Row>, String> {
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines.skip(1).map(|line| row(line).ok_or_else(|| line.to_owned())).collect()
}

fn row(line: &str) -> Option<Row> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let unit = words.iter().rposition(|word| matches!(*word, "B" | "KiB" | "MiB" | "GiB"))?;
    let scale = match words[unit] {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        _ => 30,
    };
    let size: u64 = words.get(unit.checked_sub(1)?)?.parse().ok()?;
    let column = |index: usize| words.get(unit + index).and_then(|word| hex(word));
    Some(Row {
        name: words[..unit - 1].join(" "),
        page_size: size.checked_shl(scale)?,
        used: column(2)?,
        total: column(3)?,
        address: column(4),
    })
}

/// A range of guest-physical memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FlatRange {
    /// Guest-physical address.
    pub start: u64,
    /// The memory region's name.
    pub name: String,
    /// Offset in the region.
    pub offset: u64,
}

/// The RAM ranges of `info mtree -f`.
pub(super) fn flat_ranges(text: &str) -> Vec<FlatRange> {
    text.lines().filter_map(flat_range).collect()
}

fn flat_range(line: &str) -> Option<FlatRange> {
    let (range, rest) = line.trim().split_once(" (prio ")?;
    let (start, _end) = range.split_once('-')?;
    let (kind, rest) = rest.split_once("): ")?;
    if !kind.ends_with(", ram") {
        return None;
    }
    let rest = rest.strip_suffix(" KVM").unwrap_or(rest);
    let (name, offset) = match rest.split_once(" @") {
        Some((name, offset)) => (name, u64::from_str_radix(offset.split(' ').next()?, 16).ok()?),
        None => (rest, 0),
    };
    let start = u64::from_str_radix(start, 16).ok()?;
    Some(FlatRange { start, name: name.trim().to_owned(), offset })
}

/// The host virtual address in the output of `gpa2hva`.
pub(super) fn host_address(text: &str) -> Option<u64> {
    hex(text.trim().rsplit_once(" is ")?.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000
   0000:00:02.0/vga.vram    4 KiB  0x0000000020080000 0x0000000001000000 0x0000000001000000
    /rom@etc/acpi/tables    4 KiB  0x00000000210c0000 0x0000000000020000 0x0000000000200000
";
    const NEW: &str = "              Block Name    PSize              Offset               Used              Total                HVA  RO
                    huge    2 MiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f7d43fff000  rw
                 pc.bios    4 KiB  0x0000000020000000 0x0000000000040000 0x0000000000040000 0x00007f7d98600000  ro
";

    #[test]
    fn both_forms_are_read() {
        let old = rows(OLD).unwrap();
        assert_eq!(old.len(), 3);
        assert_eq!(old[1].name, "0000:00:02.0/vga.vram");
        assert_eq!((old[2].used, old[2].total), (0x20000, 0x20_0000));
        assert_eq!(old[0].address, None);
        let new = rows(NEW).unwrap();
        assert_eq!((new[0].page_size, new[0].address), (2 << 20, Some(0x7f7d_43ff_f000)));
        assert_eq!(new[1].name, "pc.bios");
    }

    #[test]
    fn another_table_is_an_error() {
        assert!(rows("head\nnonsense\n").is_err());
        assert!(rows("head\nKiB\n").is_err());
        assert!(rows("head\n x 99 GiB 0x1\n").is_err());
        assert_eq!(rows("").unwrap(), []);
    }

    #[test]
    fn flat_ranges_name_their_region() {
        let text = " Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): ram0
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  0000000000100000-000000000fffffff (prio 0, ram): ram0 @0000000000100000 KVM
  0000000100000000-0000000107ffffff (prio 0, ram): dimm0 KVM
";
        let ranges = flat_ranges(text);
        let range = |start, name: &str, offset| FlatRange { start, name: name.into(), offset };
        let expected =
            [range(0, "ram0", 0), range(0x10_0000, "ram0", 0x10_0000), range(1 << 32, "dimm0", 0)];
        assert_eq!(ranges, expected);
    }

    #[test]
    fn the_host_address_is_found() {
        let text = "Host virtual address for 0x10000000 (ram1) is 0x7ff9f7ffe000\r\n";
        assert_eq!(host_address(text), Some(0x7ff9_f7ff_e000));
        assert_eq!(host_address("Memory at address 0xfee00000 is not RAM"), None);
    }
}
