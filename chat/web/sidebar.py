"""The chat's sidebar: which model answers, and how."""

import streamlit as st

from .models import Loading, ModelChoice
from .settings import server
from .texts import Labels

# Name, bounds, value, step: bounds within which answers make sense; anything finer is for the command line.
SLIDERS = (
    ("temperature", 0.0, 2.0, 0.65, 0.05),
    ("top_p", 0.05, 1.0, 0.85, 0.05),
    ("top_k", 0, 200, 0, 5),
    ("repetition_penalty", 1.0, 2.0, 1.0, 0.05),
    ("max_new_tokens", 16, 1024, 512, 16),
)


def pick_model(labels: Labels) -> Loading | None:
    """The model this visitor chats with, ready or on its way; None when there is none at all."""
    choices = {choice.path: choice for choice in server().shelf.choices()}
    if not choices:
        return None
    path = st.selectbox(
        labels("model"), list(choices), format_func=lambda path: describe(choices[path]) if path in choices else str(path),
        key="model", help=labels("model_help"), persist_state="session",
    )  # fmt: skip
    choice, loading = choices[path], st.session_state.get("loading")
    if choice.trained:
        st.caption(choice.trained)
    if loading is None or loading.choice.path != path or (loading.choice != choice and not loading.pending and st.button(labels("newer"), help=labels("newer_help"))):
        loading = server().shelf.load(choice)
    st.session_state.loading = loading
    return loading


def describe(choice: ModelChoice) -> str:
    """A model in the picker."""
    return f"{choice.label} ({choice.size})"


def pick_sampling(labels: Labels) -> dict:
    """How answers are chosen, as the keywords of Sampling."""
    st.subheader(labels("answers"))
    values = {
        name: st.slider(labels(name), low, high, value, step, key=name, help=labels(f"{name}_help"), persist_state="session")
        for name, low, high, value, step in SLIDERS
    }
    values["seed"] = st.number_input(labels("seed"), 0, 2**31 - 1, None, 1, key="seed", help=labels("seed_help"),
                                     persist_state="session")  # fmt: skip
    return values
