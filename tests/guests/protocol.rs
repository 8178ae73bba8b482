//! Async page faults of ours with the bare-metal test kernel (images/test-kernel), which uses all of the
//! protocol, in ring 0 too, and checks each word, token, flag and interrupt of it.

use nowait_tests::guest::End;

use crate::Test;
use crate::apf::by_mode;
use crate::hazards::pass;

pub(crate) const TESTS: &[Test] = &[
    ("the_registers_take_and_refuse_what_they_should", registers),
    ("a_guest_that_is_not_offered_the_protocol_has_none", hidden),
    ("every_page_is_announced_and_ready_once", cycle),
    ("page_ready_waits_for_word_and_acknowledgement", one_at_a_time),
    ("who_may_not_be_told_is_halted_or_waits", not_told),
    ("user_mode_is_told_without_send_always", user_mode),
    ("turned_off_or_moved_nothing_old_is_sent", off_and_on),
    ("an_apic_that_is_off_loses_no_notification", apic_off),
    ("a_processor_that_is_reset_has_the_protocol_off", reset),
    ("a_processor_that_is_reset_is_told_of_no_fault", fault_after_reset),
    ("kvms_own_protocol_looks_the_same_to_the_guest", kvms_own),
    ("hits_are_not_announced", hits),
    ("hostile_areas_and_words_hurt_nobody", hostile),
    ("a_guest_that_never_acknowledges_gets_its_pages", never_acknowledged),
];

/// Runs tests with our protocol and this store.
fn with_store(tests: &str, store: &str) -> End {
    pass(tests, &["--apf", "user", "--apf-threshold", "0us", "--no-prefetch", "--store", store])
}

/// With a store that takes 10 ms for each page.
fn user(tests: &str) -> End {
    with_store(tests, "delay=10ms")
}

/// With one that takes so long that no page comes before the guest has done what it wants to.
fn slow(tests: &str) -> End {
    with_store(tests, "delay=100ms")
}

fn number(end: &End, name: &str) -> u64 {
    end.number(&format!("/async_pf/{name}"))
}

fn registers() {
    user("apf-no-vector,apf-registers");
}

fn hidden() {
    for apf in ["off", "host"] {
        pass("apf-hidden", &["--apf", apf]);
    }
}

fn cycle() {
    let end = user("apf-send-always");
    assert_eq!(by_mode(&end, "notified"), [0, 50]);
    assert_eq!((number(&end, "ready_sent"), number(&end, "wake_alls")), (51, 1));
    assert_eq!((number(&end, "ready_acknowledged"), number(&end, "outstanding")), (51, 0));
}

fn one_at_a_time() {
    let end = user("apf-one-at-a-time");
    assert!(number(&end, "outstanding_max") >= 12, "{:#?}", end.json);
}

fn not_told() {
    let end = user("apf-flags,apf-uninterruptible,apf-kernel-mode");
    // Each waited with interrupts off; each of the others was halted, over and over.
    assert!(by_mode(&end, "waited")[1] >= 2, "{:#?}", end.json);
    assert!(by_mode(&end, "halted")[1] >= 6, "{:#?}", end.json);
}

fn user_mode() {
    let end = user("apf-user-mode");
    assert_eq!(by_mode(&end, "notified"), [5, 0]);
}

fn off_and_on() {
    let end = slow("apf-off-and-on,apf-on-again,apf-area-moves");
    assert!(number(&end, "cancelled") >= 15, "{:#?}", end.json);
}

fn apic_off() {
    let end = slow("apf-apic-off");
    assert!(number(&end, "interrupts_refused") > 0, "{:#?}", end.json);
}

/// A page that comes after INIT, but before the vCPU has made an exit, is announced to the vCPU that has
/// begun anew: KVM does not tell of an INIT. That is one page-ready at most, since it is not acknowledged.
fn reset() {
    let slow =
        ["--apf", "user", "--apf-threshold", "0us", "--no-prefetch", "--store", "delay=100ms"];
    let end = pass("apf-processor-reset", &slow);
    assert_eq!(number(&end, "resets"), 3);
}

/// Nothing else has the VMM look for the INIT.
fn fault_after_reset() {
    let end = slow("apf-fault-after-reset");
    assert_eq!(number(&end, "resets"), 2);
}

/// What the test kernel expects is what KVM does, too. (KVM does not look at the flags word, and sends
/// what is outstanding after the wake-all as well.)
fn kvms_own() {
    let tests =
        "apf-send-always,apf-user-mode,apf-kernel-mode,apf-uninterruptible,apf-one-at-a-time";
    pass(tests, &["--apf", "kernel", "--no-prefetch", "--store", "delay=10ms"]);
}

fn hits() {
    let idle =
        ["--apf", "user", "--apf-threshold", "0us", "--store", "delay=10ms", "--evict-to", "idle"];
    let end = pass("apf-hits", &idle);
    assert_eq!(by_mode(&end, "notified"), [0, 0]);
    assert_eq!((number(&end, "ready_sent"), number(&end, "wake_alls")), (1, 1));
    assert!(end.number("/pager/hits_idle") >= 5000, "{:#?}", end.json);
}

fn hostile() {
    user(
        "apf-area-moves-for-ever,apf-area-is-evicted,apf-area-on-the-stack,apf-spoilt-token,\
         apf-spoilt-flags,apf-low-vector",
    );
}

fn never_acknowledged() {
    let end = user("apf-never-acknowledged");
    assert_eq!(number(&end, "outstanding_max"), 256);
    assert!(by_mode(&end, "notified")[1] > 512, "{:#?}", end.json);
}
