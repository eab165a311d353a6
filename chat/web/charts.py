"""Curves of several runs over each other, and the colours that stay with them."""

import altair as alt
import pandas as pd

from .runs import Run, curve

UNITS = {"update": 1.0, "seconds": 1 / 60, "epoch": 1.0}  # from the files' units to those shown (minutes)
HEIGHT = 300  # pixels
DASHES = {"──": [1, 0], "– –": [6, 3], "· · ·": [2, 2], "– · –": [8, 3, 2, 3]}  # of a chart's figures: in its title, in pixels
# Ten hues that can be told apart on white and on black (those of Okabe and Ito, Color Universal Design, and four more).
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c564b", "#7f7f7f", "#9467bd", "#bcbd22"]


def give_colours(known: dict[str, str], names: list[str]) -> None:
    """Gives every run a colour of its own, as long as there are enough; one that has been shown keeps its colour."""
    for name in names:
        taken = [known[other] for other in names if other in known]
        known.setdefault(name, min(COLOURS, key=taken.count))


def points(runs: dict[str, Run], names: tuple[str, ...], axis: str, smoothing: float) -> pd.DataFrame:
    """Rows (run, kind, x, y, raw) of figures `names` of all runs. Validation losses, means over many samples, stay as
    they are."""
    parts = []
    for run_name, run in runs.items():
        for name in names:
            part = curve(run, name, axis, 0.0 if name.startswith("eval_") else smoothing)
            parts.append(part.assign(run=run_name, kind=name, x=part["x"] * UNITS[axis]))
    return pd.concat(parts)


def spans_decades(values: pd.Series) -> bool:
    """Whether a logarithmic axis shows more: the largest value is ten times the least."""
    return bool(len(values)) and 0 < 10 * values.min() <= values.max()


def chart(rows: pd.DataFrame, colours: dict[str, str], x_title: str, kinds: dict[str, str], log: bool) -> alt.Chart:
    """A chart of `points`: a colour for each run, dashes for each figure but the first of `kinds` (name: label)."""
    table = rows.assign(kind=rows["kind"].map(kinds))
    largest = rows["y"].abs().max()
    form = ",~r" if 1e-3 <= largest < 1e7 else "~e"  # not "~g": that has 1e+1 above 8, 6, 4
    scale = alt.Scale(type="log" if log else "linear", zero=False)
    ticks = [digit * 10.0**power for power in range(-12, 12) for digit in (1, 3)] if log else None
    axis = alt.Axis(format=form, labelExpr="datum.value ? datum.label : '0'", **({"values": ticks} if ticks else {}))
    base = alt.Chart(table).encode(
        x=alt.X("x:Q", title=x_title),
        color=alt.Color("run:N", legend=None, scale=alt.Scale(domain=list(colours), range=list(colours.values()))),
        strokeDash=alt.StrokeDash("kind:N", legend=None, scale=alt.Scale(domain=list(kinds.values()), range=list(DASHES.values()))),
    )
    y = alt.Y("y:Q", title=None, scale=scale, axis=axis)
    tooltip = [alt.Tooltip("run:N", title=" "), alt.Tooltip("kind:N", title="  "),
               alt.Tooltip("x:Q", title=x_title, format=",~g"),
               alt.Tooltip("raw:Q", title="y", format=form)]  # fmt: skip
    faint = base.mark_line(opacity=0.25, strokeWidth=1).encode(y=alt.Y("raw:Q", title=None, scale=scale))
    dots = base.mark_point(filled=True, size=18, opacity=0.7).encode(y=y, tooltip=tooltip)
    return alt.layer(faint, base.mark_line().encode(y=y), dots).properties(height=HEIGHT)
