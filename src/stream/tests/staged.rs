//! Copied blocks, whose pages are taken from the stream.

use super::*;

fn rewrite_staged(stream: &[u8], cuts: &[usize]) -> Result<Recorder, PushError<Infallible>> {
    let staged = vec!["pc.ram"];
    rewrite_to(Recorder { in_stream: vec!["rom"], staged, ..Recorder::default() }, stream, cuts)
}

/// For a copied block, the content of the records is written.
#[test]
fn staged_records_become_writes_of_their_bytes() {
    let stream = Build::with_blocks(&[("pc.ram", 4 << 20), ("ram1", 4 << 20)])
        .part()
        .page(0, Some("pc.ram"), 1)
        .page(4096, None, 2)
        .page(4096, Some("ram1"), 9)
        .page(4096, Some("pc.ram"), 3)
        .zero(8192, None)
        .end_of_section()
        .last()
        .end_of_section()
        .raw(&[0])
        .0;
    let whole = rewrite_staged(&stream, &[]).unwrap();
    let hook = whole.asked.iter().rposition(|asked| *asked == Asked::Hook).unwrap();
    let staged = |offset, fills: &[u8]| {
        Asked::Copied(0, offset, fills.iter().flat_map(|fill| [*fill; 4096]).collect())
    };
    let expected = [
        staged(0, &[1, 2]),
        Asked::Write(1, 4096, 4096),
        staged(4096, &[3]),
        Asked::Zero(0, 8192, 4096),
        Asked::Finished,
    ];
    assert_eq!(&whole.asked[hook + 1..][..5], expected);
    for cut in 0..stream.len() {
        assert_eq!(rewrite_staged(&stream, &[cut]).unwrap().asked, whole.asked, "cut at {cut}");
    }
    let cuts: Vec<usize> = (1..stream.len()).collect();
    assert_eq!(rewrite_staged(&stream, &cuts).unwrap().asked, whole.asked);
}

/// A pause of QEMU within a page does not write half a page.
#[test]
fn a_flush_within_a_staged_page_waits_for_the_rest() {
    let stream = Build::with_blocks(&[("pc.ram", 1 << 20)]).part().page(0, Some("pc.ram"), 7).0;
    let mut recorder = Recorder { staged: vec!["pc.ram"], ..Recorder::default() };
    let mut rewriter = Rewriter::new(Limits::default());
    let (first, last) = stream.split_at(stream.len() - 1);
    rewriter.push(first, &mut recorder).unwrap();
    rewriter.flush(&mut recorder).unwrap();
    assert!(!recorder.asked.iter().any(|asked| matches!(asked, Asked::Copied(..))));
    rewriter.push(last, &mut recorder).unwrap();
    rewriter.flush(&mut recorder).unwrap();
    assert_eq!(recorder.asked.last().unwrap(), &Asked::Copied(0, 0, vec![7; 4096]));
}

/// Only QEMU can decode these pages.
#[test]
fn encoded_pages_of_a_staged_block_are_refused() {
    for stream in [
        Build::default().word(0x40).name("pc.ram").raw(b"\x01\0\x03abc"),
        Build::default().word(0x100).name("pc.ram").raw(b"\0\0\0\x05defgh"),
    ] {
        let setup = Build::with_blocks(&[("pc.ram", 1 << 20)]).part();
        let error = rewrite_staged(&setup.raw(&stream.0).0, &[]).err().unwrap();
        assert!(error.to_string().contains("XBZRLE or compression"), "{error}");
    }
}

proptest! {
    /// For any records, cuts and pauses: the destination ends with the last record of each page,
    /// and no write crosses a chunk.
    #[test]
    fn staged_pages_arrive_as_their_last_record_says(
        records in prop::collection::vec((0_u64..600, 0_u8..4, 0_u64..40), 1..12),
        cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..12),
    ) {
        const PAGES: usize = 640;
        let mut build = Build::with_blocks(&[("pc.ram", PAGES as u64 * 4096), ("rom", 8192)]).part();
        let mut expected = vec![0xff; PAGES];
        for (first, fill, count) in records {
            build = build.page(4096, Some("rom"), 0xee);
            for page in first..first + count {
                let name = (page == first).then_some("pc.ram");
                build = match fill {
                    0 => build.zero(page * 4096, name),
                    _ => build.page(page * 4096, name, fill),
                };
                expected[page as usize] = fill;
            }
        }
        let stream = build.end_of_section().last().end_of_section().raw(&[0]).0;
        let mut cuts: Vec<_> =
            cuts.iter().map(|(cut, pause)| (cut.index(stream.len()), *pause)).collect();
        cuts.sort_unstable();

        let (in_stream, staged) = (vec!["rom"], vec!["pc.ram"]);
        let mut recorder = Recorder { in_stream, staged, ..Recorder::default() };
        let mut rewriter = Rewriter::new(Limits::default());
        let mut from = 0;
        for (cut, pause) in cuts.into_iter().chain([(stream.len(), false)]) {
            rewriter.push(&stream[from..cut], &mut recorder).unwrap();
            if pause {
                rewriter.flush(&mut recorder).unwrap();
            }
            from = cut;
        }
        let mut memory = vec![0xff; PAGES];
        let mut hook_open = false;
        for asked in &recorder.asked {
            match asked {
                Asked::Hook => hook_open = true,
                Asked::Finished => hook_open = false,
                Asked::Copied(0, offset, bytes) => {
                    prop_assert!(hook_open);
                    let last = offset + bytes.len() as u64 - 1;
                    prop_assert_eq!(offset >> 20, last >> 20);
                    for (index, page) in bytes.chunks(4096).enumerate() {
                        prop_assert!(page.iter().all(|byte| *byte == page[0]));
                        memory[(offset >> 12) as usize + index] = page[0];
                    }
                }
                Asked::Zero(0, offset, length) => {
                    prop_assert!(hook_open);
                    memory[(offset >> 12) as usize..][..(length >> 12) as usize].fill(0);
                }
                Asked::Stream(_) => prop_assert!(!hook_open),
                Asked::Blocks(_) => {}
                other => prop_assert!(false, "{:?}", other),
            }
        }
        prop_assert_eq!(memory, expected);
    }
}
