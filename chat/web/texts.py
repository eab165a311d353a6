"""Labels and errors of the page, in English and Traditional Chinese."""

import json
import re
from pathlib import Path

import streamlit as st

from .models import ModelChoice

FOLDER = Path(__file__).resolve().parent

LANGUAGES = {"en": "English", "zh": "繁體中文"}

TEXTS: dict[str, tuple[str, str]] = {
    "chat": ("Chat", "對話"),
    "training": ("Training", "訓練"),
    "language": ("Language", "語言"),
    # The sidebar of the chat
    "model": ("Model", "模型"),
    "model_help": ("Weights found in the output folder, and transformers folders there.", "輸出資料夾中的權重，以及其中的 transformers 資料夾。"),
    "newer": ("Take the newer weights", "改用較新的權重"),
    "newer_help": ("Training has saved again since these were loaded.", "載入之後，訓練又存了一次。"),
    "answers": ("Answers", "回答"),
    "temperature": ("Temperature", "溫度"),
    "temperature_help": ("0 always takes the likeliest token; higher is more varied.", "0 總是取最可能的 token；越高越多變。"),
    "top_p": ("Top-p", "Top-p"),
    "top_p_help": ("Chooses among the likeliest tokens that together have this probability.", "只在機率總和達到此值的最可能 token 中挑選。"),
    "max_new_tokens": ("Longest answer (tokens)", "回答上限（token）"),
    "max_new_tokens_help": ("The answer ends here at the latest.", "回答最長到此為止。"),
    "seed": ("Seed", "亂數種子"),
    "seed_help": ("The same seed gives the same answer to the same question. Empty: different each time.", "相同的種子對相同的問題給出相同的回答。留空則每次不同。"),
    # What the model is, and loading it
    "described": ("{name}, a decoder of width x layers {size}. ", "{name}，寬度 x 層數 {size} 的解碼器。"),
    "demo": ("It was trained on the demo's images of one coloured shape each, so ask for shapes and colours ({updates} updates).", "它以示範資料訓練（{updates} 次更新），每張圖片是一個彩色形狀，請詢問形狀與顏色。"),
    "trained": ("It was trained on {data} ({updates} updates).", "它以 {data} 訓練（{updates} 次更新）。"),
    "untold": ("No record of its training is stored next to it.", "它旁邊沒有訓練紀錄。"),
    "no_models": ("There are no weights in {folder} yet. Make some with `make demo`, or fetch published ones:", "{folder} 中還沒有權重。可以用 `make demo` 訓練，或下載已發布的："),
    "loading": ("Loading {model} …", "正在載入 {model}……"),
    "loading_failed": ("{model} cannot be loaded", "無法載入 {model}"),
    "try_again": ("Try again", "再試一次"),
    # The chat
    "welcome": ("Show the model an image, and ask.", "給模型看一張圖片，然後提問。"),
    "attach": ("Attach images with the button in the line below, or drop them there: up to {count} a question, {megabytes} MB and {megapixels} megapixels each.", "用下方輸入列的按鈕附加圖片，或把圖片拖放到那裡：每個問題最多 {count} 張，每張最多 {megabytes} MB、{megapixels} 百萬像素。"),
    "examples": ("Examples:", "範例："),
    "camera": ("Camera", "相機"),
    "camera_help": ("Browsers give the camera only to pages at https:// and on localhost.", "瀏覽器只允許 https:// 與 localhost 的網頁使用相機。"),
    "images": ("Images", "圖片"),
    "too_many": ("{count} images are more than a question can show: {most}. The first {most} wait here.", "{count} 張圖片超過一個問題的上限 {most} 張；前 {most} 張已保留在這裡。"),
    "only_images": ("Now ask something about the images.", "現在請針對圖片提問。"),
    "describe_image": ("Describe the image.", "請描述這張圖片。"),
    "remove": ("Remove {name}", "移除 {name}"),
    "question": ("Ask about the images, or anything", "詢問圖片，或任何問題"),
    "thinking": ("Thinking …", "思考中……"),
    "stop": ("Stop", "停止"),
    "stopped": ("Stopped.", "已停止。"),
    "silent": ("(The model said nothing.)", "（模型沒有說話。）"),
    "dropped": ("The conversation has grown too long for the model: it no longer sees the first {count} more exchanges.", "對話已超過模型能記住的長度：它看不到更早的 {count} 次問答。"),
    "timing": ("{model} · {seconds:.2f} s", "{model} · {seconds:.2f} 秒"),
    "regenerate": ("Regenerate", "重新產生"),
    "edit": ("Edit", "修改"),
    "ask_edited": ("Ask", "提問"),
    "download": ("Download", "下載"),
    "clear": ("Clear", "清除"),
    "look": ("Where did it look?", "它看了哪裡？"),
    "look_help": ("Attention from each token of the answer to the 14 x 14 patches of the image, mean of all layers and heads.", "回答中每個 token 對圖片 14 x 14 個圖塊的注意力，所有層與頭的平均。"),
    "look_wait": ("Looking …", "查看中……"),
    "look_all": ("all", "全部"),
    "look_hint": ("Point at a token of the answer, or tap it:", "指向或輕觸回答中的 token："),
    "look_legend": ("of the attention on one patch", "的注意力落在單一圖塊上"),
    "look_part": ("{part} of the attention fell on the images, the rest on the text.", "注意力有 {part} 落在圖片上，其餘在文字上。"),
    # Training
    "no_runs": ("No runs in {folder} yet. A training run writes its figures there from its first log line on.", "{folder} 中還沒有訓練紀錄。訓練從第一行紀錄起就會把數據寫在那裡。"),
    "runs": ("Runs", "訓練紀錄"),
    "choose": ("Choose runs", "選擇訓練紀錄"),
    "axis": ("Over", "橫軸"),
    "axis_update": ("updates", "更新次數"),
    "axis_time": ("time", "時間"),
    "axis_epoch": ("epochs", "週期"),
    "minutes": ("minutes", "分鐘"),
    "smoothing": ("Smoothing", "平滑"),
    "smoothing_help": ("Weight of the past in a running mean; the raw figures stay behind it, faint.", "滑動平均中過去的權重；原始數據以淡色留在後面。"),
    "log_scale": ("Logarithmic loss", "對數損失"),
    "loss": ("Training loss", "訓練損失"),
    "eval_loss": ("Validation loss", "驗證損失"),
    "aux_loss": ("MoE auxiliary loss", "MoE 輔助損失"),
    "learning_rate": ("Learning rate", "學習率"),
    "tokens_per_second": ("Tokens per second", "每秒 token 數"),
    "peak_memory_mb": ("Peak memory (MB)", "記憶體峰值（MB）"),
    "run": ("Run", "紀錄"),
    "state": ("State", "狀態"),
    "state_live": ("training", "訓練中"),
    "state_still": ("ended", "已結束"),
    "update": ("Update", "更新"),
    "epoch": ("Epoch", "週期"),
    "time": ("Time", "時間"),
    "left": ("Left", "剩餘"),
    "arguments": ("Arguments", "參數"),
    "arguments_differing": ("Arguments that differ", "不同的參數"),
    "argument": ("Argument", "參數"),
    "samples": ("Sample answers during training", "訓練期間的範例回答"),
    "sample_reference": ("Reference", "參考答案"),
    "bad_lines": ("{run}: {count} lines of its metrics file cannot be read and are left out.", "{run}：紀錄檔中有 {count} 行無法讀取，已略過。"),
}

