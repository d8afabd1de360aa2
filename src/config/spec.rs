//! SPEC of `export` and `serve`: what stores a namespace's blocks, and how it is shown.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use nvmf::backend::fault::Fault;
use uuid::Uuid;

use super::fault::{FaultError, parse_fault};
use super::ids::{IdError, parse_uuid};
use super::powercut::{PowerCut, PowerCutError};
use super::size::{Size, SizeError};

/// One namespace, as written on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spec {
    /// Where the blocks are.
    pub(crate) storage: Storage,
    /// Logical block size.
    pub(crate) block_size: BlockSize,
    /// The namespace's UUID, when one was chosen.
    pub(crate) uuid: Option<Uuid>,
    /// What goes wrong with the storage on purpose, in order.
    pub(crate) faults: Vec<Fault>,
    /// A volatile write cache over it.
    pub(crate) powercut: Option<PowerCut>,
}

/// Where the blocks of a namespace are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Storage {
    /// A raw file or a block device.
    File {
        /// Its path.
        path: PathBuf,
        /// Writes are refused.
        read_only: bool,
        /// Past the page cache.
        direct: bool,
    },
    /// Memory, zeroes at first, gone at exit.
    Ram {
        /// Size, a multiple of the block size.
        size: Size,
    },
    /// Nothing: reads are zeroes, writes are dropped.
    Null {
        /// Size, a multiple of the block size.
        size: Size,
    },
}

/// Logical block sizes that a namespace can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum BlockSize {
    /// 512 bytes.
    #[default]
    B512,
    /// 4096 bytes.
    B4096,
}

impl BlockSize {
    /// Bytes.
    pub(crate) fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }
}

/// Why a string is not a SPEC.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SpecError {
    /// No path.
    #[error("there is no path; write PATH, file:PATH, ram:SIZE or null:SIZE")]
    NoPath,
    /// Bad size of `ram:` or `null:`.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// A size that is not a whole number of blocks.
    #[error(
        "{kind}:{size} is not a multiple of the block size {block_size}; round the size to a multiple"
    )]
    NotBlocks {
        /// `ram` or `null`.
        kind: &'static str,
        /// The size.
        size: Size,
        /// The block size in bytes.
        block_size: u32,
    },
    /// An option of files with something else.
    #[error("'{option}' makes no sense with {kind}:, only with a file; leave it out")]
    FileOnly {
        /// The option.
        option: &'static str,
        /// `ram` or `null`.
        kind: &'static str,
    },
    /// Another block size.
    #[error("block-size={0} is not supported; write block-size=512 or block-size=4096")]
    BlockSize(String),
    /// Bad UUID.
    #[error("uuid={value}: {error}")]
    Uuid {
        /// As written.
        value: String,
        /// What is wrong with it.
        error: IdError,
    },
    /// Bad fault.
    #[error("fault={value}: {error}")]
    Fault {
        /// As written.
        value: String,
        /// What is wrong with it.
        error: FaultError,
    },
    /// Bad cache.
    #[error("powercut={value}: {error}")]
    PowerCut {
        /// As written.
        value: String,
        /// What is wrong with it.
        error: PowerCutError,
    },
    /// An option that does not exist.
    #[error(
        "option '{0}' is unknown; there are ro, direct, block-size=, uuid=, fault= and powercut (a comma in a path is written ',,')"
    )]
    Option(String),
    /// An option twice.
    #[error("option '{0}' is given twice; keep one")]
    Twice(&'static str),
}

impl Spec {
    /// A file or block device, with nothing more said about it.
    pub(crate) fn file(path: PathBuf) -> Self {
        Self {
            storage: Storage::File {
                path,
                read_only: false,
                direct: false,
            },
            block_size: BlockSize::default(),
            uuid: None,
            faults: Vec::new(),
            powercut: None,
        }
    }

