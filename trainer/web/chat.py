"""The chat page: pictures, questions, answers as they grow."""

import time

import streamlit as st
from streamlit.runtime import get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.uploaded_file_manager import DeletedFile

from . import pictures
from .looked import show_looked
from .models import Loading
from .pictures import Picture, PictureError
from .settings import server
from .sidebar import pick_model, pick_sampling
from .texts import Labels
from .visitor import Exchange, Visitor, escape

THUMBNAIL = 180  # CSS pixels
STYLE = """<style>
.st-key-examples button, .st-key-tray button {padding: 0.25rem; height: auto}
.st-key-examples img, .st-key-tray img {height: 4.5rem !important; max-height: none !important; border-radius: 0.25rem}
</style>"""  # pictures on buttons, which Streamlit would make as small as text
FRAME = 0.04  # seconds between two changes of a growing answer


def show(labels: Labels) -> None:
    """The whole page, for one visitor."""
    st.html(STYLE)
    visitor = visitor_of_session()
    with st.sidebar:
        loading = pick_model(labels)
        values = pick_sampling(labels)
    toolbar(visitor, labels)
    if loading is None:
        return no_models(labels)
    if loading.pending and not visitor.waiting:
        watch_loading(loading, labels)
    elif loading.problem:
        loading_failed(loading, labels)
    for number, exchange in enumerate(visitor.exchanges):
        growing = visitor.busy and number == len(visitor.exchanges) - 1
        place = show_exchange(visitor, exchange, number, growing, labels)
    if not visitor.exchanges:
        st.markdown(f"#### {labels('welcome')}")
        picture_sources(visitor, labels)
    bottom(visitor, labels)
    if visitor.busy:
        follow(visitor, loading, values, place, labels)


def visitor_of_session() -> Visitor:
    """The conversation of this session, made at its first run."""
    if "visitor" not in st.session_state:
        st.session_state.visitor = Visitor(server().engine, server().settings.max_seq_len)
    return st.session_state.visitor


def toolbar(visitor: Visitor, labels: Labels) -> None:
    """Clear and download, when there is something."""
    if not visitor.exchanges:
        return
    with st.container(horizontal=True, horizontal_alignment="right"):
        text = visitor.markdown(labels("conversation"), labels("you"), labels("assistant"))
        st.download_button(labels("download"), text, "conversation.md", "text/markdown", icon=":material/download:",
                           on_click="ignore", disabled=visitor.busy)  # fmt: skip
        st.button(labels("clear"), icon=":material/delete:", on_click=visitor.clear)


def no_models(labels: Labels) -> None:
    """What to do when there is nothing to chat with."""
    st.warning(labels("no_models", folder=server().settings.save_dir))
    st.code("hf download jingyaogong/MiniMind2-V-PyTorch --local-dir out\n"
            "hf download openai/clip-vit-base-patch16 --local-dir model/vision_model/clip-vit-base-patch16", "bash")  # fmt: skip


def loading_message(loading: Loading, labels: Labels) -> str:
    """How far the model's loading is."""
    return labels(f"loading_{loading.stage}", model=loading.choice.label, seconds=time.monotonic() - loading.began)


@st.fragment(run_every=0.5)
def watch_loading(loading: Loading, labels: Labels) -> None:
    """The progress of loading, until it is over."""
    if not loading.pending:
        st.rerun()
    st.info(f"{loading_message(loading, labels)} {labels('ask_meanwhile')}", icon=":material/hourglass_top:")


def loading_failed(loading: Loading, labels: Labels) -> None:
    """Why there is no model, and another try."""
    st.error(f"**{labels('loading_failed', model=loading.choice.label)}**\n\n```\n{loading.problem}\n```")

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
    st.button(labels("regenerate"), icon=":material/refresh:", on_click=visitor.again, key=f"again_{number}")
    with st.popover(labels("edit"), icon=":material/edit:"):
        key = f"edited_{number}_{exchange.question}"
        st.text_area(labels("edit"), exchange.question, key=key, label_visibility="collapsed")

        def ask() -> None:
            if st.session_state[key].strip():
                visitor.again(st.session_state[key].strip())

        st.button(labels("ask_edited"), type="primary", on_click=ask, key=f"ask_{number}")