# Errors in Chinese, by what they contain in English. The first that fits counts; after a "：" stands the error as it is.
IMAGE = r"image '(.*)' .*"
CANNOT = "無法讀取圖片「\\1」："
ERRORS = [
    (IMAGE + r"has (\d+) MB, more than (\d+)", r"圖片「\1」有 \2 MB，超過上限 \3 MB，請存成較小的檔案。"),
    (IMAGE + r"(?:more than ([\d,]+) pixels|pixels, more than ([\d,]+))", CANNOT + r"像素超過上限 \2\3，請存成較小的圖片。"),
    (IMAGE + "(?:cut short|truncated|damaged|corrupt)", CANNOT + "檔案不完整或已損壞，請重新取得，或開啟後另存新檔。"),
    (IMAGE + "(?:a video|PDF or PostScript|SVG|web page|git-lfs|text, not an image|is empty)", CANNOT + "這不是圖片，請存成 PNG 或 JPEG。"),
    (IMAGE + r"pip install (\S+?),", CANNOT + r"需要另外安裝套件（pip install \2），或存成 JPEG。"),
    (IMAGE, CANNOT + "不是能辨識的圖片格式，或內容無法解碼。"),
    (r"question is too long: (\d+) tokens, more than (\d+)", r"問題太長：\1 個 token，超過上限 \2。請縮短問題或減少圖片。"),
    ("not enough memory", "記憶體不足。請減少圖片或回答上限後再問，或清除對話。"),
    ("cannot see", "這個模型載入時沒有視覺編碼器，看不到圖片；請用 --vision_model_path 指定。"),
    (r"no vision encoder at (\S+)", r"找不到視覺編碼器 \1。請用下列指令下載，或用 --vision_model_path 指定："),
    ("tokenizer", "這些權重的 tokenizer 無法確定或不相符，請用 --tokenizer_path 指定。原始訊息："),
    ("is no readable|is refused|corrupt", "權重檔無法讀取：已損壞或不是權重檔，請重新下載或重新訓練。原始訊息："),
    ("", "發生錯誤，原始訊息："),
]

