//! Files of connections: what wins, what is refused with its line, and what of it becomes of one disk.

use proptest::prelude::*;

use super::*;

const VOL1: &str = "nqn.2024-01.com.example:vol1";
const VOL2: &str = "nqn.2024-01.com.example:vol2";

/// A directory with a main file and files beside it.
struct Files(tempfile::TempDir);

impl Files {
    fn new(main: &str, drop_ins: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("f.conf"), main).unwrap();
        let beside = directory.path().join("f.conf.d");
        if !drop_ins.is_empty() {
            std::fs::create_dir(&beside).unwrap();
        }
        for (name, text) in drop_ins {
            std::fs::write(beside.join(name), text).unwrap();
        }
        Self(directory)
    }

    fn main(&self) -> PathBuf {
        self.0.path().join("f.conf")
    }

    fn read(&self) -> Result<FabricsConf, FileError> {
        FabricsConf::read(&self.main())
    }
}

fn nqn(name: &str) -> Nqn {
    Nqn::new(name).unwrap()
}

/// The subsystem of this name in a file without others beside it.
fn subsystem(text: &str, name: &str) -> Connection {
    let files = Files::new(text, &[]);
    let subsystem = files.read().unwrap().subsystem(Some(&nqn(name)));
    subsystem.unwrap_or_else(|error| panic!("{error}"))
}

/// The error that reading the only subsystem of a file ends with; it has to name what is wrong.
#[track_caller]
fn refused(main: &str, drop_ins: &[(&str, &str)], names: &[&str]) {
    let files = Files::new(main, drop_ins);
    let error = match files.read().and_then(|conf| conf.subsystem(None)) {
        Err(error) => error.to_string(),
        Ok(found) => panic!("{main:?} is taken for {found:?}"),
    };
    for name in names {
        assert!(error.contains(name), "{name:?} is not in: {error}");
    }
    assert!(!error.contains('\n'), "{error}");
}

/// A file of one subsystem with these lines more in its section.
fn with(lines: &str) -> String {
    format!("[Subsystem]\nnqn = {VOL1}\n{lines}\ncontroller = transport=tcp;traddr=192.0.2.1\n")
}

#[test]
fn a_whole_configuration_is_read() {
    let text = format!(
        "# A host with one subsystem of two paths, and one of one.\n\
         [Discovery Controller Defaults]\nkeep-alive-tmo = 30\nctrl-loss-tmo = 600\n\
         [I/O Controller Defaults]\nkeep-alive-tmo = 7\nqueue-size = 64\n\n\
         [Subsystem]\nnqn = {VOL1}\nctrl-loss-tmo = 1800\nhdr-digest = Yes\n\
         controller = transport=tcp;traddr=192.0.2.20;trsvcid=4421\n\
         controller = transport = tcp ; traddr = 2001:db8::1 ;;\n\
         [Subsystem]\nnqn={VOL2}\ncontroller=transport=tcp;traddr=storage.example;\n\
         [Discovery Controller]\ncontroller = transport=tcp;traddr=192.0.2.30\n\
         [Host]\nhostnqn = nqn.2024-01.com.example:host\nhostid = 46ba5037-7ce5-41fa-9452-48477bf00080\n\
         hostsymname = lab\nreconnect-delay = 9\n"
    );
    let first = subsystem(&text, VOL1);
    assert_eq!(first.hostnqn, Some(nqn("nqn.2024-01.com.example:host")));
    assert_eq!(
        first.hostid.unwrap().to_string(),
        "46ba5037-7ce5-41fa-9452-48477bf00080"
    );
    let targets: Vec<String> = first.targets().iter().map(ToString::to_string).collect();
    assert_eq!(
        targets,
        [
            format!("nvme+tcp://192.0.2.20:4421/{VOL1}"),
            format!("nvme+tcp://[2001:db8::1]:4420/{VOL1}")
        ]
    );
    let settings = Settings {
        queue_size: Some(64),
        keep_alive_tmo: Some(7),
        reconnect_delay: Some(9),
        ctrl_loss_tmo: Some(1800),
        hdr_digest: Some(true),
        ..Settings::default()
    };
    assert_eq!(first.settings, settings);
    let second = subsystem(&text, VOL2);
    assert_eq!(second.settings.ctrl_loss_tmo, None);
    assert_eq!(second.targets()[0].host, "storage.example");

    let controllers = Files::new(&text, &[]).read().unwrap();
    let controllers = controllers.discovery_controllers().unwrap();
    assert_eq!(controllers.len(), 1);
    assert_eq!(controllers[0].settings.keep_alive_tmo, Some(30));
    let target = &controllers[0].targets()[0];
    assert_eq!((target.port, &target.subnqn), (8009, &Nqn::discovery()));
}

