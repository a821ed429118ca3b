"""The cluster's own certificate authority: X.509 on elliptic curves, by `cryptography`."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flops.core.admission import CLOCKS_DIFFER_BY_S, NodeCertificate, is_relay, serial_text
from flops.core.ids import NodeId
from flops.durable_file import file_error, write_durably
from flops.errors import ErrorCode, FlopsError
from flops.wire.cluster_tls import server_name

_AUTHORITY_NAME = "FLOps cluster"
_AUTHORITY_LIFE_S = 30 * 365 * 86_400.0


class FileAuthority:
    """Implements `flops.admission_ports.Authority`; made with a key of its own when it is first opened.

    Args:
        path: file with key and certificate, readable by its owner only.
        now_s: seconds since the epoch.

    Raises:
        FlopsError: ``config_corrupt`` for a file with something else; ``disk_full``, ``file_unreadable``.
    """

    def __init__(self, path: Path, now_s: float) -> None:
        if not path.exists():
            write_durably(path, _make_authority(now_s))
        try:
            text = path.read_text(encoding="ascii")
            key = serialization.load_pem_private_key(text.encode(), password=None)
            self._certificate = x509.load_pem_x509_certificate(text.encode())
        except OSError as exc:
            raise file_error(exc, path) from exc
        except (ValueError, UnsupportedAlgorithm) as exc:
            raise _corrupt(path) from exc
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise _corrupt(path)
        self._key = key

    @property
    def pem(self) -> str:
        """Its own certificate, which nodes trust."""
        return _pem(self._certificate)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of its own certificate."""
        return self._certificate.fingerprint(hashes.SHA256()).hex()

    def key_of(self, request: str) -> str:
        """Hex SHA-256 of the public key that a signing request proves to have; see `Authority`."""
        return _key_hash(_key_of(request))

    def sign_node(
        self,
        request: str,
        node_id: NodeId,
        addons: tuple[str, ...],
        now_s: float,
        life_s: float,
        cluster: str,
    ) -> NodeCertificate:
        """Sign a node's certificate, or a relay's; see `Authority`."""
        public_key = _key_of(request)
        name, usages = f"{node_id}.node.flops.internal", [ExtendedKeyUsageOID.CLIENT_AUTH]
        if is_relay(node_id):
            name, usages = server_name(cluster), [*usages, ExtendedKeyUsageOID.SERVER_AUTH]
        subject = _name(node_id, cluster)
        builder = _builder(subject, public_key, self._certificate.subject, now_s, life_s)
        signed = _for_peer(builder, name, usages).sign(self._key, hashes.SHA256())
        return NodeCertificate(
            serial=serial_text(signed.serial_number),
            node_id=node_id,
            key=_key_hash(public_key),
            addons=addons,
            not_before_s=now_s,
            not_after_s=signed.not_valid_after_utc.timestamp(),
            pem=_pem(signed),
            cluster=cluster,
        )

    def sign_service(self, request: str, name: str, now_s: float, life_s: float) -> str:
        """Sign a certificate for a service that others dial by a name; see `Authority`."""
        return self._sign_server(_key_of(request), name, now_s, life_s)

    def keep_server_identity(
        self, path: Path, name: str, now_s: float, life_s: float, *, hosts: Sequence[str] = ()
    ) -> None:
        """Write a new key with a certificate for a server of the cluster, and the authority's own.

        Args:
            path: the file.
            name: what those who dial expect.
            now_s: seconds since the epoch.
            life_s: how long the certificate is good.
            hosts: names and addresses that others dial who know no better, such as browsers.

        Raises:
            FlopsError: ``disk_full``, ``file_unreadable``.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        signed = self._sign_server(key.public_key(), name, now_s, life_s, hosts)
        write_durably(path, _key_pem(key) + signed + self.pem)

    def _sign_server(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        now_s: float,
        life_s: float,
        hosts: Sequence[str] = (),
    ) -> str:
        builder = _builder(_name(name), key, self._certificate.subject, now_s, life_s)
        builder = _for_peer(builder, name, [ExtendedKeyUsageOID.SERVER_AUTH], hosts)
        signed = builder.sign(self._key, hashes.SHA256())
        return _pem(signed)


def life_of(pem: str) -> tuple[float, float]:
    """When a certificate was signed and when it ends, in seconds since the epoch.

    Raises:
        ValueError: it is none.
    """
    found = x509.load_pem_x509_certificate(pem.encode())
    begins_s = found.not_valid_before_utc.timestamp()
    is_ours = found.issuer.rfc4514_string().startswith(f"CN={_AUTHORITY_NAME}")
    return begins_s + (CLOCKS_DIFFER_BY_S if is_ours else 0.0), found.not_valid_after_utc.timestamp()


def _make_authority(now_s: float) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    digest = hashlib.sha256(_public_bytes(key.public_key())).hexdigest()
    name = f"{_AUTHORITY_NAME} {digest[:8]}"
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = _builder(_name(name), key.public_key(), _name(name), now_s, _AUTHORITY_LIFE_S)
    signed = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _key_pem(key) + _pem(signed)


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name, now_s: float, life_s: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_date(now_s - CLOCKS_DIFFER_BY_S))
        .not_valid_after(_date(now_s + life_s))
    )


def _for_peer(
    builder: x509.CertificateBuilder,
    dns_name: str,
    usages: list[x509.ObjectIdentifier],
    hosts: Sequence[str] = (),
) -> x509.CertificateBuilder:
    """A certificate that signs no others, and is good for one side of a connection; a relay's for both."""
    names = x509.SubjectAlternativeName([x509.DNSName(dns_name), *map(_host_name, hosts)])
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=True)
        .add_extension(names, critical=False)
    )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_of(request: str) -> ec.EllipticCurvePublicKey:
    """The public key of a signing request, which proves that the private one is there."""
    try:
        found = x509.load_pem_x509_csr(request.encode())
        key, is_signed = found.public_key(), found.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as exc:
        raise FlopsError(ErrorCode.USAGE, "The node sent no signing request.") from exc
    if not is_signed or not isinstance(key, ec.EllipticCurvePublicKey):
        raise FlopsError(ErrorCode.USAGE, "The node's signing request is not signed by an EC key of its own.")
    return key


def _key_hash(key: ec.EllipticCurvePublicKey) -> str:
    return hashlib.sha256(_public_bytes(key)).hexdigest()


def _public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _name(text: str, cluster: str = "") -> x509.Name:
    unit = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, cluster)] if cluster else []
    return x509.Name([*unit, x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _date(at_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at_s, datetime.UTC)


def _corrupt(path: Path) -> FlopsError:
    return FlopsError(
        ErrorCode.CONFIG_CORRUPT,
        f"The cluster's authority in {path} cannot be used.",
        hint="Put the file back from a backup. Without it, remove it: a new authority is made, and every "
        "node has to join anew.",
    )
