"""Curves of several runs over each other."""

from collections.abc import Sequence

import altair as alt
import pyarrow as pa

from .runs import Run, smooth, thin

AXES = {"update": 1.0, "seconds": 1 / 60, "epoch": 1.0}  # from the files' units to those shown (minutes)
HEIGHT = 320  # pixels, and a line of the legend for each run
LINE = 30


def points(runs: Sequence[Run], names: Sequence[str], axis: str, weight: float) -> list[dict]:
    """Rows {run, kind, x, y, raw} of figures `names` of all runs; y is smoothed, raw is not."""
    rows = []
    for run in runs:
        for name in names:
            xs, raw = run.curve(name, axis)
            smoothed = smooth(raw, weight) if name != "eval_loss" else raw  # that is a mean over many samples already
            for x, y, value in thin(list(zip(xs, smoothed, raw, strict=True))):
                rows.append({"run": run.name, "kind": name, "x": x * AXES[axis], "y": y, "raw": value})
    return rows


def chart(rows: list[dict], runs: Sequence[Run], x_title: str, kinds: dict[str, str], weight: float, log: bool) -> alt.LayerChart:
    """A chart of such rows: a colour for each run, dashes for each figure but the first of `kinds` (name: label)."""
    table = pa.Table.from_pylist([{**row, "kind": kinds[row["kind"]]} for row in rows])
    scale = alt.Scale(type="log" if log else "linear", zero=False)
    form = ",~r" if 1e-3 <= max(abs(row["y"]) for row in rows) < 1e7 else "~e"  # not "~g": that has 1e+1 above 8, 6, 4
    color = alt.Color("run:N", scale=alt.Scale(domain=[run.name for run in runs]),
                      legend=alt.Legend(title=None, orient="bottom", labelLimit=180, columns=1, symbolOpacity=1))  # fmt: skip
    base = alt.Chart(table).encode(x=alt.X("x:Q", title=x_title), color=color)
    y = alt.Y("y:Q", title=None, scale=scale, axis=alt.Axis(format=form, labelExpr="datum.value ? datum.label : '0'"))
    tooltip = [alt.Tooltip("run:N", title=" "), alt.Tooltip("kind:N", title="  "), alt.Tooltip("x:Q", title=x_title, format=",~g"),
               alt.Tooltip("raw:Q", title="y", format=form)]  # fmt: skip
    dash = {}
    if len({row["kind"] for row in rows}) > 1:
        # Above the chart: beside the runs it would not fit into half a page.
        dash["strokeDash"] = alt.StrokeDash("kind:N", sort=list(kinds.values()), legend=alt.Legend(title=None, orient="top"))
    layers = [base.mark_line(interpolate="linear").encode(y=y, **dash), base.mark_point(filled=True, size=18, opacity=0.7).encode(y=y, tooltip=tooltip)]
    if weight > 0:
        layers.insert(0, base.mark_line(opacity=0.25, strokeWidth=1).encode(y=alt.Y("raw:Q", title=None, scale=scale), detail="kind:N"))
    return alt.layer(*layers).properties(height=HEIGHT + LINE * len(runs)).interactive(bind_y=False)
