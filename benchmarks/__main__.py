"""How fast this repository is on this machine, next to a baseline: the textbook code of docs/minimal_vlm.py.

    python -m benchmarks                                     # all suites: train, inference, data
    python -m benchmarks train --json out/benchmark.json     # one suite; its figures as json
    python -m benchmarks --rows sft_cached,decode_single     # chosen rows
    python -m benchmarks train --against ../older-clone      # the same rows of another clone, in turns with this one

Decoder 512x8, a vision encoder of ViT-B/16's shape, random weights, synthetic data of the published data's lengths.
Who is compared takes turns, so that a machine that slows down slows all; figures are medians over the turns.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from model.device import default_device
from model.errors import UsageError, print_anything
from model.outputs import check_output
from model.storage import home_for_tilde

from . import data, gpu, inference, train
from .synthetic import FULL, TINY

SUITES = {"train": train, "inference": inference, "data": data, "gpu": gpu}
DEFAULT = ("train", "inference", "data")


def parse_flags() -> argparse.Namespace:
    """The rows to measure and where the figures go. Ends the process with code 2 for bad flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for suite in SUITES.values() for name in suite.ROWS]
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)}; default: all but gpu")
    parser.add_argument("--rows", help=f"rows to measure, with commas between: {', '.join(names)}; default: all of the suites")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant (default: %(default)s)")
    parser.add_argument("--alone", action="store_true", help="train: without the baseline, which takes most of the time")
    parser.add_argument("--against", type=Path, help="another clone of this repository, whose training scripts take part")
    parser.add_argument("--minutes", type=float, default=8.0, help="gpu: no row begins after them (default: %(default)g)")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters: tries the program, measures nothing")
    args = parser.parse_args(home_for_tilde())
    chosen = [name for suite in args.suites or DEFAULT if suite in SUITES for name in SUITES[suite].ROWS]
    args.rows = args.rows.split(",") if args.rows else chosen
    if unknown := [name for name in args.suites if name not in SUITES] + [name for name in args.rows if name not in chosen]:
        parser.error(f"no suite or row of it: {', '.join(unknown)}; see --help")
    try:
        if args.json:
            check_output("--json", args.json)
    except UsageError as error:
        parser.error(str(error))
    return args


def main() -> int:
    """Measures, prints and writes the rows, suite by suite."""
    print_anything()
    args, rows = parse_flags(), []
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        for suite in SUITES.values():
            wanted = [name for name in suite.ROWS if name in args.rows]
            for row in suite.measure(wanted, Path(folder), TINY if args.tiny else FULL, args) if wanted else []:
                rows.append(row)
                print(f"{row['name']:22}", *(f"{key} {value:.4g}" for key, value in row.items() if key != "name"), sep="  ", flush=True)
                if args.json:
                    args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
