"""Turns jsonl and pictures into parquet shards, and back.

    python -m dataset.convert dataset/sft_data.jsonl --images_path dataset/sft_images --out shards        # to parquet
    python -m dataset.convert "shards/*.parquet" --out back                                               # to jsonl

Nothing is lost either way: conversations, further fields and the bytes of the pictures come back as they were, under their
names; --resize alone changes pictures. A column of foreign parquet that jsonl has no place for ends the work. A sample that
training could not use ends the work with its place, or is left out and counted with --skip_bad. Parquet has the published columns, `conversations` (json text) and `image_bytes` (list of
bytes), and two of ours, `image` (names) and `more` (further fields, json text).
"""

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
from PIL import Image
from tqdm import tqdm

from model.storage import write_temporary
from model.vision import to_rgb

from .conversation import is_text, parse_images, parse_sample
from .errors import DataError, SampleError, reason, shown
from .jsonl import JsonlSamples, parse_json
from .parquet import check_columns, picture_bytes, shows_pictures
from .pictures import ImageSource, load_picture, open_images
from .sources import find_files, open_file, split_entries
from .validate import REPOSITORY, counted

SCHEMA = arrow.schema({"conversations": arrow.string(), "image_bytes": arrow.list_(arrow.binary()),
                       "image": arrow.list_(arrow.string()), "more": arrow.string()})  # fmt: skip
GROUP_BYTES, SHARD_BYTES = 32 * 2**20, 512 * 2**20  # of pictures, of a row group and of a file at most
Row = tuple[dict, list[bytes]]  # a sample as a line of jsonl has it, and its pictures


