use super::*;
use proptest::prelude::*;

fn parse(text: &str) -> Result<StoreSpec, StoreSpecError> {
    text.parse()
}

fn layers(text: &str) -> Vec<LayerSpec> {
    parse(text).unwrap_or_else(|error| panic!("{text}: {error}")).layers
}

const MEMORY: LayerSpec = LayerSpec::Memory { size_bytes: None };

#[test]
fn the_first_stores_keep_their_names() {
    assert_eq!(parse("memory"), Ok(StoreSpec::memory()));
    for (text, us) in
        [("delay=20ms", 20_000), ("delay=7us", 7), ("delay=60s", 60_000_000), ("delay=0ms", 0)]
    {
        let spec = StoreSpec::delay(Duration::from_micros(us));
        assert_eq!(parse(text), Ok(spec.clone()), "{text}");
        assert_eq!(spec.mean_delay(), Duration::from_micros(us));
    }
    assert_eq!(parse("delay=20ms+memory"), parse("delay=20ms"));
    assert_eq!(parse("delay=20ms").unwrap().to_string(), "delay=20ms");
    assert_eq!(StoreSpec::default().to_string(), "memory");
}

#[test]
fn stacks_are_read_from_front_to_back() {
    let spec = parse("raw+lz4=32M+delay=200us+file=/var/tmp,size=1G").unwrap();
    assert!(spec.is_raw());
    assert_eq!(
        spec.layers(),
        [
            LayerSpec::Lz4 { budget_bytes: 32 << 20 },
            LayerSpec::Delay(DelaySpec::fixed(Duration::from_micros(200))),
            LayerSpec::File(FileSpec { path: "/var/tmp".into(), size_bytes: Some(1 << 30) }),
        ]
    );
    assert_eq!(layers("lz4=1m"), [LayerSpec::Lz4 { budget_bytes: 1 << 20 }]);
    assert_eq!(layers("file=a%2Bb%2Cc%25"), [file("a+b,c%")]);
    assert_eq!(layers("memory=8M"), [LayerSpec::Memory { size_bytes: Some(8 << 20) }]);
}

fn file(path: &str) -> LayerSpec {
    LayerSpec::File(FileSpec { path: path.into(), size_bytes: None })
}

#[test]
fn delays_and_failures_are_read() {
    let ms = Duration::from_millis;
    let delay = |read, write, seed| vec![LayerSpec::Delay(DelaySpec { read, write, seed }), MEMORY];
    let lognormal = Distribution::Lognormal { median: ms(2), sigma_milli: 500 };
    let uniform = Distribution::Uniform { from: ms(1), to: ms(5) };
    assert_eq!(layers("delay=uniform:1ms..5ms,seed=3"), delay(uniform, None, 3));
    assert_eq!(
        layers("delay=lognormal:median=2ms,sigma=0.5,write=uniform:1ms..5ms"),
        delay(lognormal, Some(uniform), 0)
    );
    assert_eq!(
        layers("delay=1ms,write=lognormal:median=2ms,sigma=.5".replace("=.5", "=0.50").as_str()),
        delay(Distribution::Fixed(ms(1)), Some(lognormal), 0)
    );
    let fail = |operation, when, kind, seed| {
        vec![LayerSpec::Fail(FailSpec { operation, when, kind, seed }), MEMORY]
    };
    assert_eq!(
        layers("fail=read:nth=5"),
        fail(Operation::Read, FailWhen::Nth(5), FailKind::Transient, 0)
    );
    assert_eq!(
        layers("fail=write:rate=0.01,kind=full,seed=7"),
        fail(Operation::Write, FailWhen::Rate { millionths: 10_000 }, FailKind::Full, 7)
    );
}

