//! What kind of kernel a file is, found out before anything of the VM exists.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use object::LittleEndian;
use object::elf::{self, FileHeader32, FileHeader64};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};

use super::multiboot;
use crate::boot::layout::KERNEL_MIN;
use crate::operand::{self, OperandError};

/// How a kernel is to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A 64-bit ELF `vmlinux`, entered in 32-bit mode by the PVH protocol.
    Pvh,
    /// A bzImage, entered by the 64-bit Linux boot protocol.
    BzImage,
    /// A 32-bit ELF with a Multiboot 1 header.
    Multiboot,
}

/// Why a kernel was refused. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It cannot be opened or read.
    #[error("cannot read kernel '{path}': {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not a regular file.
    #[error(
        "kernel '{path}': it is {kind}, not a regular file: \
         give a vmlinux (ELF), a bzImage or a Multiboot kernel"
    )]
    NotAFile {
        /// What was given.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// It has no bytes.
    #[error("kernel '{0}' is empty: was its build or copy interrupted?")]
    Empty(PathBuf),
    /// No known format.
    #[error(
        "kernel '{path}' is not a kernel that nowait can load ({found}): \
         give a vmlinux (ELF), a bzImage or a Multiboot kernel for x86-64"
    )]
    Unknown {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        found: String,
    },
    /// Another processor.
    #[error("kernel '{path}' is built for {machine}: nowait runs x86-64 kernels only")]
    Machine {
        /// The file.
        path: PathBuf,
        /// The processor that it is for.
        machine: String,
    },
    /// A 32-bit Linux kernel.
    #[error("kernel '{0}' is 32-bit only: give a kernel built with CONFIG_64BIT=y")]
    Only32Bit(PathBuf),
    /// The file ends before its headers say.
    #[error("kernel '{path}' is truncated or damaged ({detail}): copy or build it again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        detail: String,
    },
    /// It wants to lie where nowait puts its own tables.
    #[error(
        "kernel '{path}' wants to be loaded at {address:#x}: nowait loads kernels at {KERNEL_MIN:#x} and above"
    )]
    TooLow {
        /// The file.
        path: PathBuf,
        /// The physical address of its lowest segment.
        address: u64,
    },
}

/// A kernel file whose format is known.
#[derive(Debug)]
pub struct Kernel {
    /// The open file.
    pub file: File,
    /// Its path, for messages.
    pub path: PathBuf,
    /// How to enter it.
    pub format: Format,
    /// What of an ELF goes where, ascending and without overlap; empty with a bzImage.
    pub segments: Vec<Segment>,
}

/// A part of an ELF that is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its physical address.
    pub address: u64,
    /// How many bytes come from the file; the rest is zero.
    pub file_bytes: u64,
    /// How many bytes it has in memory, never 0.
    pub memory_bytes: u64,
}

impl Segment {
    /// The address after it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.address + self.memory_bytes
    }
}

/// How much of a file is looked at to tell what it is: a Multiboot header lies in the first 8 KiB.
const HEAD_BYTES: u64 = multiboot::SEARCH_BYTES as u64;
/// Offset of `HdrS` in a bzImage, and of the fields after it (Documentation/arch/x86/boot.rst).
const BZIMAGE_MAGIC_OFFSET: usize = 0x202;
const BZIMAGE_VERSION_OFFSET: usize = 0x206;
const BZIMAGE_XLOADFLAGS_OFFSET: usize = 0x236;
const BZIMAGE_HEADER_END: usize = 0x270;
/// Boot protocol 2.12 introduced `xloadflags`.
const BZIMAGE_MIN_VERSION: u16 = 0x020c;
/// `XLF_KERNEL_64`: the kernel has the 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// The longest notes that are searched for the PVH entry point; Linux has a few hundred bytes.
const NOTES_MAX_BYTES: u64 = 1 << 20;

