//! RULE of `fault=`: what goes wrong with storage on purpose, and when.

use std::ops::RangeInclusive;
use std::time::Duration;

use nvmf::backend::fault::{Action, Fault, Operations, PER_MILLION};
use nvmf::spec::Status;

/// Names of operations, as they are written.
const OPERATIONS: [(&str, Operations); 6] = [
    ("read", Operations::READ),
    ("write", Operations::WRITE),
    ("flush", Operations::FLUSH),
    ("zeroes", Operations::WRITE_ZEROES),
    ("discard", Operations::DEALLOCATE),
    ("compare", Operations::COMPARE),
];

/// Why a string is not a rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FaultError {
    /// It does not begin with an action.
    #[error("'{0}' is not an action; begin with error, error=STATUS, delay=TIME or hang")]
    Action(String),
    /// Neither a name nor numbers.
    #[error(
        "'{0}' is not a status that fails; write a name such as write-fault, or SCT/SC in \
         hexadecimal such as 2/0x81, with +dnr where it is not to be retried"
    )]
    Status(String),
    /// Not a time.
    #[error("'{0}' is not a time; write one in us, ms or s, as in 5ms, or two, as in 5ms-50ms")]
    Time(String),
    /// Not a filter.
    #[error(
        "'{0}' is not a filter; there are read, write, flush, zeroes, discard, compare, lba=, \
         rate=, after=, every=, count=, seed= and firm"
    )]
    Filter(String),
    /// A filter whose value means nothing.
    #[error("'{name}={value}': write {example}")]
    Value {
        /// The filter.
        name: &'static str,
        /// As written.
        value: String,
        /// What it looks like.
        example: &'static str,
    },
}

/// Parses `ACTION[:FILTER]...`.
///
/// # Errors
/// [`FaultError`] says what is wrong and what to write.
pub(crate) fn parse_fault(text: &str) -> Result<Fault, FaultError> {
    let mut fields = text.split(':');
    let mut fault = Fault::new(action(fields.next().unwrap_or_default())?);
    let mut operations = Operations::empty();
    for field in fields {
        if let Some((_, operation)) = OPERATIONS.iter().find(|(name, _)| *name == field) {
            operations |= *operation;
            continue;
        }
        match field.split_once('=') {
            None if field == "firm" => fault.firm = true,
            Some(("lba", value)) => fault.blocks = Some(blocks(value)?),
            Some(("rate", value)) => fault.rate = rate(value)?,
            Some(("after", value)) => fault.after = number("after", value, 0)?,
            Some(("every", value)) => fault.every = number("every", value, 1)?,
            Some(("count", value)) => fault.count = Some(number("count", value, 1)?),
            Some(("seed", value)) => fault.seed = number("seed", value, 0)?,
            _ => return Err(FaultError::Filter(field.to_owned())),
        }
    }
    if !operations.is_empty() {
        fault.operations = operations;
    }
    Ok(fault)
}

fn action(text: &str) -> Result<Action, FaultError> {
    match text.split_once('=') {
        None if text == "error" => Ok(Action::Error(None)),
        None if text == "hang" => Ok(Action::Hang),
        Some(("error", value)) => Ok(Action::Error(Some(status(value)?))),
        Some(("delay", value)) => delay(value),
        _ => Err(FaultError::Action(text.to_owned())),
    }
}

fn status(text: &str) -> Result<Status, FaultError> {
    let (code, dnr) = match text.strip_suffix("+dnr") {
        Some(code) => (code, true),
        None => (text, false),
    };
    let hexadecimal = |text: &str| {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        u8::from_str_radix(digits, 16).ok().filter(|_| plain)
    };
    let numbers = || {
        let (sct, sc) = code.split_once('/')?;
        let sct = hexadecimal(sct).filter(|&sct| sct < 8)?;
        Some(Status::new(sct, hexadecimal(sc)?))
    };
    let status = Status::from_name(code).or_else(numbers);
    match status.filter(|status| !status.is_success()) {
        Some(status) if dnr => Ok(status.do_not_retry()),
        Some(status) => Ok(status),
        None => Err(FaultError::Status(text.to_owned())),
    }
}

fn delay(text: &str) -> Result<Action, FaultError> {
    let wrong = || FaultError::Time(text.to_owned());
    let (least, most) = text.split_once('-').unwrap_or((text, text));
    let (least, most) = (
        time(least).ok_or_else(wrong)?,
        time(most).ok_or_else(wrong)?,
    );
    if least > most {
        return Err(wrong());
    }
    Ok(Action::Delay { least, most })
}

/// A time of at most a day.
fn time(text: &str) -> Option<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let micros = match &text[digits.len()..] {
        "us" => 1,
        "ms" => 1000,
        "s" => 1_000_000,
        _ => return None,
    };
    let time = Duration::from_micros(whole(digits)?.checked_mul(micros)?);
    (time <= Duration::from_secs(86400)).then_some(time)
}

