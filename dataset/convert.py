"""Turns jsonl and images into parquet, and back; other projects' formats into either.

    python -m dataset.convert dataset/sft_data.jsonl --images_path dataset/sft_images --out shards        # to parquet
    python -m dataset.convert "shards/*.parquet" --out back                                               # to jsonl
    python -m dataset.convert --from llava llava.json --images_path coco --out shards   # dataset/foreign.py

Nothing is lost either way: conversations, further fields and the bytes of the images come back as they were, under
their names; --resize alone changes images. Further columns of others' parquet become fields, but for those of bytes. A
sample that training could not use ends the work with its place, or is left out and counted with --skip_bad. Parquet has
the published columns, `conversations` (json text) and `image_bytes` (list of bytes), and one of ours, `more` (json text
of all other fields).
"""

import argparse
import contextlib
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as arrow
import pyarrow.parquet as parquet
from PIL import Image
from tqdm import tqdm

from model.conversation import is_text
from model.errors import DataError, SampleError, UsageError, print_anything, reason
from model.pixels import to_rgb
from model.storage import REPOSITORY, home_for_tilde

from .foreign import FORMATS, TEXT_COLUMNS, detect, to_ours
from .images import ImageSource, load_image, open_images
from .jsonl import parse_images, parse_sample
from .parquet import IMAGE_COLUMNS, find_columns, read_rows, read_schema, row_of
from .sources import find_files, open_file, open_files, split_entries
from .validate import counted

TEXT, BYTES = arrow.string(), arrow.binary()
SCHEMA = arrow.schema({"conversations": TEXT, "image_bytes": arrow.list_(BYTES), "more": TEXT})
COMPRESSION = {"conversations": "zstd", "more": "zstd", "image_bytes.list.element": "none"}  # of images
GROUP_ROWS = 500
Row = tuple[dict, list[bytes]]  # a sample as a line of jsonl has it, and its images
# How many rows a file has; the place of each with what reads it; in parquet of ours the columns of text and images.
Rows = tuple[int, Iterator[tuple[str, Callable[[], Any]]], tuple[str, str | None] | None]


def open_rows(path: Path) -> Rows:
    """The rows of a file; raises DataError."""
    if path.suffix.lower() != ".parquet":
        source = open_file(path)
        return len(source), ((source.where(number), partial(source.row, number)) for number in range(len(source))), None
    schema, count = read_schema(path)
    own = None if detect(dict.fromkeys(schema.names)) else find_columns(path, schema.names)
    known = (*TEXT_COLUMNS, *IMAGE_COLUMNS)
    kept = [name for name in schema.names if name in known or "binary" not in str(schema.field(name).type)]
    if lost := [name for name in schema.names if name not in kept]:
        print(f"notice: {path}: left out are the columns {', '.join(lost)}, which hold bytes", file=sys.stderr)
    return count, read_rows(path, kept, own[:1] if own else TEXT_COLUMNS), own


def read_row(raw: Any, form: str | None, own: tuple[str, str | None] | None, images: ImageSource, where: str) -> Row:
    """A row as a line of jsonl has it, and its images; raises SampleError for what training could not use."""
    row, refs = raw, None  # None: those that the row names
    if form := form or detect(raw):
        row, refs = to_ours(raw, form, where)
    elif own:
        row, refs = row_of(raw, *own)
    sample = parse_sample(row, where, refs)
    for ref in sample.images:
        images.load(ref, where)
    blobs = [ref if isinstance(ref, bytes) else images.read(ref, where) for ref in sample.images]
    names = ()
    with contextlib.suppress(SampleError):  # a column of others, who mean something else
        names = parse_images(row.get("image"))
    if len(names) != len(blobs) or (not blobs and row.get("image")):  # names of some alone, or of a placeholder
        row = {key: value for key, value in row.items() if key != "image"}
        row |= {"image": [name_for(blob) for blob in blobs]} if blobs else {}
    return row, blobs


def name_for(blob: bytes) -> str:
    """A file name from an image's content."""
    kind = (load_image(blob, "of the row").format or "bin").lower()
    return f"{hashlib.blake2b(blob, digest_size=10).hexdigest()}.{'jpg' if kind == 'jpeg' else kind}"


def resized(blob: bytes, size: int) -> bytes:
    """An image whose shorter side is `size` pixels, as the model would see it (upright, RGB), as JPEG; one that is no
    larger stays as it is."""
    image = load_image(blob, "of the row")
    if min(image.size) <= size:
        return blob
    image, file = to_rgb(image), io.BytesIO()
    factor = size / min(image.size)
    shape = tuple(max(1, round(side * factor)) for side in image.size)
    image.resize(shape, Image.Resampling.LANCZOS).save(file, "JPEG", quality=95)
    return file.getvalue()


class ParquetRows:
    """Writes rows to a parquet file, a row group at a time."""

    def __init__(self, file: BinaryIO):
        self._writer = parquet.ParquetWriter(file, SCHEMA, compression=COMPRESSION)
        self._rows: list[dict[str, Any]] = []  # of the next row group

    def add(self, row: dict, blobs: list[bytes]) -> None:
        """One more sample."""
        more = json.dumps({key: value for key, value in row.items() if key != "conversations"}, default=str)
        # Escaped: json can spell halves of characters, which UTF-8 cannot.
        self._rows.append({"conversations": json.dumps(row["conversations"]), "image_bytes": blobs, "more": more})
        if len(self._rows) == GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        self._writer.write_table(arrow.Table.from_pylist(self._rows, SCHEMA))
        self._rows = []

    def close(self) -> None:
        """Writes what is left."""
        self._write_group()
        self._writer.close()


