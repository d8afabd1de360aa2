//! Reads nvme-cli's configuration file of connections (`nvme-fabrics.conf`): what it says of one endpoint.
//!
//! The main file is read, and then every `*.conf` of the directory of the same name with `.d` after it. What a
//! more specific place says wins: the `controller` line, the endpoint's section, `[Host]`, the defaults of its
//! own file, those of the main file. Everything is checked before anything is connected, and one fault refuses
//! all of it. What is only untidy is a warning.

mod fault;
mod file;
mod ini;
mod keys;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read as _};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use nvmf::host::{LocalEnd, TargetAddress};
use nvmf::spec::Nqn;
use nvmf::spec::discovery::{DISCOVERY_PORT, IO_PORT};
use uuid::Uuid;

use self::fault::Fault;
pub(crate) use self::fault::FileError;
use self::file::{ConfFile, Endpoint, Host, Params, PathLine, Role, Setting};
use self::keys::Value;
use super::uri::{HOST_IFACE, HOST_TRADDR, parse_host, parse_interface};
use crate::limits;

/// Bytes of one file, at most.
const FILE_MAX: u64 = 1 << 20;
/// Files in the directory, at most.
const DROP_INS_MAX: usize = 256;

/// A configuration, checked as far as it can be without choosing from it.
#[derive(Debug)]
pub(crate) struct FabricsConf {
    path: PathBuf,
    /// The main file first.
    files: Vec<ConfFile>,
}

/// How to connect to one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Connection {
    /// The names of the host, as far as they are given.
    pub(crate) hostnqn: Option<Nqn>,
    /// See [`Self::hostnqn`].
    pub(crate) hostid: Option<Uuid>,
    /// It is a discovery controller.
    is_discovery: bool,
    /// The endpoint.
    subnqn: Nqn,
    /// Where it is, at least one: host and port.
    paths: Vec<(String, Option<u16>, LocalEnd)>,
    /// What is not as it is built in.
    pub(crate) settings: Settings,
}

/// What a file decides about a connection; `None` is what is built in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    /// See `attach --help` for each.
    pub(crate) nr_io_queues: Option<u16>,
    pub(crate) queue_size: Option<u16>,
    pub(crate) keep_alive_tmo: Option<u16>,
    pub(crate) reconnect_delay: Option<u16>,
    pub(crate) ctrl_loss_tmo: Option<i32>,
    pub(crate) fast_io_fail_tmo: Option<i32>,
    pub(crate) hdr_digest: Option<bool>,
    pub(crate) data_digest: Option<bool>,
}

impl Connection {
    /// Its paths; without a port, that which is usual.
    pub(crate) fn targets(&self) -> Vec<TargetAddress> {
        let usual = match self.is_discovery {
            true => DISCOVERY_PORT,
            false => IO_PORT,
        };
        let target = |(host, port, local): &(String, Option<u16>, LocalEnd)| TargetAddress {
            host: host.clone(),
            port: port.unwrap_or(usual),
            subnqn: self.subnqn.clone(),
            local: local.clone(),
        };
        self.paths.iter().map(target).collect()
    }
}

impl FabricsConf {
    /// Reads a file, and the directory beside it; one of the two has to be there.
    ///
    /// # Errors
    /// [`FileError`] names file, line, key, value and what to write.
    pub(crate) fn read(path: &Path) -> Result<Self, FileError> {
        if path.extension().is_some_and(|it| it == "json") {
            return Err(FileError::Json(path.to_owned()));
        }
        let directory = PathBuf::from(format!("{}.d", path.display()));
        let drop_ins = drop_ins(&directory)?;
        let mut files = Vec::with_capacity(1 + drop_ins.len());
        match read_text(path) {
            Err(FileError::Unreadable { error, .. })
                if error.kind() == io::ErrorKind::NotFound && !drop_ins.is_empty() =>
            {
                files.push(ConfFile::parse(path, "")?);
            }
            text => files.push(ConfFile::parse(path, &text?)?),
        }
        for path in drop_ins {
            files.push(ConfFile::parse(&path, &read_text(&path)?)?);
        }
        check_hosts(&files)?;
        Ok(Self {
            path: path.to_owned(),
            files,
        })
    }

    /// The subsystem of that name; without one, the only one.
    ///
    /// # Errors
    /// There is none or several, or one that cannot be connected to as it says.
    pub(crate) fn subsystem(&self, nqn: Option<&Nqn>) -> Result<Connection, FileError> {
        let all = || self.endpoints(Role::Io);
        let names = || -> Vec<String> {
            let named = all().filter_map(|(_, it)| it.nqn.as_ref());
            named.map(ToString::to_string).collect()
        };
        let mut chosen = all().filter(|(_, it)| nqn.is_none() || it.nqn.as_ref() == nqn);
        let Some((file, endpoint)) = chosen.next() else {
            let found = names();
            return Err(FileError::NoSubsystem {
                path: self.path.clone(),
                wanted: nqn.map_or("at all".to_owned(), |nqn| format!("with nqn = {nqn}")),
                found: match found.is_empty() {
                    true => "none".to_owned(),
                    false => found.join(", "),
                },
            });
        };
        if chosen.next().is_some() {
            return Err(FileError::SeveralSubsystems {
                path: self.path.clone(),
                found: names().join(", "),
            });
        }
        self.resolve(file, endpoint)
    }