fn blocks(text: &str) -> Result<RangeInclusive<u64>, FaultError> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (whole(first), whole(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => Err(value("lba", text, "a block or two, as in lba=2048-4095")),
    }
}

fn rate(text: &str) -> Result<u32, FaultError> {
    let percent = text
        .strip_suffix('%')
        .and_then(|number| number.parse().ok());
    match percent {
        Some(percent) if (0.0..=100.0).contains(&percent) => {
            let millionths: f64 = percent / 100.0 * f64::from(PER_MILLION);
            Ok(millionths.round() as u32)
        }
        _ => Err(value("rate", text, "a percentage, as in rate=2.5%")),
    }
}

fn number(name: &'static str, text: &str, least: u64) -> Result<u64, FaultError> {
    match whole(text) {
        Some(number) if number >= least => Ok(number),
        _ => Err(value(name, text, "a number, as in 10")),
    }
}

fn whole(text: &str) -> Option<u64> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| plain)
}

fn value(name: &'static str, value: &str, example: &'static str) -> FaultError {
    FaultError::Value {
        name,
        value: value.to_owned(),
        example,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action_of(text: &str) -> Action {
        parse_fault(text).unwrap().action
    }

    fn millis(least: u64, most: u64) -> Action {
        Action::Delay {
            least: Duration::from_millis(least),
            most: Duration::from_millis(most),
        }
    }

    #[test]
    fn an_action_alone_is_for_every_operation() {
        for (text, action) in [
            ("error", Action::Error(None)),
            ("hang", Action::Hang),
            ("delay=5ms", millis(5, 5)),
        ] {
            assert_eq!(parse_fault(text), Ok(Fault::new(action)));
        }
    }

    #[test]
    fn a_status_is_a_name_or_numbers_and_may_forbid_a_retry() {
        let of = |text: &str| match action_of(text) {
            Action::Error(Some(status)) => status,
            other => panic!("{other:?}"),
        };
        assert_eq!(of("error=write-fault"), Status::WRITE_FAULT);
        let dnr = Status::WRITE_FAULT.do_not_retry();
        assert_eq!(of("error=write-fault+dnr"), dnr);
        for text in ["error=2/80+dnr", "error=0x2/0x80+dnr"] {
            assert_eq!(of(text), dnr);
        }
        assert_eq!(of("error=7/ff"), Status::new(7, 0xff));
        for text in [
            "", "ok", "success", "0/0", "8/0", "2/100", "2", "2/", "+dnr", "2/+1",
        ] {
            let wrong = Err(FaultError::Status(text.to_owned()));
            assert_eq!(parse_fault(&format!("error={text}")), wrong);
        }
    }

    #[test]
    fn a_time_has_a_unit_and_a_range_is_in_order() {
        assert_eq!(action_of("delay=2s"), millis(2000, 2000));
        assert_eq!(action_of("delay=1000us-50ms"), millis(1, 50));
        for text in [
            "", "5", "ms", "5m", "-5ms", "5ms-", "9ms-5ms", "1.5s", "90000s", "+5ms",
        ] {
            let wrong = Err(FaultError::Time(text.to_owned()));
            assert_eq!(parse_fault(&format!("delay={text}")), wrong);
        }
    }

    #[test]
    fn filters_come_in_any_order_and_operations_add_up() {
        let fault =
            parse_fault("error:count=3:read:lba=8-15:rate=2.5%:write:after=1:every=10:seed=7");
        let expected = Fault {
            operations: Operations::READ | Operations::WRITE,
            blocks: Some(8..=15),
            after: 1,
            every: 10,
            rate: 25_000,
            count: Some(3),
            seed: 7,
            ..Fault::new(Action::Error(None))
        };
        assert_eq!(fault, Ok(expected));
        assert_eq!(parse_fault("hang:lba=9").unwrap().blocks, Some(9..=9));
        assert!(parse_fault("delay=1s:write:firm").unwrap().firm);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for text in ["", "fail", "error:", "hang=1", "delay"] {
            assert!(parse_fault(text).is_err(), "{text:?}");
        }
        for text in ["reads", "lba", "", "rw", "lba:1"] {
            let field = text.split(':').next().unwrap().to_owned();
            let wrong = Err(FaultError::Filter(field));
            assert_eq!(parse_fault(&format!("error:{text}")), wrong);
        }
        for text in [
            "lba=",
            "lba=9-8",
            "lba=x",
            "rate=5",
            "rate=101%",
            "rate=-1%",
            "rate=NaN%",
            "every=0",
            "count=0",
            "after=-1",
            "seed=x",
        ] {
            let found = parse_fault(&format!("error:{text}"));
            assert!(matches!(found, Err(FaultError::Value { .. })), "{text}");
        }
    }
}
