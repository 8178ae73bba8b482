use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::stores::testing::{self, Model, page, read, write};
use crate::stores::{OpenError, Trouble};

fn open(path: &Path) -> Result<FileStore, FileError> {
    FileStore::new(&FileSpec { path: path.to_owned(), size_bytes: None })
}

/// A directory on a file system with blocks of its own, unlike /tmp on some machines.
fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").unwrap()
}

#[test]
fn a_directory_shows_nothing_of_the_store() {
    let dir = dir();
    let store = open(dir.path()).unwrap();
    let slot = write(&store, &page(10)).unwrap();
    assert_eq!(read(&store, slot).unwrap(), page(10));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    let metadata = store.target.file.metadata().unwrap();
    assert_eq!((metadata.nlink(), metadata.mode() & 0o777), (0, 0o600));
    println!("{:?}", store.report()[0].notes);
}

#[test]
fn a_new_file_is_private_and_goes_with_the_store() {
    let dir = dir();
    let path = dir.path().join("new");
    let store = open(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    assert!(matches!(open(&path), Err(FileError::InUse { .. })));
    write(&store, &page(10)).unwrap();
    assert!(matches!(open(&path), Err(FileError::NotEmpty { bytes: GROWTH_BYTES, .. })));
    drop(store);
    assert!(!path.exists());
}

#[test]
fn an_empty_file_is_used_and_left_empty() {
    let dir = dir();
    let path = dir.path().join("empty");
    File::options().write(true).create_new(true).mode(0o600).open(&path).unwrap();
    let link = dir.path().join("link");
    symlink(&path, &link).unwrap();
    let store = open(&link).unwrap();
    assert!(matches!(open(&path), Err(FileError::InUse { .. })));
    write(&store, &page(10)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), GROWTH_BYTES);
    drop(store);
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(open(&path), Err(FileError::Exposed { mode: 0o640, .. })));
}

#[test]
fn what_is_no_place_for_pages_is_refused() {
    let dir = dir();
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let full = dir.path().join("full");
    fs::write(&full, "something").unwrap();
    for (path, expected) in [
        (fifo.as_path(), "is a FIFO"),
        (&socket, "is a socket"),
        (&full, "9 bytes"),
        (Path::new("/dev/null"), "is a character device"),
        (Path::new("/proc/self/comm"), "the kernel's own"),
        (Path::new("/proc"), "the kernel's own"),
        (&dir.path().join("no/such"), "No such file or directory"),
        (&full.join("x"), "Not a directory"),
    ] {
        let error = open(path).err().unwrap_or_else(|| panic!("{} opens", path.display()));
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains(path.to_str().unwrap()), "{text}");
    }
    assert_eq!(fs::read_to_string(&full).unwrap(), "something");
    let spec = format!("file={}", fifo.display());
    let opened = testing::open(&spec).map(|_| ()).err();
    let Some(StoreError::Open(error)) = opened else { panic!("{spec}: {opened:?}") };
    assert!(matches!(*error, OpenError::File(FileError::Kind { .. })));
}

#[test]
fn a_bounded_store_is_full_at_its_bound() {
    let dir = dir();
    let spec = FileSpec { path: dir.path().to_owned(), size_bytes: Some(3 << 12) };
    let store = FileStore::new(&spec).unwrap();
    let pages = [page(10), page(11), page(12), page(13)];
    let mut writes = pages.each_ref().map(Write::new);
    store.write(&testing::may_wait(), &mut writes);
    let slots: Vec<_> = writes.iter().filter_map(|write| write.result.as_ref().ok()).collect();
    assert_eq!(slots.len(), 3);
    let full = writes[3].result.as_ref().unwrap_err();
    assert_eq!((full.trouble(), store.report()[0].capacity_bytes), (Trouble::Full, Some(3 << 12)));
    store.free(*slots[1]).unwrap();
    assert_eq!(write(&store, &page(13)).unwrap(), *slots[1]);
    store.close();
    assert!(matches!(read(&store, *slots[0]), Err(StoreError::Closed)));
    assert!(matches!(write(&store, &page(13)), Err(StoreError::Closed)));
}

