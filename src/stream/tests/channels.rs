//! Streams whose pages arrive through multifd channels beside them.

use super::*;

const BLOCKS: [(&str, u64); 3] = [("pc.ram", 4 << 20), ("rom", 8192), ("stage", 8192)];

fn page(block: u32, offset: u64, fill: Option<u8>) -> ChannelPage {
    ChannelPage { block, offset, content: fill.map(|fill| Box::new([fill; 4096])) }
}

fn rewrite_beside(stream: &[u8], meetings: Vec<Vec<ChannelPage>>, cuts: &[usize]) -> Vec<Asked> {
    let mut recorder = Recorder {
        in_stream: vec!["rom"],
        staged: vec!["stage"],
        meetings: meetings.into(),
        ..Recorder::default()
    };
    let mut rewriter = Rewriter::beside_channels(Limits::default());
    let mut from = 0;
    for cut in cuts.iter().copied().chain([stream.len()]) {
        rewriter.push(&stream[from..cut], &mut recorder).unwrap();
        from = cut;
    }
    rewriter.finish().unwrap();
    assert!(recorder.meetings.is_empty());
    recorder.asked
}

/// Set-up with a MULTIFD_FLUSH, as from QEMU 8.1 on.
fn with_flush() -> Build {
    let Build(mut setup) = Build::with_blocks(&BLOCKS);
    let end = setup.split_off(setup.len() - 13);
    Build(setup).word(0x200).raw(&end)
}

/// End `section` with a sync point, and append a last section that ends with one.
fn met_twice(section: Build) -> Vec<u8> {
    section.word(0x200).end_of_section().last().word(0x200).end_of_section().raw(&[0]).0
}

/// QEMU 8.1 and later: MULTIFD_FLUSH at each sync point.
#[test]
fn channels_meet_at_each_flush() {
    let stream = met_twice(with_flush().part().end_of_section().part());
    let asked = rewrite_beside(&stream, vec![vec![], vec![], vec![]], &[]);
    let met = asked.iter().filter(|asked| **asked == Asked::Met).count();
    assert_eq!(met, 3);
    assert!(!asked.iter().any(|asked| matches!(asked, Asked::Write(..) | Asked::Zero(..))));
    let flush = 0x200_u64.to_be_bytes();
    for asked in &asked {
        if let Asked::Stream(bytes) = asked {
            assert!(!bytes.windows(8).any(|word| word == flush), "the destination gets no flush");
        }
    }
}

/// QEMU 7.2, 8.0, and later with their machine types: at the end of each RAM section.
#[test]
fn without_a_word_they_meet_at_each_sections_end() {
    let stream = Build::with_blocks(&BLOCKS)
        .part()
        .zero(0, Some("pc.ram"))
        .end_of_section()
        .last()
        .end_of_section()
        .raw(&[0])
        .0;
    let asked = rewrite_beside(&stream, vec![vec![], vec![], vec![]], &[]);
    assert_eq!(asked.iter().filter(|asked| **asked == Asked::Met).count(), 3);
    // Pages that precede the sync point in the stream are written first.
    let zero = asked.iter().position(|asked| *asked == Asked::Zero(0, 0, 4096)).unwrap();
    assert_eq!(asked[zero + 1], Asked::Met);
}

#[test]
fn pages_that_channels_cannot_write_are_records_again() {
    let stream = met_twice(with_flush().part());
    let pages =
        vec![page(1, 4096, Some(7)), page(1, 0, None), page(2, 0, Some(8)), page(2, 4096, Some(9))];
    let meetings = vec![vec![], pages, vec![page(1, 4096, Some(6))]];
    let asked = rewrite_beside(&stream, meetings.clone(), &[]);
    let staged = [[8; 4096], [9; 4096]].concat();
    assert!(asked.contains(&Asked::Copied(2, 0, staged)));
    let records = Build::default().page(4096, Some("rom"), 7).zero(0, None).0;
    let again = Build::default().page(4096, None, 6).end_of_section().0;
    let forwarded: Vec<u8> = asked
        .iter()
        .flat_map(|asked| if let Asked::Stream(bytes) = asked { bytes.clone() } else { Vec::new() })
        .collect();
    for wanted in [records, again] {
        let found = forwarded.windows(wanted.len()).any(|bytes| bytes == wanted);
        assert!(found, "records are forwarded");
    }
    for cut in 0..stream.len() {
        assert_eq!(rewrite_beside(&stream, meetings.clone(), &[cut]), asked, "cut at {cut}");
    }
}