impl Kernel {
    /// Opens a kernel and finds out how it is to be entered.
    ///
    /// # Errors
    /// When the file cannot be read, is no kernel for x86-64, or does not hold together.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        let read = |source| KernelError::Read { path: path.to_owned(), source };
        let (mut file, bytes) = operand::open_regular(path).map_err(|error| match error {
            OperandError::Kind(kind) => KernelError::NotAFile { path: path.to_owned(), kind },
            OperandError::Io(source) => read(source),
            other => read(std::io::Error::other(other)),
        })?;
        // Before it is read: the kernel's own log is a file of no length that waits for a message.
        if bytes == 0 {
            return Err(KernelError::Empty(path.to_owned()));
        }
        let mut head = Vec::new();
        file.by_ref().take(HEAD_BYTES).read_to_end(&mut head).map_err(read)?;
        let (format, segments) = detect(path, &head, &file)?;
        file.seek(SeekFrom::Start(0)).map_err(read)?;
        Ok(Self { file, path: path.to_owned(), format, segments })
    }
}

fn detect(path: &Path, head: &[u8], file: &File) -> Result<(Format, Vec<Segment>), KernelError> {
    let unknown = |found: &str| KernelError::Unknown { path: path.to_owned(), found: found.into() };
    match head {
        [] => Err(KernelError::Empty(path.to_owned())),
        [0x7f, b'E', b'L', b'F', class, ..] => match *class {
            1 => elf32(path, head, file),
            2 => elf64(path, file),
            _ => Err(damaged(path, "the ELF class is neither 32 nor 64 bits")),
        },
        [0x1f, 0x8b, ..] => Err(unknown("it is compressed with gzip: uncompress it first")),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            Err(unknown("it is compressed with zstd: uncompress it first"))
        }
        [0xfd, b'7', b'z', b'X', b'Z', ..] => {
            Err(unknown("it is compressed with xz: uncompress it first"))
        }
        _ if head.get(0x38..0x3c) == Some(b"ARM\x64") => {
            Err(KernelError::Machine { path: path.to_owned(), machine: "AArch64".into() })
        }
        _ if head.get(BZIMAGE_MAGIC_OFFSET..BZIMAGE_MAGIC_OFFSET + 4) == Some(b"HdrS") => {
            bzimage(path, head).map(|format| (format, Vec::new()))
        }
        _ => Err(unknown("no ELF, bzImage or Multiboot header")),
    }
}

fn damaged(path: &Path, detail: &str) -> KernelError {
    KernelError::Damaged { path: path.to_owned(), detail: detail.into() }
}

fn bzimage(path: &Path, head: &[u8]) -> Result<Format, KernelError> {
    if head.len() < BZIMAGE_HEADER_END {
        return Err(damaged(path, "it ends inside the bzImage setup header"));
    }
    let field = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let version = field(BZIMAGE_VERSION_OFFSET);
    if version < BZIMAGE_MIN_VERSION {
        return Err(damaged(path, "its boot protocol is older than 2.12 (Linux 3.8)"));
    }
    if field(BZIMAGE_XLOADFLAGS_OFFSET) & XLF_KERNEL_64 == 0 {
        return Err(KernelError::Only32Bit(path.to_owned()));
    }
    Ok(Format::BzImage)
}

fn elf64(path: &Path, file: &File) -> Result<(Format, Vec<Segment>), KernelError> {
    let cache = ReadCache::new(file);
    let header = FileHeader64::<LittleEndian>::parse(&cache)
        .map_err(|error| damaged(path, &error.to_string()))?;
    check_machine(path, header, elf::EM_X86_64)?;
    Ok((Format::Pvh, check_segments(path, header, &cache)?))
}

