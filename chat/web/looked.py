"""Under an answer: where each of its tokens looked in the pictures, computed when somebody wants to know."""

import io

import streamlit as st
from PIL import Image

from chat.markdown import escape

from .texts import Labels
from .visitor import Exchange, Visitor

WIDTH = 224  # CSS pixels of a map, as many as the model's view has


@st.fragment
def show_looked(visitor: Visitor, exchange: Exchange, number: int, labels: Labels) -> None:
    """A switch; behind it the maps, with a slider over the tokens."""
    if not st.toggle(labels("look"), key=f"look_{number}_{id(exchange)}", help=labels("look_help")):
        return
    if exchange.seen is None:
        with st.spinner(labels("look_wait")):
            problem = visitor.look(exchange)
        if problem:
            st.error(escape(problem))
            return
    tokens, maps = exchange.seen.tokens, exchange.seen.maps
    options = [-1, *range(len(tokens))]  # -1: the mean of all
    at = st.select_slider(
        labels("look_token"), options, format_func=lambda at: labels("look_all") if at < 0 else tokens[at].strip() or "…",
        key=f"token_{number}_{id(exchange)}",
    )  # fmt: skip
    heat = maps.mean(0) if at < 0 else maps[at]  # [N, s, s]
    if at >= 0:
        before, after = "".join(tokens[:at]), "".join(tokens[at + 1 :])
        st.markdown(f"{escape(before)}:red-background[{escape(tokens[at]) or '…'}]{escape(after)}")
    with st.container(horizontal=True):
        for picture, patches in zip(exchange.history[1], heat, strict=False):
            st.image(to_png(drawn(picture, patches, float(heat.max()))), width=WIDTH, alt=labels("look"))
    st.caption(labels("look_share", share=float(heat.sum())))


def drawn(pixels, patches, top: float) -> Image.Image:
    """The picture under its map; the same colours for the same weights in all pictures of a token."""
    from model.inference.attention_map import overlay, pixels_to_image

    return overlay(pixels_to_image(pixels), patches, top)


def to_png(picture: Image.Image) -> bytes:
    """As bytes of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
