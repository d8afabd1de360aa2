//! The properties of one controller, and the CC/CSTS machine behind them.
//!
//! ```text
//!              EN 0→1                    EN 1→0
//!  Disabled ──────────▶ Enabled (RDY) ──────────▶ Resetting ──closed──▶ Disabled
//!     │                    │ SHN                                           ▲ EN 0→1
//!     └──── SHN ───────────┴─────▶ ShuttingDown (SHST 1) ──closed──▶ ShutDown (SHST 2)
//!  any ──fatal──▶ Failed (CFS)
//! ```
//! While Resetting or ShuttingDown every write of CC is refused; so it is when Failed.

use crate::spec::Status;
use crate::spec::fabrics::{Property, PropertySize};
use crate::spec::property::{Cap, Cc, Csts, offset};

/// Version that the controller declares: 1.4.
pub(super) const VERSION: u32 = 0x0001_0400;
/// CAP.TO: longest time to become ready, in units of 500 ms.
const TIMEOUT: u64 = 15;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Disabled,
    Enabled,
    Resetting,
    ShuttingDown,
    ShutDown,
    Failed,
}

/// What a Property Set asks of the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// It is enabled now.
    Enabled,
    /// It must be reset; [`Registers::closed`] ends that.
    Reset,
    /// It must be shut down; [`Registers::closed`] ends that.
    Shutdown,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Registers {
    cap: Cap,
    cc: Cc,
    state: State,
}

fn refuse<T>() -> Result<T, Status> {
    Err(Status::INVALID_FIELD.do_not_retry())
}

impl Registers {
    /// Of a controller that was just connected to; `queue_size` is the largest I/O queue in
    /// entries.
    pub(super) fn new(queue_size: u32) -> Self {
        let mqes = u64::from(queue_size.clamp(2, 65536) - 1);
        Self {
            cap: Cap(mqes | Cap::CQR | TIMEOUT << 24 | Cap::CSS_NVM),
            cc: Cc(0),
            state: State::Disabled,
        }
    }

    /// Commands other than Fabrics, and I/O queues, are served.
    pub(super) fn is_enabled(&self) -> bool {
        self.state == State::Enabled
    }

    /// The work of a reset or shutdown is going on.
    pub(super) fn is_closing(&self) -> bool {
        matches!(self.state, State::Resetting | State::ShuttingDown)
    }

    fn csts(&self) -> u32 {
        match self.state {
            State::Disabled => 0,
            // Ready until the reset is done: that is how the host sees its end.
            State::Enabled | State::Resetting => Csts::RDY,
            State::ShuttingDown => Csts::RDY | Csts::SHST_OCCURRING,
            State::ShutDown => Csts::SHST_COMPLETE,
            State::Failed => Csts::CFS,
        }
    }

    /// Property Get.
    ///
    /// # Errors
    /// The status to answer with.
    pub(super) fn get(&self, property: Property) -> Result<u64, Status> {
        use PropertySize::{Eight, Four};
        match (property.offset, property.size) {
            (offset::CAP, Some(Eight)) => Ok(self.cap.0),
            (offset::VS, Some(Four)) => Ok(u64::from(VERSION)),
            (offset::CC, Some(Four)) => Ok(u64::from(self.cc.0)),
            (offset::CSTS, Some(Four)) => Ok(u64::from(self.csts())),
            _ => refuse(),
        }
    }

    /// Property Set.
    ///
    /// # Errors
    /// The status to answer with; nothing has changed then.
    pub(super) fn set(&mut self, property: Property) -> Result<Effect, Status> {
        if (property.offset, property.size) != (offset::CC, Some(PropertySize::Four)) {
            return refuse();
        }
        let cc = Cc(property.value as u32);
        if self.is_closing() || self.state == State::Failed || !self.is_valid(cc) {
            return refuse();
        }
        let before = std::mem::replace(&mut self.cc, cc);
        if cc.shn() != 0 && cc.shn() != before.shn() {
            self.cc.0 &= !Cc::EN;
            self.state = State::ShuttingDown;
            return Ok(Effect::Shutdown);
        }
        match (before.en(), cc.en()) {
            (false, true) => {
                self.state = State::Enabled;
                Ok(Effect::Enabled)
            }
            (true, false) => {
                self.state = State::Resetting;
                Ok(Effect::Reset)
            }
            _ => Ok(Effect::None),
        }
    }

    fn is_valid(&self, cc: Cc) -> bool {
        let mps_max = (self.cap.0 >> 52 & 0xf) as u32;
        let keeps_selection = !(self.cc.en() && cc.en())
            || (cc.ams(), cc.mps(), cc.css()) == (self.cc.ams(), self.cc.mps(), self.cc.css());
        matches!(cc.iosqes(), 0 | 6)
            && matches!(cc.iocqes(), 0 | 4)
            && cc.shn() != 3
            && cc.ams() == 0
            && cc.mps() <= mps_max
            && matches!(cc.css(), 0 | 7)
            // Enabling and shutting down in one write means nothing.
            && (self.cc.en() || !cc.en() || cc.shn() == 0)
            && keeps_selection
    }

    /// A reset or shutdown has done its work.
    pub(super) fn closed(&mut self) {
        self.state = match self.state {
            State::Resetting => State::Disabled,
            State::ShuttingDown => State::ShutDown,
            state => state,
        };
    }

