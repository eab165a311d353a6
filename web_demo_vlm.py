"""The web page: chat with a trained model about pictures, and watch training runs.

    python web_demo_vlm.py                                  # http://127.0.0.1:8501, the weights in out/
    python web_demo_vlm.py --save_dir other/out --port 8600
    streamlit run web_demo_vlm.py -- --save_dir other/out   # the same; Streamlit's own flags stand before the --

Reads   weights (out/*.pth with their sidecars, transformers folders in out/), metrics files (out/*.metrics.jsonl),
        example pictures (dataset/eval_images), the vision tower's folder
Writes  nothing. All flags: --help.
"""

import sys
from contextlib import asynccontextmanager
from pathlib import Path

import streamlit as st

from chat.web.settings import parse_flags, start

settings = parse_flags(sys.argv[1:], __doc__)  # here, so that a bad flag ends `streamlit run` with code 2 as well


@asynccontextmanager
async def lifespan(_: st.App):
    """Before the first visitor comes, the first model begins to load."""
    start(settings)
    yield


PAGE = Path(__file__).resolve().parent / "chat" / "web" / "page.py"
# Streamlit puts the folder of a page's script before sys.path for as long as the script runs, unless it is in there. Were it
# taken out while torch is imported in the background, the import would pass over the entry that moved into its place.
sys.path.append(str(PAGE.parent))
app = st.App(PAGE, lifespan=lifespan)


def main() -> None:
    """Serves the page until Ctrl-C."""
    app.run(config={"server.address": settings.host} | ({"server.port": settings.port} if settings.port else {}))


if __name__ == "__main__":
    main()