    /// Parses `PATH | file:PATH[,ro][,direct] | ram:SIZE | null:SIZE`, with `,block-size=512|4096`, `,uuid=U`,
    /// `,powercut[=SIZE]` and any number of `,fault=RULE` in any order. A comma in a path is written twice.
    ///
    /// # Errors
    /// [`SpecError`] says what is wrong and what to write.
    pub(crate) fn parse(text: &OsStr) -> Result<Self, SpecError> {
        let mut fields = split(text.as_bytes()).into_iter();
        let subject = fields.next().unwrap_or_default();
        let (mut read_only, mut direct, mut block_size, mut uuid) = (None, None, None, None);
        let (mut faults, mut powercut) = (Vec::new(), None);
        for option in fields {
            let option = String::from_utf8_lossy(&option).into_owned();
            match option.split_once('=') {
                None if option == "ro" => once("ro", &mut read_only, ())?,
                None if option == "direct" => once("direct", &mut direct, ())?,
                Some(("block-size", value)) => {
                    once("block-size", &mut block_size, parse_block_size(value)?)?;
                }
                Some(("uuid", value)) => {
                    let id = parse_uuid(value).map_err(|error| SpecError::Uuid {
                        value: value.to_owned(),
                        error,
                    })?;
                    once("uuid", &mut uuid, id)?;
                }
                Some(("fault", value)) => {
                    let fault = parse_fault(value).map_err(|error| SpecError::Fault {
                        value: value.to_owned(),
                        error,
                    })?;
                    faults.push(fault);
                }
                None if option == "powercut" => {
                    once("powercut", &mut powercut, PowerCut::default())?;
                }
                Some(("powercut", value)) => {
                    let cache = value.parse().map_err(|error| SpecError::PowerCut {
                        value: value.to_owned(),
                        error,
                    })?;
                    once("powercut", &mut powercut, cache)?;
                }
                _ => return Err(SpecError::Option(option)),
            }
        }
        let block_size = block_size.unwrap_or_default();
        Ok(Self {
            storage: storage(subject, read_only.is_some(), direct.is_some(), block_size)?,
            block_size,
            uuid,
            faults,
            powercut,
        })
    }
}

fn storage(
    subject: Vec<u8>,
    read_only: bool,
    direct: bool,
    block_size: BlockSize,
) -> Result<Storage, SpecError> {
    for kind in ["ram", "null"] {
        let prefix = subject.strip_prefix(kind.as_bytes());
        let Some(size) = prefix.and_then(|rest| rest.strip_prefix(b":")) else {
            continue;
        };
        let size: Size = String::from_utf8_lossy(size).parse()?;
        for (option, given) in [("ro", read_only), ("direct", direct)] {
            if given {
                return Err(SpecError::FileOnly { option, kind });
            }
        }
        let block_size = block_size.bytes();
        if !size.bytes().is_multiple_of(block_size.into()) {
            return Err(SpecError::NotBlocks {
                kind,
                size,
                block_size,
            });
        }
        return Ok(match kind {
            "ram" => Storage::Ram { size },
            _ => Storage::Null { size },
        });
    }
    let path = match subject.strip_prefix(b"file:") {
        Some(path) => path.to_vec(),
        None => subject,
    };
    if path.is_empty() {
        return Err(SpecError::NoPath);
    }
    Ok(Storage::File {
        path: OsString::from_vec(path).into(),
        read_only,
        direct,
    })
}

fn parse_block_size(value: &str) -> Result<BlockSize, SpecError> {
    match value {
        "512" => Ok(BlockSize::B512),
        "4096" => Ok(BlockSize::B4096),
        other => Err(SpecError::BlockSize(other.to_owned())),
    }
}

fn once<T>(name: &'static str, slot: &mut Option<T>, value: T) -> Result<(), SpecError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(SpecError::Twice(name)),
    }
}

