"""Who may join a cluster and who has, in SQLite."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from flops.adapters.sql_engine import SqliteFile
from flops.core.admission import Invitation, NodeCertificate
from flops.core.ids import NodeId

SCHEMA_VERSION = 1


class _Table(DeclarativeBase):
    pass


class _SchemaRow(_Table):
    __tablename__ = "admission_schema"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int]


class _InvitationRow(_Table):
    __tablename__ = "invitations"
    id: Mapped[str] = mapped_column(primary_key=True)
    expires_at_s: Mapped[float]
    document: Mapped[str]


class _UseRow(_Table):
    """A node has joined by an invitation; kept when the node is removed: it counts all the same."""

    __tablename__ = "invitation_uses"
    invitation_id: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)


class _CertificateRow(_Table):
    """Certificates in force: what is not here is refused."""

    __tablename__ = "node_certificates"
    __table_args__ = ({"sqlite_autoincrement": True},)
    position: Mapped[int] = mapped_column(primary_key=True)
    serial: Mapped[str] = mapped_column(unique=True)
    node_id: Mapped[str] = mapped_column(index=True)
    not_after_s: Mapped[float]
    document: Mapped[str]


class SqlAdmissionStore:
    """Implements `flops.admission_ports.AdmissionStore` on one SQLite file; safe to use from several threads.

    Every method raises `FlopsError`: ``disk_full``, or ``internal`` naming the file.

    Args:
        path: the database's file; it is created when it does not exist.

    Raises:
        FlopsError: ``conflict`` when another version of FLOps wrote the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(path, "cluster", _prepare, SCHEMA_VERSION)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def put_invitation(self, invitation: Invitation) -> None:
        """Store an invitation."""
        row = {
            "id": invitation.id,
            "expires_at_s": invitation.expires_at_s,
            "document": invitation.model_dump_json(),
        }
        with self._file.transaction() as connection:
            connection.execute(insert(_InvitationRow).values(row))

    def invitation(self, invitation_id: str) -> Invitation | None:
        """An invitation that was made."""
        query = select(_InvitationRow.document).where(_InvitationRow.id == invitation_id)
        with self._file.transaction() as connection:
            found = connection.execute(query).scalar_one_or_none()
        return None if found is None else Invitation.model_validate_json(found)

    def joined(self, invitation_id: str) -> list[str]:
        """Keys of the nodes that have joined by an invitation, removed ones too."""
        query = select(_UseRow.key).where(_UseRow.invitation_id == invitation_id)
        with self._file.transaction() as connection:
            return list(connection.execute(query).scalars())

    def admit(self, certificate: NodeCertificate, invitation_id: str) -> None:
        """Store a node's first certificate, and that the invitation was used for its key."""
        with self._file.transaction() as connection:
            connection.execute(insert(_UseRow).values(invitation_id=invitation_id, key=certificate.key))
            connection.execute(insert(_CertificateRow).values(_row(certificate)))

    def renew(self, certificate: NodeCertificate) -> None:
        """Store a further certificate of a node; ended ones of it are forgotten."""
        ended = delete(_CertificateRow).where(
            _CertificateRow.node_id == certificate.node_id,
            _CertificateRow.not_after_s < certificate.not_before_s,
        )
        with self._file.transaction() as connection:
            connection.execute(ended)
            connection.execute(insert(_CertificateRow).values(_row(certificate)))

    def certificate(self, serial: str) -> NodeCertificate | None:
        """The certificate in force with a serial number."""
        query = select(_CertificateRow.document).where(_CertificateRow.serial == serial)
        with self._file.transaction() as connection:
            found = connection.execute(query).scalar_one_or_none()
        return None if found is None else NodeCertificate.model_validate_json(found)

    def certificates_of(self, node_id: NodeId) -> list[NodeCertificate]:
        """A node's certificates in force, the latest last."""
        query = select(_CertificateRow.document).where(_CertificateRow.node_id == node_id)
        with self._file.transaction() as connection:
            found = connection.execute(query.order_by(_CertificateRow.position)).scalars()
            return [NodeCertificate.model_validate_json(document) for document in found]

    def expel(self, node_id: NodeId) -> None:
        """No certificate of this node is in force any more."""
        with self._file.transaction() as connection:
            connection.execute(delete(_CertificateRow).where(_CertificateRow.node_id == node_id))

    def expel_cluster(self, cluster: str) -> None:
        """No certificate and no invitation of this cluster, its relay and its nodes, is in force any more."""
        with self._file.transaction() as connection:
            for table, model in ((_CertificateRow, NodeCertificate), (_InvitationRow, Invitation)):
                rows = connection.execute(select(table.__table__.c.document)).scalars().all()
                gone = [text for text in rows if model.model_validate_json(text).cluster == cluster]
                connection.execute(delete(table).where(table.__table__.c.document.in_(gone)))

    def forget_invitations(self, before_s: float) -> None:
        """Forget the invitations that ended before a time, with what is known of their use."""
        old = select(_InvitationRow.id).where(_InvitationRow.expires_at_s < before_s)
        with self._file.transaction() as connection:
            connection.execute(delete(_UseRow).where(_UseRow.invitation_id.in_(old)))
            connection.execute(delete(_InvitationRow).where(_InvitationRow.expires_at_s < before_s))


def _prepare(connection: Connection) -> int:
    _Table.metadata.create_all(connection)
    first = insert(_SchemaRow).values(id=1, version=SCHEMA_VERSION)
    connection.execute(first.on_conflict_do_nothing())
    return connection.execute(select(_SchemaRow.version)).scalar_one()


def _row(certificate: NodeCertificate) -> dict[str, object]:
    return {
        "serial": certificate.serial,
        "node_id": certificate.node_id,
        "not_after_s": certificate.not_after_s,
        "document": certificate.model_dump_json(),
    }