#[test]
fn the_more_specific_place_wins_and_an_empty_value_is_what_is_built_in() {
    // Each place that has the key, from the least specific one; then what comes of it.
    let cases: [([Option<&str>; 4], Option<u16>); 9] = [
        ([None, None, None, None], None),
        ([Some("1"), None, None, None], Some(1)),
        ([Some("1"), Some("2"), None, None], Some(2)),
        ([Some("1"), Some("2"), Some("3"), None], Some(3)),
        ([Some("1"), Some("2"), Some("3"), Some("4")], Some(4)),
        ([Some("1"), None, None, Some("4")], Some(4)),
        ([Some("1"), Some(""), None, None], None),
        ([Some("1"), Some("2"), Some("3"), Some("")], None),
        ([Some("1"), Some(""), Some("3"), None], Some(3)),
    ];
    for ([defaults, host, section, path], expected) in cases {
        let set = |value: Option<&str>| match value {
            Some(value) => format!("keep-alive-tmo = {value}\n"),
            None => String::new(),
        };
        let path = path.map_or(String::new(), |value| format!(";keep-alive-tmo={value}"));
        let text = format!(
            "[Subsystem]\nnqn = {VOL1}\n{}controller = transport=tcp;traddr=192.0.2.1{path}\n\
             [Host]\n{}[I/O Controller Defaults]\n{}",
            set(section),
            set(host),
            set(defaults)
        );
        assert_eq!(
            subsystem(&text, VOL1).settings.keep_alive_tmo,
            expected,
            "{text}"
        );
    }
}

#[test]
fn a_file_beside_the_main_one_has_its_own_host_and_defaults_over_those_of_the_main_one() {
    let section = |nqn: &str| {
        format!("[Subsystem]\nnqn = {nqn}\ncontroller = transport=tcp;traddr=192.0.2.1\n")
    };
    let main = format!(
        "[Host]\nhostnqn = nqn.2024-01.com.example:main\ndata-digest = on\n\
         [I/O Controller Defaults]\nqueue-size = 64\nkeep-alive-tmo = 9\n{}",
        section(VOL1)
    );
    let own = format!(
        "[Host]\nhostnqn = nqn.2024-01.com.example:own\n[I/O Controller Defaults]\nqueue-size = 32\n{}",
        section(VOL2)
    );
    let vol3 = "nqn.2024-01.com.example:vol3";
    let files = Files::new(
        &main,
        &[
            ("own.conf", own.as_str()),
            ("none.conf", section(vol3).as_str()),
            ("notes.txt", "not read"),
        ],
    );
    let conf = files.read().unwrap();
    let of = |name| {
        let Connection {
            hostnqn, settings, ..
        } = conf.subsystem(Some(&nqn(name))).unwrap();
        let hostnqn = hostnqn.unwrap().to_string();
        let Settings {
            queue_size,
            keep_alive_tmo,
            data_digest,
            ..
        } = settings;
        (
            hostnqn.rsplit(':').next().unwrap().to_owned(),
            queue_size,
            keep_alive_tmo,
            data_digest,
        )
    };
    assert_eq!(of(VOL1), ("main".into(), Some(64), Some(9), Some(true)));
    assert_eq!(of(VOL2), ("own".into(), Some(32), Some(9), None));
    assert_eq!(of(vol3), ("main".into(), Some(64), Some(9), Some(true)));

    // The directory alone is enough.
    std::fs::remove_file(files.main()).unwrap();
    let conf = files.read().unwrap();
    assert_eq!(
        conf.subsystem(Some(&nqn(VOL2)))
            .unwrap()
            .settings
            .queue_size,
        Some(32)
    );
}

