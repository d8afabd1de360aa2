//! What `export --ana-state` tells hosts, and what it does to their requests.

use nvmf::host::{AnaState, Association, HostOptions, LocalEnd, TargetAddress};
use nvmf::spec::Nqn;
use nvmf::transport::Registry;

use crate::daemons::{Attach, Export};
use crate::front_end::{FrontEnd, OK};
use crate::noise::noise;

const HOSTNQN: &str = "nqn.2026-01.org.example:host";

/// An association with an export.
async fn connect(export: &Export) -> Association {
    let (host, port) = export.address().rsplit_once(':').expect("an address");
    let subnqn = export.subsystem().rsplit_once('/').expect("a URI").1;
    let target = TargetAddress {
        host: host.to_owned(),
        port: port.parse().expect("a port"),
        subnqn: Nqn::new(subnqn).expect("an NQN"),
        local: LocalEnd::default(),
    };
    let hostid = "6ba7b810-9dad-41d1-80b4-00c04fd430c8".parse();
    let options = HostOptions::new(Nqn::new(HOSTNQN).expect("an NQN"), hostid.expect("a UUID"));
    let connected = Association::connect(&Registry::with_defaults(), &target, &options).await;
    connected.expect("it is served")
}

#[test]
fn the_state_is_told_for_every_namespace() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    for state in AnaState::ALL {
        let args = ["--listen", "127.0.0.1:0", "--ana-state", state.name()];
        let export = Export::start_with(&args, &["ram:1M", "ram:2M"]);
        runtime.block_on(async {
            let association = connect(&export).await;
            let log = association.ana_log().await.expect("a log");
            for nsid in [1, 2] {
                let found = association.reidentify(nsid).await.expect("an answer");
                let group = found.expect("a namespace").anagrpid;
                assert_eq!(log.state_of(nsid, group), Some(state));
            }
        });
    }
    let export = Export::start(&["ram:1M"]);
    runtime.block_on(async {
        let association = connect(&export).await;
        assert_eq!(association.controller().ana, None);
    });
}

#[test]
fn a_path_that_is_not_the_best_works() {
    let args = ["--listen", "127.0.0.1:0", "--ana-state", "non-optimized"];
    let export = Export::start_with(&args, &["ram:1M"]);
    let attach = Attach::start(export.uri());
    let mut front_end = FrontEnd::connect(&attach.socket);
    let data = noise(4096, 3);
    assert_eq!(front_end.write(0, 8, &data), OK);
    assert_eq!(front_end.read(0, 8, 4096), (OK, data));
}
