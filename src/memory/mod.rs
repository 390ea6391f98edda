//! Guest RAM: the files that back it, their mappings, and the ways bytes enter and leave them.
//!
//! Owns every access to guest memory. Guest RAM changes while QEMU runs, so no reference to it
//! (`&[u8]`) ever exists: bytes move between a region and a socket or a buffer of ours, by system
//! call on the file or by raw pointer on the mapping. Knows neither messages nor fabrics.

mod huge_pages;
mod hugetlb;
mod inherited;
mod mapping;
mod peer;
mod pipe;
mod prefault;
mod ranges;
mod region;
mod shortage;
mod write_window;

pub use inherited::{close_on_exec_from, inherited};
pub use peer::peer_process;
pub use pipe::Pipe;
pub use ranges::Ranges;
pub use region::{Region, RegionError};
pub use write_window::WriteWindow;
