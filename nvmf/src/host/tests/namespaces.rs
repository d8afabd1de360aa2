//! Listing and selecting namespaces, of honest controllers and of liars.

use std::time::{Duration, Instant};

use super::*;
use crate::host::scripted::{Answer, SHORT, namespace, uuid_descriptor};
use crate::spec::identify::cns;
use crate::spec::opcode::admin;

fn three() -> Scripted {
    Scripted::new().with(|model| {
        let uuid = uuid_descriptor(Uuid::from_u128(0xaaaa));
        model.namespaces.insert(2, (namespace(4096, 12), uuid));
        let mut third = namespace(10, 9);
        third.nguid = [0xcc; 16];
        model.namespaces.insert(70_000, (third, Vec::new()));
    })
}

async fn select(controller: &Scripted, selector: NamespaceSelector) -> Result<u32, HostError> {
    let association = connect(controller).await.unwrap();
    let selected = association.select(&selector).await;
    selected.map(|info| info.nsid)
}

#[tokio::test]
async fn the_only_namespace_needs_no_selector() {
    let association = connect(&Scripted::new()).await.unwrap();
    let info = association.select(&NamespaceSelector::Only).await.unwrap();
    assert_eq!(
        (info.nsid, info.block_size, info.block_count),
        (1, 512, 2048)
    );
    assert_eq!(info.capacity(), 1 << 20);
}

#[tokio::test]
async fn each_selector_finds_its_namespace() {
    use NamespaceSelector::{Nguid, Nsid, Uuid as ByUuid};
    let controller = three();
    assert_eq!(select(&controller, Nsid(2)).await, Ok(2));
    assert_eq!(select(&controller, Nsid(70_000)).await, Ok(70_000));
    let uuid = Uuid::from_u128(0xaaaa);
    assert_eq!(select(&controller, ByUuid(uuid)).await, Ok(2));
    assert_eq!(select(&controller, Nguid([0xcc; 16])).await, Ok(70_000));
}

#[tokio::test]
async fn several_namespaces_without_a_selector_are_listed() {
    let error = select(&three(), NamespaceSelector::Only).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, HostError::SeveralNamespaces { .. }));
    for part in [
        "?nsid=1 (1048576 bytes)",
        "?nsid=2 (uuid=00000000-0000-0000-0000-00000000aaaa, 16777216 bytes)",
        "?nsid=70000 (nguid=cccccccccccccccccccccccccccccccc, 5120 bytes)",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains('\n'));
}