    /// All discovery controllers, at least one.
    ///
    /// # Errors
    /// There is none, or one that cannot be connected to as it says.
    pub(crate) fn discovery_controllers(&self) -> Result<Vec<Connection>, FileError> {
        let found = self.endpoints(Role::Discovery);
        let found: Vec<_> = found
            .map(|(file, endpoint)| self.resolve(file, endpoint))
            .collect::<Result<_, _>>()?;
        match found.is_empty() {
            true => Err(FileError::NoDiscoveryController(self.path.clone())),
            false => Ok(found),
        }
    }

    fn endpoints(&self, role: Role) -> impl Iterator<Item = (&ConfFile, &Endpoint)> {
        let all = self.files.iter();
        all.flat_map(|file| file.endpoints.iter().map(move |it| (file, it)))
            .filter(move |(_, endpoint)| endpoint.role == role)
    }

    /// What all that a file says comes to for one endpoint.
    fn resolve(&self, file: &ConfFile, endpoint: &Endpoint) -> Result<Connection, FileError> {
        let defaults = |file: &ConfFile| match endpoint.role {
            Role::Discovery => file.discovery_defaults.clone(),
            Role::Io => file.io_defaults.clone(),
        };
        let main = self.files.first();
        let host = file.host.as_ref().or(main.and_then(|it| it.host.as_ref()));
        let mut params = main.map(defaults).unwrap_or_default();
        params.extend(defaults(file));
        params.extend(host.map(|host| host.params.clone()).unwrap_or_default());
        params.extend(endpoint.params.clone());

        let at = |path: &PathLine, fault| FileError::at(&file.path, path.line, fault);
        let mut paths = Vec::new();
        let mut settings: Option<BTreeMap<&str, Value>> = None;
        let mut chosen = Params::new();
        for path in &endpoint.paths {
            let transport = path.addresses.get("transport").map(String::as_str);
            if transport != Some("tcp") {
                let transport = transport.unwrap_or_default();
                let line = path.line;
                let file = file.path.display();
                tracing::warn!(
                    "{file}:{line}: a path over {transport} is not used, but those over TCP"
                );
                continue;
            }
            paths.push(address(path).map_err(|fault| at(path, fault))?);
            let mut params = params.clone();
            params.extend(path.params.clone());
            let values: BTreeMap<&str, Value> = params
                .iter()
                .filter(|(_, it)| it.value != Value::BuiltIn)
                .map(|(key, it)| (*key, it.value.clone()))
                .collect();
            match &settings {
                Some(first) if *first != values => {
                    let differs = params
                        .keys()
                        .find(|key| first.get(**key) != values.get(*key));
                    let key = differs.copied().unwrap_or("a key");
                    return Err(at(path, Fault::PathsDiffer(key)));
                }
                _ => settings = Some(values),
            }
            chosen = params;
        }
        if paths.is_empty() {
            let transport = endpoint
                .paths
                .first()
                .and_then(|it| it.addresses.get("transport"));
            let fault = Fault::NoTcp(transport.cloned().unwrap_or_default());
            return Err(FileError::at(&file.path, endpoint.line, fault));
        }
        Ok(Connection {
            hostnqn: host.and_then(|host| host.nqn.clone()),
            hostid: host.and_then(|host| host.id),
            is_discovery: endpoint.role == Role::Discovery,
            subnqn: endpoint.nqn.clone().unwrap_or_else(Nqn::discovery),
            paths,
            settings: Settings::new(&chosen)?,
        })
    }
}

impl Settings {
    fn new(params: &Params) -> Result<Self, FileError> {
        for (&key, setting) in params {
            if let Some(reason) = unsupported(key, &setting.value) {
                let value = setting.to_string();
                let fault = Fault::NotSupported { key, value, reason };
                return Err(FileError::at(&setting.file, setting.line, fault));
            }
        }
        let number = |key, range| number(params, key, range);
        let switch = |key| match params.get(key).map(|it| &it.value) {
            Some(Value::Switch(on)) => Some(*on),
            _ => None,
        };
        let short = |number: Option<i64>| number.and_then(|it| u16::try_from(it).ok());
        let seconds = |number: Option<i64>| number.and_then(|it| i32::try_from(it).ok());
        Ok(Self {
            nr_io_queues: short(number("nr-io-queues", limits::NR_IO_QUEUES)?),
            queue_size: short(number("queue-size", limits::QUEUE_SIZE)?),
            keep_alive_tmo: short(number("keep-alive-tmo", limits::KEEP_ALIVE_SECONDS)?),
            reconnect_delay: short(number("reconnect-delay", limits::RECONNECT_DELAY_SECONDS)?),
            ctrl_loss_tmo: seconds(number("ctrl-loss-tmo", limits::LOSS_SECONDS)?),
            fast_io_fail_tmo: seconds(number("fast-io-fail-tmo", limits::LOSS_SECONDS)?),
            hdr_digest: switch("hdr-digest"),
            data_digest: switch("data-digest"),
        })
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Value::BuiltIn => Ok(()),
            Value::Number(number) => write!(f, "{number}"),
            Value::Switch(on) => write!(f, "{on}"),
            // It may be a secret.
            Value::Text(_) => f.write_str("…"),
        }
    }
}

