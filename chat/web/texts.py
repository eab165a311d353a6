"""Labels and errors of the page, in English and Traditional Chinese."""

import json
import re
from pathlib import Path

import streamlit as st

from chat.markdown import escape

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
    "newer": ("Load the newer weights", "載入較新的權重"),
    "newer_help": ("Training has saved again since these were loaded.", "載入之後，訓練又存了一次。"),
    "answers": ("Answers", "回答"),
    "temperature": ("Temperature", "溫度"),
    "temperature_help": ("0 always takes the likeliest token; higher is more varied.", "0 總是取最可能的 token；越高越多變。"),
    "top_p": ("Top-p", "Top-p"),
    "top_p_help": ("Chooses among the likeliest tokens that together have this probability.", "只在機率總和達到此值的最可能 token 中挑選。"),
    "top_k": ("Top-k", "Top-k"),
    "top_k_help": ("Chooses among this many of the likeliest tokens; 0: no limit.", "只在最可能的這麼多個 token 中挑選；0 表示不限。"),
    "repetition_penalty": ("Repetition penalty", "重複懲罰"),
    "repetition_penalty_help": ("Above 1, tokens that have appeared become less likely.", "大於 1 時，出現過的 token 較不易再出現。"),
    "max_new_tokens": ("Longest answer (tokens)", "回答上限（token）"),
    "max_new_tokens_help": ("The answer ends here at the latest.", "回答最長到此為止。"),
    "seed": ("Seed", "亂數種子"),
    "seed_help": ("The same seed gives the same answer to the same question. Empty: different each time.", "相同的種子對相同的問題給出相同的回答。留空則每次不同。"),
    # Loading
    "no_models": ("There are no weights in {folder} yet. Make some with `make demo`, or fetch published ones:", "{folder} 中還沒有權重。可以用 `make demo` 訓練，或下載已發布的："),
    "loading": ("Loading {model} …", "正在載入 {model}……"),
    "loading_failed": ("{model} cannot be loaded", "無法載入 {model}"),
    "try_again": ("Try again", "再試一次"),
    # The chat
    "welcome": ("Show the model an image, and ask.", "給模型看一張圖片，然後提問。"),
    "attach": ("Attach images with the button in the line below, or drop them there: up to {count} a question, {megabytes} MB and {megapixels} megapixels each.", "用下方輸入列的按鈕附加圖片，或把圖片拖放到那裡：每個問題最多 {count} 張，每張最多 {megabytes} MB、{megapixels} 百萬像素。"),
    "examples": ("Or take an example:", "或選一個範例："),
    "camera": ("Camera", "相機"),
    "camera_closed": ("Browsers give the camera to pages at https:// or on this very machine only. Open the page that way (an ssh tunnel to localhost does), or attach images.", "瀏覽器只允許 https:// 或本機的網頁使用相機。請改用那樣的網址（用 ssh 通道連到 localhost 也行），或改為附加圖片。"),
    "images": ("Images", "圖片"),
    "too_many": ("{count} images are more than a question can show: {most}. The first {most} wait here.", "{count} 張圖片超過一個問題的上限 {most} 張；前 {most} 張已保留在這裡。"),
    "only_images": ("Now ask something about the images.", "現在請針對圖片提問。"),
    "describe_image": ("Describe the image.", "請描述這張圖片。"),
    "remove": ("Remove {name}", "移除 {name}"),
    "more_notices": ("and {count} more", "還有 {count} 則"),
    "question": ("Ask about the images, or anything", "詢問圖片，或任何問題"),
    "thinking": ("Thinking …", "思考中……"),
    "queue": ("Thinking, in turn with {count} others …", "思考中，與另外 {count} 人輪流……"),
    "stop": ("Stop", "停止"),
    "stopped": ("Stopped.", "已停止。"),
    "silent": ("(The model said nothing.)", "（模型沒有說話。）"),
    "dropped": ("The conversation has grown too long for the model: it no longer sees the first {count} more exchanges.", "對話已超過模型能記住的長度：它看不到更早的 {count} 次問答。"),
    "timing": ("{model} · first words after {first:.2f} s, done after {seconds:.2f} s", "{model} · {first:.2f} 秒後開始回答，{seconds:.2f} 秒後完成"),
    "regenerate": ("Regenerate", "重新產生"),
    "edit": ("Edit", "修改"),
    "ask_edited": ("Ask", "提問"),
    "clear": ("Clear", "清除"),
    "download": ("Download", "下載"),
    "conversation": ("A conversation with MiniMind-V", "與 MiniMind-V 的對話"),
    "you": ("You", "你"),
    "assistant": ("Model", "模型"),
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
    "live": ("Live", "即時更新"),
    "live_help": ("Reads the files again every two seconds.", "每兩秒重新讀取檔案。"),
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
    "arguments_differing": ("Only those that differ", "只列出不同的"),
    "arguments_none": ("A run's arguments are known from its first save on.", "訓練第一次存檔後才有參數。"),
    "argument": ("Argument", "參數"),
    "samples": ("Sample answers during training", "訓練期間的範例回答"),
    "samples_none": ("The chosen runs have logged no sample answers.", "所選訓練沒有記錄範例回答。"),
    "sample_reference": ("Reference", "參考答案"),
    "bad_lines": ("{run}: {count} lines of its metrics file cannot be read and are left out.", "{run}：紀錄檔中有 {count} 行無法讀取，已略過。"),
}

