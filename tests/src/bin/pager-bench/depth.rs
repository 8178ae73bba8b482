//! How many pages a store gives in a second when many are asked for at once: 32 threads that fault beside
//! one, through the pager and its workers, with 200 us of latency added to each read.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::Result;
use nowait_tests::figures::Figure;

use crate::machine::Machine;
use crate::probe::{Probe, Samples};
use crate::rates::{Size, incompressible};
use crate::servers::Server;

/// At least this many times the rate of one at a time.
const BAR: f64 = 8.0;
const SYNCHRONOUS: Size = Size { pages: 600, threads: 1 };
const DEEP: Size = Size { pages: 12_000, threads: 32 };
const STORES: [&str; 3] = ["file", "nbd_qemu", "nbd_nbdkit"];

pub(crate) fn probes(directory: &Path) -> Vec<Probe> {
    let directory: Rc<Path> = directory.into();
    let probe = |store: &'static str, size: Size| {
        let directory = Rc::clone(&directory);
        Probe::new(name(store, size), "pages/s", move |_| rate(store, size, &directory))
    };
    STORES.into_iter().flat_map(|store| [probe(store, SYNCHRONOUS), probe(store, DEEP)]).collect()
}

pub(crate) fn figures(samples: &Samples) -> Vec<Figure> {
    let figure = |store| {
        let ratio = samples.ratio(&name(store, DEEP), &name(store, SYNCHRONOUS))?;
        let name = format!("store.{store}_depth_32_over_1");
        Some(Figure::at_least(&name, ratio, "ratio", BAR))
    };
    STORES.into_iter().filter_map(figure).collect()
}

fn name(store: &str, size: Size) -> String {
    format!("depth: {store}, {} at once", size.threads)
}

fn rate(store: &str, size: Size, directory: &Path) -> Result<f64> {
    let run = |store: &str| {
        let store = format!("delay=200us+{store}");
        let machine = Machine::stored(size.pages, &store, incompressible)?;
        Ok(size.touch(machine.memory()?).rate())
    };
    match store {
        "file" => run(&format!("file={}", text(directory))),
        _ => {
            let server = match store {
                "nbd_qemu" => Server::qemu_nbd(directory, size.pages)?,
                _ => Server::nbdkit(size.pages)?,
            };
            run(&format!("nbd+unix:///?socket={}", text(&server.socket())))
        }
    }
}

/// A path as stores have it.
fn text(path: &Path) -> String {
    let path: PathBuf = path.into();
    path.display().to_string().replace('%', "%25").replace('+', "%2B").replace(',', "%2C")
}