#[test]
fn addresses_are_read() {
    let nbd = |text: &str| match layers(text).remove(0) {
        LayerSpec::Nbd(nbd) => nbd,
        other => panic!("{text}: {other:?}"),
    };
    let tcp = |text, host: &str, port, export| {
        let server = ServerAddress::Tcp { host: host.to_owned(), port };
        let expected = NbdSpec { server, export: String::from(export), size_bytes: None };
        assert_eq!(nbd(text), expected, "{text}");
    };
    tcp("nbd://localhost", "localhost", 10809, "");
    tcp("nbd://localhost/", "localhost", 10809, "");
    tcp("nbd://10.0.0.1:7/a/b%20c", "10.0.0.1", 7, "a/b c");
    tcp("nbd://[::1]:7/x", "::1", 7, "x");
    tcp("nbd://[::1]", "::1", 10809, "");
    let unix = nbd("nbd+unix:///x%2By?socket=/run/nbd.sock,size=4K");
    assert_eq!(unix.server, ServerAddress::Unix("/run/nbd.sock".into()));
    assert_eq!((unix.export.as_str(), unix.size_bytes), ("x+y", Some(4096)));
    assert_eq!(layers("lz4=1M+nbd+unix:///?socket=/s").len(), 2);
    assert_eq!(unix.to_string(), "nbd+unix:///x%2By?socket=/run/nbd.sock,size=4K");
    assert_eq!(nbd("nbd://[::1]:10809/").to_string(), "nbd://[::1]");
}

#[test]
fn errors_name_what_was_given() {
    use StoreSpecError::{
        Distribution, Duration, Fail, NotLast, Option, Path, Raw, Seed, Size, TooLong,
        TwiceCompressed, Unknown, Uri,
    };
    let error = |text: &str| parse(text).expect_err(text);
    for unknown in ["disk", "", "lz4", "Memory", "zero", "file"] {
        assert_eq!(error(unknown), Unknown(unknown.into()));
    }
    assert_eq!(error("lz4=1M+"), Unknown(String::new()));
    for raw in ["raw", "raw+raw", "lz4=1M+raw", "lz4=1M+raw+memory"] {
        assert_eq!(error(raw), Raw(raw.into()));
    }
    assert_eq!(error("memory+raw"), NotLast("memory".into()));
    assert_eq!(error("file=/a+nbd://b"), NotLast("file=/a".into()));
    assert_eq!(error("lz4=1M+lz4=2M"), TwiceCompressed("lz4=2M".into()));
    for bad in ["", "20", "ms", "-5ms", "+5ms", "1.5s", "5 ms", "5h", "5MS", "٣ms"] {
        match bad.split_once('+') {
            Some(_) => assert_eq!(error(&format!("delay={bad}")), Duration(String::new())),
            None => assert_eq!(error(&format!("delay={bad}")), Duration(bad.into())),
        }
    }
    for long in ["61s", "60001ms", "99999999999999999999s"] {
        assert_eq!(error(&format!("delay={long}")), TooLong(long.into()));
    }
    for bad in ["uniform:5ms", "uniform:5ms..1ms", "normal:5ms", "lognormal:median=1ms"] {
        assert_eq!(error(&format!("delay={bad}")), Distribution(bad.into()));
    }
    for sigma in ["-1", "5.001", "1e3", "0.0001", "", "1."] {
        let text = format!("delay=lognormal:median=1ms,sigma={sigma}");
        assert_eq!(error(&text), Distribution("lognormal:median=1ms".into()), "{sigma}");
    }
    for bad in ["read", "read:nth=0", "write:rate=1.1", "free:nth=1", "read:nth=1,kind=full"] {
        assert_eq!(error(&format!("fail={bad}")), Fail(bad.into()));
    }
    assert_eq!(error("delay=1ms,seed=x"), Seed("x".into()));
    assert_eq!(error("delay=1ms,read=1ms"), Option { layer: "delay", given: "read=1ms".into() });
    assert_eq!(error("file=/a,mode=1"), Option { layer: "file", given: "mode=1".into() });
    for (layer, text, given) in
        [("lz4", "lz4=1K", "1K"), ("file", "file=/a,size=1", "1"), ("memory", "memory=x", "x")]
    {
        assert!(matches!(error(text), Size { layer: l, given: g, .. } if l == layer && g == given));
    }
    assert_eq!(error("file="), Path("file=".into()));
    assert_eq!(error("file=a%2"), Path("file=a%2".into()));
    for bad in [
        "nbd:localhost",
        "nbd://",
        "nbd:///x",
        "nbd://h:0",
        "nbd://h:65536",
        "nbd://[::1",
        "nbd://[::1]7",
        "nbd://user@h",
        "nbd://h/%FF",
        "nbd://h/x?socket=/s",
        "nbd+unix:///x",
        "nbd+unix://h/x?socket=/s",
        "nbd+unix:///x?socket=",
        "nbd+unix:///x?socket=/s&tls=1",
    ] {
        assert!(matches!(error(bad), Uri { given, .. } if given == bad), "{bad}");
    }
    let long = format!("nbd+unix:///?socket=/{}", "s".repeat(nbd::MAX_SOCKET_PATH_BYTES));
    assert!(error(&long).to_string().contains("107 bytes"));
    assert!(error("delay=5h").to_string().contains("\"5h\""));
}

