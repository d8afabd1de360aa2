//! Controllers that lie about their namespaces, and never get more of us than a clear message. What they lie
//! about elsewhere is beside what it is about: themselves in `bring_up`, lists in `namespaces`, access states in
//! `ana`, events in `events`, discovery in `discovery`; completions in the machine's own tests.

use super::*;
use crate::host::scripted::{Answer, namespace, uuid_descriptor};
use crate::spec::Status;
use crate::spec::identify::{IdentifyNamespace, cns, nidt};
use crate::spec::opcode::admin;

/// A controller whose only namespace is changed.
fn with_namespace(change: impl FnOnce(&mut IdentifyNamespace)) -> Scripted {
    Scripted::new().with(|model| {
        let (data, _) = model.namespaces.get_mut(&1).unwrap();
        change(data);
    })
}

/// Why its namespace cannot be used.
async fn reason(controller: &Scripted) -> String {
    let association = connect(controller).await.unwrap();
    let [listed] = &association.list_namespaces().await.unwrap()[..] else {
        panic!("one namespace");
    };
    let reason = listed.info.clone().unwrap_err();
    assert_eq!(association.namespaces().await, Ok(Vec::new()));
    for error in [
        association.select(&NamespaceSelector::Only).await.map(drop),
        association.reidentify(1).await.map(drop),
    ] {
        let text = error.unwrap_err().to_string();
        assert!(text.contains(&reason) && !text.contains('\n'), "{text}");
    }
    assert_eq!(*association.lost().borrow(), None);
    reason
}

#[tokio::test]
async fn sizes_that_cannot_be_are_told_with_their_value() {
    type Change = fn(&mut IdentifyNamespace);
    let changes: [(Change, &str); 8] = [
        (|data| data.nsze = 0.into(), "no blocks"),
        (|data| data.nsze = u64::MAX.into(), "18446744073709551615"),
        (|data| data.nsze = (1 << 55).into(), "beyond 2^64 bytes"),
        (|data| data.lbaf[0].lbads = 0, "2^0"),
        (|data| data.lbaf[0].lbads = 1, "2^1"),
        (|data| data.lbaf[0].lbads = 63, "2^63"),
        (|data| data.lbaf[0].lbads = 64, "2^64"),
        (|data| data.lbaf[0].lbads = 255, "2^255"),
    ];
    for (change, named) in changes {
        let reason = reason(&with_namespace(change)).await;
        assert!(reason.contains(named), "{reason}");
    }
}

#[tokio::test]
async fn metadata_and_protection_information_are_refused_with_the_way_out() {
    type Change = fn(&mut IdentifyNamespace);
    let changes: [(Change, &str); 4] = [
        (|data| data.lbaf[0].ms = 8.into(), "8 bytes of metadata"),
        (
            |data| data.lbaf[0].ms = u16::MAX.into(),
            "65535 bytes of metadata",
        ),
        (|data| data.dps = 1, "protection information of type 1"),
        (|data| data.dps = 0xff, "protection information of type 7"),
    ];
    for (change, named) in changes {
        let reason = reason(&with_namespace(change)).await;
        assert!(reason.contains(named), "{reason}");
        assert!(reason.contains("format it without"), "{reason}");
    }
}

#[tokio::test]
async fn four_billion_namespaces_cost_nothing() {
    let controller = Scripted::new().with(|model| {
        model.identity.nn = u32::MAX.into();
        model.identity.mnan = u32::MAX.into();
    });
    let association = connect(&controller).await.unwrap();
    assert_eq!(association.namespaces().await.unwrap().len(), 1);
    let asked = controller.look(|model| {
        let sent = model.commands.iter();
        sent.filter(|(opcode, _)| *opcode == admin::IDENTIFY)
            .count()
    });
    assert_eq!(asked, 4, "the controller, the list, a namespace, its names");
}

#[tokio::test]
async fn namespaces_of_one_name_cannot_be_told_apart_by_it() {
    let uuid = Uuid::from_u128(0xaaaa);
    let controller = Scripted::new().with(|model| {
        for nsid in [1, 5, 9] {
            let mut data = namespace(2048, 9);
            data.nguid = [0xcc; 16];
            model.namespaces.insert(nsid, (data, uuid_descriptor(uuid)));
        }
    });
    let association = connect(&controller).await.unwrap();
    for selector in [
        NamespaceSelector::Uuid(uuid),
        NamespaceSelector::Nguid([0xcc; 16]),
    ] {
        let text = association.select(&selector).await.unwrap_err().to_string();
        assert!(text.contains("namespaces 1 and 5 both have"), "{text}");
        assert!(text.contains(&selector.to_string()), "{text}");
    }
    let by_number = association.select(&NamespaceSelector::Nsid(5)).await;
    assert_eq!(by_number.unwrap().nsid, 5);
}

#[tokio::test]
async fn identification_descriptors_without_end_or_sense_are_passed_over() {
    let nonsense = [
        vec![0xff; 4096],
        [nidt::UUID, 255, 0, 0].repeat(1024),
        [99, 0, 0, 0].repeat(1024),
    ];
    for list in nonsense {
        let controller = Scripted::new().with(|model| {
            model.namespaces.insert(1, (namespace(2048, 9), list));
        });
        let association = connect(&controller).await.unwrap();
        let info = association.select(&NamespaceSelector::Only).await.unwrap();
        assert_eq!((info.uuid, info.nguid, info.eui64), (None, None, None));
    }
}

#[tokio::test]
async fn a_namespace_that_comes_and_goes_with_every_question_ends_the_question() {
    // In the list, and not there when it is looked at.
    let controller = Scripted::new().scripted(|_, sqe, _| {
        let looked = sqe.opcode == admin::IDENTIFY && sqe.cdw10.get() as u8 == cns::NAMESPACE;
        looked.then(|| Answer::status(Status::INVALID_NAMESPACE))
    });
    let association = connect(&controller).await.unwrap();
    assert_eq!(association.reidentify(1).await, Ok(None));
    assert_eq!(association.namespaces().await, Ok(Vec::new()));
    let error = association.select(&NamespaceSelector::Nsid(1)).await;
    assert!(matches!(error, Err(HostError::NoNamespaces { .. })));
}
