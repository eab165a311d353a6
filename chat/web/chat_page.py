"""The chat page: images, questions, answers as they grow."""

import time

import streamlit as st

from model.inference.generation import Sampling

from .attention import attention_html
from .conversation import Conversation, Exchange, explain, in_turn
from .images import MAX_IMAGES, MAX_MEGABYTES, MAX_PIXELS, SessionImage, examples, take
from .models import ModelChoice, find_models, load, training_questions
from .settings import page_settings
from .texts import Labels, escape

FETCH = """hf download jingyaogong/MiniMind2-V-PyTorch --local-dir out
hf download openai/clip-vit-base-patch16 --local-dir model/vision_model/clip-vit-base-patch16"""
FRAME = 0.04  # seconds between two changes of a growing answer
# Name, bounds, value, step: bounds within which answers make sense; anything finer is for the command line.
SLIDERS = (
    ("temperature", 0.0, 2.0, 0.65, 0.05),
    ("top_p", 0.05, 1.0, 0.85, 0.05),
    ("max_new_tokens", 16, 1024, 512, 16),
)


def show(labels: Labels) -> None:
    """The whole page, for one session."""
    conversation = st.session_state.setdefault("conversation", Conversation(page_settings().max_seq_len))
    with st.sidebar:
        model = pick_model(conversation, labels)
        conversation.sampling = pick_sampling(labels)
    if model is None:
        st.warning(labels("no_models", folder=page_settings().save_dir))
        st.code(FETCH, "bash")
        return
    st.caption(labels.describe(model))
    place = st.empty()
    if conversation.exchanges:
        with st.container(horizontal=True, horizontal_alignment="right"):
            st.download_button(labels("download"), conversation.as_markdown, "conversation.md", on_click="ignore",
                               icon=":material/download:")  # fmt: skip
            st.button(labels("clear"), icon=":material/delete:", on_click=act, args=(conversation, conversation.clear))
    for number in range(len(conversation.exchanges)):
        answer = show_exchange(conversation, number, labels)
    if not conversation.exchanges:
        st.markdown(f"#### {labels('welcome')}")
        image_sources(conversation, model, labels)
    bottom(conversation, model, labels)
    bring_model(conversation, model, answer if conversation.busy else place, labels)
    if conversation.busy:
        follow(conversation, answer, labels)


# The sidebar: which model answers, and how


def pick_model(conversation: Conversation, labels: Labels) -> ModelChoice | None:
    """The model to chat with; None when there is none at all."""
    choices = {choice.path: choice for choice in find_models(page_settings())}
    if not choices:
        return None
    path = st.selectbox(
        labels("model"), list(choices), key="model", help=labels("model_help"), persist_state="session",
        format_func=lambda path: choices[path].name if path in choices else str(path),
    )  # fmt: skip
    loaded = conversation.model
    if not loaded or loaded.path != path:
        return choices[path]
    if loaded.changed != choices[path].changed:  # training has saved again: a conversation keeps its model until asked
        st.button(labels("newer"), help=labels("newer_help"), on_click=setattr, args=(conversation, "model", None))
    return loaded


def pick_sampling(labels: Labels) -> Sampling:
    """How answers are chosen."""
    st.subheader(labels("answers"))
    values = {
        name: st.slider(labels(name), *bounds, key=name, help=labels(f"{name}_help"), persist_state="session")
        for name, *bounds in SLIDERS
    }
    seed = st.number_input(labels("seed"), 0, 2**31 - 1, None, 1, key="seed", help=labels("seed_help"),
                           persist_state="session")  # fmt: skip
    return Sampling(**values, seed=seed)


