"""How a project's plan is written for people: what each node would run, and what it cannot, and why."""

from __future__ import annotations

from flops.cli.output import print_line, print_table, say
from flops.core.plan import NodePlan, ProjectPlan


def show_plan(plan: ProjectPlan) -> None:
    """Print a plan as a table; what is not about single nodes follows in sentences."""
    has_clusters = len({node.cluster for node in plan.nodes}) > 1
    has_paces = any(node.pace is not None for node in plan.nodes)
    columns = ["node", "cluster", "rows", "pace", "would run", "cannot run"]
    left_away = {name for name, is_shown in (("cluster", has_clusters), ("pace", has_paces)) if not is_shown}
    rows = [dict(zip(columns, _row(node), strict=True)) for node in plan.nodes]
    shown = [name for name in columns if name not in left_away]
    print_table(shown, [[row[name] for name in shown] for row in rows], empty="No node has joined yet.")
    if plan.columns:
        columns_told = ", ".join(f"{name} ({kind})" for name, kind in plan.columns.items())
        print_line(f"\nColumns of the data: {columns_told}.")
    for name, why in plan.left_out.items():
        say(f"The cluster {name} would be left out: {why}")
    for note in plan.notes:
        say(note)
    if plan.is_possible:
        say("The project can be placed. Submit it: flops project create SLA")


def _row(node: NodePlan) -> tuple[str, ...]:
    runs = [what if count == 1 else f"{count} {what}s" for what, count in node.runs.items()]
    reasons: dict[str, list[str]] = {}
    for what, why in node.obstacles.items():
        reasons.setdefault(why, []).append(what)
    whys = [f"{', '.join(what)}: {why}" for why, what in reasons.items()]
    pace = "" if node.pace is None else f"{node.pace:.2f}"
    return (node.name, node.cluster, f"{node.rows:,}", pace, ", ".join(runs), "; ".join(whys))