    /// The controller has failed.
    pub(super) fn fail(&mut self) {
        self.cc.0 &= !Cc::EN;
        self.state = State::Failed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::fabrics::{property_get, property_set};

    const ENABLE: u32 = Cc::EN | 6 << 16 | 4 << 20;

    fn set(registers: &mut Registers, cc: u32) -> Result<Effect, Status> {
        registers.set(Property::from_sqe(&property_set(offset::CC, cc)))
    }

    fn get(registers: &Registers, offset: u32, size: PropertySize) -> Result<u64, Status> {
        registers.get(Property::from_sqe(&property_get(offset, size)))
    }

    fn csts(registers: &Registers) -> u32 {
        get(registers, offset::CSTS, PropertySize::Four).unwrap() as u32
    }

    #[test]
    fn each_property_has_one_size_and_everything_else_is_an_invalid_field() {
        let registers = Registers::new(128);
        let cap = Cap(get(&registers, offset::CAP, PropertySize::Eight).unwrap());
        assert_eq!(cap.max_queue_entries(), 128);
        assert_eq!((cap.mps_min(), cap.mps_max()), (4096, 4096));
        assert_eq!(cap.to(), 15);
        assert!(cap.supports_nvm() && cap.0 & Cap::CQR != 0);
        let vs = get(&registers, offset::VS, PropertySize::Four);
        assert_eq!(vs, Ok(0x0001_0400));
        for (offset, size) in [
            (offset::CAP, PropertySize::Four),
            (offset::VS, PropertySize::Eight),
            (offset::CC, PropertySize::Eight),
            (offset::CSTS, PropertySize::Eight),
            (offset::NSSR, PropertySize::Four),
            (0x04, PropertySize::Four),
        ] {
            let got = get(&registers, offset, size);
            assert_eq!(
                got,
                Err(Status::INVALID_FIELD.do_not_retry()),
                "{offset:#x}"
            );
        }
    }

    #[test]
    fn only_cc_can_be_set_and_only_to_values_that_the_controller_knows() {
        let mut registers = Registers::new(128);
        let csts = registers.set(Property::from_sqe(&property_set(offset::CSTS, 0)));
        assert_eq!(csts, Err(Status::INVALID_FIELD.do_not_retry()));
        for (what, cc) in [
            ("IOSQES 7", Cc::EN | 7 << 16 | 4 << 20),
            ("IOCQES 5", Cc::EN | 6 << 16 | 5 << 20),
            ("SHN 3", ENABLE | 3 << 14),
            ("AMS 1", ENABLE | 1 << 11),
            ("MPS 1", ENABLE | 1 << 7),
            ("CSS 6", ENABLE | 6 << 4),
            ("EN and SHN at once", ENABLE | Cc::SHN_NORMAL),
        ] {
            let answer = set(&mut registers, cc);
            assert_eq!(answer, Err(Status::INVALID_FIELD.do_not_retry()), "{what}");
        }
        let cc = get(&registers, offset::CC, PropertySize::Four);
        assert_eq!(cc, Ok(0), "a refused value leaves no trace");
        // As Linux does: first everything but EN, then EN.
        assert_eq!(set(&mut registers, ENABLE & !Cc::EN), Ok(Effect::None));
        assert_eq!(set(&mut registers, ENABLE), Ok(Effect::Enabled));
        let changed = set(&mut registers, ENABLE | 7 << 4);
        assert_eq!(changed, Err(Status::INVALID_FIELD.do_not_retry()));
    }

    #[test]
    fn enabling_is_ready_at_once_and_reset_keeps_ready_until_it_is_done() {
        let mut registers = Registers::new(128);
        assert_eq!(csts(&registers), 0);
        assert_eq!(set(&mut registers, ENABLE), Ok(Effect::Enabled));
        assert_eq!(csts(&registers), Csts::RDY);
        assert_eq!(set(&mut registers, ENABLE & !Cc::EN), Ok(Effect::Reset));
        assert_eq!(csts(&registers), Csts::RDY);
        assert!(set(&mut registers, ENABLE).is_err(), "busy resetting");
        registers.closed();
        assert_eq!(csts(&registers), 0);
        assert_eq!(set(&mut registers, ENABLE), Ok(Effect::Enabled));
    }

    #[test]
    fn shutdown_is_reported_while_it_goes_on_when_it_is_complete_and_not_after_enabling_again() {
        for shn in [Cc::SHN_NORMAL, Cc::SHN_ABRUPT] {
            let mut registers = Registers::new(128);
            set(&mut registers, ENABLE).unwrap();
            assert_eq!(set(&mut registers, ENABLE | shn), Ok(Effect::Shutdown));
            assert_eq!(csts(&registers) & Csts::SHST_MASK, Csts::SHST_OCCURRING);
            let cc = get(&registers, offset::CC, PropertySize::Four).unwrap();
            assert!(!Cc(cc as u32).en(), "EN is forced to 0");
            assert!(set(&mut registers, ENABLE).is_err(), "busy shutting down");
            registers.closed();
            assert_eq!(csts(&registers), Csts::SHST_COMPLETE);
            assert_eq!(set(&mut registers, ENABLE), Ok(Effect::Enabled));
            assert_eq!(csts(&registers), Csts::RDY, "SHST reads 0 again");
        }
    }

    #[test]
    fn a_controller_that_failed_says_so_and_cannot_be_enabled() {
        let mut registers = Registers::new(128);
        set(&mut registers, ENABLE).unwrap();
        registers.fail();
        assert_eq!(csts(&registers), Csts::CFS);
        assert!(set(&mut registers, ENABLE).is_err());
    }
}