/// Why a key cannot be honoured as it is set, if it cannot.
fn unsupported(key: &str, value: &Value) -> Option<&'static str> {
    let set = match value {
        Value::BuiltIn | Value::Switch(false) => false,
        Value::Number(number) => *number > 0 || (key == "tos" && *number == 0),
        Value::Switch(true) | Value::Text(_) => true,
    };
    match key {
        "tls" | "concat" | "tls-key" | "tls-key-identity" | "keyring" if set => {
            Some("TLS is not supported")
        }
        "kxchap-secret" | "kxchap-ctrl-secret" | "dhchap-secret" | "dhchap-ctrl-secret" if set => {
            Some("in-band authentication is not supported")
        }
        "nr-write-queues" | "nr-poll-queues" if set => {
            Some("there are no queues for that alone; nr-io-queues are for everything")
        }
        "tos" if set => Some("the type of service cannot be set"),
        _ => None,
    }
}

fn number(
    params: &Params,
    key: &'static str,
    range: RangeInclusive<i64>,
) -> Result<Option<i64>, FileError> {
    match params.get(key) {
        Some(setting) => match setting.value {
            Value::Number(value) if range.contains(&value) => Ok(Some(value)),
            Value::Number(value) => {
                let fault = Fault::Range { key, value, range };
                Err(FileError::at(&setting.file, setting.line, fault))
            }
            _ => Ok(None),
        },
        None => Ok(None),
    }
}

/// Where a path leads to, and where it begins.
fn address(path: &PathLine) -> Result<(String, Option<u16>, LocalEnd), Fault> {
    let traddr = path.addresses.get("traddr").map_or("", String::as_str);
    let host = parse_host(traddr).ok_or_else(|| Fault::Host(traddr.to_owned()))?;
    let port = match path.addresses.get("trsvcid") {
        None => None,
        Some(text) => match text.parse() {
            Ok(port) if port != 0 => Some(port),
            _ => return Err(Fault::Port(text.clone())),
        },
    };
    let address = match path.addresses.get(HOST_TRADDR) {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| Fault::HostTraddr(text.clone()))?),
    };
    let interface = path.addresses.get(HOST_IFACE);
    let interface = interface.map(|name| parse_interface(name)).transpose();
    let local = LocalEnd {
        address,
        interface: interface.map_err(Fault::HostIface)?,
    };
    Ok((host, port, local))
}

/// Each file has a host of its own, or that of the main file.
fn check_hosts(files: &[ConfFile]) -> Result<(), FileError> {
    let hosts = files.iter();
    let hosts: Vec<(&Path, &Host)> = hosts
        .filter_map(|file| Some((file.path.as_path(), file.host.as_ref()?)))
        .collect();
    let main = files.first().map(|file| file.path.as_path());
    for (nth, &(path, host)) in hosts.iter().enumerate() {
        if host.nqn.is_none() && Some(path) != main {
            return Err(FileError::at(path, host.line, Fault::NoHostNqn));
        }
        for &(other, before) in &hosts[..nth] {
            let other = other.to_owned();
            let fault = match (&host.nqn, host.id) {
                (Some(nqn), _) if before.nqn.as_ref() == Some(nqn) => {
                    let nqn = nqn.clone();
                    Fault::SameHostNqn { nqn, other }
                }
                (_, Some(id)) if before.id == Some(id) => Fault::SameHostId { id, other },
                _ => continue,
            };
            return Err(FileError::at(path, host.line, fault));
        }
    }
    Ok(())
}

/// The files of a directory that count, by name; none when it is not there.
fn drop_ins(directory: &Path) -> Result<Vec<PathBuf>, FileError> {
    let unreadable = |error| FileError::Unreadable {
        path: directory.to_owned(),
        error,
    };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|it| it == "conf") {
            found.push(path);
        }
        if found.len() > DROP_INS_MAX {
            return Err(FileError::TooManyFiles(directory.to_owned()));
        }
    }
    found.sort();
    Ok(found)
}

fn read_text(path: &Path) -> Result<String, FileError> {
    let read = || {
        let mut text = String::new();
        let file = std::fs::File::open(path)?;
        file.take(FILE_MAX + 1).read_to_string(&mut text)?;
        match text.len() as u64 > FILE_MAX {
            true => Err(io::Error::other("it has more than 1 MiB")),
            false => Ok(text),
        }
    };
    read().map_err(|error| FileError::Unreadable {
        path: path.to_owned(),
        error,
    })
}

#[cfg(test)]
#[path = "fabrics_conf/tests.rs"]
mod tests;
