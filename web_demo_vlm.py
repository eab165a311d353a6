"""The web page: chat with a trained model about images, and watch training runs.

    python web_demo_vlm.py                                  # http://127.0.0.1:8501, the weights in out/
    python web_demo_vlm.py --save_dir other/out --port 8600
    streamlit run web_demo_vlm.py -- --save_dir other/out   # the same; Streamlit's own flags stand before the --

Reads   weights (out/*.pth with their sidecars, transformers folders in out/), metrics files (out/*.metrics.jsonl),
        example images (dataset/eval_images), the vision encoder's folder
Writes  nothing. All flags: --help.
"""

import contextlib
import sys

import streamlit as st

from chat.web.settings import parse_flags

settings = parse_flags(sys.argv[1:], __doc__)  # here, so that a bad flag ends `streamlit run` with code 2 as well

import chat.web.chat_page  # noqa: E402  (takes seconds: after the flags, before the first session)

app = st.App(chat.web.__path__[0] + "/page.py")


def main() -> None:
    """Serves the page until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        app.run(config={"server.address": settings.host} | ({"server.port": settings.port} if settings.port else {}))


if __name__ == "__main__":
    main()
