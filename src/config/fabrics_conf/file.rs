//! One configuration file of connections: its sections, each key where it may be.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nvmf::spec::Nqn;
use uuid::Uuid;

use super::fault::{Fault, FileError};
use super::ini::{Line, lines};
use super::keys::{ADDRESSES, Class, Key, Value, key};
use crate::config::ids::parse_uuid;

/// Keys that are set, with the lines where.
pub(super) type Params = BTreeMap<&'static str, Setting>;

/// What a key is set to, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) file: PathBuf,
    pub(super) line: usize,
    pub(super) value: Value,
}

/// What a file says.
#[derive(Debug)]
pub(super) struct ConfFile {
    pub(super) path: PathBuf,
    pub(super) host: Option<Host>,
    pub(super) discovery_defaults: Params,
    pub(super) io_defaults: Params,
    pub(super) endpoints: Vec<Endpoint>,
}

/// `[Host]`.
#[derive(Debug, Default)]
pub(super) struct Host {
    pub(super) line: usize,
    pub(super) nqn: Option<Nqn>,
    pub(super) id: Option<Uuid>,
    pub(super) params: Params,
}

/// What an endpoint's section is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// `[Discovery Controller]`.
    Discovery,
    /// `[Subsystem]`.
    Io,
}

/// `[Discovery Controller]` or `[Subsystem]`.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) role: Role,
    pub(super) line: usize,
    pub(super) nqn: Option<Nqn>,
    pub(super) params: Params,
    pub(super) paths: Vec<PathLine>,
}

/// A `controller` line.
#[derive(Debug)]
pub(super) struct PathLine {
    pub(super) line: usize,
    /// By the names of [`ADDRESSES`]; transport and traddr are there.
    pub(super) addresses: BTreeMap<&'static str, String>,
    pub(super) params: Params,
}

/// The section that lines belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    None,
    /// One that is not known.
    Ignored,
    DiscoveryDefaults,
    IoDefaults,
    Host,
    /// The last of the endpoints.
    Endpoint,
}

impl Section {
    fn name(self) -> &'static str {
        match self {
            Self::None | Self::Ignored => "",
            Self::DiscoveryDefaults => "Discovery Controller Defaults",
            Self::IoDefaults => "I/O Controller Defaults",
            Self::Host => "Host",
            Self::Endpoint => "an endpoint",
        }
    }
}

impl ConfFile {
    /// Reads a file's text.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, FileError> {
        let mut parser = Parser {
            file: Self {
                path: path.to_owned(),
                host: None,
                discovery_defaults: Params::new(),
                io_defaults: Params::new(),
                endpoints: Vec::new(),
            },
            section: Section::None,
            entered: Vec::new(),
        };
        for (line, content) in lines(text) {
            let read = parser.line(line, &content);
            read.map_err(|fault| FileError::at(path, line, fault))?;
        }
        for endpoint in &parser.file.endpoints {
            if endpoint.role == Role::Io && endpoint.nqn.is_none() {
                return Err(FileError::at(path, endpoint.line, Fault::NoNqn));
            }
            if endpoint.paths.is_empty() {
                return Err(FileError::at(path, endpoint.line, Fault::NoPath));
            }
        }
        Ok(parser.file)
    }
}

struct Parser {
    file: ConfFile,
    section: Section,
    /// Sections of defaults that there were.
    entered: Vec<Section>,
}

impl Parser {
    fn line(&mut self, line: usize, content: &Line<'_>) -> Result<(), Fault> {
        match *content {
            Line::Section(name) => self.enter(line, name),
            Line::Assignment { key, value } => self.assign(line, key, value),
            Line::Junk(text) => Err(Fault::Junk(text.to_owned())),
        }
    }

    fn enter(&mut self, line: usize, name: &str) -> Result<(), Fault> {
        self.section = match name {
            "Discovery Controller Defaults" => Section::DiscoveryDefaults,
            "I/O Controller Defaults" => Section::IoDefaults,
            "Host" => {
                if let Some(host) = &self.file.host {
                    return Err(Fault::SecondHost { first: host.line });
                }
                let host = Host {
                    line,
                    ..Host::default()
                };
                self.file.host = Some(host);
                Section::Host
            }
            "Discovery Controller" => self.endpoint(line, Role::Discovery),
            "Subsystem" => self.endpoint(line, Role::Io),
            other => {
                self.warn(
                    line,
                    &format!("section [{other}] is not known and not read"),
                );
                Section::Ignored
            }
        };
        let defaults = matches!(
            self.section,
            Section::DiscoveryDefaults | Section::IoDefaults
        );
        if defaults && self.entered.contains(&self.section) {
            self.warn(
                line,
                &format!("section [{name}] is there again; the last value of a key counts"),
            );
        }
        self.entered.push(self.section);
        Ok(())
    }

    fn endpoint(&mut self, line: usize, role: Role) -> Section {
        self.file.endpoints.push(Endpoint {
            role,
            line,
            nqn: None,
            params: Params::new(),
            paths: Vec::new(),
        });
        Section::Endpoint
    }