def bring_model(conversation: Conversation, model: ModelChoice, place, labels: Labels) -> None:
    """Loads the model when it is another one than before, once the answer on its way is done. What is clicked and asked
    meanwhile is heard afterwards."""
    if conversation.model == model or (conversation.busy and conversation.exchanges[-1].model):
        return
    with place, st.spinner(labels("loading", model=model.name), show_time=True):
        try:
            conversation.assistant, conversation.model = load(model, page_settings()), model
            return
        except Exception as error:  # the page lives on and tells what happened
            problem = explain(error)
    with place.container():
        st.error(f"**{escape(labels('loading_failed', model=model.name))}**  \n{labels.error(problem)}")
        st.code(problem, None, wrap_lines=True)
        st.button(labels("try_again"))  # every run does
    st.stop()  # a question waits for a model


# The conversation


def act(conversation: Conversation, change, *args) -> None:
    """What a click does to the conversation. Notices about earlier ones go."""
    conversation.notices = []
    in_turn(change, *args)


def show_exchange(conversation: Conversation, number: int, labels: Labels):
    """A question and its answer; returns the place of the answer's text."""
    exchange = conversation.exchanges[number]
    with st.chat_message("user"):
        if exchange.images:
            st.image([image.preview for image in exchange.images], alt=[image.name for image in exchange.images])
        st.text(exchange.question)
    with st.chat_message("assistant"):
        place, below = st.empty(), st.empty()
        if exchange.answer:
            place.text(exchange.answer)
        elif exchange.done and not exchange.problem and not exchange.stopped:
            place.caption(labels("silent"))
        if exchange.done:
            with below.container():
                show_ending(conversation, exchange, number, labels)
    return place


def show_ending(conversation: Conversation, exchange: Exchange, number: int, labels: Labels) -> None:
    """What stands under an answer: how it ended, where it looked, and buttons under the last one."""
    if exchange.problem:
        st.error(labels.error(exchange.problem))
    if exchange.stopped:
        st.caption(labels("stopped"))
    elif exchange.answer:
        st.caption(labels("timing", model=exchange.model.name, seconds=exchange.seconds))
    if exchange.dropped:
        st.caption(labels("dropped", count=exchange.dropped))
    if exchange.history and exchange.model == conversation.model:
        show_attention(conversation, exchange, labels)
    buttons = st.empty()  # emptied while the next answer grows: what a run has not come to yet would stay in sight
    if number == len(conversation.exchanges) - 1:
        with buttons.container(horizontal=True):
            repeat_buttons(conversation, exchange, labels)


@st.fragment
def show_attention(conversation: Conversation, exchange: Exchange, labels: Labels) -> None:
    """A switch; behind it where each token of the answer looked, computed when somebody wants to know."""
    if not st.toggle(labels("look"), key=f"look_{exchange.asked}", help=labels("look_help")):
        return
    try:
        with st.spinner(labels("look_wait")):
            seen = in_turn(conversation.look, exchange)
    except Exception as error:  # the page lives on and tells what happened
        st.error(labels.error(explain(error)))
        return
    st.html(attention_html(seen, labels))


def repeat_buttons(conversation: Conversation, exchange: Exchange, labels: Labels) -> None:
    """The last question again, as it was or edited."""
    st.button(labels("regenerate"), icon=":material/refresh:", key=f"again_{exchange.asked}",
              on_click=act, args=(conversation, conversation.again))  # fmt: skip
    with st.popover(labels("edit"), icon=":material/edit:"):
        key = f"edited_{exchange.asked}"
        st.text_area(labels("edit"), exchange.question, key=key, label_visibility="collapsed")
        st.button(labels("ask_edited"), type="primary", key=f"ask_{exchange.asked}",
                  on_click=lambda: act(conversation, conversation.again, st.session_state[key].strip()))  # fmt: skip


def follow(conversation: Conversation, place, labels: Labels) -> None:
    """Shows the answer as it grows, to its end. A click elsewhere breaks this off, and the next run continues it."""
    exchange, shown = conversation.exchanges[-1], 0.0
    if not exchange.answer:
        place.caption(labels("thinking"))
    while not exchange.done:
        in_turn(conversation.step)
        if exchange.answer and time.monotonic() - shown > FRAME:
            place.text(exchange.answer)
            shown = time.monotonic()
    st.rerun()


# The bottom: what stays in sight


