//! Writes seeded data to a disk or file, or compares what is there with it:
//! `seeded-data write|verify|zeroes PATH OFFSET LENGTH SEED [CHUNK]` (bytes; `zeroes` takes no seed).
//! `write` goes through the page cache and ends with fsync, CHUNK bytes a call.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};

use anyhow::{Context, Result, bail};
use guest_tests::{Seeded, fill};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| -> Result<u64> {
        let text = arguments
            .get(index)
            .with_context(|| format!("argument {} is missing", index + 1))?;
        text.parse()
            .with_context(|| format!("'{text}' is no number"))
    };
    let verb = arguments.first().context("write, verify or zeroes?")?;
    let path = arguments.get(1).context("PATH is missing")?;
    let (offset, length) = (number(2)?, number(3)?);
    match verb.as_str() {
        "write" => {
            let chunk = if arguments.len() > 5 {
                number(5)?
            } else {
                1 << 20
            };
            write(
                path,
                &Seeded {
                    seed: number(4)?,
                    offset,
                    length,
                },
                chunk as usize,
            )
        }
        "verify" => {
            let stretch = Seeded {
                seed: number(4)?,
                offset,
                length,
            };
            Ok(stretch.compare(&mut open_at(path, offset)?)?)
        }
        "zeroes" => zeroes(path, offset, length),
        _ => bail!("'{verb}' is none of write, verify, zeroes"),
    }
    .with_context(|| path.clone())
}

fn open_at(path: &str, offset: u64) -> Result<File> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    Ok(file)
}

fn write(path: &str, stretch: &Seeded, chunk: usize) -> Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.seek(SeekFrom::Start(stretch.offset))?;
    let mut buffer = vec![0; chunk];
    let mut done = 0;
    while done < stretch.length {
        let step = (stretch.length - done).min(chunk as u64) as usize;
        fill(stretch.seed, stretch.offset + done, &mut buffer[..step]);
        file.write_all(&buffer[..step])?;
        done += step as u64;
    }
    Ok(file.sync_all()?)
}

fn zeroes(path: &str, offset: u64, length: u64) -> Result<()> {
    let mut found = open_at(path, offset)?.take(length);
    let mut buffer = vec![0; 1 << 20];
    let mut position = offset;
    loop {
        let read = found.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        if let Some(at) = buffer[..read].iter().position(|&byte| byte != 0) {
            bail!(
                "byte {} is {:#04x}, should be zero",
                position + at as u64,
                buffer[at]
            );
        }
        position += read as u64;
    }
    if position != offset + length {
        bail!("it ends at byte {position}");
    }
    Ok(())
}
