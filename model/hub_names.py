"""What names on a hub stand for, fetched into the cache of huggingface_hub by its rules: HF_ENDPOINT names a mirror,
HF_HUB_OFFLINE=1 takes what is in the cache, HF_HOME moves it, `hf auth login` opens what is not public.

Of weights, safetensors alone are taken: no pickles and no code, and nothing is executed.
"""

import functools
import glob
import os
import re
import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfUriError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import HfUri, enable_progress_bars, parse_hf_uri

from .errors import UsageError, first_line

# org/name or org/name@revision
HUB_NAME = re.compile(r"(?![^@]*(--|\.\.|\.git\b))\w([\w.-]*\w)?/\w([\w.-]{,94}\w)?(@(refs/(pr|convert)/)?[\w.%-]+)?", re.ASCII)
TEXTS, WEIGHTS = ("*.json", "*.jinja"), ("model*.safetensors", "vision_model/model*.safetensors")
REASONS = {
    GatedRepoError: "access is granted to each user: ask for it on the repository's page, then log in (hf auth login)",
    RepositoryNotFoundError: "there is no such repository, or it is private: check the name, or log in (hf auth login)",
    RevisionNotFoundError: "there is no such revision: check what follows the @",
}
OTHERWISE = (f"nor is all of it in the cache, {constants.HF_HUB_CACHE}. Check network and disk, name a mirror by HF_ENDPOINT, or fetch"
             " it on another machine (hf download) and give its path")  # fmt: skip


@functools.cache
def fetch(uri: HfUri, allowed: tuple[str, ...], ignored: str | None, failed: str) -> tuple[str, str]:
    """The folder of the cache that holds a repository's files of these patterns, and why the hub was not asked, if so: what it
    does not give now is taken if it is there from before. Raises UsageError, which begins with `failed`."""
    repository = {"repo_id": uri.id, "repo_type": uri.type, "revision": uri.revision}
    refusal = None
    try:  # first, for snapshot_download waits for ever where the network swallows what is sent
        commit = HfApi().repo_info(**repository, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT).sha
        print(f"{uri.id}: from {constants.ENDPOINT}, commit {commit}", file=sys.stderr)
    except Exception as error:  # of network, proxy and hub, which share no base class
        refusal = error
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        enable_progress_bars()  # which transformers' own switch turns off as well
    try:
        folder = snapshot_download(
            **repository, allow_patterns=[*allowed], ignore_patterns=ignored, local_files_only=refusal is not None
        )
        return folder, "" if refusal is None else f"{failed} {constants.ENDPOINT}: {first_line(refusal)}; {OTHERWISE}"
    except Exception as error:
        cause = refusal or error
        reason = next((text for kind, text in REASONS.items() if isinstance(cause, kind)), f"{first_line(cause)}; {OTHERWISE}")
        raise UsageError(f"{failed} {constants.ENDPOINT}: {reason}") from error


def is_hub_name(path: str | Path) -> bool:
    """Whether that means a repository on a hub: it has the form, and no file or folder has that name."""
    return bool(HUB_NAME.fullmatch(path if isinstance(path, str) else path.as_posix())) and not os.path.lexists(path)


def folder_of(path: str | Path, weights: bool = True) -> Path:
    """The folder at `path`; of a repository on a hub the fetched one, with json, templates and, if wanted, weights. Raises
    UsageError."""
    if not is_hub_name(path):
        return Path(path)
    name = Path(path).as_posix()
    failed = f"{name}: no file or folder of that name in {os.getcwd()}, and no repository could be fetched from"
    folder, refusal = fetch(parse_hf_uri(f"hf://models/{name}"), (*TEXTS, *WEIGHTS) if weights else TEXTS, None, failed)
    folder = Path(folder)
    if weights and not any(folder.glob(WEIGHTS[0])):
        raise UsageError(
            refusal or f"{name} on {constants.ENDPOINT} has no model.safetensors, and pickles are not fetched by name. Often a pull"
            f" request of the repository has it: {name.partition('@')[0]}@refs/pr/1, with its number. Or name a folder:\n"
            f"    hf download {name.partition('@')[0]} --local-dir FOLDER"
        )
    return folder


def fetch_data(entry: str) -> str:
    """The path, in the cache, of what "hf://datasets/org/name/path" or "hf://datasets/org/name@revision/path" names: a file, a
    folder ("data/") or a pattern. Raises UsageError."""
    try:
        uri = parse_hf_uri(entry)
        if uri.type != "dataset" or not uri.path_in_repo:
            raise HfUriError(entry, "It names no file of a data set.")
    except HfUriError as error:
        raise UsageError(f"{error} Data are named hf://datasets/ORG/NAME/FILE or hf://datasets/ORG/NAME@REVISION/FILE, where"
                         " FILE may be a pattern (*.parquet)") from error  # fmt: skip
    deeper = None if "**" in uri.path_in_repo else "*/" * (uri.path_in_repo.count("/") + 1) + "*"  # for the hub, * means / too
    wanted = (uri.path_in_repo, uri.path_in_repo.replace("**/", ""))  # ** may mean no folder at all
    folder, refusal = fetch(uri, wanted, deeper, f"{entry} cannot be fetched from")
    path = os.path.join(folder, uri.path_in_repo)
    if not os.path.exists(path) and not glob.glob(path := os.path.join(glob.escape(folder), uri.path_in_repo), recursive=True):
        raise UsageError(refusal or f"{entry}: the repository has no such file; its files: {HfUri(uri.type, uri.id).to_url()}/tree/main")
    return path
