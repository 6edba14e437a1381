//! A large amount of known data: one block of noise, repeated.

use std::fs::{self, File};
use std::io::{self, Write};

use super::spec::Spec;
use super::stdio::{Reader, Scratch};

/// A prime number, so that it is no multiple of the size of a buffer.
const BLOCK: usize = 1_048_573;

pub struct Bulk {
    scratch: Scratch,
    block: Vec<u8>,
    blocks: usize,
}

impl Bulk {
    /// Data of at least this many bytes.
    pub fn new(bytes: usize) -> Bulk {
        let noise = |n: usize| ((n as u32).wrapping_mul(2_654_435_761) >> 13) as u8;
        let block: Vec<u8> = (0..BLOCK).map(noise).collect();
        let scratch = Scratch::new("bulk");
        fs::write(scratch.join("block"), &block).expect("write a block");
        Bulk { scratch, block, blocks: bytes.div_ceil(BLOCK) }
    }

    /// Mounts the file that [`Bulk::script`] needs into a container.
    pub fn bind(&self, spec: Spec) -> Spec {
        spec.bind(self.scratch.as_str(), "/bulk", &["ro"])
    }

    /// Shell code that writes all data to stdout.
    pub fn script(&self) -> String {
        format!("i=0; while [ $i -lt {} ]; do cat /bulk/block; i=$((i+1)); done", self.blocks)
    }

    /// Writes all data.
    pub fn feed(&self, file: &File) {
        self.try_feed(file).expect("write a block");
    }

    /// As [`Self::feed`], but returns the error if the reader has closed its end.
    pub fn try_feed(&self, mut file: &File) -> io::Result<()> {
        (0..self.blocks).try_for_each(|_| file.write_all(&self.block))
    }

    /// The number of bytes.
    pub fn bytes(&self) -> usize {
        self.blocks * BLOCK
    }

    /// Reads to EOF and asserts that the data is the same, byte for byte.
    pub fn assert_arrives(&self, reader: &mut Reader) {
        self.assert_arrives_while(reader, usize::MAX, || ());
    }

    /// As [`Self::assert_arrives`], and calls `act` each time another `every` bytes have arrived.
    pub fn assert_arrives_while(&self, reader: &mut Reader, every: usize, act: impl FnMut()) {
        self.check_while(reader, every, act).unwrap_or_else(|wrong| panic!("{wrong}"));
    }

    /// Reads to EOF and returns what is wrong with the data.
    pub fn check(&self, reader: &mut Reader) -> Result<(), String> {
        self.check_while(reader, usize::MAX, || ())
    }

    /// As [`Self::check`], and calls `act` each time another `every` bytes have arrived.
    pub fn check_while(
        &self,
        reader: &mut Reader,
        every: usize,
        mut act: impl FnMut(),
    ) -> Result<(), String> {
        let (mut count, mut acted) = (0, 0);
        let mut other = false;
        let ended = reader.each(|mut piece| {
            while !piece.is_empty() && !other {
                let at = count % BLOCK;
                let (now, later) = piece.split_at(piece.len().min(BLOCK - at));
                other = now != &self.block[at..at + now.len()];
                count += now.len();
                piece = later;
            }
            if count / every > acted {
                acted = count / every;
                act();
            }
            !other
        });
        let expected = self.bytes();
        match (other, ended) {
            (true, _) => Err(format!("wrong bytes in the piece that ends at byte {count} of {expected}")),
            (_, false) => Err(format!("no EOF after {count} of {expected} bytes")),
            _ if count != expected => Err(format!("EOF after {count} of {expected} bytes")),
            _ => Ok(()),
        }
    }
}
