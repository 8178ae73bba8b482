//! How fast a store is:
//! `cargo run --release -p guest-memory --example store-bench -- SPEC [PAGES [THREADS [FILE]]]`.
//! Pages are those of FILE, or of `stores::testing::page`: of 16 one is zero, one same-filled, eight
//! compress to 600 to 2700 bytes, and six do not compress.

use std::time::{Duration, Instant};

use guest_memory::stores::{MAX_BATCH, Read, Slot, Store, TierReport, Write, testing};
use guest_memory::{PAGE_SIZE, PageBytes};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let spec = arguments.next().unwrap_or_else(|| "memory".to_owned());
    let mut number = |default| match arguments.next() {
        Some(text) => text.parse().expect("PAGES and THREADS are numbers"),
        None => default,
    };
    let (pages, threads) = (number(16_384_usize), number(1_usize));
    let store = testing::open(&spec).unwrap_or_else(|error| {
        eprintln!("{error}");
        std::process::exit(2);
    });
    let bytes: Vec<PageBytes> = match arguments.next() {
        None => (0..pages as u64).map(testing::page).collect(),
        Some(file) => {
            let bytes = std::fs::read(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
            bytes.as_chunks().0.iter().cycle().take(pages).copied().collect()
        }
    };
    let share = pages.div_ceil(threads.max(1));
    std::thread::scope(|scope| {
        for (thread, bytes) in bytes.chunks(share).enumerate() {
            let store = &store;
            scope.spawn(move || run(thread, &**store, bytes));
        }
    });
    for tier in store.report() {
        println!("{}", line(&tier));
    }
    store.close();
}

fn run(thread: usize, store: &dyn Store, bytes: &[PageBytes]) {
    let mut slots: Vec<Option<Slot>> = Vec::new();
    let mut refused = 0;
    let took = measure(|| {
        for batch in bytes.chunks(MAX_BATCH) {
            let mut writes: Vec<_> = batch.iter().map(Write::new).collect();
            store.write(&testing::may_wait(), &mut writes);
            slots.extend(writes.into_iter().map(|write| match write.result {
                Ok(slot) => Some(slot),
                Err(_) => {
                    refused += 1;
                    None
                }
            }));
        }
    });
    say(thread, &format!("written ({refused} refused), in batches of 64"), bytes.len(), took);

    let mut page = [0; PAGE_SIZE];
    let at_hand = |slot: &&Slot| store.at_hand(**slot);
    let here: Vec<Slot> = slots.iter().flatten().filter(at_hand).copied().collect();
    let took = measure(|| {
        for slot in &here {
            let read = store.read_now(&testing::no_wait(), *slot, &mut page);
            assert!(matches!(read, Ok(true)), "{read:?}");
        }
    });
    say(thread, "at hand, read in the first pass", here.len(), took);

    let there: Vec<(Slot, &PageBytes)> = (slots.iter().zip(bytes))
        .filter_map(|(slot, bytes)| Some(((*slot)?, bytes)))
        .filter(|(slot, _)| !store.at_hand(*slot))
        .collect();
    for batch in [1, 8, MAX_BATCH] {
        let mut buffers = [[0; PAGE_SIZE]; MAX_BATCH];
        let took = measure(|| {
            for part in there.chunks(batch) {
                let mut reads: Vec<_> = (part.iter().zip(&mut buffers))
                    .map(|((slot, _), page)| Read::new(*slot, page))
                    .collect();
                store.read(&testing::may_wait(), &mut reads);
                for (read, (slot, bytes)) in reads.iter().zip(part) {
                    assert!(read.result.is_ok() && read.page == *bytes, "{slot}: {read:?}");
                }
            }
        });
        say(thread, &format!("elsewhere, in batches of {batch}"), there.len(), took);
    }
    let took = measure(|| {
        for slot in slots.iter().flatten() {
            store.free(*slot).expect("the page was stored");
        }
    });
    say(thread, "freed", slots.len(), took);
}

fn measure(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn say(thread: usize, what: &str, pages: usize, took: Duration) {
    let each = took.as_secs_f64() * 1e6 / pages.max(1) as f64;
    println!("thread {thread}: {pages:7} pages {what}: {each:.2} us each");
}

fn line(tier: &TierReport) -> String {
    format!(
        "{}: {} written, {} read, {} hits, {} moved on; read p50 {} us, p99 {} us, max {} us; {}",
        tier.name,
        tier.writes,
        tier.reads,
        tier.hits,
        tier.demotions,
        tier.read_latency.p50_us,
        tier.read_latency.p99_us,
        tier.read_latency.max_us,
        tier.notes.join("; ")
    )
}