def rows_of_jsonl(source: JsonlSamples, images: ImageSource, skip_bad: list[str] | None) -> Iterator[Row]:
    """All samples of a jsonl file with their pictures; bad ones raise SampleError or are noted in `skip_bad`."""
    for index in range(len(source)):
        where = source.where(index)
        try:
            row = source.row(index)
            sample = parse_sample(row, where)
            for name in sample.images:
                images.load(name, where)
            yield row, [images.read(name, where) for name in sample.images]
        except SampleError as error:
            note(error, skip_bad)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Arrow's errors with the name of the file that they are about, as DataError."""
    try:
        yield
    except (arrow.ArrowInvalid, OSError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def count_rows(path: Path) -> int:
    """Samples of a parquet file; raises DataError."""
    with named(path):
        return parquet.read_metadata(path).num_rows


def rows_of_parquet(path: Path, skip_bad: list[str] | None) -> Iterator[Row]:
    """All samples of a parquet file; a picture without a name is called by its content. Raises DataError for a damaged file."""
    with named(path), parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:  # row groups are not held as a whole
        check_columns(path, file.schema_arrow)
        cells = (batch.slice(number, 1) for batch in file.iter_batches(batch_size=256) for number in range(len(batch)))
        for number, record in enumerate(cells, start=1):
            where = f"{path}:{number}"
            try:
                yield row_of_cells(decoded(record, where), where)
            except SampleError as error:
                note(error, skip_bad)


def row_of_cells(cell: dict[str, Any], where: str) -> Row:
    """One row of parquet, checked; raises SampleError."""
    conversations, pictures = cell.pop("conversations"), cell.pop("image_bytes", None)
    row = {"conversations": parse_json(conversations, where) if isinstance(conversations, str) else conversations}
    blobs = list(picture_bytes(pictures, where)) if shows_pictures(row["conversations"]) else []  # else a placeholder
    parse_sample(row, where, tuple(blobs))
    for blob in blobs:
        load_picture(io.BytesIO(blob), "of the row", where)
    image, text = cell.pop("image", None), cell.pop("more", None) or "{}"
    more = parse_json(text, where) if isinstance(text, str) else None
    if cell or not isinstance(more, dict) or "conversations" in more:
        raise SampleError(f"columns that jsonl has no place for: {', '.join(cell) or 'more'}", where)
    names = parse_images(image or more.get("image") or None, where) or names_inside(pictures, blobs)
    if len(names) != len(blobs):
        raise SampleError(f"{len(names)} names for {len(blobs)} pictures", where)
    if "image" in more and parse_images(more["image"], where) != names:
        raise SampleError(f"'more' calls the pictures {shown(more['image'])}, the row {shown(list(names))}", where)
    return row | ({"image": spelled(names)} if names else {}) | more, blobs


def spelled(names: tuple[str, ...]) -> str | list[str]:
    """The field `image`, as names that come back are written."""
    return list(names) if len(names) > 1 or "," in names[0] else names[0]


def names_inside(pictures: Any, blobs: list[bytes]) -> tuple[str, ...]:
    """Names of pictures from the field `path` that the datasets library writes beside `bytes`, or else from their content."""
    cells = [cell for cell in (pictures if isinstance(pictures, list) else [pictures]) if isinstance(cell, dict) and cell.get("bytes")]
    paths = [cell.get("path") for cell in cells] or [None] * len(blobs)
    return tuple(path or name_for(blob) for path, blob in zip(paths, blobs, strict=False))


def decoded(record: arrow.RecordBatch, where: str) -> dict[str, Any]:
    """The cells of one row by column; raises SampleError for text that is none."""
    try:
        return record.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise SampleError(f"not UTF-8 text ({error.reason} at byte {error.start})", where) from error


def note(error: SampleError, skip_bad: list[str] | None) -> None:
    """Remembers a bad sample, or raises it."""
    if skip_bad is None:
        raise error
    skip_bad.append(str(error))


def name_for(blob: bytes) -> str:
    """A file name from a picture's content."""
    kind = (Image.open(io.BytesIO(blob)).format or "bin").lower()
    return f"{hashlib.blake2b(blob, digest_size=10).hexdigest()}.{'jpg' if kind == 'jpeg' else kind}"


def resized(blob: bytes, size: int) -> bytes:
    """A picture whose shorter side is `size` pixels, as the model would see it (upright, RGB), as JPEG; one that is no larger
    stays as it is."""
    picture = Image.open(io.BytesIO(blob))
    if min(picture.size) <= size:
        return blob
    picture, file = to_rgb(picture), io.BytesIO()
    factor = size / min(picture.size)
    shape = tuple(max(1, round(side * factor)) for side in picture.size)
    picture.resize(shape, Image.Resampling.LANCZOS).save(file, "JPEG", quality=95)
    return file.getvalue()


class ParquetShards:
    """Writes rows to out/00000.parquet and on, a row group at a time; a file appears when it is whole."""

    # Picture files do not shrink any further.
    COMPRESSION = {"conversations": "zstd", "image": "zstd", "more": "zstd", "image_bytes.list.element": "none"}

    def __init__(self, out: Path, shard_rows: int, group_rows: int):
        self.out, self.shard_rows, self.group_rows, self.shards = out, shard_rows, group_rows, 0
        self._writer: parquet.ParquetWriter | None = None
        self._rows: list[dict[str, Any]] = []  # of the next row group
        self._bytes = self._shard_count = self._shard_bytes = 0  # of the next row group's pictures; of the file so far

    def add(self, row: dict, blobs: list[bytes]) -> None:
        """One more sample."""
        more = {key: value for key, value in row.items() if key not in ("conversations", "image")}
        names = parse_images(row.get("image"))
        if "image" in row and not (names and row["image"] == spelled(names)):
            more["image"] = row["image"]  # "a.jpg, b.jpg", null
        # Escaped: json can spell halves of characters, which UTF-8 cannot.
        self._rows.append({"conversations": json.dumps(row["conversations"]), "image_bytes": blobs, "image": list(names),
                           "more": json.dumps(more)})  # fmt: skip
        self._bytes += sum(map(len, blobs))
        full = self._shard_count + len(self._rows) >= self.shard_rows or self._shard_bytes + self._bytes > SHARD_BYTES
        if full or len(self._rows) >= self.group_rows or self._bytes > GROUP_BYTES:
            self._write_group()
        if full:
            self.close()

    def _write_group(self) -> None:
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self.out / f"{self.shards:05}.tmp", SCHEMA, compression=self.COMPRESSION)
        self._writer.write_table(arrow.Table.from_pylist(self._rows, SCHEMA), row_group_size=len(self._rows))
        self._shard_count, self._shard_bytes = self._shard_count + len(self._rows), self._shard_bytes + self._bytes
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        """Ends the file at hand with what is left."""
        if self._rows:
            self._write_group()
        if self._writer is not None:
            self._writer.close()
            (self.out / f"{self.shards:05}.tmp").replace(self.out / f"{self.shards:05}.parquet")
            self._writer, self.shards, self._shard_count, self._shard_bytes = None, self.shards + 1, 0, 0


