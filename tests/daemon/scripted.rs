//! An NVMe/TCP controller that a test scripts: honest where the script says nothing.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nvmf::spec::discovery::{DiscoveryHeader, RECORD_LEN};
use nvmf::spec::fabrics::SQHD_FLOW_DISABLED;
use nvmf::spec::identify::{IDENTIFY_LEN, IdentifyController, IdentifyNamespace, cns};
use nvmf::spec::opcode::{admin, fabrics, nvm};
use nvmf::spec::property::{Cap, Cc, Csts, offset};
use nvmf::spec::{Cqe, Nqn, Sqe, Status};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::ring::PATIENCE;

pub(crate) const SUBNQN: &str = "nqn.2026-01.org.example:scripted";
const CNTLID: u16 = 1;

/// PDU types.
const IC_RESP: u8 = 1;
const CAPSULE_CMD: u8 = 4;
const CAPSULE_RESP: u8 = 5;
const C2H_DATA: u8 = 7;
/// Bytes of ICReq and ICResp, and of the headers of the others.
const IC_LEN: usize = 128;
const CMD_LEN: usize = 72;
const DATA_LEN: usize = 24;
const LAST_PDU: u8 = 1 << 2;

/// Where a controller fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// With its ICResp.
    Handshake,
    Connect,
    /// Property Get, by offset.
    Property(u32),
    SetProperty,
    /// Identify, by CNS.
    Identify(u8),
    SetFeatures,
    KeepAlive,
    GetLogPage,
    /// The handshake of the second connection, an I/O queue's.
    IoHandshake,
    IoConnect,
    /// Any command on the I/O queue.
    Io,
}

/// How it fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Failure {
    /// It says nothing.
    Silent,
    /// It hangs up in the middle of a PDU.
    CutOff,
    /// A byte of each PDU now and then.
    Slow(Duration),
    /// What it says is no PDU.
    Nonsense,
}

/// What a test changes in an honest controller.
#[derive(Default)]
pub(crate) struct Script {
    /// The result of Connect commands.
    pub(crate) connect: Option<Cqe>,
    pub(crate) controller: Option<fn(&mut IdentifyController)>,
    pub(crate) namespace: Option<fn(&mut IdentifyNamespace)>,
    /// Limits of the NVM command set (CNS 06h), which it does not tell otherwise.
    pub(crate) command_set: Option<fn(&mut [u8])>,
    /// Where and how it fails; everywhere, if nowhere in particular.
    pub(crate) failure: Option<(Option<Stage>, Failure)>,
    /// It is a discovery controller.
    pub(crate) discovery: bool,
    /// PSH bytes of ICResp that are changed: offset in the PDU and value.
    pub(crate) ic_resp: Vec<(usize, u8)>,
}

/// A controller that listens on a port of its own until the test ends.
pub(crate) struct Scripted {
    address: SocketAddr,
    seen: Arc<Seen>,
}

/// What a controller was told.
#[derive(Default)]
struct Seen {
    /// Values that were written to CC.
    configurations: Mutex<Vec<u32>>,
    /// Commands of I/O queues, with their data.
    commands: Mutex<Vec<(Sqe, Vec<u8>)>>,
    /// When Keep Alive commands came.
    keep_alives: Mutex<Vec<Instant>>,
}

impl Scripted {
    pub(crate) fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let seen = Arc::<Seen>::default();
        let shared = Arc::new((script, Arc::clone(&seen)));
        // Threads that nobody ends: each waits for bytes of a connection, and ends with it or with
        // the program.
        thread::spawn(move || {
            for (number, stream) in listener.incoming().map_while(Result::ok).enumerate() {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    let (script, seen) = &*shared;
                    let _ = stream.set_read_timeout(Some(PATIENCE));
                    let _ = stream.set_nodelay(true);
                    let cc = Cc::default();
                    // A host that hangs up is no error here.
                    let _ = Connection {
                        stream,
                        admin: number == 0,
                        failure: None,
                        script,
                        seen,
                        cc,
                    }
                    .serve();
                });
            }
        });
        Self { address, seen }
    }

    pub(crate) fn uri(&self) -> String {
        format!("nvme+tcp://{}/{SUBNQN}", self.address)
    }

    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn configurations(&self) -> Vec<Cc> {
        let all = self
            .seen
            .configurations
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|cc| Cc(*cc)).collect()
    }

    /// When Keep Alive commands came.
    pub(crate) fn keep_alives(&self) -> Vec<Instant> {
        let all = self.seen.keep_alives.lock();
        all.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Commands of I/O queues since the last call, with the data that they brought.
    pub(crate) fn take_commands(&self) -> Vec<(Sqe, Vec<u8>)> {
        let mut all = (self.seen.commands.lock()).unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut all)
    }
}

