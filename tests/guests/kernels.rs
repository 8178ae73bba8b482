//! Small bare-metal Multiboot kernels, assembled by hand.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

/// Where the code is loaded and entered.
const LOAD: u32 = 0x10_0000;
/// The Multiboot header comes first; the code after it.
const HEADER_BYTES: u32 = 12;

/// `mov al, value; out 0xf4, al; hlt`
pub(crate) const fn debug_exit(value: u8) -> [u8; 5] {
    [0xb0, value, 0xe6, 0xf4, 0xf4]
}

/// `mov dx, port; mov eax, value; out dx, eax`
pub(crate) fn out32(port: u16, value: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xba];
    code.extend(port.to_le_bytes());
    code.push(0xb8);
    code.extend(value.to_le_bytes());
    code.push(0xef);
    code
}

/// `mov al, [address]; out 0xf4, al; hlt`: ends with the byte at an address.
pub(crate) fn exit_with_byte_at(address: u32) -> Vec<u8> {
    let mut code = vec![0xa0];
    code.extend(address.to_le_bytes());
    code.extend([0xe6, 0xf4, 0xf4]);
    code
}

/// Prints the command line on COM1 and exits with the first byte of its module.
pub(crate) fn show_boot_information() -> Vec<u8> {
    vec![
        0x3d, 0x02, 0xb0, 0xad, 0x2b, // cmp eax, 0x2badb002
        0x75, 0x17, //                   jne fail
        0x8b, 0x73, 0x10, //             mov esi, [ebx + 16]  command line
        0xac, //                  next:  lodsb
        0x84, 0xc0, //                   test al, al
        0x74, 0x07, //                   jz done
        0x66, 0xba, 0xf8, 0x03, //       mov dx, 0x3f8
        0xee, //                         out dx, al
        0xeb, 0xf4, //                   jmp next
        0x8b, 0x73, 0x18, //      done:  mov esi, [ebx + 24]  module list
        0x8b, 0x36, //                   mov esi, [esi]       its start
        0xac, //                         lodsb
        0xeb, 0x02, //                   jmp out
        0xb0, 0x7f, //            fail:  mov al, 0x7f
        0xe6, 0xf4, //            out:   out 0xf4, al
        0xf4, //                         hlt
    ]
}

/// A kernel file in a directory that goes away with it.
pub(crate) struct TestKernel {
    directory: TempDir,
}

impl TestKernel {
    /// A Multiboot ELF32 kernel with this code.
    pub(crate) fn new(code: &[u8]) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        fs::write(directory.path().join("kernel"), elf32(code)).expect("the kernel can be written");
        Self { directory }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("kernel")
    }

    /// Another file beside the kernel.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, bytes).expect("the file can be written");
        path
    }
}

fn elf32(code: &[u8]) -> Vec<u8> {
    const ELF_HEADER_BYTES: u32 = 52;
    const PROGRAM_HEADER_BYTES: u32 = 32;
    let offset = ELF_HEADER_BYTES + PROGRAM_HEADER_BYTES;
    let length = HEADER_BYTES + code.len() as u32;
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 3, 0]); // ET_EXEC, EM_386
    for word in [1, LOAD + HEADER_BYTES, ELF_HEADER_BYTES, 0, 0] {
        file.extend(u32::to_le_bytes(word));
    }
    for half in [ELF_HEADER_BYTES as u16, PROGRAM_HEADER_BYTES as u16, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for word in [1, offset, LOAD, LOAD, length, length, 7, 4] {
        file.extend(u32::to_le_bytes(word));
    }
    for word in [0x1bad_b002u32, 0, 0u32.wrapping_sub(0x1bad_b002)] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}
