"""`python -m train dashboard`: the wandb workspace or report of a project, built by code.

The charts are the same for every project, because every run logs the same names (train/tracking.py). `--spec` prints
what would be sent, without a network.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

from train.tracking import grouped


@dataclass(frozen=True)
class Chart:
    """One line chart over `step`: its title, and the metrics.jsonl keys that it draws together."""

    title: str
    keys: tuple[str, ...]
    log_y: bool = False


SECTIONS: dict[str, tuple[Chart, ...]] = {
    "Loss": (
        Chart("Loss (nats a token)", ("loss", "validation_loss")),
        Chart("Bits per byte", ("bits_per_byte", "validation_bits_per_byte")),
        Chart("Held-out loss", ("validation_loss",)),
    ),
    "Optimisation": (
        Chart("Learning rate", ("lr",)),
        Chart("Gradient norm", ("grad_norm",), log_y=True),
        Chart("Tokens trained on", ("tokens",)),
    ),
    "Speed": (
        Chart("Tokens a second", ("tokens_per_second",)),
        Chart("Model FLOPs utilisation", ("mfu",)),
        Chart("Memory (GiB)", ("memory_gib",)),
        Chart("Share of the time waiting for data", ("data_wait",)),
    ),
}
SAMPLES = "eval/samples"


def main(argv: list[str]) -> int:
    """Builds the dashboard; 0 when it was saved or printed, 2 with one sentence when it could not be."""
    parser = argparse.ArgumentParser(prog="python -m train dashboard", description=__doc__.split("\n\n")[0])
    parser.add_argument("--project", required=True, help="the wandb project: `log.wandb` of its runs")
    parser.add_argument("--entity", help="the wandb user or team (default: the one that is logged in)")
    parser.add_argument(
        "--report", action="store_true", help="a report (a page to share) instead of a workspace (a view)"
    )
    parser.add_argument("--spec", action="store_true", help="print the specification as JSON and send nothing")
    options = parser.parse_args(argv)
    build = report if options.report else workspace
    if options.spec:
        print(json.dumps(spec(build(options.project, options.entity or "ENTITY")), indent=2))
        return 0
    try:
        entity = options.entity or _default_entity()
        page = build(options.project, entity)
        page.save()
    except Exception as error:  # network, login, permission: wandb has an error of its own for each
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        print(f"The dashboard of {options.project!r} could not be saved: {said}.", file=sys.stderr)
        print("`wandb login` logs in; --spec prints the dashboard without a network.", file=sys.stderr)
        return 2
    print(page.url)
    return 0


def workspace(project: str, entity: str) -> Any:
    """The project's workspace: a section a subject, the samples table, and the runs' columns beside it."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=name, panels=_panels(wr, charts), is_open=True) for name, charts in SECTIONS.items()]
    sections.append(ws.Section(name="Samples", panels=[_samples(wr)], is_open=True))
    return ws.Workspace(
        entity=entity,
        project=project,
        name="Heed",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="step", smoothing_type="none", group_by_prefix="first"),
    )


def report(project: str, entity: str) -> Any:
    """A report: a heading and a grid of charts a subject, over all runs of the project."""
    import wandb_workspaces.reports.v2 as wr

    runs = wr.Runset(name="Runs")  # without names of its own it is the report's project, and needs no look-up
    blocks: list[Any] = [wr.TableOfContents()]
    for name, charts in SECTIONS.items():
        blocks += [wr.H1(text=name), wr.PanelGrid(runsets=[runs], panels=_panels(wr, charts))]
    blocks += [wr.H1(text="Samples"), wr.PanelGrid(runsets=[runs], panels=[_samples(wr)])]
    return wr.Report(
        entity=entity,
        project=project,
        title=f"{project}: training",
        description="Loss, optimisation, speed and samples of every run.",
        blocks=blocks,
    )


def spec(page: Any) -> dict[str, Any]:
    """What would be sent for a workspace or a report: plain JSON values."""
    model = page._to_model()
    return json.loads(model.model_dump_json(by_alias=True, exclude_none=True))


def _panels(wr: Any, charts: tuple[Chart, ...]) -> list[Any]:
    """The charts, three a row of wandb's 24-column grid."""
    return [
        wr.LinePlot(
            title=chart.title,
            x="step",
            y=[grouped(key) for key in chart.keys],
            log_y=chart.log_y,
            layout=wr.Layout(x=8 * (index % 3), y=6 * (index // 3), w=8, h=6),
        )
        for index, chart in enumerate(charts)
    ]


def _samples(wr: Any) -> Any:
    return wr.WeavePanelSummaryTable(table_name=SAMPLES, layout=wr.Layout(x=0, y=0, w=24, h=10))


def _default_entity() -> str:
    """The entity of the login. Raises what wandb raises, or LookupError, without one."""
    import wandb

    entity = wandb.Api().default_entity
    if not entity:
        raise LookupError("the login has no default entity; name one with --entity")
    return entity