def follow(visitor: Visitor, loading: Loading, values: dict, place, labels: Labels) -> None:
    """Shows the answer as it grows, to its end. A click elsewhere breaks this off, and the next run goes on with it."""
    while visitor.waiting:
        if loading.pending:
            place.caption(loading_message(loading, labels))
            time.sleep(0.2)
        elif loading.problem:
            visitor.fail(loading.problem)
        else:
            from trainer.inference import Sampling

            visitor.begin(loading, Sampling(**values))
    if job := visitor.job:
        known, done = 0, False
        while not done:
            done = job.wait(known, 0.5)
            if job.values:
                known = len(job.values)
                place.text(job.text)
                time.sleep(FRAME)
            else:
                others = server().engine.busy - 1
                place.caption(labels("queue", count=others) if others > 0 else labels("thinking"))
        visitor.settle()
    st.rerun()


def bottom(visitor: Visitor, labels: Labels) -> None:
    """What stays in sight: notices, the pictures of the next question, and where to type it."""
    with st.bottom:
        for notice in visitor.notices:
            show_problem(notice)
        visitor.notices = []
        if visitor.busy:
            st.button(labels("stop"), icon=":material/stop_circle:", on_click=visitor.end, type="primary", key="stop")
        elif visitor.exchanges:
            with st.popover(labels("pictures"), icon=":material/add_photo_alternate:"):
                picture_sources(visitor, labels)
        tray(visitor, labels)
        st.chat_input(labels("question"), key="question", accept_file="multiple", file_type=list(pictures.SUFFIXES),
                      max_chars=4000, max_upload_size=pictures.MAX_MEGABYTES,
                      on_submit=lambda: submit(visitor, labels))  # fmt: skip


def tray(visitor: Visitor, labels: Labels) -> None:
    """The pictures that the next question shows, each with a button that takes it out."""
    if visitor.tray:
        with st.container(horizontal=True, key="tray"):
            for number, picture in enumerate(visitor.tray):
                st.button(f"![{escape(picture.name)}]({picture.thumbnail}) ✕", help=labels("remove", name=picture.name),
                          key=f"remove_{number}", on_click=visitor.tray.pop, args=(number,))  # fmt: skip


def submit(visitor: Visitor, labels: Labels) -> None:
    """Takes what was typed and dropped into the input line."""
    value = st.session_state.question
    bad = bring(visitor, value.files)
    text = value.text.strip()
    if bad:
        st.session_state.question = text  # back into the line: the question waits for better pictures
    elif text:
        visitor.ask(text)
    elif value.files:
        visitor.notices.append(labels("only_pictures"))


def picture_sources(visitor: Visitor, labels: Labels) -> None:
    """A place to drop files, the examples, the camera."""
    state = st.session_state
    key = f"upload_{state.setdefault('uploads', 0)}"

    def uploaded() -> None:
        bring(visitor, state[key])
        state.uploads += 1  # a new, empty place for the next ones

    st.file_uploader(
        labels("upload"), list(pictures.SUFFIXES), True, key=key, on_change=uploaded, max_upload_size=pictures.MAX_MEGABYTES,
        help=labels("upload_help", count=pictures.MAX_PICTURES, megabytes=pictures.MAX_MEGABYTES,
                    megapixels=pictures.MAX_PIXELS // 10**6),
    )  # fmt: skip
    if found := pictures.examples(server().settings.image_dir):
        st.caption(labels("examples"))
        with st.container(horizontal=True, key="examples"):
            for picture in found:
                st.button(f"![{escape(picture.name)}]({picture.thumbnail})", key=f"example_{picture.name}", on_click=add,
                          args=(visitor, picture))  # fmt: skip
    camera(visitor, labels)


def camera(visitor: Visitor, labels: Labels) -> None:
    """The camera, asked for only when it is wanted: browsers ask for permission as soon as it is there."""
    state = st.session_state
    if not st.toggle(labels("camera"), key="camera"):
        return
    key = f"shot_{state.setdefault('shots', 0)}"

    def taken() -> None:
        bring(visitor, [state[key]] if state[key] else [])
        state.shots += 1

    st.camera_input(labels("camera"), key=key, on_change=taken, label_visibility="collapsed")


def add(visitor: Visitor, picture: Picture) -> bool:
    """Puts a picture into the tray, or a notice why not; whether it is there."""
    try:
        visitor.bring(picture)
    except PictureError as error:
        visitor.notices.append(str(error))
        return False
    return True


def bring(visitor: Visitor, files: list) -> bool:
    """Uploaded files into the tray; whether some could not be taken. Streamlit's own copies are let go."""
    bad = False
    for file in files:
        if isinstance(file, DeletedFile):
            continue  # taken at an earlier run
        try:
            added = add(visitor, pictures.take(file.getvalue(), file.name))
        except PictureError as error:
            visitor.notices.append(str(error))
            added = False
        bad = bad or not added
        get_instance().uploaded_file_mgr.remove_file(get_script_run_ctx().session_id, file.file_id)
    return bad
