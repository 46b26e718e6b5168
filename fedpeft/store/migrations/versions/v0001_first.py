"""The first schema: runs, rounds, deltas, refusals, evaluations, ledger, clients."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "clients",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.Column("fingerprint", sa.String(length=128), nullable=False),
        sa.Column("node_id", sa.String(length=20), nullable=True),
        sa.Column("enrolled_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_seen", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_clients")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_clients_fingerprint")),
        sa.UniqueConstraint("node_id", name=op.f("uq_clients_node_id")),
        sa.UniqueConstraint("public_key", name=op.f("uq_clients_public_key")),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("job_toml", sa.Text(), nullable=False),
        sa.Column("job_sha256", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("rounds_total", sa.Integer(), nullable=False),
        sa.Column("base_fingerprint", sa.String(length=128), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("summary", sa.JSON(), nullable=True),
        sa.Column("ledger_length", sa.Integer(), nullable=False),
        sa.Column("ledger_head", sa.String(length=64), nullable=False),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'finished', 'failed', 'stopped')", name=op.f("ck_runs_state")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
    )
    op.create_index(op.f("ix_runs_state_created_at"), "runs", ["state", "created_at"])

    op.create_table(
        "evaluations",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("client", sa.String(length=255), nullable=False),
        sa.Column("split", sa.String(length=64), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_evaluations_run_id")),
        sa.PrimaryKeyConstraint("run_id", "round", "client", "split", name=op.f("pk_evaluations")),
    )
    op.create_table(
        "ledger",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("prev_hash", sa.String(length=64), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_ledger_run_id")),
        sa.PrimaryKeyConstraint("run_id", "seq", name=op.f("pk_ledger")),
    )
    op.create_table(
        "refusals",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("client", sa.String(length=255), nullable=False),
        sa.Column("code", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_refusals_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_refusals")),
    )
    op.create_index(op.f("ix_refusals_run_id_round_client"), "refusals", ["run_id", "round", "client"])

    op.create_table(
        "rounds",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("start_state", sa.String(length=64), nullable=False),
        sa.Column("end_state", sa.String(length=64), nullable=True),
        sa.Column("selected", sa.JSON(), nullable=False),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("committed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.CheckConstraint(
            "state <> 'committed' OR end_state IS NOT NULL", name=op.f("ck_rounds_committed_has_end_state")
        ),
        sa.CheckConstraint("state IN ('open', 'committed', 'failed')", name=op.f("ck_rounds_state")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_rounds_run_id")),
        sa.PrimaryKeyConstraint("run_id", "number", name=op.f("pk_rounds")),
    )
    op.create_table(
        "deltas",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("client", sa.String(length=255), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("payload_bytes", sa.BigInteger(), nullable=False),
        sa.Column("weight", sa.BigInteger(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id", "round"], ["rounds.run_id", "rounds.number"], name=op.f("fk_deltas_run_id_round")
        ),
        sa.PrimaryKeyConstraint("run_id", "round", "client", name=op.f("pk_deltas")),
    )
    op.create_index(op.f("ix_deltas_digest"), "deltas", ["digest"])


def downgrade() -> None:
    op.drop_index(op.f("ix_deltas_digest"), table_name="deltas")

    op.drop_table("deltas")
    op.drop_table("rounds")
    op.drop_index(op.f("ix_refusals_run_id_round_client"), table_name="refusals")

    op.drop_table("refusals")
    op.drop_table("ledger")
    op.drop_table("evaluations")
    op.drop_index(op.f("ix_runs_state_created_at"), table_name="runs")

    op.drop_table("runs")
    op.drop_table("clients")
