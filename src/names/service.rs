//! Names of systemd services.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{NameError, impl_name};

/// The name of a systemd service unit (systemd.unit(5)), with its suffix `.service`. The suffix is optional in the text
/// that it is parsed from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName(String);

impl_name!(ServiceName);

/// The suffixes of other kinds of units.
const OTHER_KINDS: [&str; 10] =
    ["socket", "timer", "target", "mount", "automount", "swap", "path", "slice", "scope", "device"];

impl ServiceName {
    /// The maximum length of a unit's name in characters.
    pub const MAX: usize = 255;

    /// Returns whether this is a template, which systemd can start only as an instance.
    pub fn is_template(&self) -> bool {
        self.0.ends_with("@.service")
    }

    /// Returns the part before the `@` of a template or instance.
    pub fn prefix(&self) -> Option<&str> {
        self.0.split_once('@').map(|(prefix, _)| prefix)
    }
}

impl FromStr for ServiceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if let Some(found) = text.chars().find(|c| !(c.is_ascii_alphanumeric() || ":-_.\\@".contains(*c))) {
            return Err(NameError::Character { found, allowed: "letters, digits and : - _ . \\ @" });
        }
        if let Some(first) = text.chars().next().filter(|first| matches!(first, '.' | '-' | '@')) {
            return Err(NameError::Start(first));
        }
        if text.rsplit_once('.').is_some_and(|(_, kind)| OTHER_KINDS.contains(&kind)) {
            return Err(NameError::NotService(text.to_owned()));
        }
        let name = if text.ends_with(".service") { text.to_owned() } else { format!("{text}.service") };
        if name.len() > Self::MAX {
            return Err(NameError::TooLong { length: name.len(), max: Self::MAX });
        }
        Ok(Self(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffix_is_optional_and_other_units_are_refused() {
        for text in ["nginx", "nginx.service"] {
            assert_eq!(text.parse::<ServiceName>().map(String::from), Ok("nginx.service".into()));
        }
        assert_eq!("a.timer".parse::<ServiceName>(), Err(NameError::NotService("a.timer".into())));
        assert_eq!("@a".parse::<ServiceName>(), Err(NameError::Start('@')));
        let template: ServiceName = "getty@".parse().expect("a template");
        assert!(template.is_template() && template.prefix() == Some("getty"));
    }
}