fn elf32(path: &Path, head: &[u8], file: &File) -> Result<(Format, Vec<Segment>), KernelError> {
    let cache = ReadCache::new(file);
    let header = FileHeader32::<LittleEndian>::parse(&cache)
        .map_err(|error| damaged(path, &error.to_string()))?;
    check_machine(path, header, elf::EM_386)?;
    if multiboot::find_header(head).is_none() {
        return Err(KernelError::Only32Bit(path.to_owned()));
    }
    Ok((Format::Multiboot, check_segments(path, header, &cache)?))
}

fn check_machine<H: FileHeader<Endian = LittleEndian>>(
    path: &Path,
    header: &H,
    wanted: elf::Machine,
) -> Result<(), KernelError> {
    if header.endian().is_err() {
        return Err(KernelError::Machine {
            path: path.to_owned(),
            machine: "a big-endian processor".into(),
        });
    }
    let machine = header.e_machine(LittleEndian);
    if machine == wanted {
        return Ok(());
    }
    let name = match machine {
        elf::EM_AARCH64 => "AArch64".into(),
        elf::EM_ARM => "ARM".into(),
        elf::EM_RISCV => "RISC-V".into(),
        elf::EM_386 => "i386".into(),
        elf::EM_X86_64 => "x86-64 in a 32-bit ELF (x32)".into(),
        other => format!("{other:?}"),
    };
    Err(KernelError::Machine { path: path.to_owned(), machine: name })
}

/// Every loadable segment must lie in the file, and above the first MiB of guest memory beside the
/// others.
fn check_segments<H: FileHeader<Endian = LittleEndian>>(
    path: &Path,
    header: &H,
    cache: &ReadCache<&File>,
) -> Result<Vec<Segment>, KernelError> {
    let kind = header.e_type(LittleEndian);
    if kind != elf::ET_EXEC && kind != elf::ET_DYN {
        return Err(damaged(path, "it is an object file or a core dump, not an executable"));
    }
    let file_length = object::read::ReadRef::len(cache).unwrap_or(0);
    let mut segments = Vec::new();
    let headers = header
        .program_headers(LittleEndian, cache)
        .map_err(|error| damaged(path, &error.to_string()))?;
    for header in headers {
        let kind = header.p_type(LittleEndian);
        let offset: u64 = header.p_offset(LittleEndian).into();
        let file_bytes: u64 = header.p_filesz(LittleEndian).into();
        let in_file = offset.checked_add(file_bytes).is_some_and(|end| end <= file_length);
        if (kind == elf::PT_LOAD || kind == elf::PT_NOTE) && !in_file {
            return Err(damaged(path, "a segment lies outside the file"));
        }
        if kind == elf::PT_NOTE && file_bytes > NOTES_MAX_BYTES {
            return Err(damaged(path, "its notes are longer than a MiB"));
        }
        if kind == elf::PT_LOAD {
            segments.extend(segment(path, header, file_bytes)?);
        }
    }
    segments.sort_by_key(|segment| segment.address);
    if segments.iter().all(|segment| segment.file_bytes == 0) {
        return Err(damaged(path, "it has no loadable segment"));
    }
    if segments.windows(2).any(|pair| pair[0].end() > pair[1].address) {
        return Err(damaged(path, "its segments overlap in memory"));
    }
    Ok(segments)
}

/// A segment to load; `None` when there is nothing of it.
fn segment<P: ProgramHeader<Endian = LittleEndian>>(
    path: &Path,
    header: &P,
    file_bytes: u64,
) -> Result<Option<Segment>, KernelError> {
    let address: u64 = header.p_paddr(LittleEndian).into();
    let memory_bytes: u64 = header.p_memsz(LittleEndian).into();
    if memory_bytes < file_bytes || address.checked_add(memory_bytes).is_none() {
        return Err(damaged(path, "a segment's sizes contradict each other"));
    }
    if memory_bytes == 0 {
        return Ok(None);
    }
    if address < KERNEL_MIN {
        return Err(KernelError::TooLow { path: path.to_owned(), address });
    }
    Ok(Some(Segment { address, file_bytes, memory_bytes }))
}