fn any_distribution() -> impl Strategy<Value = Distribution> {
    let time = (0..=60_000_000_u64).prop_map(Duration::from_micros).boxed();
    prop_oneof![
        time.clone().prop_map(Distribution::Fixed),
        (time.clone(), time.clone())
            .prop_map(|(a, b)| Distribution::Uniform { from: a.min(b), to: a.max(b) }),
        (time, 0..=5000_u32)
            .prop_map(|(median, sigma_milli)| Distribution::Lognormal { median, sigma_milli }),
    ]
}

fn any_decorator() -> impl Strategy<Value = LayerSpec> {
    let when = prop_oneof![
        (1..u64::MAX).prop_map(FailWhen::Nth),
        (0..=1_000_000_u32).prop_map(|millionths| FailWhen::Rate { millionths }),
    ];
    let failure = prop_oneof![
        Just((Operation::Read, FailKind::Transient)),
        Just((Operation::Read, FailKind::Lost)),
        Just((Operation::Read, FailKind::Corrupt)),
        Just((Operation::Write, FailKind::Transient)),
        Just((Operation::Write, FailKind::Full)),
    ];
    prop_oneof![
        (any_distribution(), prop::option::of(any_distribution()), any::<u64>())
            .prop_map(|(read, write, seed)| LayerSpec::Delay(DelaySpec { read, write, seed })),
        (failure, when, any::<u64>()).prop_map(|((operation, kind), when, seed)| {
            LayerSpec::Fail(FailSpec { operation, when, kind, seed })
        }),
    ]
}

fn any_last() -> impl Strategy<Value = LayerSpec> {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;
    let size_bytes = prop::option::of(4096..u64::MAX).boxed();
    let bytes = |max| prop::collection::vec(any::<u8>(), 1..max);
    let path = |bytes| PathBuf::from(OsString::from_vec(bytes));
    let server = prop_oneof![
        ("[a-z0-9.-]{1,9}|[0-9a-f:]{2,9}", 1..=u16::MAX)
            .prop_map(|(host, port)| ServerAddress::Tcp { host, port }),
        bytes(nbd::MAX_SOCKET_PATH_BYTES).prop_map(move |bytes| ServerAddress::Unix(path(bytes))),
    ];
    prop_oneof![
        size_bytes.clone().prop_map(|size_bytes| LayerSpec::Memory { size_bytes }),
        (bytes(20), size_bytes.clone()).prop_map(move |(bytes, size_bytes)| LayerSpec::File(
            FileSpec { path: path(bytes), size_bytes }
        )),
        (server, ".{0,9}", size_bytes).prop_map(|(server, export, size_bytes)| LayerSpec::Nbd(
            NbdSpec { server, export, size_bytes }
        )),
    ]
}

fn any_spec() -> impl Strategy<Value = StoreSpec> {
    let decorators = || prop::collection::vec(any_decorator(), 0..3);
    let lz4 = (MIN_LZ4_BYTES..=MAX_LZ4_BYTES)
        .prop_map(|budget_bytes| vec![LayerSpec::Lz4 { budget_bytes }]);
    let stack = (decorators(), prop::option::of(lz4), decorators(), any_last());
    (any::<bool>(), stack).prop_map(|(raw, (front, lz4, back, last))| {
        let lz4 = lz4.unwrap_or_default();
        StoreSpec { raw, layers: [front, lz4, back, vec![last]].concat() }
    })
}

proptest! {
    #[test]
    fn a_spec_comes_back_as_it_was(spec in any_spec()) {
        prop_assert_eq!(spec.to_string().parse(), Ok(spec));
    }

    #[test]
    fn any_text_gives_a_verdict(text in "(raw\\+|lz4=1M\\+|delay=|fail=|file=|nbd://|nbd\\+unix:///|.{0,4}){0,3}.{0,12}") {
        if let Ok(spec) = text.parse::<StoreSpec>() {
            prop_assert_eq!(spec.to_string().parse(), Ok(spec));
        }
    }
}
