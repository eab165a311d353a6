"""What Streamlit runs for every visitor at every click: his language, and the two pages."""

import streamlit as st

from . import chat, training
from .texts import LANGUAGES, Labels, preferred

st.session_state.setdefault("language", preferred(st.context.locale))
labels = Labels(st.session_state.language)

pages = [
    st.Page(lambda: chat.show(labels), title=labels("chat"), url_path="chat", default=True),
    st.Page(lambda: training.show(labels), title=labels("training"), url_path="training"),
]
page = st.navigation(pages, position="top")
st.set_page_config(page_title=f"MiniMind-V · {page.title}", page_icon="👁️",
                   layout="wide" if page.url_path == "training" else "centered")  # fmt: skip
with st.sidebar:
    st.selectbox(labels("language"), list(LANGUAGES), format_func=LANGUAGES.get, key="language", persist_state="session")
page.run()
