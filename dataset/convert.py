"""Turns jsonl and images into parquet shards, and back; other projects' formats into either.

    python -m dataset.convert dataset/sft_data.jsonl --images_path dataset/sft_images --out shards        # to parquet
    python -m dataset.convert "shards/*.parquet" --out back                                               # to jsonl
    python -m dataset.convert --from llava llava.json --images_path coco --out shards                     # dataset/foreign.py

Nothing is lost either way: conversations, further fields and the bytes of the images come back as they were, under their
names; --resize alone changes images. Further columns of others' parquet become fields, but for those of bytes. A sample that
training could not use ends the work with its place, or is left out and counted with --skip_bad. Parquet has the published
columns, `conversations` (json text) and `image_bytes` (list of bytes), and one of ours, `more` (all other fields, json text).
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
from PIL import Image
from tqdm import tqdm

from model.conversation import is_text
from model.errors import DataError, SampleError, UsageError, print_anything, reason
from model.storage import REPOSITORY, home_for_tilde
from model.vision import to_rgb

from .foreign import FORMATS, TEXT_COLUMNS, detect, to_ours
from .images import ImageSource, load_image, open_images
from .jsonl import parse_images, parse_sample
from .parquet import IMAGE_COLUMNS, cells_of, find_columns, read_batches, read_schema, row_of
from .sources import find_files, open_file, open_files, split_entries
from .validate import counted

SCHEMA = arrow.schema({"conversations": arrow.string(), "image_bytes": arrow.list_(arrow.binary()),
                       "more": arrow.string()})  # fmt: skip
GROUP_ROWS = 500
Row = tuple[dict, list[bytes]]  # a sample as a line of jsonl has it, and its images


def open_rows(path: Path) -> tuple[int, Iterator[tuple[str, Callable[[], Any]]], tuple[str, str | None] | None]:
    """How many rows a file has; the place of each with what reads it; in parquet of ours the columns of text and images."""
    if path.suffix.lower() != ".parquet":
        source = open_file(path)
        return len(source), ((source.where(number), partial(source.row, number)) for number in range(len(source))), None
    schema, count = read_schema(path)
    own = None if detect(dict.fromkeys(schema.names)) else find_columns(path, schema.names)
    kept = [name for name in schema.names if name in (*TEXT_COLUMNS, *IMAGE_COLUMNS) or "binary" not in str(schema.field(name).type)]
    if lost := [name for name in schema.names if name not in kept]:
        print(f"notice: {path}: left out are the columns {', '.join(lost)}, which hold bytes", file=sys.stderr)
    rows = ((batch, number, f"{path}:{first + number + 1}") for batch, first in read_batches(path, kept) for number in range(len(batch)))
    return count, ((row[2], partial(cells_of, *row, texts=own[:1] if own else TEXT_COLUMNS)) for row in rows), own


def read_row(raw: Any, form: str | None, own: tuple[str, str | None] | None, images: ImageSource, where: str) -> Row:
    """A row as a line of jsonl has it, and its images; raises SampleError for what training could not use."""
    row, refs = raw, None  # None: those that the row names
    if form := form or detect(raw):
        row, refs = to_ours(raw, form, where)
    elif own:
        row, refs = row_of(raw, *own, where)
    sample = parse_sample(row, where, refs)
    for ref in sample.images:
        images.load(ref, where)
    blobs = [ref if isinstance(ref, bytes) else images.read(ref, where) for ref in sample.images]
    names = None
    with contextlib.suppress(SampleError):  # a column of others, who mean something else
        names = parse_images(row.get("image"))
    if names is None or len(names) != len(blobs):  # names of some alone, or of a placeholder
        row = {key: value for key, value in row.items() if key != "image"} | ({"image": [name_for(blob) for blob in blobs]} if blobs else {})
    return row, blobs


def name_for(blob: bytes) -> str:
    """A file name from an image's content."""
    kind = (load_image(blob, "of the row").format or "bin").lower()
    return f"{hashlib.blake2b(blob, digest_size=10).hexdigest()}.{'jpg' if kind == 'jpeg' else kind}"


def resized(blob: bytes, size: int) -> bytes:
    """An image whose shorter side is `size` pixels, as the model would see it (upright, RGB), as JPEG; one that is no larger
    stays as it is."""
    image = load_image(blob, "of the row")
    if min(image.size) <= size:
        return blob
    image, file = to_rgb(image), io.BytesIO()
    factor = size / min(image.size)
    shape = tuple(max(1, round(side * factor)) for side in image.size)
    image.resize(shape, Image.Resampling.LANCZOS).save(file, "JPEG", quality=95)
    return file.getvalue()


class ParquetShards:
    """Writes rows to out/00000.parquet and on, a row group at a time; a file appears when it is whole."""

    # Image files do not shrink any further.
    COMPRESSION = {"conversations": "zstd", "more": "zstd", "image_bytes.list.element": "none"}

    def __init__(self, out: Path, shard_rows: int):
        self.out, self.shard_rows, self.count = out, shard_rows, 0
        self._writer: parquet.ParquetWriter | None = None
        self._rows: list[dict[str, Any]] = []  # of the next row group

    def add(self, row: dict, blobs: list[bytes]) -> None:
        """One more sample."""
        more = {key: value for key, value in row.items() if key != "conversations"}
        # Escaped: json can spell halves of characters, which UTF-8 cannot.
        self._rows.append({"conversations": json.dumps(row["conversations"]), "image_bytes": blobs, "more": json.dumps(more, default=str)})
        self.count += 1
        if self.count % self.shard_rows == 0:
            self.close()
        elif len(self._rows) == GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        if self._writer is None:
            self._path = self.out / f"{(self.count - 1) // self.shard_rows:05}.tmp"
            self._file = self._path.open("wb")  # Arrow would take the path for UTF-8
            self._writer = parquet.ParquetWriter(self._file, SCHEMA, compression=self.COMPRESSION)
        self._writer.write_table(arrow.Table.from_pylist(self._rows, SCHEMA))
        self._rows = []

    def close(self) -> None:
        """Ends the file at hand with what is left."""
        if self._rows:
            self._write_group()
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            self._path.replace(self._path.with_suffix(".parquet"))
            self._writer = None