def bottom(conversation: Conversation, model: ModelChoice, labels: Labels) -> None:
    """Notices, the images of the next question, and where to type it."""
    with st.bottom:
        if conversation.notices:
            st.error("  \n".join(conversation.notices))
        if conversation.busy:
            st.button(labels("stop"), icon=":material/stop_circle:", type="primary", key="stop",
                      on_click=act, args=(conversation, conversation.stop))  # fmt: skip
        elif conversation.exchanges:
            with st.popover(labels("images"), icon=":material/add_photo_alternate:"):
                image_sources(conversation, model, labels)
        if conversation.tray:
            show_tray(conversation, model, labels)
    st.chat_input(labels("question"), key="question", accept_file="multiple", max_chars=4000,
                  max_upload_size=MAX_MEGABYTES, on_submit=submit, args=(conversation, labels))  # fmt: skip


def submit(conversation: Conversation, labels: Labels) -> None:
    """Takes what was typed and attached. Images that cannot be taken bring the question back into its line."""
    value, conversation.notices = st.session_state.question, []
    for file in value.files:
        try:
            bring(conversation, take(file.getvalue(), file.name, conversation.pixel_settings), labels)
        except Exception as error:  # of odd files, all kinds
            conversation.notices.append(labels.error(explain(error)))
    if value.text.strip() and not conversation.notices:
        in_turn(conversation.ask, value.text.strip(), conversation.tray)
        return
    st.session_state.question = value.text
    if not conversation.notices:
        conversation.notices.append(labels("only_images"))


def show_tray(conversation: Conversation, model: ModelChoice, labels: Labels) -> None:
    """The images of the next question, each a button that takes it out, and questions to ask about them."""
    with st.container(horizontal=True, key="tray"):
        for number, image in enumerate(conversation.tray):
            st.button(f"![{escape(image.name)}]({image.thumbnail}) ✕", key=f"remove_{number}",
                      help=labels("remove", name=image.name), on_click=act,
                      args=(conversation, conversation.tray.remove, image))  # fmt: skip
        for number, question in enumerate(training_questions(model.data_path) or [labels("describe_image")]):
            st.button(escape(question), key=f"suggested_{number}", type="tertiary", icon=":material/help:",
                      on_click=act, args=(conversation, conversation.ask, question, conversation.tray))  # fmt: skip


def image_sources(conversation: Conversation, model: ModelChoice, labels: Labels) -> None:
    """How to attach images, and the examples, those of a kind that the model was trained on first."""
    st.caption(labels("attach", count=MAX_IMAGES, megabytes=MAX_MEGABYTES, megapixels=MAX_PIXELS // 10**6))
    if st.toggle(labels("camera"), key="camera", help=labels("camera_help")):
        key = f"shot_{len(conversation.exchanges)}"
        st.camera_input(labels("camera"), key=key, label_visibility="collapsed",
                        on_change=lambda: photograph(conversation, st.session_state[key], labels))  # fmt: skip
    found = examples(page_settings().image_dir)
    found = sorted(found, key=lambda image: image.name.startswith("easy_vqa") != model.is_demo)
    if found:
        st.caption(labels("examples"))
        with st.container(horizontal=True, key="examples"):
            for image in found:
                st.button(f"![{escape(image.name)}]({image.thumbnail})", key=f"example_{image.name}",
                          on_click=act, args=(conversation, bring, conversation, image, labels))  # fmt: skip


def photograph(conversation: Conversation, shot, labels: Labels) -> None:
    """Puts what the camera took into the tray; `shot` is None when a user clears it."""
    if shot is not None:
        act(conversation, bring, conversation, take(shot.getvalue(), shot.name, conversation.pixel_settings), labels)


def bring(conversation: Conversation, image: SessionImage, labels: Labels) -> None:
    """Puts an image into the tray, once, or a notice why not."""
    if len(conversation.tray) >= MAX_IMAGES:
        conversation.notices.append(labels("too_many", name=escape(image.name), most=MAX_IMAGES))
    elif image not in conversation.tray:
        conversation.tray.append(image)
