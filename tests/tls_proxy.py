"""TLS in front of a Redis server, since not every build of the server has it, and the certificates for it."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

START_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Pair:
    """The files of a certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority of a test's own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"the authority of {folder.name}")])
        self.certificate = folder / "ca.pem"
        signed = self._sign(self._name, self._key, x509.BasicConstraints(ca=True, path_length=0))
        self.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def issue(self, host: str) -> Pair:
        """Makes a certificate for an address or a name."""
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        signed = self._sign(subject, key, x509.SubjectAlternativeName([name]))
        pair = Pair(self._folder / f"{host}.pem", self._folder / f"{host}.key")
        pair.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pair

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType
    ) -> x509.Certificate:
        now, a_day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        own, issuer = key.public_key(), self._key.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(own)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - a_day)
            .not_valid_after(now + a_day)
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(own), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
            .sign(self._key, hashes.SHA256())
        )


class TlsProxy:
    """Listens with TLS on `port` of a host and hands all on to another port. `clients` signs whom it lets in."""

    def __init__(
        self, target_port: int, pair: Pair, *, clients: Authority | None = None, host: str = "127.0.0.1"
    ) -> None:
        self._host, self._target_port = host, target_port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(pair.certificate, pair.key)
        if clients is not None:
            self._context.verify_mode = ssl.CERT_REQUIRED
            self._context.load_verify_locations(clients.certificate)
        self._loop = asyncio.new_event_loop()
        self._listens = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))
        self._end = asyncio.Event()
        self._transports: list[asyncio.WriteTransport] = []
        self.port = 0

    async def _serve(self) -> None:
        self._loop.set_exception_handler(lambda loop, context: None)  # Handshakes are there to fail.
        server = await asyncio.start_server(self._forward, self._host, 0, ssl=self._context)
        self.port = server.sockets[0].getsockname()[1]
        self._listens.set()
        await self._end.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        for transport in self._transports:
            transport.abort()  # Closing would wait for peers that have fallen silent.
        await asyncio.sleep(0)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(self._host, self._target_port)
        self._transports += [writer.transport, inner_writer.transport]
        try:
            await asyncio.gather(copy_bytes(reader, inner_writer), copy_bytes(inner_reader, writer))
        finally:
            for end in (writer, inner_writer):
                end.close()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listens.wait(START_TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._loop.close()


async def copy_bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Passes on what comes until either end is gone, and closes the writer."""
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()
