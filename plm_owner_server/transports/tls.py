"""TLS for both transports, from files that may be renewed while the server runs."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from protocol.errors import PemaError

log = logging.getLogger(__name__)

_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Certificate:
    """A certificate chain and its private key, both PEM files.

    Attributes:
        chain: path of the certificate chain, the server's certificate first.
        key: path of the private key, without a password.
        client_ca: path of the authorities of clients' certificates; None if clients need no certificates.
    """

    chain: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """The TLS context of the REST server.

        Raises:
            PemaError: the files cannot be read, or do not belong together.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        self.load_into(context)
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Load the files into a context, for connections that are made from now on.

        A removed authority of clients is trusted until the next start, because OpenSSL only adds authorities.

        Raises:
            PemaError: the files cannot be read, or do not belong together.
        """
        try:
            # First into another context: bad files must not spoil the one in use.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.chain, self.key, password="")
            context.load_cert_chain(self.chain, self.key, password="")
        except (OSError, ssl.SSLError) as error:
            raise PemaError(
                f"{self.chain} and {self.key} are no certificate and its key: {error}.",
                hint="--tls-certificate and --tls-key take PEM files; the key without a password.",
            ) from error
        if self.client_ca is None:
            return
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(self.client_ca)
            context.load_verify_locations(self.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise PemaError(
                f"{self.client_ca} holds no authorities: {error}.", hint="--tls-client-ca takes their PEM file."
            ) from error

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """The credentials of the gRPC server, which checks the files at every connection."""
        # Before the files are read, so that a renewal in between is noticed.
        loaded = self._modified()
        self.context()
        current = self._grpc_configuration()

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal loaded
            try:
                # Files that are incomplete, or do not belong together, leave those in use.
                if (now := self._modified()) == loaded:
                    return None
                self.context()
                configuration = self._grpc_configuration()
                if self._modified() != now:
                    return None
                loaded = now
                return configuration
            except (OSError, PemaError):
                return None

        is_required = self.client_ca is not None
        # gRPC's types lack None, which means "unchanged".
        return grpc.dynamic_ssl_server_credentials(current, renewed, is_required)  # type: ignore[arg-type]

    async def keep_current(self, context: ssl.SSLContext) -> None:
        """Load the files into the REST server's context whenever they change; runs until it is cancelled."""
        loaded: tuple[int, ...] | None = None
        while True:
            try:
                if (now := self._modified()) != loaded:
                    is_renewal, loaded = loaded is not None, now
                    self.load_into(context)
                    if is_renewal:
                        log.info("the certificate %s was renewed", self.chain)
            except (OSError, PemaError) as error:
                log.warning("the certificate in use stays: %s", error)
            await asyncio.sleep(_POLL_SECONDS)

    def _modified(self) -> tuple[int, ...]:
        files = (self.chain, self.key, *([] if self.client_ca is None else [self.client_ca]))
        return tuple(file.stat().st_mtime_ns for file in files)

    def _grpc_configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = (self.key.read_bytes(), self.chain.read_bytes())
        authorities = None if self.client_ca is None else self.client_ca.read_bytes()
        return grpc.ssl_server_certificate_configuration([pair], authorities)


def common_name(certificate: Mapping[str, Any] | None) -> str | None:
    """The common name in the subject of a certificate as `ssl` returns it; None if there is none, or several."""
    subject = (certificate or {}).get("subject", ())
    names = [value for part in subject for field, value in part if field == "commonName"]
    return names[0] if len(names) == 1 else None