# What the page says of a model, put together from what is known.
DESCRIPTION = {
    "size": ("{name}: a decoder of width {width}", "{name}：寬度 {width} 的解碼器"),
    "layers": (" with {layers} layers", "，{layers} 層"),
    "moe": (", mixture of experts", "，混合專家"),
    "demo": (". It was trained on the demo's images of one coloured shape each, so ask for shapes and colours", "。它以示範資料訓練，每張圖片是一個彩色形狀，請詢問形狀與顏色"),
    "trained": (". It was trained on {data}", "。它以 {data} 訓練"),
    "updates": (" ({updates:,} updates).", "（{updates:,} 次更新）。"),
    "unknown": (". No record of its training is stored next to it.", "。它旁邊沒有訓練紀錄。"),
}  # fmt: skip

# Errors in English, by what they contain, and in Chinese.
REASONS = [
    (r"more than ([\d,]+) pixels|pixels, more than ([\d,]+)", r"像素超過上限 \1\2，請存成較小的圖片"),
    ("cut short|truncated|damaged|corrupt", "檔案不完整或已損壞，請重新取得，或開啟後另存新檔"),
    ("a video", "這是影片，不是圖片"),
    ("PDF or PostScript", "這是 PDF 或 PostScript 文件，請將頁面存成 PNG"),
    ("SVG", "這是 SVG 向量圖，請存成 PNG"),
    ("web page", "這是網頁，可能是下載時存到的錯誤頁面"),
    ("git-lfs", "這是 git-lfs 指標檔，不是圖片本身，請執行 git lfs pull"),
    ("text, not an image", "這是文字檔，不是圖片"),
    ("is empty", "檔案是空的"),
    ("pip install (\\S+?),", r"需要另外安裝套件（pip install \1），或存成 JPEG"),
    ("", "不是能辨識的圖片格式，或內容無法解碼"),
]
ERRORS = [
    (r"image '(.*)' has (\d+) MB, more than (\d+)", r"圖片「\1」有 \2 MB，超過上限 \3 MB，請存成較小的檔案。"),
    (r"image '(.*)' cannot be (?:read|converted): (?P<reason>.*)", r"無法讀取圖片「\1」：{reason}。"),
    (r"question is too long: (\d+) tokens, more than (\d+)(?:.*: (\d+) would fit)?", r"問題太長：\1 個 token，超過上限 \2。請縮短問題或減少圖片。"),
    ("not enough memory", "記憶體不足。請減少圖片或回答上限後再問，或清除對話。"),
    ("cannot see", "這個模型載入時沒有視覺編碼器，看不到圖片；請用 --vision_model_path 指定。"),
    ("no vision encoder at (\\S+)", r"找不到視覺編碼器 \1。請用下列指令下載，或用 --vision_model_path 指定："),
    ("tokenizer", "這些權重的 tokenizer 無法確定或不相符，請用 --tokenizer_path 指定。原始訊息："),
    ("(\\S+) is no readable|is refused|is torn|corrupt", "權重檔無法讀取：已損壞或不是權重檔，請重新下載或重新訓練。原始訊息："),
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
        """A sentence or two on what a model is and what it was trained on."""
        def part(key: str, **values) -> str:
            return DESCRIPTION[key][self._column].format(**values)

        said = part("size", name=escape(model.name), width=model.hidden_size or "?")
        said += part("layers", layers=model.layers) * bool(model.layers) + part("moe") * model.is_moe
        if not model.data_path:
            return said + part("unknown")
        said += part("demo") if model.is_demo else part("trained", data=escape(Path(model.data_path).name))
        return said + (part("updates", updates=model.updates) if model.updates else ".")

    def install(self) -> None:
        """Styles, and what only a browser can do."""
        st.html(FOLDER / "page.css")
        words = json.dumps(PAGE_WORDS if self.language == "zh" else [])
        script = f"window.pageWords = {words};\n(() => {{ {(FOLDER / 'page.js').read_text()} }})()"
        st.html(f"<script>{script}</script>", unsafe_allow_javascript=True)


def in_chinese(text: str) -> str:
    """An error in Chinese; of one that is not known, a sentence that something failed, and the error as it is."""
    for pattern, chinese in ERRORS:
        if found := re.search(pattern, text, re.DOTALL):
            said = found.expand(chinese)
            if "{reason}" in said:
                reason, words = next((re.search(key, found["reason"]), words) for key, words in REASONS if re.search(key, found["reason"]))
                said = said.replace("{reason}", reason.expand(words))
            return f"{said}\n{text}" if said.endswith("：") else said
    return f"發生錯誤，原始訊息：\n{text}"


def preferred(locale: str | None) -> str:
    """The language to begin with, by the browser's locale."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"
