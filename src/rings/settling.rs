//! Keeps a guest from going on elsewhere while what a lost controller may still write could undo what it writes there:
//! whoever has its disk then knows nothing of our fences.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// How often fences are looked at: they may end before their time.
const LOOK: Duration = Duration::from_millis(20);

/// Waits until nothing is fenced any more, for `most` at the longest. `fenced` says how long something still is, or
/// nothing, when the disk has ended and there is nobody to wait for.
pub(super) fn settle(disk: &str, most: Duration, fenced: impl Fn() -> Option<Option<Duration>>) {
    let began = Instant::now();
    let mut told = false;
    loop {
        let left = match fenced() {
            None => return,
            Some(None) => break,
            Some(Some(left)) => left,
        };
        let waited = began.elapsed();
        if waited >= most {
            tracing::warn!(
                disk,
                seconds = rounded(left),
                "the guest may go on elsewhere while writes that were lost with a controller may still be carried \
                 out: keep it paused for that long, or set --drain-timeout to more than three keep-alive time-outs"
            );
            return;
        }
        if !told {
            told = true;
            tracing::info!(
                disk,
                seconds = rounded(left),
                "writes that were lost with a controller may still be carried out: the guest does not go on \
                 elsewhere before that is over"
            );
        }
        let pause = LOOK.min(left).min(most - waited);
        sleep(pause.max(Duration::from_millis(1)));
    }
    if told {
        let waited = began.elapsed().as_secs_f32();
        tracing::info!(disk, seconds = waited, "no write can be late any more");
    }
}

/// Whole seconds, rounded up.
fn rounded(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn it_takes_as_long_as_something_is_fenced_and_no_longer_than_it_may() {
        let until = |length: Duration, most: Duration| {
            let began = Instant::now();
            let looks = Cell::new(0);
            settle("disk", most, || {
                looks.set(looks.get() + 1);
                Some(length.checked_sub(began.elapsed()))
            });
            (began.elapsed(), looks.get())
        };
        let (short, long) = (Duration::from_millis(120), Duration::from_secs(60));
        let (took, looks) = until(short, long);
        assert!(took >= short && took < long / 4, "{took:?}");
        assert!((3..200).contains(&looks), "{looks}");
        let (took, _) = until(long, short);
        assert!(took >= short && took < long / 4, "{took:?}");
        assert_eq!(until(long, Duration::ZERO).1, 1, "no wait at all");
    }

    #[test]
    fn it_is_over_at_once_when_nothing_is_fenced_or_there_is_no_disk_any_more() {
        for nothing in [Some(None), None] {
            let looks = Cell::new(0);
            settle("disk", Duration::from_secs(60), || {
                looks.set(looks.get() + 1);
                nothing
            });
            assert_eq!(looks.get(), 1);
        }
    }
}