class JsonlRows:
    """Writes rows to a jsonl file, and their images to a folder."""

    def __init__(self, file: BinaryIO, images: Path):
        images.mkdir()
        self._file, self._images = file, images.resolve()

    def add(self, row: dict, blobs: list[bytes]) -> None:
        """One more sample."""
        names = list(parse_images(row.get("image")))
        written = [self._write(name, blob) for name, blob in zip(names, blobs, strict=True)]
        row = row if written == names else row | {"image": written}
        text = json.dumps(row, ensure_ascii=False, default=str)
        self._file.write((text if is_text(text) else json.dumps(row, default=str)).encode() + b"\n")

    def _write(self, name: str, blob: bytes) -> str:
        """Writes an image; its name, which is made of its content where the name leads out of the folder, can be no
        file's, or is that of a different image."""
        try:
            path = (self._images / name).resolve()
            usable = path.is_relative_to(self._images) and (not path.exists() or path.read_bytes() == blob)
        except (OSError, ValueError):  # too long, a NUL, a folder
            usable = False
        if not usable:
            return self._write(name_for(blob), blob)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob)
        return name

    def close(self) -> None:
        """Nothing is left to write."""


def make_folder(out: Path) -> None:
    """Raises DataError unless the folder is new or empty and can be written into."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise DataError(f"--out {out} is not empty; name another folder, or remove what is half done (*.tmp)")
    except OSError as error:
        raise DataError(f"--out {out}: no folder can be written there ({reason(error)}); name another one") from error


def convert(args: argparse.Namespace) -> tuple[int, list[str]]:
    """Rows converted, and what was wrong with those left out. Raises DataError, SampleError, UsageError."""
    paths, images, out = [], open_images(args.images_path), Path(args.out)
    for entry, weight in split_entries(args.data):
        if weight != 1:
            raise DataError(f"{entry}:{weight:g}: a weight means nothing here; everything is converted once")
        paths += find_files(entry)
    to = args.to or ("jsonl" if paths[0].suffix.lower() == ".parquet" and not args.form else "parquet")
    sources = open_files(paths, open_rows)
    make_folder(out)
    try:
        with open(out / "data.tmp", "wb") as file:
            writer = ParquetRows(file) if to == "parquet" else JsonlRows(file, out / "images")
            with contextlib.closing(writer):
                done = write_rows(sources, images, writer, args)
        (out / "data.tmp").replace(out / f"data.{to}")
    except BaseException:  # Ctrl-C as well: what is half done is of no use
        (out / "data.tmp").unlink()
        shutil.rmtree(out / "images", ignore_errors=True)
        raise
    return done


def write_rows(sources: list[Rows], images: ImageSource, writer: ParquetRows | JsonlRows,
               args: argparse.Namespace) -> tuple[int, list[str]]:  # fmt: skip
    """The same, of files that are open."""
    count, skipped = 0, []
    with tqdm(total=sum(rows for rows, *_ in sources), unit="sample", disable=not sys.stderr.isatty()) as bar:
        for where, read, own in ((where, read, own) for _, rows, own in sources for where, read in rows):
            bar.update()
            try:
                row, blobs = read_row(read(), args.form, own, images, where)
                blobs = [resized(blob, args.resize) for blob in blobs] if args.resize else blobs
            except SampleError as error:
                if not args.skip_bad:
                    raise SampleError(error.problem, where) from error
                skipped.append(f"{where}: {error.problem}")
                continue
            writer.add(row, blobs)
            count += 1
    return count, skipped


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 2 when the data cannot be converted or no sample was good, or 130 after Ctrl-C."""
    print_anything()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="what --data_path of training takes, or a file of another format")
    parser.add_argument("--from", dest="form", choices=FORMATS, help="the format, where rows do not show it")
    parser.add_argument("--to", choices=("parquet", "jsonl"), help="parquet, but jsonl for parquet of ours")
    parser.add_argument("--images_path", default=str(REPOSITORY / "dataset" / "sft_images"), help="as for training")
    parser.add_argument("--out", required=True, help="a new or empty folder")
    parser.add_argument("--resize", type=int, help="pixels of the shorter side of larger images, then JPEG")
    parser.add_argument("--skip_bad", action="store_true", help="leave bad samples out")
    args = parser.parse_args(home_for_tilde(argv))
    if args.resize is not None and args.resize < 1:
        parser.error("--resize is greater than 0")
    try:
        count, skipped = convert(args)
    except (DataError, SampleError, UsageError, OSError, arrow.ArrowInvalid) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    left_out = f"; {len(skipped):,} bad left out, the first: {skipped[0]}" if skipped else ""
    print(f"{counted(count, 'sample')} in {args.out}{left_out}")
    return 0 if count else 2


if __name__ == "__main__":
    sys.exit(main())
