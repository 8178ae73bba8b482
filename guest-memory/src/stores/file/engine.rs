//! How batches of pages get to a file and back: by io_uring, or one after the other where that is not
//! permitted. Pages are copied to and from aligned ones, as O_DIRECT wants them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use crate::address::{PAGE_SIZE, PageBytes};
use crate::sys::ring::{AlignedPage, Direction, Ring, aligned_pages};

/// How many idle rings are kept. A ring is about 270 KiB.
const MAX_IDLE: usize = 8;

/// The means for any number of batches at a time.
pub(super) struct Engine {
    file: File,
    idle: Mutex<Vec<Means>>,
    /// Why there is no io_uring, if there is none.
    no_uring: Option<io::Error>,
}

/// The means for one batch at a time.
enum Means {
    Uring(Box<Ring>),
    OneByOne(Box<[AlignedPage]>),
}

impl Engine {
    /// Finds out whether io_uring is permitted.
    pub(super) fn new(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        Ok(match Ring::new() {
            Ok(ring) => {
                Self { file, idle: Mutex::new(vec![Means::Uring(ring.into())]), no_uring: None }
            }
            Err(error) => Self { file, idle: Mutex::default(), no_uring: Some(error) },
        })
    }

    /// An engine that does without io_uring.
    #[cfg(test)]
    pub(super) fn one_by_one(file: &File) -> io::Result<Self> {
        let no_uring = Some(io::ErrorKind::PermissionDenied.into());
        Ok(Self { file: file.try_clone()?, idle: Mutex::default(), no_uring })
    }

    /// What the report says of it.
    pub(super) fn note(&self) -> String {
        match &self.no_uring {
            None => "io_uring".to_owned(),
            Some(error) => format!(
                "pread and pwrite, for io_uring is not to be had ({error}): see sysctl \
                 kernel.io_uring_disabled and the container's seccomp profile"
            ),
        }
    }

    /// Reads a page from each of the offsets and hands them to `each`, in order.
    ///
    /// # Errors
    /// When the batch as a whole could not be read; then `each` was not called.
    pub(super) fn read(
        &self,
        offsets: &[u64],
        mut each: impl FnMut(usize, io::Result<&PageBytes>),
    ) -> io::Result<()> {
        let mut means = self.take();
        let done = means.run(&self.file, Direction::Read, offsets)?;
        for (index, (done, page)) in done.iter().zip(means.pages()).enumerate() {
            let read = match done {
                true => Ok(()),
                false => self.file.read_exact_at(&mut page.0, offsets[index]),
            };
            each(index, read.map(|()| &page.0));
        }
        self.put(means);
        Ok(())
    }

    /// Writes pages, each to its offset.
    ///
    /// # Errors
    /// When nobody knows which pages are written, or will be still.
    pub(super) fn write(
        &self,
        offsets: &[u64],
        pages: &[&PageBytes],
    ) -> io::Result<Vec<io::Result<()>>> {
        let mut means = self.take();
        for (aligned, page) in means.pages().iter_mut().zip(pages) {
            aligned.0 = **page;
        }
        let done = means.run(&self.file, Direction::Write, offsets)?;
        let answers = (done.iter().zip(means.pages()).zip(offsets))
            .map(|((done, page), offset)| match done {
                true => Ok(()),
                false => self.file.write_all_at(&page.0, *offset),
            })
            .collect();
        self.put(means);
        Ok(answers)
    }

    fn take(&self) -> Means {
        let idle = self.idle.lock().expect("nothing panics with this lock held").pop();
        idle.unwrap_or_else(|| match self.no_uring {
            None => {
                Ring::new().map_or_else(|_| Means::one_by_one(), |ring| Means::Uring(ring.into()))
            }
            Some(_) => Means::one_by_one(),
        })
    }

    fn put(&self, means: Means) {
        let mut idle = self.idle.lock().expect("nothing panics with this lock held");
        if idle.len() < MAX_IDLE {
            idle.push(means);
        }
    }
}

impl Means {
    fn one_by_one() -> Self {
        Self::OneByOne(aligned_pages())
    }

    fn pages(&mut self) -> &mut [AlignedPage] {
        match self {
            Self::Uring(ring) => ring.pages(),
            Self::OneByOne(pages) => pages,
        }
    }

    /// Moves a batch and says for each page whether it is done. What is not, the caller does one by
    /// one, which finishes what was cut short and gives errors their names.
    fn run(&mut self, file: &File, direction: Direction, offsets: &[u64]) -> io::Result<Vec<bool>> {
        match self {
            // One page is one system call in either way.
            Self::Uring(ring) if offsets.len() > 1 => {
                let lengths = ring.run(file, direction, offsets)?;
                Ok(lengths.iter().map(|len| *len == PAGE_SIZE as i32).collect())
            }
            _ => Ok(vec![false; offsets.len()]),
        }
    }
}