/// A small tmpfs, gone with this value; `None` where it cannot be mounted.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "nowait-test"]).arg(dir.path());
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        if !mounted {
            println!("skipped: mounting a tmpfs needs root");
        }
        mounted.then_some(Self(dir))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_medium_without_space_is_full_and_recovers() {
    let Some(tmpfs) = Tmpfs::mount("size=256k") else { return };
    let store = open(tmpfs.0.path()).unwrap();
    println!("{:?}", store.report()[0].notes);
    let pages: Vec<_> = (0..64).map(page).collect();
    let mut slots = Vec::new();
    for _ in 0..2 {
        let mut writes: Vec<_> = pages.iter().map(Write::new).collect();
        store.write(&testing::may_wait(), &mut writes);
        slots.extend(writes.into_iter().map(|write| write.result));
    }
    let (stored, refused): (Vec<_>, Vec<_>) = slots.into_iter().partition(Result::is_ok);
    assert!((32..=64).contains(&stored.len()), "{} pages fit", stored.len());
    for error in refused {
        let error = error.unwrap_err();
        assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
        assert_eq!(error.trouble(), Trouble::Full);
    }
    let stored: Vec<Slot> = stored.into_iter().map(Result::unwrap).collect();
    for (slot, page) in stored.iter().zip(&pages) {
        assert_eq!(read(&store, *slot).unwrap(), *page);
    }
    store.free(stored[0]).unwrap();
    assert_eq!(write(&store, &page(99)).unwrap(), stored[0]);
}

/// A loop device, gone with this value; `None` where there are none.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        let name = output.ok().filter(|output| output.status.success());
        if name.is_none() {
            println!("skipped: a loop device needs root");
        }
        Some(Self(String::from_utf8(name?.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_used_behind_its_first_mib() {
    let dir = dir();
    let image = dir.path().join("image");
    File::create_new(&image).unwrap().set_len(DEVICE_BYTES).unwrap();
    let Some(device) = Loop::new(&image) else { return };
    let path = Path::new(&device.0);
    let store = open(path).unwrap();
    println!("{:?}", store.report()[0].notes);
    assert!(matches!(open(path), Err(FileError::InUse { .. })));
    assert_eq!(store.report()[0].capacity_bytes, Some(DEVICE_BYTES - (1 << 20)));
    let slot = write(&store, &page(10)).unwrap();
    assert_eq!(read(&store, slot).unwrap(), page(10));
    drop(store);
    // Its own data does not keep the next run away, anybody else's does.
    drop(reopen(path, None).unwrap());
    let wanted = reopen(path, Some(DEVICE_BYTES));
    assert!(matches!(wanted, Err(FileError::TooSmall { .. })));
    std::os::unix::fs::FileExt::write_all_at(
        &File::options().write(true).open(path).unwrap(),
        b"file system",
        1024,
    )
    .unwrap();
    assert!(matches!(reopen(path, None), Err(FileError::DeviceData { .. })));
}

/// Opens a device that was just closed: processes that other tests are starting may have it still.
fn reopen(path: &Path, size_bytes: Option<u64>) -> Result<FileStore, FileError> {
    let start = Instant::now();
    loop {
        match FileStore::new(&FileSpec { path: path.to_owned(), size_bytes }) {
            Err(FileError::InUse { .. }) if start.elapsed() < Duration::from_secs(10) => {
                thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

const DEVICE_BYTES: u64 = 8 << 20;

#[test]
fn batches_side_by_side_keep_their_pages_apart() {
    let dir = dir();
    let store = open(dir.path()).unwrap();
    thread::scope(|scope| {
        for thread in 0..4_u64 {
            let store = &store;
            scope.spawn(move || {
                for round in 0..8 {
                    let seed = (thread << 32 | round << 8) + 10;
                    let pages: Vec<_> = (seed..).take(64).map(page).collect();
                    let mut writes: Vec<_> = pages.iter().map(Write::new).collect();
                    store.write(&testing::may_wait(), &mut writes);
                    let mut buffers = vec![[0; 4096]; 64];
                    let mut reads: Vec<_> = (writes.into_iter().zip(&mut buffers))
                        .map(|(write, page)| Read::new(write.result.unwrap(), page))
                        .collect();
                    store.read(&testing::may_wait(), &mut reads);
                    for read in reads {
                        read.result.unwrap();
                        if read.slot.0 % 3 > 0 {
                            store.free(read.slot).unwrap();
                        }
                    }
                    assert_eq!(buffers, pages);
                }
            });
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn it_keeps_what_a_map_keeps(ops in testing::operations(40), uring: bool) {
        let dir = dir();
        let mut store = open(dir.path()).unwrap();
        if !uring {
            store.engine = Engine::one_by_one(&store.target.file).unwrap();
        }
        Model::new(None).run(&store, &ops)?;
    }
}