    fn assign(&mut self, line: usize, name: &str, value: &str) -> Result<(), Fault> {
        match self.section {
            Section::Ignored => return Ok(()),
            Section::None => return Err(Fault::NoSection(name.to_owned())),
            _ => {}
        }
        let key = if ADDRESSES.contains(&name) {
            return Err(Fault::NotHere {
                key: name.to_owned(),
                place: "a controller line",
            });
        } else {
            key(name)?
        };
        match key.class {
            Class::Tunable | Class::Security => {
                let value = key.value(value)?;
                self.set(line, key, value)
            }
            Class::Identity => self.identity(line, key, value),
            Class::Subsystem => {
                let endpoint = self.last_endpoint(key)?;
                endpoint.nqn = Some(parse_nqn(key, value)?);
                Ok(())
            }
            Class::Controller => {
                self.last_endpoint(key)?;
                let path = path_line(&self.file.path, line, value)?;
                self.last_endpoint(key)?.paths.push(path);
                Ok(())
            }
        }
    }

    fn set(&mut self, line: usize, key: &'static Key, value: Value) -> Result<(), Fault> {
        let setting = Setting {
            file: self.file.path.clone(),
            line,
            value,
        };
        let params = match self.section {
            Section::DiscoveryDefaults => &mut self.file.discovery_defaults,
            Section::IoDefaults => &mut self.file.io_defaults,
            Section::Host => &mut self.file.host.get_or_insert_default().params,
            Section::Endpoint => &mut self.last_endpoint(key)?.params,
            Section::None | Section::Ignored => return Ok(()),
        };
        if let Some(first) = params.insert(key.name, setting) {
            let again = format!("{} replaces that of line {}", key.name, first.line);
            self.warn(line, &again);
        }
        Ok(())
    }

    fn identity(&mut self, line: usize, key: &Key, value: &str) -> Result<(), Fault> {
        let host = match (self.section, &mut self.file.host) {
            (Section::Host, Some(host)) => host,
            _ => {
                return Err(Fault::NotHere {
                    key: key.name.to_owned(),
                    place: "[Host]",
                });
            }
        };
        match key.name {
            // Empty: as if it were not there.
            "hostnqn" if value.is_empty() => host.nqn = None,
            "hostid" if value.is_empty() => host.id = None,
            "hostnqn" => host.nqn = Some(parse_nqn(key, value)?),
            "hostid" => {
                let id = parse_uuid(value).map_err(|error| Fault::HostId {
                    value: value.to_owned(),
                    error,
                })?;
                host.id = Some(id);
            }
            other => self.warn(line, &format!("{other} is not used")),
        }
        Ok(())
    }

    fn last_endpoint(&mut self, key: &Key) -> Result<&mut Endpoint, Fault> {
        match (self.section, self.file.endpoints.last_mut()) {
            (Section::Endpoint, Some(endpoint)) => Ok(endpoint),
            _ => Err(Fault::NotIn {
                key: key.name,
                section: self.section.name(),
            }),
        }
    }

    fn warn(&self, line: usize, message: &str) {
        tracing::warn!("{}:{line}: {message}", self.file.path.display());
    }
}

fn parse_nqn(key: &Key, value: &str) -> Result<Nqn, Fault> {
    if value.is_empty() {
        return Err(Fault::Empty(key.name.to_owned()));
    }
    Nqn::new(value).map_err(|error| Fault::Nqn {
        key: key.name,
        value: value.to_owned(),
        error,
    })
}

/// The value of a `controller` line: `key=value` pairs between semicolons.
fn path_line(file: &Path, line: usize, value: &str) -> Result<PathLine, Fault> {
    let mut path = PathLine {
        line,
        addresses: BTreeMap::new(),
        params: Params::new(),
    };
    for pair in value.split(';').map(str::trim).filter(|it| !it.is_empty()) {
        let (name, value) = match pair.split_once('=') {
            Some((name, value)) if !name.trim().is_empty() => (name.trim(), value.trim()),
            _ => return Err(Fault::NotAPair(pair.to_owned())),
        };
        if let Some(&name) = ADDRESSES.iter().find(|&&it| it == name) {
            if value.is_empty() {
                return Err(Fault::Empty(name.to_owned()));
            }
            if path.addresses.insert(name, value.to_owned()).is_some() {
                return Err(Fault::Repeated(name));
            }
            continue;
        }
        let key = key(name)?;
        match key.class {
            Class::Tunable => {}
            Class::Security => return Err(Fault::PerPath(key.name)),
            Class::Identity | Class::Subsystem | Class::Controller => {
                return Err(Fault::NotIn {
                    key: key.name,
                    section: "a controller line",
                });
            }
        }
        let setting = Setting {
            file: file.to_owned(),
            line,
            value: key.value(value)?,
        };
        path.params.insert(key.name, setting);
    }
    for needed in ["transport", "traddr"] {
        if !path.addresses.contains_key(needed) {
            return Err(Fault::NoAddress(needed));
        }
    }
    Ok(path)
}
