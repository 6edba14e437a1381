//! Much data of which every byte is known: a block of noise, over and over.

use std::fs::{self, File};
use std::io::Write;

use super::spec::Spec;
use super::stdio::{Reader, Scratch};

/// A prime, so that no buffer's size goes into it.
const BLOCK: usize = 1_048_573;

pub struct Bulk {
    scratch: Scratch,
    block: Vec<u8>,
    blocks: usize,
}

impl Bulk {
    /// At least so many bytes.
    pub fn new(bytes: usize) -> Bulk {
        let noise = |n: usize| ((n as u32).wrapping_mul(2_654_435_761) >> 13) as u8;
        let block: Vec<u8> = (0..BLOCK).map(noise).collect();
        let scratch = Scratch::new("bulk");
        fs::write(scratch.join("block"), &block).expect("write a block");
        Bulk { scratch, block, blocks: bytes.div_ceil(BLOCK) }
    }

    /// Gives a container what [`Bulk::script`] needs.
    pub fn bind(&self, spec: Spec) -> Spec {
        spec.bind(self.scratch.as_str(), "/bulk", &["ro"])
    }

    /// Shell code that writes it all to stdout.
    pub fn script(&self) -> String {
        format!("i=0; while [ $i -lt {} ]; do cat /bulk/block; i=$((i+1)); done", self.blocks)
    }

    /// Writes it all.
    pub fn feed(&self, mut file: &File) {
        (0..self.blocks).for_each(|_| file.write_all(&self.block).expect("write a block"));
    }

    /// Reads to EOF and asserts that it is this, byte for byte.
    pub fn assert_arrives(&self, reader: &mut Reader) {
        let mut count = 0;
        let ended = reader.each(|mut piece| {
            while !piece.is_empty() {
                let at = count % BLOCK;
                let (now, later) = piece.split_at(piece.len().min(BLOCK - at));
                assert!(now == &self.block[at..at + now.len()], "other bytes after {count}");
                count += now.len();
                piece = later;
            }
            true
        });
        assert!(ended, "no EOF after {count} bytes");
        assert_eq!(count, self.blocks * BLOCK);
    }
}
