"""Write the page of all results, after the benchmarks have run: `python -m tests.benchmarks.lanes_page`.

It reads the documents in `bench/` that have findings. It writes beside this file `LANES.md`, a table of targets and
figures, `throughput.svg`, the contenders' speeds, and `batch_sizes.svg`, the cost of the server by batch size.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from psgd.monitoring.plots import bars, svg
from tests.benchmarks import batch_sizes
from tests.benchmarks.contender import LIMIT
from tests.benchmarks.findings import Finding, shown, spread, target, verdict

__all__ = ["figure", "main", "page"]

HEADINGS = {  # of documents, in the order of the page; other documents follow under their own names
    "throughput": "Gradients per second, two workers",
    "steady": "The same over 20 s",
    "batch_sizes": "Larger batches",
    "transfer": "Large weights",
    "small": "Small pushes",
    "stragglers": "One slow worker",
    "servers": "More servers, more workers",
    "apply": "A server's step",
    "startup": "Start-up",
    "recovery": "Cost of deaths",
    "soak": "Memory over time",
}
INTRODUCTION = """# The lanes, measured

Figures are medians over turns: within one run, everything that is compared is measured once in each turn. The column
"turns" has the least and the most of any turn. A ratio is a ratio of medians. The docstring of each module says how it
measures; [PROFILE.md](PROFILE.md) says where the time of a push goes.

To measure again (each command writes a document into `bench/`) and to write this page:

```
{commands}
python -m tests.benchmarks.lanes_page
```
"""
COMMANDS = {  # of documents that are not named like their benchmark
    "steady": "throughput --seconds 20 --only psgd_job own_loops psgd_unvalidated_job --out bench/steady.json"
}
CAPTIONS = {  # of the figures, by document
    "throughput": "gradients per second by contender",
    "batch_sizes": "gradients per second over those of separate loops, by batch size",
}
GREY = "#b8b8b8"
INK = "#222222"
ROOM = 1.45  # width of the figure over the longest bar, for the text behind the bars


def main() -> int:
    """Write the page and the figure. Return the exit code: 1 if there is no document."""
    made = ArgumentParser(description="Write LANES.md, the page of all findings.")
    made.add_argument("--bench", type=Path, default=Path("bench"), help="folder of the documents")
    made.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the page and the figure")
    arguments = made.parse_args()
    documents = _documents(arguments.bench)
    if not documents:
        print(
            f"no document with findings in {arguments.bench}: run a benchmark first, or give its folder with --bench",
            file=sys.stderr,
        )
        return 1
    for name, draw in (("throughput", figure), ("batch_sizes", batch_sizes.figure)):
        if name in documents:
            (arguments.out / f"{name}.svg").write_text(svg(draw(documents[name])), encoding="utf-8")
    (arguments.out / "LANES.md").write_text(page(documents), encoding="utf-8")
    return 0


def _documents(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the documents with findings by name, in the order of the page."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    names = [*HEADINGS, *(name for name in found if name not in HEADINGS)]
    return {name: found[name] for name in names if name in found and "findings" in found[name]}


def page(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page in Markdown.

    Args:
        documents: documents by name, in the order of the page.
    """
    introduction = INTRODUCTION.format(
        commands="\n".join(f"python -m tests.benchmarks.{COMMANDS.get(name, name)}" for name in documents)
    )
    return "\n".join([introduction, *(_section(name, tree) for name, tree in documents.items())])


def _section(name: str, tree: Mapping[str, Any]) -> str:
    findings = [Finding.of_dict(one) for one in tree["findings"]]
    rows = [(one.measure, target(one), shown(one), spread(one), verdict(one)) for one in findings]
    parts = [f"## {HEADINGS.get(name, name)}", _table(("measure", "target", "measured", "turns", "met"), rows)]
    if name in ("throughput", "steady"):
        parts.append(_contenders(tree["runs"]))
    if name in CAPTIONS:
        parts.append(f"![{CAPTIONS[name]}]({name}.svg)")
    settings = ", ".join(f"{key} {_plain(value)}" for key, value in tree["settings"].items())
    machine = tree["machine"]
    where = f"{machine['cpu']}, {machine['cores_used']} of {machine['cores']} cores"
    return "\n\n".join([*parts, f"`{name}` on {where}: {settings}."]) + "\n"


def _contenders(contenders: Sequence[Mapping[str, Any]]) -> str:
    rates = [(one["title"], one["updates_per_s"], one["runs"]) for one in contenders if one["updates_per_s"]]
    rows = [
        (title, f"{rate['median']:,.0f}", f"{rate['min']:,.0f} to {rate['max']:,.0f}", f"{_accuracy(runs):.3f}")
        for title, rate, runs in rates
    ]
    return _table(("contender", "gradients/s", "turns", "lowest test accuracy"), rows)


def _accuracy(runs: Sequence[Mapping[str, Any]]) -> float:
    return min(float(run["val_accuracy"]) for run in runs)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def figure(tree: Mapping[str, Any]) -> Figure:
    """Draw the gradients per second by contender: the fastest first, psgd in colour, each as a share of the limit.

    Args:
        tree: the document of `throughput`.
    """
    measured = [one for one in tree["runs"] if one["updates_per_s"]]
    measured.sort(key=lambda one: -one["updates_per_s"]["median"])
    speeds = {one["name"]: float(one["updates_per_s"]["median"]) for one in measured}
    titles = {one["title"]: speeds[one["name"]] for one in measured}
    drawn = bars(titles, "", "gradients of 128 examples per second")
    (axes,) = drawn.axes
    limit = speeds.get(LIMIT)
    for (name, speed), patch, text in zip(speeds.items(), axes.patches, axes.texts, strict=True):
        if not name.startswith("psgd"):
            patch.set_facecolor(GREY)
        text.set_text(f"{speed:,.0f}" + (f", {speed / limit:.2f} of the limit" if limit and name != LIMIT else ""))
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # the limit's line passes behind
    if limit:
        axes.axvline(limit, color=INK, linewidth=1, linestyle="--")
    axes.set_xlim(0, ROOM * max(speeds.values()))
    return drawn


if __name__ == "__main__":
    sys.exit(main())
