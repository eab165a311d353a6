"""The web page: chatting with a trained model, and watching training. `python web_demo_vlm.py` opens it.

| file | responsibility |
|---|---|
| settings.py | the page's flags |
| models.py | which weights there are, what they were trained on, loading them |
| images.py | what may be uploaded; example images |
| conversation.py | one session's conversation, and whose turn it is to use the model |
| page.py | what Streamlit runs at every click: language, and one of two pages |
| chat_page.py, attention.py | the chat: conversation, choices, images; where an answer looked |
| runs.py, charts.py, training_page.py | the training page |
| texts.py, texts.toml | labels and errors in English and Traditional Chinese |
| page.css, page.js | looks; what only a browser can do |
"""
