//! What to add to a VM's command line for a disk that is being served.

use std::fmt;
use std::path::Path;

/// Queues in the examples: of a VM with this many vCPUs.
const EXAMPLE_VCPUS: u16 = 4;

/// A disk as a VMM's user has to know it; displays as the arguments of each VMM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VmmHints<'a> {
    /// Socket of the disk, absolute.
    pub(crate) socket_path: &'a Path,
    /// Queues on offer.
    pub(crate) num_queues: u16,
    /// The guest may not write.
    pub(crate) read_only: bool,
    /// It is the VMM that listens.
    pub(crate) vmm_listens: bool,
}

impl fmt::Display for VmmHints<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let socket = self.socket_path.display().to_string();
        let offered = self.num_queues;
        let queues = offered.min(EXAMPLE_VCPUS);
        let role = if self.vmm_listens {
            "server=on,wait=on"
        } else {
            "reconnect=1"
        };
        let qemu_socket = quote(&format!(
            "socket,id=vhost0,path={},{role}",
            socket.replace(',', ",,")
        ));
        // cloud-hypervisor takes a value with a comma in double quotes.
        let ch_value = if socket.contains([',', '[', ']', '=']) {
            format!("\"{socket}\"")
        } else {
            socket
        };
        let read_only = if self.read_only { ",readonly=on" } else { "" };
        let ch_disk = quote(&format!(
            "vhost_user=true,socket={ch_value},num_queues={queues},queue_size=128{read_only}"
        ));
        let newer = match self.vmm_listens {
            true => "",
            false => "; QEMU 9.2 and later: reconnect-ms=1000 for reconnect=1",
        };
        writeln!(f, "QEMU (memory size as in -m{newer}):")?;
        writeln!(f, "  -m 2G -smp {queues} \\")?;
        writeln!(
            f,
            "  -object memory-backend-memfd,id=mem0,size=2G,share=on -machine memory-backend=mem0 \\"
        )?;
        writeln!(f, "  -chardev {qemu_socket} \\")?;
        writeln!(
            f,
            "  -device vhost-user-blk-pci,chardev=vhost0,num-queues={queues}"
        )?;
        // Others only connect.
        if !self.vmm_listens {
            writeln!(f, "cloud-hypervisor:")?;
            writeln!(f, "  --memory size=2G,shared=on --cpus boot={queues} \\")?;
            writeln!(f, "  --disk {ch_disk}")?;
        }
        writeln!(
            f,
            "One queue for each vCPU is best; this disk offers up to {offered}."
        )
    }
}

/// An argument as a shell takes it.
fn quote(argument: &str) -> String {
    let plain =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, ',' | '=' | '/' | '.' | '_' | '-' | ':');
    if argument.chars().all(plain) {
        argument.to_owned()
    } else {
        format!("'{}'", argument.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hints(path: &str, num_queues: u16, read_only: bool) -> String {
        VmmHints {
            socket_path: Path::new(path),
            num_queues,
            read_only,
            vmm_listens: false,
        }
        .to_string()
    }

    #[test]
    fn a_vmm_that_is_to_listen_is_told_so() {
        let hints = VmmHints {
            socket_path: Path::new("/s"),
            num_queues: 4,
            read_only: false,
            vmm_listens: true,
        };
        let text = hints.to_string();
        assert!(
            text.contains("-chardev socket,id=vhost0,path=/s,server=on,wait=on "),
            "{text}"
        );
        assert!(
            !text.contains("reconnect") && !text.contains("cloud-hypervisor"),
            "{text}"
        );
    }

    #[test]
    fn an_ordinary_path_is_shown_as_it_is() {
        let text = hints("/run/disk.sock", 64, false);
        for line in [
            "  -chardev socket,id=vhost0,path=/run/disk.sock,reconnect=1 \\",
            "  -device vhost-user-blk-pci,chardev=vhost0,num-queues=4",
            "  --disk vhost_user=true,socket=/run/disk.sock,num_queues=4,queue_size=128",
        ] {
            assert!(text.lines().any(|l| l == line), "no {line:?} in {text}");
        }
    }

    #[test]
    fn no_more_queues_are_shown_than_are_offered() {
        let text = hints("/s", 2, true);
        assert!(text.contains("num-queues=2\n"));
        assert!(text.contains("num_queues=2,queue_size=128,readonly=on\n"));
    }

    #[test]
    fn commas_are_escaped_for_each_vmm_and_blanks_for_the_shell() {
        let text = hints("/my disks/a,b", 4, false);
        assert!(text.contains("-chardev 'socket,id=vhost0,path=/my disks/a,,b,reconnect=1'"));
        assert!(text.contains("--disk 'vhost_user=true,socket=\"/my disks/a,b\",num_queues=4"));
        assert_eq!(quote("it's"), r"'it'\''s'");
    }
}
