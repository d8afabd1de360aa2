//! NVMe/TCP as a pure machine for both roles: no sockets, clocks, threads or payload.
