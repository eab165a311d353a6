"""What Streamlit runs for every session at every click: its language, and one of two pages."""

import streamlit as st

from chat.web import chat_page, training_page
from chat.web.texts import LANGUAGES, Labels, preferred

st.session_state.setdefault("language", preferred(st.context.locale))
labels = Labels(st.session_state.language)

pages = [
    st.Page(lambda: chat_page.show(labels), title=labels("chat"), url_path="chat", default=True),
    st.Page(lambda: training_page.show(labels), title=labels("training"), url_path="training"),
]
page = st.navigation(pages, position="top")
st.set_page_config(page_title=f"MiniMind-V · {page.title}", page_icon="👁️",
                   layout="wide" if page.url_path == "training" else "centered")  # fmt: skip
labels.install()
with st.sidebar:
    st.selectbox(labels("language"), list(LANGUAGES), format_func=LANGUAGES.get, key="language",
                 persist_state="session")  # fmt: skip
page.run()
