//! What a queue pair runs over, of whatever transport it is.

use std::any::{Any, type_name};
use std::fmt;

/// A connection that was negotiated, on its way to a transport that knows its kind.
///
/// Each transport has a type of its own for this, and declines what holds another. It is opened
/// once for a queue pair, and is not there any more when requests are.
pub struct Connection {
    connection: Box<dyn Any + Send>,
    kind: &'static str,
}

impl Connection {
    /// Of any kind.
    pub fn new<C: Any + Send>(connection: C) -> Self {
        Self {
            connection: Box::new(connection),
            kind: type_name::<C>(),
        }
    }

    /// A look at it before it is taken; `None` when it is of another kind.
    pub fn get<C: Any>(&self) -> Option<&C> {
        self.connection.downcast_ref()
    }

    /// The connection itself; as it was when it is of another kind.
    ///
    /// # Errors
    /// Itself.
    pub fn take<C: Any>(self) -> Result<C, Self> {
        let Self { connection, kind } = self;
        match connection.downcast() {
            Ok(connection) => Ok(*connection),
            Err(connection) => Err(Self { connection, kind }),
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({})", self.kind)
    }
}