# Streamlit's own words, by what they contain, and in Chinese; page.js puts them in place.
PAGE_WORDS = [
    ("File must be", "檔案超過 20 MB，請存成較小的檔案。"),
    ("Drag and drop", "把圖片拖放到這裡"),
    ("Upload or drag", "附加或拖放圖片"),
    ("Upload files", "附加圖片"),
    ("No results", "沒有符合的項目"),
    ("Select all", "全選"),
    ("Press Enter to apply", "按 Enter 套用"),
    ("Press Ctrl+Enter to apply", "按 Ctrl+Enter 套用"),
    ("Press ⌘+Enter to apply", "按 ⌘+Enter 套用"),
    ("Take Photo", "拍照"),
    ("Clear photo", "清除照片"),
    ("This app would like to use your camera", "這個網頁想使用你的相機"),
    ("Learn how to allow access", "如何允許使用"),
    ("Fullscreen", "全螢幕"),
    ("Download as CSV", "下載 CSV"),
]


class Labels:
    """The labels of one language: `labels("stop")`, with values for those that have places."""

    def __init__(self, language: str):
        self.language, self._column = language, list(LANGUAGES).index(language)

    def __call__(self, key: str, **values) -> str:
        return TEXTS[key][self._column].format(**values)

    def error(self, text: str) -> str:
        """An error as Markdown. File names and commands in it are no Markdown."""
        if self.language == "zh":
            text = in_chinese(text)
        return escape(text).replace("\n", "  \n")

    def describe(self, model: ModelChoice) -> str:
        """What a model is and what it was trained on."""
        key = "untold" if not model.data_path else "demo" if model.is_demo else "trained"
        updates = "?" if model.updates is None else f"{model.updates:,}"
        training = self(key, data=escape(Path(model.data_path).name), updates=updates)
        return self("described", name=escape(model.name), size=model.size) + training

    def install(self) -> None:
        """Styles, and what only a browser can do."""
        st.html(FOLDER / "page.css")
        words = json.dumps(PAGE_WORDS if self.language == "zh" else [])
        script = f"window.pageWords = {words};\n(() => {{ {(FOLDER / 'page.js').read_text()} }})()"
        st.html(f"<script>{script}</script>", unsafe_allow_javascript=True)


def escape(text: str) -> str:
    """Text as itself in Markdown: characters with a meaning there get a backslash."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~$" else c for c in text)


def in_chinese(text: str) -> str:
    """An error in Chinese."""
    found, chinese = next((found, chinese) for pattern, chinese in ERRORS if (found := re.search(pattern, text, re.DOTALL)))
    said = found.expand(chinese)
    return f"{said}\n{text}" if said.endswith("：") else said


def preferred(locale: str | None) -> str:
    """The language to begin with, by the browser's locale."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"
