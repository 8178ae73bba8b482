//! Printing on COM1.

use core::fmt::{self, Write};

use crate::cpu::out8;

const COM1: u16 = 0x3f8;

struct Com1;

impl Write for Com1 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| out8(COM1, byte));
        Ok(())
    }
}

/// What [`println!`](crate::println) calls.
pub(crate) fn print(text: fmt::Arguments<'_>) {
    // It cannot fail but by what is printed.
    let _ = Com1.write_fmt(text);
}

/// Prints a line on COM1.
#[macro_export]
macro_rules! println {
    ($($text:tt)*) => {
        $crate::serial::print(format_args!("{}\n", format_args!($($text)*)))
    };
}
