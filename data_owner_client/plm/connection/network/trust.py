"""The root certificates that both transports trust.

gRPC brings roots of its own and takes others only as PEM, so that a library such as truststore cannot serve both.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path

import certifi

from protocol.errors import InvalidRequest

# In this order: the first that is set counts.
_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")


@dataclass(frozen=True)
class TrustedRoots:
    """Root certificates.

    Attributes:
        pem: the certificates.
        source: where they come from, in words.
    """

    pem: str = field(repr=False)
    source: str


def trusted_roots(ca: Path | None) -> TrustedRoots:
    """The roots of `ca`, else of a variable of the environment, else of the system, else of certifi.

    The variables are `SSL_CERT_FILE`, `SSL_CERT_DIR`, `REQUESTS_CA_BUNDLE` and `GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`, each
    with a file or a folder. Of several, the first counts.

    Raises:
        InvalidRequest: there is no certificate in the file or folder that `ca` or the variable names.
    """
    if ca is not None:
        return _named_roots(ca, f"--ca {ca}")
    for name in _VARIABLES:
        if value := os.environ.get(name, "").strip():
            return _named_roots(Path(value), f"{name}={value}")
    paths = ssl.get_default_verify_paths()
    file = paths.cafile or paths.capath
    if file and (pem := _read(Path(file))):
        return TrustedRoots(pem, "the system's certificates")
    if found := ssl.create_default_context().get_ca_certs(binary_form=True):  # Windows
        return TrustedRoots("".join(map(ssl.DER_cert_to_PEM_cert, found)), "the system's certificates")
    return TrustedRoots(_read(Path(certifi.where())), "the certificates of certifi")


def client_context(
    roots: TrustedRoots | None, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """The TLS context of a client. It accepts what gRPC's TLS library accepts.

    Args:
        roots: trusted roots; None for none.
        certificate: PEM file of the client's own certificate.
        key: PEM file of its private key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST
    if roots is not None:
        context.load_verify_locations(cadata=roots.pem)
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def _named_roots(path: Path, name: str) -> TrustedRoots:
    try:
        roots = TrustedRoots(_read(path), name)
        client_context(roots)
    except (OSError, ValueError) as error:  # SSLError is an OSError, no certificate at all a ValueError
        raise InvalidRequest(
            f"{name} holds no certificate: {error}.", hint="It must name the PEM file, or a folder of them, of the CA."
        ) from error
    return roots


def _read(path: Path) -> str:
    """The certificates in a file, or in the files of a folder, without what stands between them."""
    files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
    found = dict.fromkeys(block for file in files for block in _CERTIFICATE.findall(file.read_bytes()))
    return "".join(f"{block.decode('ascii')}\n" for block in found)