#[test]
fn what_is_not_as_it_should_be_is_refused_with_file_line_and_fix() {
    let long = format!("nqn.2024-01.com.example:{}", "x".repeat(220));
    let long = format!("[Subsystem]\nnqn = {long}");
    for (text, names) in [
        ("word", &["f.conf:1: 'word'", "KEY = VALUE"][..]),
        ("[Host", &["f.conf:1", "[Host"]),
        ("tls = 1", &["f.conf:1: tls", "[Section]"]),
        (
            &with("keep_alive_tmo = 5"),
            &["f.conf:3", "'keep_alive_tmo'", "'keep-alive-tmo'"],
        ),
        (
            &with("traddr = 192.0.2.1"),
            &["f.conf:3", "traddr", "controller line"],
        ),
        (
            &with("hostnqn = nqn.2024-01.com.example:h"),
            &["f.conf:3", "[Host]"],
        ),
        ("[Host]\nnqn = x", &["f.conf:2: nqn", "[Subsystem]"]),
        ("[Host]\ncontroller = x", &["f.conf:2: controller"]),
        ("[Host]\n[Host]", &["f.conf:2", "line 1", "file of its own"]),
        (
            "[Host]\nhostnqn = host",
            &["f.conf:2: hostnqn = host", "nqn."],
        ),
        ("[Host]\nhostid = 12", &["f.conf:2: hostid = 12", "UUID"]),
        (
            "[Host]\nhostid = 00000000-0000-0000-0000-000000000000",
            &["f.conf:2: hostid = 0000", "zero"],
        ),
        (&long, &["f.conf:2: nqn = ", "223"]),
        ("[Subsystem]\nnqn =", &["f.conf:2: nqn has no value"]),
        (
            "[Subsystem]\ncontroller = transport=tcp;traddr=h",
            &["f.conf:1", "nqn = NQN"],
        ),
        (
            &with("[Subsystem]\nnqn = nqn.2024-01.com.example:x\n[Host]"),
            &["controller"],
        ),
        (
            &with("queue-size = many"),
            &["f.conf:3: queue-size = many", "number"],
        ),
        (
            &with("queue-size = 64 # small"),
            &["queue-size = 64 # small", "a line of its own"],
        ),
        (
            &with("queue-size = 1"),
            &["f.conf:3: queue-size = 1", "2 to 4096"],
        ),
        (
            &with("ctrl-loss-tmo = -2"),
            &["ctrl-loss-tmo = -2", "-1 to"],
        ),
        (
            &with("hdr-digest = 2"),
            &["hdr-digest = 2", "true or false"],
        ),
    ] {
        refused(text, &[], names);
    }
    refused(
        "[Subsystem]\nnqn = nqn.2024-01.com.example:x",
        &[],
        &["f.conf:1", "controller = transport=tcp;traddr=ADDRESS"],
    );
}

#[test]
fn a_controller_line_is_checked_part_by_part() {
    let path = |line: &str| format!("[Subsystem]\nnqn = {VOL1}\ncontroller = {line}\n");
    for (line, names) in [
        ("", &["f.conf:3", "transport"][..]),
        (
            "tcp://192.0.2.1:4420",
            &["'tcp://192.0.2.1:4420'", "KEY=VALUE"],
        ),
        ("transport=tcp", &["no traddr"]),
        ("traddr=192.0.2.1", &["no transport"]),
        ("transport=tcp;traddr=", &["traddr has no value"]),
        (
            "transport=tcp;traddr=a;traddr=b",
            &["traddr is there twice"],
        ),
        ("transport=tcp;traddr=a b", &["traddr = a b"]),
        (
            "transport=tcp;traddr=a;trsvcid=0",
            &["trsvcid = 0", "65535"],
        ),
        (
            "transport=tcp;traddr=a;trsvid=1",
            &["'trsvid'", "'trsvcid'"],
        ),
        (
            "transport=tcp;traddr=a;tls=1",
            &["tls is the same for all paths"],
        ),
        (
            "transport=tcp;traddr=a;nqn=x",
            &["nqn", "a controller line"],
        ),
        ("transport=tcp;traddr=a;queue-size=x", &["queue-size = x"]),
        ("transport=rdma;traddr=a", &["f.conf:1", "TCP", "rdma"]),
        (
            "transport=tcp;traddr=a;host-iface=eth/0",
            &["host-iface", "'eth/0'", "ip link"],
        ),
        (
            "transport=tcp;traddr=a;host-traddr=storage",
            &["host-traddr = storage"],
        ),
    ] {
        refused(&path(line), &[], names);
    }
    let begins = path("transport=tcp;traddr=192.0.2.1;host-traddr=192.0.2.9;host-iface=eth0");
    let local = subsystem(&begins, VOL1).targets().remove(0).local;
    assert_eq!(local.to_string(), "from 192.0.2.9 through eth0");
    // Paths of one disk cannot differ, and those over another transport are not in the way.
    let differ = format!(
        "{}controller = transport=tcp;traddr=192.0.2.2;queue-size=32\n",
        with("queue-size = 64")
    );
    refused(&differ, &[], &["f.conf:5: queue-size"]);
    let mixed = format!("{}controller = transport=rdma;traddr=192.0.2.2\n", with(""));
    assert_eq!(subsystem(&mixed, VOL1).targets().len(), 1);
}

