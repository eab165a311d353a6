"""Where pictures come from, and those that the next question shows."""

import re
from urllib.parse import urlsplit

import streamlit as st
from streamlit.runtime import get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.uploaded_file_manager import DeletedFile

from chat.markdown import escape

from . import pictures
from .pictures import Picture, PictureError
from .settings import server
from .texts import Labels
from .visitor import Visitor

STYLE = """<style>
.st-key-examples button, .st-key-tray button {padding: 0.25rem; height: auto}
.st-key-examples img, .st-key-tray img {height: 4.5rem !important; max-height: none !important; border-radius: 0.25rem}
</style>"""  # pictures on buttons, which Streamlit would make as small as text


def show_tray(visitor: Visitor, labels: Labels) -> None:
    """The pictures that the next question shows, each with a button that takes it out."""
    if visitor.tray:
        with st.container(horizontal=True, key="tray"):
            for number, picture in enumerate(visitor.tray):
                st.button(f"![{escape(picture.name)}]({picture.thumbnail}) ✕", help=labels("remove", name=picture.name),
                          key=f"remove_{number}", args=(picture,),
                          on_click=visitor.once(f"remove_{number}", visitor.remove))  # fmt: skip


def picture_sources(visitor: Visitor, labels: Labels) -> None:
    """A place to drop files, the examples, the camera."""
    state = st.session_state
    key = f"upload_{state.setdefault('uploads', 0)}"

    def uploaded() -> None:
        bring(visitor, state[key], labels)
        state.uploads += 1  # a new, empty place for the next ones

    st.file_uploader(
        labels("upload"), accept_multiple_files=True, key=key, on_change=visitor.once(key, uploaded),
        max_upload_size=pictures.MAX_MEGABYTES,
        help=labels("upload_help", count=pictures.MAX_PICTURES, megabytes=pictures.MAX_MEGABYTES,
                    megapixels=pictures.MAX_PIXELS // 10**6),
    )  # fmt: skip
    if found := pictures.examples(server().settings.image_dir):
        st.caption(labels("examples"))
        with st.container(horizontal=True, key="examples"):
            for picture in found:
                st.button(f"![{escape(picture.name)}]({picture.thumbnail})", key=f"example_{picture.name}", args=(visitor, picture),
                          on_click=visitor.once(f"example_{picture.name}", add))  # fmt: skip
    camera(visitor, labels)


def may_film(url: str | None) -> bool:
    """Whether browsers let the page at this address ask for a camera: over https, or from the visitor's own machine."""
    place = urlsplit(url or "")
    return place.scheme != "http" or bool(re.fullmatch(r"(.+\.)?localhost|127\.[\d.]+|::1", place.hostname or ""))


def camera(visitor: Visitor, labels: Labels) -> None:
    """The camera, asked for only when it is wanted: browsers ask for permission as soon as it is there."""
    state = st.session_state
    allowed = may_film(st.context.url)
    if not st.toggle(labels("camera"), key="camera", disabled=not allowed, help=None if allowed else labels("camera_closed")):
        return
    key = f"shot_{state.setdefault('shots', 0)}"

    def taken() -> None:
        bring(visitor, [state[key]] if state[key] else [], labels)
        state.shots += 1

    st.camera_input(labels("camera"), key=key, on_change=visitor.once(key, taken), label_visibility="collapsed")


def add(visitor: Visitor, picture: Picture) -> bool:
    """Puts a picture into the tray, or a notice why not; whether it is there."""
    try:
        visitor.bring(picture)
    except PictureError as error:
        visitor.notices.append(str(error))
        return False
    return True


def bring(visitor: Visitor, files: list, labels: Labels) -> bool:
    """Uploaded files into the tray; whether some could not be taken. Streamlit's own copies are let go."""
    bad = False
    for file in files:
        if isinstance(file, DeletedFile):  # let go when it was taken, or lost with a broken connection
            if file.file_id not in visitor.taken:
                visitor.notices.append(labels("lost"))
                bad = True
            continue
        visitor.taken.add(file.file_id)
        try:
            added = add(visitor, pictures.take(file.getvalue(), file.name))
        except PictureError as error:
            visitor.notices.append(str(error))
            added = False
        bad = bad or not added
        get_instance().uploaded_file_mgr.remove_file(get_script_run_ctx().session_id, file.file_id)
    return bad
