//! Pages that are announced without content.

use super::*;

const MIB: u64 = 1 << 20;

/// The upper half of each MiB is a hole (see [`Recorder`]).
fn stream() -> Build {
    Build::with_blocks(&[("pc.ram", 4 * MIB), ("rom", 8192)])
        .part()
        .announced(0, Some("pc.ram"), 64)
        .announced(256 << 10, None, 64)
        .announced(512 << 10, None, 192)
        .announced(3 * MIB + 4096, None, 1)
        .end_of_section()
        .last()
        .page(2 * MIB, Some("pc.ram"), 1)
        .announced(2 * MIB + 4096, None, 1)
        .page(0, Some("rom"), 2)
        .end_of_section()
        .raw(b"\x04 device state")
}

impl Build {
    pub(super) fn announced(self, offset: u64, name: Option<&str>, pages: u64) -> Self {
        let flags = if name.is_some() { 0x01 } else { 0x21 };
        let build = self.word(offset | flags);
        let build = if let Some(name) = name { build.name(name) } else { build };
        build.word(pages)
    }
}

#[test]
fn announced_pages_are_written_or_zero_and_counted() {
    let recorder = rewrite(&stream().0, &[]).unwrap();
    let asked: Vec<_> = recorder
        .asked
        .iter()
        .filter(|asked| !matches!(asked, Asked::Stream(_) | Asked::Blocks(_)))
        .collect();
    let expected = [
        Asked::Hook,
        Asked::Finished,
        Asked::Hook,
        Asked::Write(0, 0, MIB / 2),
        Asked::Announced(MIB / 2, false),
        Asked::Zero(0, MIB / 2, MIB / 2),
        Asked::Announced(MIB / 2, true),
        Asked::Write(0, MIB, MIB / 4),
        Asked::Announced(MIB / 4, false),
        Asked::Write(0, 3 * MIB + 4096, 4096),
        Asked::Announced(4096, false),
        Asked::Finished,
        Asked::Hook,
        Asked::Write(0, 2 * MIB, 8192),
        Asked::Announced(4096, false),
        Asked::Finished,
    ];
    assert_eq!(asked, expected.iter().collect::<Vec<_>>());
    // The destination's QEMU gets a stream that it understands.
    let mut forwarder = Forwarder::default();
    let mut hooks = 0;
    for asked in recorder.asked {
        let mut sink = Recorder::default();
        if let Asked::Stream(bytes) = asked {
            forwarder.push(&bytes, &mut sink).unwrap();
            hooks += 1;
        }
    }
    assert!(hooks > 3);
    forwarder.finish().unwrap();
}

#[test]
fn cuts_change_nothing() {
    let stream = stream().0;
    let whole = rewrite(&stream, &[]).unwrap().asked;
    for cut in 0..stream.len() {
        assert_eq!(rewrite(&stream, &[cut]).unwrap().asked, whole, "cut at {cut}");
    }
}

#[test]
fn only_what_is_mapped_can_be_announced() {
    let start = || Build::with_blocks(&[("pc.ram", 4 * MIB), ("rom", 8192)]).part();
    let refused = |build: Build| rewrite(&build.0, &[]).unwrap_err().to_string();
    for (offset, pages) in [
        (0, 0),
        (0, 1025),
        (4 * MIB, 1),
        (4 * MIB - 4096, 2),
        (0, u64::MAX),
        (4096, u64::MAX >> 12),
    ] {
        let why = refused(start().announced(offset, Some("pc.ram"), pages));
        assert!(why.contains("'pc.ram'"), "{offset} {pages}: {why}");
    }
    assert!(refused(start().announced(0, None, 1)).contains("no RAM block"));
    let why = refused(start().announced(0, Some("rom"), 1));
    assert!(why.contains("x-shared-ram-external"), "{why}");
    let staged = Recorder { staged: vec!["pc.ram"], ..Recorder::default() };
    let stream = start().announced(0, Some("pc.ram"), 1).0;
    assert!(rewrite_to(staged, &stream, &[]).is_err());
    // The destination's QEMU would assume that it has the content.
    assert!(Forwarder::default().push(&stream, &mut Recorder::default()).is_err());
}

proptest! {
    #[test]
    fn whatever_is_announced_is_handed_over_once(
        ranges in proptest::collection::vec((0u64..1024, 1u64..65), 1..50),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let mut build = Build::with_blocks(&[("pc.ram", 4 * MIB)]).part();
        let mut expected = Vec::new();
        for (first, pages) in ranges {
            let pages = pages.min(1024 - first);
            build = build.announced(first * 4096, Some("pc.ram"), pages);
            expected.extend(first..first + pages);
        }
        let stream = build.end_of_section().last().end_of_section().0;
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(stream.len())).collect();
        cuts.sort_unstable();
        let mut seen = Vec::new();
        let mut counted = 0;
        for asked in rewrite(&stream, &cuts).unwrap().asked {
            match asked {
                Asked::Write(0, offset, length) => {
                    prop_assert!(offset / MIB == (offset + length - 1) / MIB);
                    seen.extend(offset / 4096..(offset + length) / 4096);
                }
                Asked::Zero(0, offset, length) => seen.extend(offset / 4096..(offset + length) / 4096),
                Asked::Announced(bytes, _) => counted += bytes,
                _ => {}
            }
        }
        prop_assert_eq!(counted, expected.len() as u64 * 4096);
        prop_assert_eq!(seen, expected);
    }
}