class JsonlFolder:
    """Writes rows to out/data.jsonl, which appears when it is whole, and images to out/images."""

    def __init__(self, out: Path):
        self.out, self.images = out, out / "images"
        self.images.mkdir(exist_ok=True)
        self._file = open(out / "data.tmp", "w", encoding="utf-8")  # noqa: SIM115  (closed in close)

    def add(self, row: dict, blobs: list[bytes]) -> None:
        """One more sample."""
        names = list(parse_images(row.get("image")))
        written = [self._write(name, blob) for name, blob in zip(names, blobs, strict=True)]
        row = row if written == names else row | {"image": written}
        text = json.dumps(row, ensure_ascii=False, default=str)
        self._file.write((text if is_text(text) else json.dumps(row, default=str)) + "\n")

    def _write(self, name: str, blob: bytes) -> str:
        """Writes an image; its name, which is made of its content where the name leads out of the folder, can be no file's, or
        is that of a different image."""
        try:
            path = (self.images / name).resolve()
            there = path.exists()
        except (OSError, ValueError):  # too long, a NUL
            return self._write(name_for(blob), blob)
        if not path.is_relative_to(self.images.resolve()) or path.is_dir() or (there and path.read_bytes() != blob):
            return self._write(name_for(blob), blob)
        if there:
            return name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob)
        return name

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()
        (self.out / "data.tmp").replace(self.out / "data.jsonl")


def files_of(entries: str) -> list[Path]:
    """What there is to convert, all of one format; raises DataError."""
    paths: dict[str, Path] = {}
    for entry, weight in split_entries(entries):
        if weight != 1:
            raise DataError(f"{entry}:{weight:g}: a weight means nothing here; everything is converted once")
        paths |= {os.path.realpath(path): path for path in find_files(entry)}
    if len({path.suffix.lower() == ".parquet" for path in paths.values()}) > 1:
        raise DataError("jsonl and parquet at once: convert one after the other")
    return list(paths.values())


def make_folder(out: Path) -> None:
    """Raises DataError unless the folder is new or empty and can be written into."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise DataError(f"--out {out} is not empty; name another folder, or remove what a conversion left half done (*.tmp)")
    except OSError as error:
        raise DataError(f"--out {out}: no folder can be written there ({reason(error)}); name another one, new or empty") from error


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 2 when the data cannot be converted or no sample was good, or 130 after Ctrl-C."""
    print_anything()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="what --data_path of training takes, or a file of another format")
    parser.add_argument("--from", dest="form", choices=FORMATS, help="the format, where rows do not show it (dataset/foreign.py)")
    parser.add_argument("--to", choices=("parquet", "jsonl"), help="parquet, but jsonl for parquet of ours")
    parser.add_argument("--images_path", default=str(REPOSITORY / "dataset" / "sft_images"), help="as for training")
    parser.add_argument("--out", required=True, help="a new or empty folder")
    parser.add_argument("--shard_rows", type=int, default=20_000, help="samples of a parquet file")
    parser.add_argument("--resize", type=int, help="pixels of the shorter side; larger images are made smaller, as JPEG")
    parser.add_argument("--skip_bad", action="store_true", help="leave bad samples out")
    args = parser.parse_args(home_for_tilde(argv))
    if min(args.shard_rows, 1 if args.resize is None else args.resize) < 1:
        parser.error("--shard_rows and --resize are greater than 0")
    out, skipped, count = Path(args.out), [], 0
    try:
        paths, images = files_of(args.data), open_images(args.images_path)
        to = args.to or ("jsonl" if paths[0].suffix.lower() == ".parquet" and not args.form else "parquet")
        sources = open_files(paths, open_rows)
        make_folder(out)
        with tqdm(total=sum(rows for rows, *_ in sources), unit="sample", disable=not sys.stderr.isatty()) as bar:
            writer = ParquetShards(out, args.shard_rows) if to == "parquet" else JsonlFolder(out)
            for where, read, own in ((where, read, own) for _, rows, own in sources for where, read in rows):
                bar.update()
                try:
                    row, blobs = read_row(read(), args.form, own, images, where)
                    blobs = [resized(blob, args.resize) for blob in blobs] if args.resize else blobs
                except SampleError as error:
                    if not args.skip_bad:
                        raise
                    skipped.append(str(error))
                    continue
                writer.add(row, blobs)
                count += 1
            writer.close()
    except (DataError, SampleError, UsageError, OSError, arrow.ArrowInvalid) as error:
        print(f"error: {error}" + (f"\n(what is in {out} is not all)" if count else ""), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; what is in {out} is not all", file=sys.stderr)
        return 130
    print(f"{counted(count, 'sample')} in {out}" + (f"; {len(skipped):,} bad left out, the first: {skipped[0]}" if skipped else ""))
    return 0 if count else 2


if __name__ == "__main__":
    sys.exit(main())