/// Splits at single commas; two in a row are one comma of the field.
fn split(text: &[u8]) -> Vec<Vec<u8>> {
    let mut fields = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        let is_separator = byte == b',' && bytes.next_if_eq(&b',').is_none();
        match fields.last_mut() {
            Some(field) if !is_separator => field.push(byte),
            _ => fields.push(Vec::new()),
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Spec, SpecError> {
        Spec::parse(OsStr::new(text))
    }

    fn file(path: &str, read_only: bool) -> Storage {
        Storage::File {
            path: path.into(),
            read_only,
            direct: false,
        }
    }

    #[test]
    fn a_path_may_have_a_prefix_and_may_be_read_only() {
        assert_eq!(parse("/a/b").unwrap().storage, file("/a/b", false));
        assert_eq!(parse("file:x").unwrap().storage, file("x", false));
        assert_eq!(parse("file:x,ro").unwrap().storage, file("x", true));
        assert_eq!(parse("file:ram:1").unwrap().storage, file("ram:1", false));
    }

    #[test]
    fn direct_is_for_files_and_null_has_a_size() {
        let direct = Storage::File {
            path: "/a".into(),
            read_only: true,
            direct: true,
        };
        assert_eq!(parse("/a,direct,ro").unwrap().storage, direct);
        let size = "1T".parse().unwrap();
        assert_eq!(parse("null:1T").unwrap().storage, Storage::Null { size });
        for (text, option, kind) in [
            ("ram:1M,direct", "direct", "ram"),
            ("null:1M,direct", "direct", "null"),
            ("null:1M,ro", "ro", "null"),
        ] {
            assert_eq!(parse(text), Err(SpecError::FileOnly { option, kind }));
        }
        assert!(matches!(
            parse("null:512,block-size=4096"),
            Err(SpecError::NotBlocks { kind: "null", .. })
        ));
    }

    #[test]
    fn a_doubled_comma_belongs_to_the_path() {
        assert_eq!(parse("/a,,b,ro").unwrap().storage, file("/a,b", true));
        assert_eq!(parse("/a,,,ro").unwrap().storage, file("/a,", true));
        assert_eq!(parse("/a,,").unwrap().storage, file("/a,", false));
    }

    #[test]
    fn a_path_need_not_be_utf_8() {
        let spec = Spec::parse(OsStr::from_bytes(b"file:/a\xff,ro")).unwrap();
        assert_eq!(
            spec.storage,
            Storage::File {
                path: OsStr::from_bytes(b"/a\xff").into(),
                read_only: true,
                direct: false
            }
        );
    }

    #[test]
    fn options_come_in_any_order() {
        let uuid = Uuid::from_u128(0x1234);
        let spec = parse(&format!("ram:64M,uuid={uuid},block-size=4096")).unwrap();
        assert_eq!(
            spec,
            Spec {
                storage: Storage::Ram {
                    size: "64M".parse().unwrap()
                },
                block_size: BlockSize::B4096,
                uuid: Some(uuid),
                faults: Vec::new(),
                powercut: None,
            }
        );
        assert_eq!(parse("x").unwrap().block_size, BlockSize::B512);
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(parse(""), Err(SpecError::NoPath));
        assert_eq!(parse("file:,ro"), Err(SpecError::NoPath));
        assert_eq!(
            parse("ram:1M,ro"),
            Err(SpecError::FileOnly {
                option: "ro",
                kind: "ram"
            })
        );
        assert_eq!(parse("x,rw"), Err(SpecError::Option("rw".into())));
        assert_eq!(parse("x,"), Err(SpecError::Option(String::new())));
        assert_eq!(parse("x,ro=1"), Err(SpecError::Option("ro=1".into())));
        assert_eq!(parse("x,ro,ro"), Err(SpecError::Twice("ro")));
        assert_eq!(
            parse("x,block-size=1024"),
            Err(SpecError::BlockSize("1024".into()))
        );
        assert_eq!(
            parse("ram:x").unwrap_err(),
            SpecError::Size(SizeError::Form("x".into()))
        );
        assert!(matches!(
            parse("ram:512,block-size=4096"),
            Err(SpecError::NotBlocks { .. })
        ));
        assert!(matches!(parse("x,uuid=1"), Err(SpecError::Uuid { .. })));
        assert!(matches!(parse("x,fault=1"), Err(SpecError::Fault { .. })));
        let wrong = parse("x,powercut=1");
        assert!(matches!(wrong, Err(SpecError::PowerCut { .. })));
        let twice = parse("x,powercut,powercut=1M");
        assert_eq!(twice, Err(SpecError::Twice("powercut")));
    }

    #[test]
    fn faults_keep_their_order() {
        let spec = parse("x,fault=hang:read,ro,fault=error:write").unwrap();
        let faults = ["hang:read", "error:write"].map(|text| parse_fault(text).unwrap());
        assert_eq!(spec.faults, faults);
    }
}
