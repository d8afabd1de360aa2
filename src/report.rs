//! An error and its causes as the one line that a user sees.

use std::error::Error;

/// The message, then each cause that the message does not end with already, on one line whatever names
/// a peer or a user has put in.
pub(crate) fn one_line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    let mut shown = String::with_capacity(line.len());
    for character in line.chars() {
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Fault {
        #[error("cannot open '{0}'")]
        Open(&'static str, #[source] std::io::Error),
        #[error("cannot open it: {0}")]
        Told(#[source] std::io::Error),
    }

    #[test]
    fn causes_follow_unless_the_message_tells_them() {
        let io = || std::io::Error::other("disk on fire");
        assert_eq!(
            one_line(&Fault::Open("x", io())),
            "cannot open 'x': disk on fire"
        );
        assert_eq!(one_line(&Fault::Told(io())), "cannot open it: disk on fire");
    }

    #[test]
    fn a_name_with_control_characters_stays_on_the_line() {
        let error = Fault::Open("a\nb\u{1b}[0m", std::io::Error::other("no"));
        assert_eq!(one_line(&error), r"cannot open 'a\nb\u{1b}[0m': no");
    }
}
