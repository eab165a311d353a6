"""The web page: chatting with a trained model, and watching training. `python web_demo_vlm.py` opens it.

| file | responsibility |
|---|---|
| settings.py | flags of the page, and what all visitors share |
| models.py | which weights there are; loading them in the background |
| problems.py | what a visitor is told when something fails |
| engine.py | one thread that answers all visitors, a piece for each in turn |
| pictures.py | what may be uploaded, without its metadata; examples |
| visitor.py | one visitor's conversation |
| page.py | what Streamlit runs |
| chat.py, sidebar.py, tray.py, looked.py | the chat page: conversation, choices, pictures, attention |
| runs.py, charts.py, training.py | the training page |
| texts.py | its labels, in English and Traditional Chinese |
"""