struct Connection<'a> {
    stream: TcpStream,
    /// The first of the controller.
    admin: bool,
    /// What is to happen to what is sent next.
    failure: Option<Failure>,
    script: &'a Script,
    seen: &'a Seen,
    cc: Cc,
}

impl Connection<'_> {
    fn serve(&mut self) -> std::io::Result<()> {
        self.stream.read_exact(&mut [0; IC_LEN])?;
        let mut resp = [0; IC_LEN];
        (resp[0], resp[2], resp[4]) = (IC_RESP, 128, 128);
        // MAXH2CDATA of 1 MiB.
        resp[12..16].copy_from_slice(&(1_u32 << 20).to_le_bytes());
        for (at, byte) in &self.script.ic_resp {
            resp[*at] = *byte;
        }
        self.enter(match self.admin {
            true => Stage::Handshake,
            false => Stage::IoHandshake,
        });
        self.transmit(&resp)?;
        loop {
            let mut header = [0; CMD_LEN];
            self.stream.read_exact(&mut header)?;
            if header[0] != CAPSULE_CMD {
                // A host that ends the connection has said why.
                return Ok(());
            }
            let length = u32::from_le_bytes(header[4..8].try_into().expect("4 bytes"));
            let mut data = vec![0; length as usize - CMD_LEN];
            self.stream.read_exact(&mut data)?;
            let sqe = Sqe::read_from_bytes(&header[8..]).expect("64 bytes");
            if !self.admin && sqe.opcode != fabrics::OPCODE {
                let all = self.seen.commands.lock();
                let mut all = all.unwrap_or_else(PoisonError::into_inner);
                all.push((sqe, data));
            }
            if self.admin && sqe.opcode == admin::KEEP_ALIVE {
                let all = self.seen.keep_alives.lock();
                all.unwrap_or_else(PoisonError::into_inner)
                    .push(Instant::now());
            }
            self.answer(&sqe)?;
        }
    }

    fn answer(&mut self, sqe: &Sqe) -> std::io::Result<()> {
        self.enter(self.stage(sqe));
        let cid = sqe.cid.get();
        let cqe = match (sqe.opcode, sqe.fctype()) {
            (fabrics::OPCODE, fabrics::CONNECT) => self.script.connect.unwrap_or(Cqe {
                sqhd: SQHD_FLOW_DISABLED.into(),
                ..Cqe::with_result(0, CNTLID.into())
            }),
            (fabrics::OPCODE, fabrics::PROPERTY_GET) => Cqe::with_result(0, self.property(sqe)),
            (fabrics::OPCODE, fabrics::PROPERTY_SET) => {
                self.cc = Cc(sqe.cdw12.get());
                let mut all = self
                    .seen
                    .configurations
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                all.push(self.cc.0);
                Cqe::new(0, Status::SUCCESS)
            }
            (nvm::READ, _) if !self.admin => {
                self.send_data(cid, &vec![0; sqe.block_count() as usize * 512])?;
                Cqe::new(0, Status::SUCCESS)
            }
            (nvm::WRITE | nvm::WRITE_ZEROES | nvm::DATASET_MANAGEMENT, _) if !self.admin => {
                Cqe::new(0, Status::SUCCESS)
            }
            (admin::IDENTIFY, _) => match self.identify(sqe.cdw10.get() as u8) {
                Some(data) => {
                    self.send_data(cid, &data)?;
                    Cqe::new(0, Status::SUCCESS)
                }
                None => Cqe::new(0, Status::INVALID_FIELD),
            },
            (admin::GET_LOG_PAGE, _) => {
                let length = (sqe.cdw10.get() >> 16) as usize * 4 + 4;
                let mut page = vec![0; length.max(RECORD_LEN)];
                let header = DiscoveryHeader::new_zeroed();
                page[..RECORD_LEN].copy_from_slice(header.as_bytes());
                self.send_data(cid, &page[..length])?;
                Cqe::new(0, Status::SUCCESS)
            }
            // One I/O queue each way, zero-based.
            (admin::SET_FEATURES | admin::KEEP_ALIVE | nvm::FLUSH, _) => {
                Cqe::new(0, Status::SUCCESS)
            }
            _ => Cqe::new(0, Status::INVALID_OPCODE),
        };
        self.send(
            CAPSULE_RESP,
            0,
            Cqe {
                cid: cid.into(),
                ..cqe
            }
            .as_bytes(),
            &[],
        )
    }

    fn stage(&self, sqe: &Sqe) -> Stage {
        match (sqe.opcode, sqe.fctype()) {
            (fabrics::OPCODE, fabrics::CONNECT) if self.admin => Stage::Connect,
            (fabrics::OPCODE, fabrics::CONNECT) => Stage::IoConnect,
            (fabrics::OPCODE, fabrics::PROPERTY_GET) => Stage::Property(sqe.cdw11.get()),
            (fabrics::OPCODE, _) => Stage::SetProperty,
            _ if !self.admin => Stage::Io,
            (admin::IDENTIFY, _) => Stage::Identify(sqe.cdw10.get() as u8),
            (admin::GET_LOG_PAGE, _) => Stage::GetLogPage,
            // It comes in between, at any time.
            (admin::KEEP_ALIVE, _) => Stage::KeepAlive,
            _ => Stage::SetFeatures,
        }
    }

    /// From here on it fails, if the script wants it at this stage.
    fn enter(&mut self, stage: Stage) {
        if let Some((at, failure)) = self.script.failure
            && at.is_none_or(|at| at == stage)
        {
            self.failure = Some(failure);
        }
    }

    /// Sends a PDU, or what the script wants instead.
    fn transmit(&mut self, pdu: &[u8]) -> std::io::Result<()> {
        match self.failure {
            None => self.stream.write_all(pdu),
            Some(Failure::Silent) => Ok(()),
            Some(Failure::CutOff) => {
                self.stream.write_all(&pdu[..pdu.len() - 1])?;
                self.stream.shutdown(Shutdown::Both)
            }
            Some(Failure::Slow(pause)) => pdu.iter().try_for_each(|byte| {
                self.stream.write_all(&[*byte])?;
                thread::sleep(pause);
                Ok(())
            }),
            Some(Failure::Nonsense) => self.stream.write_all(&[0x55; 128]),
        }
    }

    fn property(&self, sqe: &Sqe) -> u64 {
        let csts = match (self.cc.shn(), self.cc.en()) {
            (0, true) => Csts::RDY,
            (0, false) => 0,
            _ => Csts::RDY | Csts::SHST_COMPLETE,
        };
        match sqe.cdw11.get() {
            offset::CAP => Cap::CSS_NVM | Cap::CQR | 10 << 24 | 127,
            offset::VS => 0x0001_0400,
            offset::CC => self.cc.0.into(),
            offset::CSTS => csts.into(),
            _ => 0,
        }
    }

    fn identify(&self, structure: u8) -> Option<Vec<u8>> {
        let mut bytes = vec![0; IDENTIFY_LEN];
        match structure {
            cns::CONTROLLER => {
                let mut data = IdentifyController::new_zeroed();
                data.cntlid = CNTLID.into();
                data.ver = 0x0001_0400.into();
                data.cntrltype = if self.script.discovery { 2 } else { 1 };
                (data.sqes, data.cqes) = (0x66, 0x44);
                data.nn = 1.into();
                (data.ioccsz, data.iorcsz) = (4.into(), 1.into());
                data.subnqn = Nqn::new(SUBNQN).expect("a name").to_field();
                self.script.controller.inspect(|change| change(&mut data));
                bytes = data.as_bytes().to_vec();
            }
            cns::ACTIVE_NAMESPACES => bytes[0] = 1,
            cns::NAMESPACE => {
                let mut data = IdentifyNamespace::new_zeroed();
                (data.nsze, data.ncap) = (2048.into(), 2048.into());
                data.lbaf[0].lbads = 9;
                self.script.namespace.inspect(|change| change(&mut data));
                bytes = data.as_bytes().to_vec();
            }
            cns::NAMESPACE_DESCRIPTORS => {}
            cns::IO_CONTROLLER => self.script.command_set?(&mut bytes),
            _ => return None,
        }
        Some(bytes)
    }

    fn send_data(&mut self, cid: u16, data: &[u8]) -> std::io::Result<()> {
        let mut psh = [0; DATA_LEN - 8];
        psh[..2].copy_from_slice(&cid.to_le_bytes());
        psh[8..12].copy_from_slice(&u32::try_from(data.len()).expect("short").to_le_bytes());
        self.send(C2H_DATA, LAST_PDU, &psh, data)
    }

    fn send(&mut self, kind: u8, flags: u8, psh: &[u8], data: &[u8]) -> std::io::Result<()> {
        let header_len = u8::try_from(8 + psh.len()).expect("short");
        let data_at = if data.is_empty() { 0 } else { header_len };
        let length = u32::try_from(8 + psh.len() + data.len()).expect("short");
        let mut pdu = vec![kind, flags, header_len, data_at];
        pdu.extend(length.to_le_bytes());
        pdu.extend(psh);
        pdu.extend(data);
        self.transmit(&pdu)
    }
}
