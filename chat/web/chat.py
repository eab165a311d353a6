"""The chat page: pictures, questions, answers as they grow."""

import contextlib
import time
from functools import partial

import streamlit as st
from streamlit.runtime import get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx

from chat.markdown import escape

from . import pictures
from .looked import show_looked
from .models import Loading
from .pictures import Picture, PictureError
from .settings import server
from .sidebar import pick_model, pick_sampling
from .texts import Labels
from .tray import STYLE, bring, picture_sources, show_tray
from .visitor import Exchange, Visitor

THUMBNAIL = 180  # CSS pixels
NOTICES = 3  # in sight at once: more would push the input line off the screen
FRAME = 0.04  # seconds between two changes of a growing answer


def show(labels: Labels) -> None:
    """The whole page, for one visitor."""
    st.html(STYLE)
    visitor = visitor_of_session()
    with st.sidebar:
        loading = pick_model(labels)
        values = pick_sampling(labels)
    if visitor.at_once and loading is not None and loading.assistant is not None:
        visitor.begin(loading, sampling(values))  # the model works while the page is put together
    toolbar(visitor, labels)
    if loading is None:
        return no_models(labels)
    if loading.pending and not visitor.waiting:
        watch_loading(visitor, values, labels)
    elif loading.problem:
        loading_failed(loading, labels)
    for number, exchange in enumerate(visitor.exchanges):
        growing = visitor.busy and number == len(visitor.exchanges) - 1
        place = show_exchange(visitor, exchange, number, growing, labels)
    if not visitor.exchanges:
        st.markdown(f"#### {labels('welcome')}")
        picture_sources(visitor, labels)
    bottom(visitor, labels)
    server().shelf.page_shown()
    if visitor.busy:
        follow(visitor, loading, values, place, labels)
    elif loading.assistant is not None:
        convert(visitor.tray)  # after the page: a large picture takes seconds to decode
        visitor.look_ahead(loading, sampling(values))


def convert(shown: list[Picture]) -> None:
    """Makes the model's pixels of pictures. Between two of them a click is heard: Streamlit looks whether there is one when
    the session's state is read."""
    for picture in shown:
        st.session_state.get("visitor")
        with contextlib.suppress(PictureError, MemoryError):  # the question will say so
            picture.pixels()


def sampling(values: dict):
    """The sidebar's values as model.inference.generation.Sampling."""
    from model.inference.generation import Sampling

    return Sampling(**values)


def visitor_of_session() -> Visitor:
    """The conversation of this session, made at its first run."""
    if "visitor" not in st.session_state:
        connected = partial(get_instance().is_active_session, get_script_run_ctx().session_id)
        st.session_state.visitor = Visitor(server().engine, server().settings.max_seq_len, connected)
    return st.session_state.visitor


def toolbar(visitor: Visitor, labels: Labels) -> None:
    """Clear and download, when there is something."""
    if not visitor.exchanges:
        return
    with st.container(horizontal=True, horizontal_alignment="right"):
        text = visitor.markdown(labels("conversation"), labels("you"), labels("assistant"))
        st.download_button(labels("download"), text, "conversation.md", "text/markdown", icon=":material/download:",
                           on_click="ignore", disabled=visitor.busy)  # fmt: skip
        st.button(labels("clear"), icon=":material/delete:", on_click=visitor.once("clear", visitor.clear))


def no_models(labels: Labels) -> None:
    """What to do when there is nothing to chat with."""
    st.warning(labels("no_models", folder=server().settings.save_dir))
    st.code("hf download jingyaogong/MiniMind2-V-PyTorch --local-dir out\n"
            "hf download openai/clip-vit-base-patch16 --local-dir model/vision_model/clip-vit-base-patch16", "bash")  # fmt: skip


def loading_message(loading: Loading, labels: Labels) -> str:
    """How far the model's loading is."""
    return labels(f"loading_{loading.stage}", model=loading.choice.label, seconds=time.monotonic() - loading.began)


@st.fragment(run_every=0.5)
def watch_loading(visitor: Visitor, values: dict, labels: Labels) -> None:
    """The progress of loading, and how it ended when it failed. It never runs the whole page anew, amid a visitor's clicks."""
    loading = st.session_state.loading
    if loading.pending:
        st.info(f"{loading_message(loading, labels)} {labels('ask_meanwhile')}", icon=":material/hourglass_top:")
    elif loading.problem:
        loading_failed(loading, labels)
    elif not visitor.busy:
        convert(visitor.tray)
        visitor.look_ahead(loading, sampling(values))


def loading_failed(loading: Loading, labels: Labels) -> None:
    """Why there is no model, and another try."""
    st.error(f"**{escape(labels('loading_failed', model=loading.choice.label))}**")
    st.code(loading.problem, None, wrap_lines=True)

    def again() -> None:
        st.session_state.loading = server().shelf.load(loading.choice)

    st.button(labels("try_again"), on_click=again, key="load_again")