class JsonlFolder:
    """Writes rows to out/data.jsonl, which appears when it is whole, and pictures to out/images."""

    def __init__(self, out: Path):
        self.out, self.images = out, out / "images"
        self.images.mkdir(exist_ok=True)
        self._file = open(out / "data.tmp", "w", encoding="utf-8")  # noqa: SIM115  (closed in close)

    def add(self, row: dict, blobs: list[bytes]) -> None:
        """One more sample; raises DataError for two different pictures of one name, and for a name that leads out of the folder."""
        for name, blob in zip(parse_images(row.get("image")), blobs, strict=True):
            try:
                path = (self.images / name).resolve()
                there = path.exists()
            except (OSError, ValueError) as error:  # too long, a NUL
                raise DataError(f"picture {shown(name)} is no file name: {reason(error)}") from error
            if not path.is_relative_to(self.images.resolve()):
                raise DataError(f"picture {shown(name)} leads out of {self.images}")
            if there:
                if path.read_bytes() != blob:
                    raise DataError(f"two different pictures are called {shown(name)}: convert the files into folders of their own")
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(blob)
        text = json.dumps(row, ensure_ascii=False)
        self._file.write((text if is_text(text) else json.dumps(row)) + "\n")

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


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """A new or empty folder that no second conversion writes into; raises DataError."""
    with contextlib.ExitStack() as held:
        try:
            out.mkdir(parents=True, exist_ok=True)
            folder = os.open(out, os.O_RDONLY)
            held.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if any(out.iterdir()):
                raise DataError(f"--out {out} is not empty" + (", it holds what a conversion left half done (*.tmp): remove it, or name another folder" if list(out.glob("*.tmp")) else ""))
            write_temporary(out / "probe", lambda file: None).unlink()
        except BlockingIOError as error:
            raise DataError(f"another conversion writes into --out {out}") from error
        except OSError as error:
            raise DataError(f"--out {out}: no folder can be written there ({reason(error)}); name another one, new or empty") from error
        yield


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 2 when the data cannot be converted, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="what --data_path of training takes: jsonl is turned into parquet, parquet into jsonl")
    parser.add_argument("--images_path", default=str(REPOSITORY / "dataset" / "sft_images"), help="as for training; for jsonl alone")
    parser.add_argument("--out", required=True, help="a new or empty folder")
    parser.add_argument("--shard_rows", type=int, default=20_000, help="samples of a parquet file")
    parser.add_argument("--group_rows", type=int, default=500, help="samples of a row group")
    parser.add_argument("--resize", type=int, help="pixels of the shorter side; larger pictures are made smaller, as JPEG")
    parser.add_argument("--skip_bad", action="store_true", help="leave bad samples out")
    args = parser.parse_args(argv)
    if min(args.shard_rows, args.group_rows, 1 if args.resize is None else args.resize) < 1:
        parser.error("--shard_rows, --group_rows and --resize are greater than 0")
    out, skipped, count = Path(args.out), [] if args.skip_bad else None, 0
    try:
        paths, images = files_of(args.data), open_images(args.images_path)
        to_parquet = paths[0].suffix.lower() != ".parquet"
        sources = [open_file(path) for path in paths] if to_parquet else paths
        total = sum(len(source) if to_parquet else count_rows(source) for source in sources)
        with claimed(out), tqdm(total=total, unit="sample", disable=not sys.stderr.isatty()) as bar:
            writer = ParquetShards(out, args.shard_rows, args.group_rows) if to_parquet else JsonlFolder(out)
            for source in sources:
                rows = rows_of_jsonl(source, images, skipped) if to_parquet else rows_of_parquet(source, skipped)
                for row, blobs in rows:
                    writer.add(row, [resized(blob, args.resize) for blob in blobs] if args.resize else blobs)
                    count += 1
                    bar.update()
            writer.close()
    except (DataError, SampleError, OSError, arrow.ArrowInvalid) as error:
        print(f"error: {error}" + (f"\n(what is in {out} is not all)" if count else ""), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; what is in {out} is not all", file=sys.stderr)
        return 130
    print(f"{counted(count, 'sample')} in {out}" + (f"; {len(skipped):,} bad left out, the first: {skipped[0]}" if skipped else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
