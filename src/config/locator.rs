//! What `attach` is told of where its namespace is: the way to it, or a discovery controller that knows the ways.

use std::fmt;
use std::str::FromStr;

use nvmf::host::NamespaceSelector;
use nvmf::spec::Nqn;
use nvmf::spec::nqn::NQN_MAX_LEN;

use super::uri::{
    DISCOVERY_SCHEME, DiscoveryUri, Uri, UriError, decode, parse_authority, parse_selector,
};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Locator {
    /// A namespace, and the way to it.
    Namespace(Uri),
    /// Whatever a discovery controller tells.
    Search(Search),
}

/// `nvme+tcp-discovery://HOST[:PORT]/[?nqn=PATTERN][&nsid=N | &uuid=U | &nguid=G]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Search {
    /// Who is asked.
    pub(crate) controller: DiscoveryUri,
    /// The subsystem.
    pub(crate) pattern: NqnPattern,
    /// Which of its namespaces.
    pub(crate) selector: NamespaceSelector,
}

/// A name of subsystems, in which `*` is any text and `?` any character.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NqnPattern(String);

impl NqnPattern {
    /// Whether a subsystem has such a name.
    pub(crate) fn matches(&self, nqn: &Nqn) -> bool {
        let pattern: Vec<char> = self.0.chars().collect();
        let name: Vec<char> = nqn.as_str().chars().collect();
        let (mut at, mut next) = (0, 0);
        // The last star, and how much of the name it is taken for.
        let mut star: Option<(usize, usize)> = None;
        while next < name.len() {
            match pattern.get(at) {
                Some('*') => {
                    star = Some((at, next));
                    at += 1;
                }
                Some(&wanted) if wanted == '?' || wanted == name[next] => {
                    at += 1;
                    next += 1;
                }
                _ => match star {
                    Some((after, taken)) => {
                        star = Some((after, taken + 1));
                        at = after + 1;
                        next = taken + 1;
                    }
                    None => return false,
                },
            }
        }
        pattern[at..].iter().all(|&rest| rest == '*')
    }
}

impl fmt::Display for NqnPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Locator {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(UriError::Scheme);
        };
        match scheme.eq_ignore_ascii_case(DISCOVERY_SCHEME) {
            true => parse_search(rest).map(Self::Search),
            false => text.parse().map(Self::Namespace),
        }
    }
}

fn parse_search(rest: &str) -> Result<Search, UriError> {
    if rest.contains('#') {
        return Err(UriError::Fragment);
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if !path.is_empty() {
        return Err(UriError::NotAPattern(path.to_owned()));
    }
    let (host, port) = parse_authority(authority)?;
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let (names, selectors): (Vec<&str>, Vec<&str>) =
        pairs.partition(|pair| pair.starts_with("nqn="));
    let pattern = match names[..] {
        [] => "*".to_owned(),
        [name] => decode(&name["nqn=".len()..])?,
        _ => return Err(UriError::TwoPatterns),
    };
    if pattern.is_empty() || pattern.len() > NQN_MAX_LEN {
        return Err(UriError::Pattern(pattern));
    }
    Ok(Search {
        controller: DiscoveryUri { host, port },
        pattern: NqnPattern(pattern),
        selector: match selectors.is_empty() {
            true => NamespaceSelector::Only,
            false => parse_selector(&selectors.join("&"))?,
        },
    })
}

impl fmt::Display for Search {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DiscoveryUri { host, port } = &self.controller;
        match host.contains(':') {
            true => write!(f, "{DISCOVERY_SCHEME}://[{host}]")?,
            false => write!(f, "{DISCOVERY_SCHEME}://{host}")?,
        }
        if let Some(port) = port {
            write!(f, ":{port}")?;
        }
        write!(f, "/?nqn={}", self.pattern)?;
        match &self.selector {
            NamespaceSelector::Only => Ok(()),
            selector => write!(f, "&{selector}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(rest: &str) -> Result<Search, UriError> {
        match format!("{DISCOVERY_SCHEME}://{rest}").parse()? {
            Locator::Search(search) => Ok(search),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_pattern_is_any_text_at_stars_and_any_character_at_question_marks() {
        let name = Nqn::new("nqn.2026-01.org.example:disk12").unwrap();
        for pattern in [
            "*",
            "***",
            "nqn.2026-01.org.example:disk12",
            "*:disk12",
            "*disk*",
            "nqn.*:disk??",
            "*disk12*",
            "nqn*1*2",
        ] {
            assert!(NqnPattern(pattern.to_owned()).matches(&name), "{pattern}");
        }
        for pattern in [
            "disk12",
            "*disk",
            "nqn.*:disk?",
            "*disk???",
            "?",
            "nqn*1*3",
            "NQN.*",
        ] {
            assert!(!NqnPattern(pattern.to_owned()).matches(&name), "{pattern}");
        }
    }

    #[test]
    fn a_pattern_of_stars_does_not_take_for_ever() {
        let name = Nqn::new(format!("nqn.2026-01.org.{}", "a".repeat(200))).unwrap();
        let pattern = NqnPattern(format!("{}b", "*a".repeat(100)));
        assert!(!pattern.matches(&name));
    }

    #[test]
    fn a_search_names_host_pattern_and_namespace() {
        let found = search("storage.example").unwrap();
        assert_eq!(found.controller.port, None);
        assert_eq!(
            (found.pattern.0.as_str(), found.selector),
            ("*", NamespaceSelector::Only)
        );
        let found = search("[fd00::1]:8010/?nsid=3&nqn=*%3adisk?").unwrap();
        assert_eq!(found.controller.host, "fd00::1");
        assert_eq!(found.controller.port, Some(8010));
        assert_eq!(found.pattern.0, "*:disk?");
        assert_eq!(found.selector, NamespaceSelector::Nsid(3));
        assert_eq!(
            found.to_string(),
            "nvme+tcp-discovery://[fd00::1]:8010/?nqn=*:disk?&nsid=3"
        );
        assert_eq!(found.to_string().parse(), Ok(Locator::Search(found)));
    }

    #[test]
    fn what_is_wrong_with_a_search_is_named() {
        assert_eq!(search(""), Err(UriError::NoHost));
        assert_eq!(search("h:0"), Err(UriError::Port("0".to_owned())));
        let path = "nqn.2026-01.org.example:disk1";
        assert_eq!(
            search(&format!("h/{path}")),
            Err(UriError::NotAPattern(path.to_owned()))
        );
        assert_eq!(search("h/?nqn=a&nqn=b"), Err(UriError::TwoPatterns));
        assert_eq!(search("h/?nqn="), Err(UriError::Pattern(String::new())));
        let long = "x".repeat(224);
        assert_eq!(
            search(&format!("h/?nqn={long}")),
            Err(UriError::Pattern(long))
        );
        assert_eq!(search("h/?name=x"), Err(UriError::Key("name".to_owned())));
        assert_eq!(search("h/?nsid=1&nsid=2"), Err(UriError::TwoSelectors));
        assert_eq!(search("h#x"), Err(UriError::Fragment));
        assert_eq!("h".parse::<Locator>(), Err(UriError::Scheme));
    }
}