def show_exchange(visitor: Visitor, exchange: Exchange, number: int, growing: bool, labels: Labels):
    """A question and its answer; returns the place of the answer's text."""
    with st.chat_message("user"):
        if exchange.pictures:
            with st.container(horizontal=True):
                for picture in exchange.pictures:
                    st.image(picture.preview, width=THUMBNAIL, alt=picture.name)
        st.text(exchange.question)
    with st.chat_message("assistant"):
        place, below = st.empty(), st.empty()
        if growing:
            return place
        with below.container():
            show_ending(visitor, exchange, number, labels)
        if exchange.answer:
            place.text(exchange.answer)
        elif not exchange.problem and not exchange.stopped:
            place.caption(labels("silent"))
    return place


def show_ending(visitor: Visitor, exchange: Exchange, number: int, labels: Labels) -> None:
    """What stands under an answer: how it ended, where it looked, and buttons under the last one."""
    if exchange.problem:
        show_problem(exchange.problem)
    if exchange.stopped:
        st.caption(labels("stopped"))
    elif exchange.first_seconds is not None:
        st.caption(labels("timing", model=exchange.model, first=exchange.first_seconds, seconds=exchange.seconds))
    if exchange.dropped:
        st.caption(labels("dropped", count=exchange.dropped))
    if exchange.history and exchange.answered_by() is not None:
        show_looked(visitor, exchange, number, labels)
    buttons = st.empty()  # emptied while the next answer grows: what a run has not come to yet would stay in sight
    if number == len(visitor.exchanges) - 1:
        with buttons.container(horizontal=True):
            repeat_buttons(visitor, exchange, number, labels)


def show_problem(text: str) -> None:
    """A message as it is, line by line: file names and commands in it are no Markdown."""
    st.error(escape(text).replace("\n", "  \n"))


def repeat_buttons(visitor: Visitor, exchange: Exchange, number: int, labels: Labels) -> None:
    """The last question anew, as it was or edited."""
    st.button(labels("regenerate"), icon=":material/refresh:", key=f"again_{number}",
              on_click=visitor.once(f"again_{number}", visitor.again))  # fmt: skip
    with st.popover(labels("edit"), icon=":material/edit:"):
        key = f"edited_{number}_{exchange.question}"
        st.text_area(labels("edit"), exchange.question, key=key, label_visibility="collapsed")

        def ask() -> None:
            if st.session_state[key].strip():
                visitor.again(st.session_state[key].strip())

        st.button(labels("ask_edited"), type="primary", key=f"ask_{number}", on_click=visitor.once(f"ask_{number}", ask))


def follow(visitor: Visitor, loading: Loading, values: dict, place, labels: Labels) -> None:
    """Shows the answer as it grows, to its end. A click elsewhere breaks this off, and the next run goes on with it."""
    while visitor.waiting:
        if loading.pending:
            place.caption(loading_message(loading, labels))
            time.sleep(0.2)
        elif loading.problem:
            visitor.fail(loading.problem)
        else:
            convert(visitor.exchanges[-1].pictures)
            visitor.begin(loading, sampling(values))
    if job := visitor.job:
        known, done = 0, False
        while not done:
            done = job.wait(known, 0.2)  # a click is heard when something is written to the page
            if job.values:
                known = len(job.values)
                place.text(job.text)
                time.sleep(FRAME)
            else:
                others = server().engine.busy - visitor.jobs
                place.caption(labels("queue", count=others) if others > 0 else labels("thinking"))
        visitor.settle(job)
    st.rerun()


def bottom(visitor: Visitor, labels: Labels) -> None:
    """What stays in sight: notices, the pictures of the next question, and where to type it."""
    with st.bottom:
        for notice in visitor.notices[:NOTICES]:
            show_problem(notice)
        if (more := len(visitor.notices) - NOTICES) > 0:
            st.caption(labels("more_notices", count=more))
        if visitor.busy:
            st.button(labels("stop"), icon=":material/stop_circle:", type="primary", key="stop",
                      on_click=visitor.once("stop", visitor.end))  # fmt: skip
        elif visitor.exchanges:
            with st.popover(labels("pictures"), icon=":material/add_photo_alternate:"):
                picture_sources(visitor, labels)
        show_tray(visitor, labels)
        st.chat_input(labels("question"), key="question", accept_file="multiple",
                      max_chars=4000, max_upload_size=pictures.MAX_MEGABYTES,
                      on_submit=visitor.once("question", lambda: submit(visitor, labels)))  # fmt: skip


def submit(visitor: Visitor, labels: Labels) -> None:
    """Takes what was typed and dropped into the input line."""
    value = st.session_state.question
    bad = bring(visitor, value.files, labels)
    text = value.text.strip()
    if bad:
        st.session_state.question = text  # back into the line: the question waits for better pictures
    elif text:
        visitor.ask(text)
    elif value.files:
        visitor.notices.append(labels("only_pictures"))
