"""The training page: runs over each other, while they run and afterwards."""

import html
from datetime import timedelta
from pathlib import Path

import pandas as pd
import streamlit as st

from dataset.images import open_images
from model.errors import DataError, SampleError

from .charts import DASHES, chart, give_colours, points, spans_decades
from .images import SessionImage, take
from .runs import Run, find_runs, read_run
from .settings import page_settings
from .texts import Labels, escape

REFRESH = "2s"
SHOWN_AT_FIRST = 4
CHARTS = (("loss", "eval_loss"), ("eval_loss", "eval_loss_blank", "eval_loss_shuffled", "eval_loss_seen"), ("aux_loss",),
          ("reward", "eval_reward"), ("useless_groups",), ("entropy",), ("length",), ("kl",), ("learning_rate",), ("tokens_per_second",), ("peak_memory_mb",))  # fmt: skip
FIGURES = {"update": ",.0f", "epoch": ".2f", "loss": ".4f", "eval_loss": ".4f", "reward": ".4f", "tokens_per_second": ",.0f"}
AXES = {"update": "axis_update", "seconds": "axis_time", "epoch": "axis_epoch"}
ANSWERS_SHOWN = 6  # of one question, as training went on


@st.cache_data(max_entries=64, show_spinner=False)
def read_run_once(path: Path, changed: int) -> Run:
    """The run, read once for all sessions after each change of its file."""
    return read_run(path)


@st.fragment(run_every=REFRESH)
def show(labels: Labels) -> None:
    """Choices, and everything about the chosen runs; read again at every refresh."""
    found, state = find_runs(page_settings().save_dir), st.session_state
    if not found:
        st.info(labels("no_runs", folder=page_settings().save_dir))
        return
    if "runs" in state:
        state.runs = [name for name in state.runs if name in found]
    newest = None if "runs" in state else list(found)[:SHOWN_AT_FIRST]
    chosen = st.multiselect(labels("runs"), sorted(found), newest, key="runs", placeholder=labels("choose"),
                            persist_state="session")  # fmt: skip
    runs = {name: read_run_once(*found[name]) for name in chosen}
    if "log_scale" not in state:
        state.log_scale = any(spans_decades(run.frame["loss"].dropna()) for run in runs.values())
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        axis = st.segmented_control(labels("axis"), list(AXES), default="update", required=True, key="axis",
                                    format_func=lambda name: labels(AXES[name]), persist_state="session")  # fmt: skip
        smoothing = st.slider(labels("smoothing"), 0.0, 0.98, 0.0, 0.02, key="smoothing", width=260,
                              help=labels("smoothing_help"), persist_state="session")  # fmt: skip
        log = st.toggle(labels("log_scale"), key="log_scale", persist_state="session")
    if not runs:
        return
    for name, run in runs.items():
        if run.bad:
            st.warning(labels("bad_lines", run=escape(name), count=run.bad))
    st.dataframe(state_table(runs, labels), hide_index=True, alt=labels("runs"))
    show_charts(runs, axis, smoothing, log, labels)
    show_arguments(runs, labels)
    show_samples(runs, labels)


def state_table(runs: dict[str, Run], labels: Labels) -> pd.DataFrame:
    """How far each run is."""
    def clock(seconds: float | None) -> str:
        return "" if seconds is None else str(timedelta(seconds=int(seconds)))

    rows = []
    for name, run in runs.items():
        last = {key: run.last(key) for key in FIGURES}
        figures = {labels(key): "" if value is None else format(value, FIGURES[key]) for key, value in last.items()}
        state, left = ("state_live", run.last("seconds_left")) if run.is_live else ("state_still", None)
        rows.append({labels("run"): name, labels("state"): labels(state), **figures,
                     labels("time"): clock(run.last("seconds")), labels("left"): clock(left)})  # fmt: skip
    return pd.DataFrame(rows)


def show_charts(runs: dict[str, Run], axis: str, smoothing: float, log: bool, labels: Labels) -> None:
    """A chart for each figure that any of the runs has, and one legend above them."""
    known = st.session_state.setdefault("colours", {})
    give_colours(known, list(runs))
    colours = {name: known[name] for name in runs}
    legend = [f'<span style="color:{colour}">■ {html.escape(name)}</span>' for name, colour in colours.items()]
    st.html(f'<div class="legend">{"".join(legend)}</div>')
    columns = st.columns(2)
    shown = 0
    for names in CHARTS:
        rows = points(runs, names, axis, smoothing)
        there = tuple(name for name in names if (rows["kind"] == name).any())
        alone = there == names[:1] == ("eval_loss",)  # it stands beside the training loss
        if not there or alone or (names == ("aux_loss",) and not rows["raw"].any()):
            continue
        kinds = {name: labels(name) for name in there}
        dashes = DASHES if there[1:] else [""]
        title = "\u2003".join(f"{dash} **{kind}**" for dash, kind in zip(dashes, kinds.values(), strict=False))
        unit = labels("minutes" if axis == "seconds" else AXES[axis])
        figure = chart(rows, colours, unit, kinds, log and "eval_loss" in names)
        with columns[shown % 2]:
            st.markdown(title)
            st.altair_chart(figure, key=f"chart_{names[-1]}", alt=", ".join(kinds.values()))
        shown += 1


def show_arguments(runs: dict[str, Run], labels: Labels) -> None:
    """A run's arguments; of several runs, side by side, those that differ."""
    table = pd.DataFrame({name: run.arguments() for name, run in runs.items()}).fillna("")
    if len(runs) > 1:
        table = table[table.nunique(axis=1) > 1]
    if table.empty:
        return
    st.subheader(labels("arguments" if len(runs) == 1 else "arguments_differing"))
    table.index = "--" + table.index
    st.dataframe(table.rename_axis(labels("argument")), alt=labels("arguments"))


def show_samples(runs: dict[str, Run], labels: Labels) -> None:
    """What the models answered to the same questions as training went on, the newest answer first."""
    if any(run.samples for run in runs.values()):
        st.subheader(labels("samples"))
    for name, run in runs.items():
        questions: dict[tuple[str, str], list[dict]] = {}
        for sample in run.samples:
            questions.setdefault((str(sample.get("where")), str(sample.get("question"))), []).append(sample)
        for answers in questions.values():
            with st.container(border=True, horizontal=True):
                show_answers(name, answers, run.arguments().get("images_path", ""), labels)


def show_answers(run: str, answers: list[dict], images_path: str, labels: Labels) -> None:
    """One question with its images, and the answers to it."""
    last = {key: str(value) for key, value in answers[-1].items()}
    for name in filter(None, last.get("image", "").split(", ")):
        if image := training_image(images_path, name):
            st.image(image.preview, alt=image.name)
    lines = [f"**{escape(last.get('question', ''))}**"]
    lines.append(f"{labels('sample_reference')}: {escape(last.get('reference', ''))}")
    for answer in answers[: -ANSWERS_SHOWN - 1 : -1]:
        said = " ".join(str(answer.get("answer", "")).split())
        lines.append(f"{labels('update')} {answer['update']:,}: {escape(said)}")
    with st.container(width="stretch"):
        st.caption(escape(run))
        st.markdown("  \n".join(lines))


@st.cache_resource(max_entries=64, show_spinner=False)
def training_image(images_path: str, name: str) -> SessionImage | None:
    """An image of a run's data by its name; None where it cannot be read here."""
    try:
        return take(open_images(images_path).read(name), name)
    except (DataError, SampleError, OSError):
        return None