#[tokio::test]
async fn a_namespace_that_is_not_there_is_answered_with_those_that_are() {
    for selector in [
        NamespaceSelector::Nsid(3),
        NamespaceSelector::Nsid(0),
        NamespaceSelector::Nsid(u32::MAX),
        NamespaceSelector::Uuid(Uuid::from_u128(0xbbbb)),
        NamespaceSelector::Nguid([1; 16]),
    ] {
        let error = select(&three(), selector.clone()).await.unwrap_err();
        assert!(
            matches!(error, HostError::NoSuchNamespace { .. }),
            "{error}"
        );
        let text = error.to_string();
        assert!(
            text.contains(&selector.to_string()) && text.contains("?nsid=70000"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_subsystem_without_namespaces_says_so() {
    let controller = Scripted::new().with(|model| model.namespaces.clear());
    let error = select(&controller, NamespaceSelector::Only).await;
    assert!(matches!(error, Err(HostError::NoNamespaces { .. })));
    let association = connect(&controller).await.unwrap();
    assert_eq!(association.namespaces().await, Ok(Vec::new()));
}

#[tokio::test]
async fn a_namespace_that_cannot_be_served_is_in_nobodys_way() {
    let controller = three().with(|model| {
        let (data, _) = model.namespaces.get_mut(&1).unwrap();
        data.lbaf[0].ms = 8.into();
    });
    let association = connect(&controller).await.unwrap();
    let nsids: Vec<u32> = association
        .namespaces()
        .await
        .unwrap()
        .iter()
        .map(|info| info.nsid)
        .collect();
    assert_eq!(nsids, [2, 70_000]);
    let error = select(&controller, NamespaceSelector::Nsid(1))
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("namespace 1 of") && text.contains("8 bytes of metadata"),
        "{text}"
    );
}

#[tokio::test]
async fn lists_longer_than_a_page_are_read_page_by_page() {
    let controller = Scripted::new().with(|model| {
        model.namespaces = (1..=2048)
            .map(|n| (3 * n, (namespace(1, 9), Vec::new())))
            .collect();
    });
    let association = connect(&controller).await.unwrap();
    let all = association.namespaces().await.unwrap();
    assert_eq!(all.len(), 2048);
    assert!(
        all.iter()
            .enumerate()
            .all(|(i, info)| info.nsid == 3 * (i as u32 + 1))
    );
    let lists = controller.look(|model| {
        let list = (admin::IDENTIFY, u32::from(cns::ACTIVE_NAMESPACES));
        model.commands.iter().filter(|&&c| c == list).count()
    });
    assert_eq!(lists, 3, "a full page does not say that it is the last");
}

/// A controller that answers each Identify of the active list by `page`, which gets the NSID asked
/// after.
fn listing(page: impl Fn(u32) -> Vec<u32> + Send + 'static) -> Scripted {
    Scripted::new().scripted(move |model, sqe, _| {
        let structure = sqe.cdw10.get() as u8;
        if sqe.opcode != admin::IDENTIFY {
            return None;
        }
        if structure == cns::NAMESPACE {
            let any = (namespace(1, 9), Vec::new());
            model.namespaces.insert(sqe.nsid.get(), any);
            return None;
        }
        (structure == cns::ACTIVE_NAMESPACES).then(|| {
            let nsids = page(sqe.nsid.get());
            let mut bytes: Vec<u8> = nsids.iter().flat_map(|nsid| nsid.to_le_bytes()).collect();
            bytes.resize(4096, 0);
            Answer::Data(bytes)
        })
    })
}

#[tokio::test]
async fn lists_that_do_not_ascend_are_refused() {
    let lists: [fn(u32) -> Vec<u32>; 4] = [
        |_| vec![5, 5],
        |_| vec![5, 4],
        |_| vec![u32::MAX],
        // The same full page for ever.
        |_| (1..=1024).collect(),
    ];
    for list in lists {
        let association = connect(&listing(list)).await.unwrap();
        let error = association.namespaces().await.unwrap_err();
        assert!(
            error.to_string().contains("list of active namespaces"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn nothing_is_asked_for_after_the_largest_nsid() {
    let last = 0xffff_fffe;
    let controller = listing(move |after| match after {
        0 => (last - 1023..=last).collect(),
        _ => vec![1],
    });
    let association = connect(&controller).await.unwrap();
    assert_eq!(association.namespaces().await.unwrap().len(), 1024);
}

#[tokio::test]
async fn a_list_that_never_ends_is_cut() {
    let controller = listing(|after| (after + 1..=after + 1024).collect());
    let association = connect(&controller).await.unwrap();
    assert_eq!(association.namespaces().await.unwrap().len(), 4096);
    let beyond = association.select(&NamespaceSelector::Nsid(4_000_000_000));
    assert_eq!(beyond.await.unwrap().nsid, 4_000_000_000);
}

#[tokio::test]
async fn a_controller_that_answers_slowly_does_not_make_a_list_last_for_ever() {
    let controller = three();
    let mut options = options();
    options.connect_timeout = SHORT;
    let association = connect_with(&controller, &options).await.unwrap();
    controller.set_script(|_, sqe, _| (sqe.opcode == admin::IDENTIFY).then_some(Answer::Silence));
    let started = Instant::now();
    let error = association.namespaces().await.unwrap_err();
    assert!(matches!(error, HostError::TimedOut { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(2));
}
