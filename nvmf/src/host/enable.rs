//! The controller's registers, as properties: what it can do, enabling it, shutting it down.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::admin::Admin;
use super::error::HostError;
use crate::spec::fabrics::PropertySize;
use crate::spec::property::{Cap, Cc, Csts, offset};

/// Largest MPSMIN that is believed: no memory page of a host is larger.
const PAGE_MAX: u64 = 64 << 10;
/// The fields of CC that are ours to set; other bits are kept.
const CC_KNOWN: u32 = 0x00ff_fff1;
/// CC.CSS for the NVM command set, and for all that the controller supports.
const CSS_ALL: u32 = 6 << 4;
/// CC.CSS for a controller without any.
const CSS_ADMIN: u32 = 7 << 4;
/// First and longest pause between two looks at CSTS.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));

/// Reads CAP, and refuses what no controller that we can use would say.
pub(super) async fn read_capabilities(admin: &Admin) -> Result<Cap, HostError> {
    read_checked(admin, check_capabilities).await
}

/// As [`read_capabilities`], of a controller without I/O queues.
pub(super) async fn read_discovery_capabilities(admin: &Admin) -> Result<Cap, HostError> {
    read_checked(admin, check_pages).await
}

async fn read_checked(
    admin: &Admin,
    check: fn(Cap) -> Result<(), String>,
) -> Result<Cap, HostError> {
    let cap = admin
        .property("Property Get of CAP", offset::CAP, PropertySize::Eight)
        .await?;
    let cap = Cap(cap);
    check(cap).map_err(|reason| HostError::Unusable {
        at: admin.at(),
        reason,
    })?;
    Ok(cap)
}

fn check_capabilities(cap: Cap) -> Result<(), String> {
    if !cap.supports_nvm() {
        return Err("it does not support the NVM command set".to_owned());
    }
    if cap.max_queue_entries() < 2 {
        return Err("its queues have one entry; two are the least (CAP.MQES)".to_owned());
    }
    check_pages(cap)
}

fn check_pages(cap: Cap) -> Result<(), String> {
    if cap.mps_min() > cap.mps_max() {
        return Err(format!(
            "its smallest page, {} bytes, is larger than its largest, {} bytes",
            cap.mps_min(),
            cap.mps_max()
        ));
    }
    if cap.mps_min() > PAGE_MAX {
        return Err(format!(
            "its smallest page is {} bytes; {PAGE_MAX} is the most that is supported",
            cap.mps_min()
        ));
    }
    Ok(())
}

/// How long the controller may take to become ready.
fn ready_timeout(cap: Cap) -> Duration {
    Duration::from_millis(500) * u32::from(cap.to().max(1))
}

/// Enables the controller and waits until it is ready. Returns CC as it was set. A bounded handle gets back
/// the time that the controller states to need.
pub(super) async fn enable(admin: &mut Admin, cap: Cap) -> Result<Cc, HostError> {
    let before = Cc(admin.register("Property Get of CC", offset::CC).await?);
    if before.en() {
        // A new controller is not enabled. This one was used before: start it afresh.
        set_cc(admin, Cc(before.0 & !Cc::EN)).await?;
        wait(admin, cap, |csts| !csts.rdy()).await?;
    }
    let cc = configuration(before, cap);
    set_cc(admin, cc).await?;
    wait(admin, cap, Csts::rdy).await?;
    Ok(cc)
}

/// CC that enables the controller; bits that we do not know stay as they are.
fn configuration(before: Cc, cap: Cap) -> Cc {
    let page_shift = cap.mps_min().trailing_zeros() - 12;
    let css = if cap.0 & Cap::CSS_NVM != 0 {
        0
    } else if cap.supports_nvm() {
        CSS_ALL
    } else {
        CSS_ADMIN
    };
    Cc(before.0 & !CC_KNOWN | Cc::enable(page_shift).0 | css)
}

async fn set_cc(admin: &Admin, cc: Cc) -> Result<(), HostError> {
    admin
        .set_register("Property Set of CC", offset::CC, cc.0)
        .await
}

/// Reads CSTS until `reached`, for as long as CAP.TO allows.
async fn wait(admin: &mut Admin, cap: Cap, reached: fn(Csts) -> bool) -> Result<(), HostError> {
    let at = admin.at();
    let after = ready_timeout(cap);
    let end = Instant::now() + after;
    let (mut pause, longest) = PAUSE;
    loop {
        let csts = read_status(admin).await?;
        if csts.cfs() {
            return Err(HostError::Fatal { at, csts: csts.0 });
        }
        if reached(csts) {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(HostError::NeverReady { at, after });
        }
        sleep(pause).await;
        admin.extend(pause);
        pause = (pause * 2).min(longest);
    }
}

/// CSTS.
pub(super) async fn read_status(admin: &Admin) -> Result<Csts, HostError> {
    let csts = admin.register("Property Get of CSTS", offset::CSTS).await?;
    Ok(Csts(csts))
}

/// Asks for a normal shutdown and waits until it is complete, or until `within` has passed, or the
/// controller is found to be gone. True when it is complete.
pub(super) async fn shut_down(admin: &Admin, cc: Cc, within: Duration) -> bool {
    if admin.loss().is_some() {
        return false;
    }
    let steps = async {
        set_cc(admin, Cc(cc.0 & !Cc::SHN_MASK | Cc::SHN_NORMAL)).await?;
        let (mut pause, longest) = PAUSE;
        while !read_status(admin).await?.shutdown_complete() {
            sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
        Ok::<(), HostError>(())
    };
    match timeout(within, steps).await {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            tracing::debug!("shutdown notification: {error}");
            false
        }
        Err(_) => {
            tracing::debug!(controller = %admin.at(), "shutdown was not complete within {within:?}");
            false
        }
    }
}
