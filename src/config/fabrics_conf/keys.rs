//! The keys of a configuration file of connections: where each may be, and what values it takes.

use super::fault::Fault;

/// What a key is for, which decides where it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// How to connect: in every section, and on a `controller` line.
    Tunable,
    /// Keys and secrets, which belong to the pair of host and subsystem: in every section.
    Security,
    /// Who connects: in `[Host]`.
    Identity,
    /// Which subsystem: in an endpoint's section.
    Subsystem,
    /// A path: in an endpoint's section, any number of times.
    Controller,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Number,
    Switch,
    Text,
}

/// A key that may be in a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) class: Class,
    kind: Kind,
}

/// What a key is set to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// Nothing: back to what is built in.
    BuiltIn,
    Number(i64),
    Switch(bool),
    Text(String),
}

const fn tunable(name: &'static str, kind: Kind) -> Key {
    let class = Class::Tunable;
    Key { name, class, kind }
}

const fn security(name: &'static str, kind: Kind) -> Key {
    let class = Class::Security;
    Key { name, class, kind }
}

const fn text(name: &'static str, class: Class) -> Key {
    let kind = Kind::Text;
    Key { name, class, kind }
}

const KEYS: [Key; 28] = [
    tunable("nr-io-queues", Kind::Number),
    tunable("nr-write-queues", Kind::Number),
    tunable("nr-poll-queues", Kind::Number),
    tunable("queue-size", Kind::Number),
    tunable("keep-alive-tmo", Kind::Number),
    tunable("reconnect-delay", Kind::Number),
    tunable("ctrl-loss-tmo", Kind::Number),
    tunable("fast-io-fail-tmo", Kind::Number),
    tunable("tos", Kind::Number),
    tunable("duplicate-connect", Kind::Switch),
    tunable("disable-sqflow", Kind::Switch),
    tunable("hdr-digest", Kind::Switch),
    tunable("data-digest", Kind::Switch),
    tunable("persistent", Kind::Switch),
    security("tls", Kind::Switch),
    security("concat", Kind::Switch),
    security("tls-key", Kind::Text),
    security("tls-key-identity", Kind::Text),
    security("keyring", Kind::Text),
    security("kxchap-secret", Kind::Text),
    security("kxchap-ctrl-secret", Kind::Text),
    security("dhchap-secret", Kind::Text),
    security("dhchap-ctrl-secret", Kind::Text),
    text("hostnqn", Class::Identity),
    text("hostid", Class::Identity),
    text("hostsymname", Class::Identity),
    text("nqn", Class::Subsystem),
    text("controller", Class::Controller),
];

/// Addresses of a path, on a `controller` line only.
pub(super) const ADDRESSES: [&str; 5] = [
    "transport",
    "traddr",
    "trsvcid",
    "host-traddr",
    "host-iface",
];

/// Finds a key by its name.
pub(super) fn key(name: &str) -> Result<&'static Key, Fault> {
    KEYS.iter()
        .find(|key| key.name == name)
        .ok_or_else(|| Fault::UnknownKey {
            key: name.to_owned(),
            nearest: nearest(name),
        })
}

/// The name that was probably meant.
fn nearest(name: &str) -> &'static str {
    if name == "subsysnqn" {
        return "nqn";
    }
    let names = KEYS.iter().map(|key| key.name).chain(ADDRESSES);
    names
        .min_by_key(|known| strsim::damerau_levenshtein(name, known))
        .unwrap_or_default()
}

impl Key {
    /// Reads a value.
    pub(super) fn value(&self, value: &str) -> Result<Value, Fault> {
        if value.is_empty() {
            return Ok(Value::BuiltIn);
        }
        match self.kind {
            Kind::Text => Ok(Value::Text(value.to_owned())),
            Kind::Number => {
                let number = value.parse().map_err(|_| Fault::NotANumber {
                    key: self.name,
                    value: value.to_owned(),
                });
                number.map(Value::Number)
            }
            Kind::Switch => {
                let on = ["1", "yes", "y", "true", "t", "on"];
                let off = ["0", "no", "n", "false", "f", "off"];
                let is = |words: [&str; 6]| words.iter().any(|it| it.eq_ignore_ascii_case(value));
                match (is(on), is(off)) {
                    (true, _) => Ok(Value::Switch(true)),
                    (_, true) => Ok(Value::Switch(false)),
                    _ => Err(Fault::NotASwitch {
                        key: self.name,
                        value: value.to_owned(),
                    }),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_are_systemds_in_any_case() {
        let tls = key("tls").unwrap();
        for on in ["1", "yes", "Y", "True", "t", "ON"] {
            assert_eq!(tls.value(on).unwrap(), Value::Switch(true));
        }
        for off in ["0", "no", "N", "False", "f", "OFF"] {
            assert_eq!(tls.value(off).unwrap(), Value::Switch(false));
        }
        assert!(matches!(tls.value("maybe"), Err(Fault::NotASwitch { .. })));
    }

    #[test]
    fn an_empty_value_is_what_is_built_in_for_each_key() {
        for key in &KEYS {
            assert_eq!(key.value("").unwrap(), Value::BuiltIn);
        }
    }

    #[test]
    fn an_unknown_key_is_answered_with_the_one_that_was_meant() {
        for (wrong, right) in [
            ("keep_alive_tmo", "keep-alive-tmo"),
            ("subsysnqn", "nqn"),
            ("trsvid", "trsvcid"),
        ] {
            match key(wrong) {
                Err(Fault::UnknownKey { nearest, .. }) => assert_eq!(nearest, right),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn numbers_are_decimal_and_may_be_negative() {
        let key = key("ctrl-loss-tmo").unwrap();
        assert_eq!(key.value("-1").unwrap(), Value::Number(-1));
        for wrong in ["30 # s", "0x10", "off", "1s"] {
            assert!(matches!(key.value(wrong), Err(Fault::NotANumber { .. })));
        }
    }
}
