"""The training page: runs over each other, while they run and afterwards."""

import functools
import math

import pyarrow as pa
import streamlit as st

from .charts import AXES, chart, points
from .runs import Run, RunFolder, as_text, differing
from .settings import server
from .texts import Labels

REFRESH = "2s"
SHOWN_AT_FIRST = 4
CHARTS = (("loss", "eval_loss"), ("aux_loss",), ("learning_rate",), ("tokens_per_second",), ("peak_memory_mb",))
SAMPLE = ("image", "question", "answer", "reference")  # of a sample answer, what is shown
SAMPLES_KEPT = 50  # validations of a run
AXIS_LABELS = {"update": "axis_update", "seconds": "axis_time", "epoch": "axis_epoch"}


@functools.cache
def run_folder() -> RunFolder:
    """The owner's output folder."""
    return RunFolder(server().settings.save_dir)


def show(labels: Labels) -> None:
    """The whole page."""
    runs = run_folder().runs()
    if not runs:
        st.info(labels("no_runs", folder=run_folder().folder))
        st.fragment(wait_for_runs, run_every=REFRESH)(set())
        return
    state = st.session_state
    if "runs" in state:
        state.runs = [name for name in state.runs if name in runs]
    chosen = st.multiselect(labels("runs"), list(runs), list(runs)[:SHOWN_AT_FIRST] if "runs" not in state else None, key="runs",
                            persist_state="session")  # fmt: skip
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        axis = st.segmented_control(labels("axis"), list(AXES), default="update", required=True, key="axis",
                                    format_func=lambda name: labels(AXIS_LABELS[name]), persist_state="session")  # fmt: skip
        weight = st.slider(labels("smoothing"), 0.0, 0.98, 0.0, 0.02, key="smoothing", help=labels("smoothing_help"), width=260,
                           persist_state="session")  # fmt: skip
        log = st.toggle(labels("log_scale"), key="log_scale", persist_state="session")
        live = st.toggle(labels("live"), True, key="live", help=labels("live_help"), persist_state="session")
    st.fragment(show_runs, run_every=REFRESH if live else None)(set(runs), chosen, axis, weight, log, labels)


def wait_for_runs(known: set[str]) -> None:
    """Shows the page anew when there is another set of runs."""
    if set(run_folder().runs()) != known:
        st.rerun()


def show_runs(known: set[str], chosen: list[str], axis: str, weight: float, log: bool, labels: Labels) -> None:
    """Everything about the chosen runs; read again at every refresh."""
    found = run_folder().runs()
    if set(found) != known:
        st.rerun()
    runs = [found[name].refresh() for name in chosen]
    if not runs:
        return
    for run in runs:
        if run.bad:
            st.warning(labels("bad_lines", run=run.name, count=run.bad))
    st.dataframe(state_table(runs, labels), hide_index=True, alt=labels("runs"))
    show_charts(runs, axis, weight, log, labels)
    show_arguments({run.name: run.arguments() for run in runs}, labels)
    show_samples(runs, labels)


def state_table(runs: list[Run], labels: Labels) -> pa.Table:
    """How far each run is."""
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = []
    for run in runs:
        left = run.last("seconds_left") if run.is_live else None
        rows.append({
            labels("run"): run.name, labels("state"): labels("state_live" if run.is_live else "state_still"),
            labels("update"): number(run.last("update"), ",.0f"), labels("epoch"): number(run.last("epoch"), ".2f"),
            labels("loss"): number(run.last("loss"), ".4f"), labels("eval_loss"): number(run.last("eval_loss"), ".4f"),
            labels("tokens_per_second"): number(run.last("tokens_per_second"), ",.0f"),
            labels("time"): clock(run.last("seconds")), labels("left"): clock(left),
        })  # fmt: skip
    return pa.Table.from_pylist(rows)


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss."""
    return "" if seconds is None or not math.isfinite(seconds) else f"{seconds // 3600:.0f}:{seconds % 3600 // 60:02.0f}:{int(seconds % 60):02d}"


def show_charts(runs: list[Run], axis: str, weight: float, log: bool, labels: Labels) -> None:
    """A chart for each figure that any of the runs has."""
    x_title = labels("minutes" if axis == "seconds" else AXIS_LABELS[axis])
    columns = st.columns(2)
    place = 0
    for names in CHARTS:
        rows = points(runs, names, axis, weight)
        if not rows or (names == ("aux_loss",) and not any(row["raw"] for row in rows)):
            continue
        kinds = {name: labels(name) for name in names}
        shown = [labels(name) for name in names if any(row["kind"] == name for row in rows)]
        with columns[place % 2]:
            st.markdown(f"**{' · '.join(shown)}**")
            st.altair_chart(chart(rows, runs, x_title, kinds, weight, log and "loss" in names), key=f"chart_{names[0]}", alt=" · ".join(shown))
        place += 1


def show_arguments(arguments: dict[str, dict[str, str]], labels: Labels) -> None:
    """The runs' arguments side by side."""
    st.subheader(labels("arguments"))
    if not any(arguments.values()):
        st.caption(labels("arguments_none"))
        return
    names = sorted({name for values in arguments.values() for name in values})
    if len(arguments) > 1 and st.toggle(labels("arguments_differing"), True, key="differing"):
        names = differing(arguments)
    if not names:
        st.caption(labels("arguments_same"))
        return
    rows = [{labels("argument"): f"--{name}", **{run: values.get(name, "") for run, values in arguments.items()}} for name in names]
    st.dataframe(pa.Table.from_pylist(rows), hide_index=True, alt=labels("arguments"))


def show_samples(runs: list[Run], labels: Labels) -> None:
    """What the model answered to the same questions as training went on, the newest first."""
    st.subheader(labels("samples"))
    rows = [{labels("update"): entry["update"], labels("run"): run.name, **{labels(f"sample_{key}"): as_text(sample.get(key, "")) for key in SAMPLE}}
            for run in runs for entry in reversed(run.samples[-SAMPLES_KEPT:]) for sample in entry["samples"] if isinstance(sample, dict)]  # fmt: skip
    if not rows:
        st.caption(labels("samples_none"))
        return
    st.dataframe(pa.Table.from_pylist(rows), hide_index=True, alt=labels("samples"))