#[test]
fn what_is_known_and_not_there_is_refused_by_name_where_it_is_on_and_shows_no_secret() {
    for (line, reason) in [
        ("tls = true", "tls = true: TLS"),
        ("concat = yes", "concat = true: TLS"),
        ("tls-key = NVMeTLSkey-1:01:secret", "tls-key = …: TLS"),
        ("keyring = .nvme", "keyring = …: TLS"),
        (
            "dhchap-secret = DHHC-1:00:secret",
            "dhchap-secret = …: in-band",
        ),
        (
            "kxchap-ctrl-secret = secret",
            "kxchap-ctrl-secret = …: in-band",
        ),
        ("nr-poll-queues = 2", "nr-poll-queues = 2: "),
        ("tos = 0", "tos = 0: "),
    ] {
        refused(&with(line), &[], &["f.conf:3: ", reason]);
        let key = line.split(' ').next().unwrap();
        assert!(!subsystem(&with(&format!("{key} =")), VOL1).paths.is_empty());
    }
    for off in [
        "tls = off",
        "nr-write-queues = 0",
        "tos = -1",
        "disable-sqflow = true",
    ] {
        subsystem(&with(off), VOL1);
    }
    // What another subsystem needs is of no concern.
    let text = with("").replace(VOL1, VOL2) + &with("tls = 1");
    subsystem(&text, VOL2);
}

#[test]
fn hosts_of_several_files_are_told_apart() {
    let host = |lines: &str| format!("[Host]\n{lines}\n");
    let a = "hostnqn = nqn.2024-01.com.example:a";
    let b = "hostnqn = nqn.2024-01.com.example:b";
    let id = "hostid = 46ba5037-7ce5-41fa-9452-48477bf00080";
    for (main, first, second, names) in [
        (
            with(""),
            host(id),
            String::new(),
            &["f.conf.d/1.conf:1", "no hostnqn"][..],
        ),
        (
            host(a),
            host(a),
            String::new(),
            &["1.conf:1", ":a is that of", "f.conf too"],
        ),
        (
            with(""),
            host(&format!("{a}\n{id}")),
            host(&format!("{b}\n{id}")),
            &["2.conf:1", "46ba5037", "1.conf too"],
        ),
    ] {
        refused(&main, &[("1.conf", &first), ("2.conf", &second)], names);
    }
}

#[test]
fn the_subsystem_is_the_one_asked_for_or_the_only_one() {
    let both = with("") + &with("").replace(VOL1, VOL2);
    refused(&both, &[], &["--nqn", VOL1, VOL2]);
    refused("[Host]\n", &[], &["no [Subsystem]", "none"]);
    let files = Files::new(&both, &[]);
    let other = nqn("nqn.2024-01.com.example:other");
    let error = files.read().unwrap().subsystem(Some(&other)).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains(other.as_str()) && error.contains(VOL2),
        "{error}"
    );
    // One that is there twice is not chosen from either.
    refused(&(with("") + &with("")), &[], &["several"]);
}

#[test]
fn a_file_that_is_not_one_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let error = |name: &str| {
        let path = directory.path().join(name);
        FabricsConf::read(&path).unwrap_err().to_string()
    };
    assert!(error("config.json").contains("nvme config-convert"));
    assert!(error("missing.conf").contains("missing.conf"));
    let big = directory.path().join("big.conf");
    std::fs::write(&big, vec![b'#'; FILE_MAX as usize + 1]).unwrap();
    assert!(error("big.conf").contains("1 MiB"));
    std::fs::write(directory.path().join("binary.conf"), [0xff, 0xfe]).unwrap();
    assert!(error("binary.conf").contains("UTF-8"));
}

/// A line as somebody could have written it, right or wrong.
fn some_line() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "[Host]",
        "[Subsystem]",
        "[Discovery Controller]",
        "[I/O Controller Defaults]",
        "[",
        "]",
        "=",
        ";",
        "#",
        "nqn",
        "hostnqn",
        "hostid",
        "controller",
        "transport=tcp",
        "traddr=",
        "traddr=h",
        "trsvcid=4420",
        "queue-size",
        "tls",
        "nqn.2024-01.com.example:vol1",
        "46ba5037-7ce5-41fa-9452-48477bf00080",
        "99999999999999999999",
        "-1",
        "\u{e9}\u{0}",
    ]);
    prop::collection::vec(word, 0..6).prop_map(|words| words.concat())
}

proptest! {
    /// Whatever a file has, there is an answer of one line.
    #[test]
    fn no_file_is_beyond_words(lines in prop::collection::vec(some_line(), 0..12)) {
        let files = Files::new(&lines.join("\n"), &[]);
        let read = files.read().and_then(|conf| {
            conf.discovery_controllers()?;
            conf.subsystem(None)
        });
        if let Err(error) = read {
            prop_assert!(!error.to_string().contains('\n'));
        }
    }
}
