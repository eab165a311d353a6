"""Labels of the page, in English and Traditional Chinese. Errors stay in English: people search for them."""

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
    "loading_libraries": ("Loading {model}: libraries, {seconds:.0f} s …", "正在載入 {model}：程式庫，{seconds:.0f} 秒……"),
    "loading_weights": ("Loading {model}: weights, {seconds:.0f} s …", "正在載入 {model}：權重，{seconds:.0f} 秒……"),
    "ask_meanwhile": ("You can ask already.", "現在就可以提問。"),
    "loading_failed": ("{model} cannot be loaded", "無法載入 {model}"),
    "try_again": ("Try again", "再試一次"),
    # The chat
    "welcome": ("Show the model a picture, and ask.", "給模型看一張圖片，然後提問。"),
    "upload": ("Drop pictures here", "把圖片拖放到這裡"),
    "upload_help": ("Up to {count} pictures a question, {megabytes} MB and {megapixels} megapixels each.", "每個問題最多 {count} 張圖片，每張最多 {megabytes} MB、{megapixels} 百萬像素。"),
    "examples": ("Or take an example:", "或選一個範例："),
    "camera": ("Camera", "相機"),
    "camera_closed": ("Browsers give the camera to pages at https:// or on this very machine only. Open the page that way (an ssh tunnel to localhost does), or drop pictures.", "瀏覽器只允許 https:// 或本機的網頁使用相機。請改用那樣的網址（用 ssh 通道連到 localhost 也行），或直接拖放圖片。"),
    "pictures": ("Pictures", "圖片"),
    "remove": ("Remove {name}", "移除 {name}"),
    "lost": ("A picture was lost on its way here. Drop it again.", "有一張圖片在傳送途中遺失了，請再拖放一次。"),
    "more_notices": ("and {count} more", "還有 {count} 則"),
    "question": ("Ask about the pictures, or anything", "詢問圖片，或任何問題"),
    "only_pictures": ("Now ask something about it.", "現在請提問。"),
    "thinking": ("Thinking …", "思考中……"),
    "queue": ("Thinking, in turn with {count} others …", "思考中，與另外 {count} 位輪流……"),
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
    "look_help": ("Attention from each token of the answer to the 14 x 14 patches of the picture, mean of all layers and heads.", "回答中每個 token 對圖片 14 x 14 個圖塊的注意力，所有層與頭的平均。"),
    "look_wait": ("Looking …", "查看中……"),
    "look_token": ("Token of the answer", "回答中的 token"),
    "look_all": ("all", "全部"),
    "look_share": ("{share:.0%} of its attention fell on the pictures, the rest on the text.", "注意力有 {share:.0%} 落在圖片上，其餘在文字上。"),
    # Training
    "no_runs": ("No runs in {folder} yet. A training run writes its figures there from its first log line on.", "{folder} 中還沒有訓練紀錄。訓練從第一行紀錄起就會把數據寫在那裡。"),
    "runs": ("Runs", "訓練紀錄"),
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
    "arguments_same": ("The chosen runs have the same arguments.", "所選訓練的參數都相同。"),
    "argument": ("Argument", "參數"),
    "samples": ("Sample answers during training", "訓練期間的範例回答"),
    "samples_none": ("The chosen runs have logged no sample answers.", "所選訓練沒有記錄範例回答。"),
    "sample_image": ("Picture", "圖片"),
    "sample_question": ("Question", "問題"),
    "sample_answer": ("Answer", "回答"),
    "sample_reference": ("Reference", "參考答案"),
    "bad_lines": ("{run}: {count} lines of its metrics file cannot be read and are left out.", "{run}：紀錄檔中有 {count} 行無法讀取，已略過。"),
}


class Labels:
    """The labels of one language: `labels("stop")`, with values for those that have places."""

    def __init__(self, language: str):
        self._column = list(LANGUAGES).index(language)

    def __call__(self, key: str, **values) -> str:
        return TEXTS[key][self._column].format(**values)


def preferred(locale: str | None) -> str:
    """The language to begin with, by the browser's locale."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"
