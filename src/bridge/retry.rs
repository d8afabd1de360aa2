//! What a failed command is worth: the one table over status type, code and "do not retry".
//!
//! A guest turns one error into a read-only file system, so what may pass is attempted again: a few times, with pauses
//! that grow, or after the time that the controller asks for. What speaks of the path is attempted on another one, if
//! there is one.

use nvmf::spec::{Status, status::sct};

/// What to do about a command that has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The guest is told.
    Fail,
    /// Attempt it again, on whatever path.
    Here,
    /// Attempt it again, on another path if there is one.
    Elsewhere,
    /// The same; and this path is not what it was said to be.
    AccessChanged,
}

/// The pause before the second attempt that follows a failure, in milliseconds; the first follows at once. Each is
/// twice as long as the one before.
const FIRST_PAUSE: u64 = 100;

/// The pause before an attempt after `failures` of them, at least 1, in milliseconds. `asked` is what the controller
/// asks for.
pub(crate) fn pause(failures: u8, asked: Option<u64>) -> u64 {
    let doublings = u32::from(failures.saturating_sub(1)).min(16);
    asked.unwrap_or(FIRST_PAUSE * ((1 << doublings) - 1))
}

/// The table. Success is none of its business, and counts as final.
pub(crate) fn verdict(status: Status) -> Verdict {
    if status.dnr() {
        return Verdict::Fail;
    }
    match (status.sct(), status.sc()) {
        (sct::GENERIC, sc) => generic(sc),
        // Access is lost for good, not there, or changing, on this path.
        (sct::PATH, 0x01..=0x03) => Verdict::AccessChanged,
        // The rest of the path-related: internal, of the controller, of the host.
        (sct::PATH, _) => Verdict::Elsewhere,
        // Wrong commands stay wrong, and what the medium lost is lost; nobody knows what a vendor means.
        _ => Verdict::Fail,
    }
}

fn generic(sc: u8) -> Verdict {
    match sc {
        // Data transfer error (a digest, for instance), internal error, abort requested, SQ deleted.
        0x04 | 0x06..=0x08 => Verdict::Here,
        // Sanitize in progress, command interrupted, transient transport error.
        0x1d | 0x21 | 0x22 => Verdict::Here,
        // Namespace not ready, format in progress.
        0x82 | 0x84 => Verdict::Here,
        // Success, and everything that is wrong with the command or the namespace.
        _ => Verdict::Fail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bridge::status::Class;

    #[test]
    fn each_code_that_may_pass_is_attempted_again_where_that_helps() {
        for (sct, sc, expected) in [
            (0, 0x00, Verdict::Fail),
            (0, 0x01, Verdict::Fail),
            (0, 0x04, Verdict::Here),
            (0, 0x05, Verdict::Fail),
            (0, 0x06, Verdict::Here),
            (0, 0x07, Verdict::Here),
            (0, 0x08, Verdict::Here),
            (0, 0x0b, Verdict::Fail),
            (0, 0x20, Verdict::Fail),
            (0, 0x21, Verdict::Here),
            (0, 0x22, Verdict::Here),
            (0, 0x80, Verdict::Fail),
            (0, 0x82, Verdict::Here),
            (0, 0x83, Verdict::Fail),
            (1, 0x82, Verdict::Fail),
            (2, 0x80, Verdict::Fail),
            (2, 0x81, Verdict::Fail),
            (3, 0x00, Verdict::Elsewhere),
            (3, 0x01, Verdict::AccessChanged),
            (3, 0x02, Verdict::AccessChanged),
            (3, 0x03, Verdict::AccessChanged),
            (3, 0x60, Verdict::Elsewhere),
            (3, 0x70, Verdict::Elsewhere),
            (3, 0x71, Verdict::Elsewhere),
            (7, 0x22, Verdict::Fail),
        ] {
            let status = Status::new(sct, sc);
            assert_eq!(verdict(status), expected, "{status}");
        }
    }

    #[test]
    fn what_must_not_be_retried_is_not_and_what_is_wrong_or_lost_never_is() {
        for code in 0..0x800u16 {
            let status = Status::new((code >> 8) as u8, code as u8);
            assert_eq!(verdict(status.do_not_retry()), Verdict::Fail, "{status}");
            let hopeless = matches!(
                Class::of(status),
                Class::Unsupported | Class::Medium | Class::Denied | Class::Malformed
            );
            assert!(!hopeless || verdict(status) == Verdict::Fail, "{status}");
        }
    }

    #[test]
    fn pauses_begin_with_none_and_double_unless_the_controller_asks_for_one() {
        let pauses = [1, 2, 3, 4, 5].map(|failures| pause(failures, None));
        assert_eq!(pauses, [0, 100, 300, 700, 1500]);
        assert_eq!([pause(1, Some(200)), pause(5, Some(200))], [200, 200]);
        assert_eq!(pause(u8::MAX, None), pause(17, None), "there is a longest");
    }
}
