"""From settings to the objects of a run: tokenizer, model, data, optimizer, number format."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import parent_process
from multiprocessing.queues import Queue
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dataset.images import ImageSource, open_images
from dataset.sources import Mixture, Order, open_samples
from dataset.vlm_dataset import Batch, VLMDataset, collate
from machine import cores
from model.conversation import Renderer, image_token_of
from model.device import bf16_is_fast, check_compile
from model.errors import DataError, SampleError, UsageError, first_line
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vision import patches_per_image, pooling
from model.weights import (
    OWN_TOKENIZER,
    find_vision_encoder,
    fingerprints,
    load_tokenizer,
    load_weights,
    read_sidecar,
    read_state,
    tokenizer_folder,
)

from .config import DTYPES, TrainConfig, fraction_of
from .distributed import Ranks
from .guards import StopRequest
from .sampler import ResumableSampler

if TYPE_CHECKING:
    from dataset.features import FeatureCache

@dataclass
class Run:
    """What the loop works on."""

    config: TrainConfig
    ranks: Ranks
    model: MiniMindVLM
    dataset: VLMDataset
    sampler: ResumableSampler
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of fp16; passes everything through otherwise
    dtype: torch.dtype
    fingerprints: dict[str, str]
    saved: tuple[dict, str | None] | None  # what a resume takes up, until it has (resume.load_training_state)

    @property
    def cache(self) -> "FeatureCache | None":
        return self.dataset.cache

    def autocast(self) -> torch.autocast:
        """The context in which the decoder computes."""
        return torch.autocast(self.ranks.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def build(config: TrainConfig, ranks: Ranks) -> Run:
    """Everything that a run needs, or a UsageError that lists all that is missing."""
    torch.manual_seed(config.seed)
    saved = None
    if config.from_resume:
        from .resume import load_training_state  # not needed without

        saved = load_training_state(config.resume_file)
    tokenizer, model, samples, images = load_parts(config, ranks, saved)
    used = fingerprints(model, tokenizer)
    # What the machine decided is recorded, for a resume to do the same.
    dtype = choose_dtype(config, ranks, saved, used["vision_encoder"])
    config = replace(config, dtype=dtype, device=str(ranks.device), tokenizer_path=tokenizer.name_or_path,
                     vision_model_path=config.vision_model_path or model.vision_encoder.name_or_path,
                     family=family_of(vars(model.config)), projector=model.config.projector, image_tokens=model.config.image_tokens,
                     tiles=model.config.tiles)  # fmt: skip
    freeze(model, config.freeze_llm)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.to(ranks.device).train()
    model.vision_encoder.to(getattr(torch, dtype))  # frozen: what autocast would cast at every use is cast once
    if config.use_compile:
        check_compile(ranks.device)
        for block in model.model.layers:
            block.compile(dynamic=True)  # in place: the names of the weights stay
    cache = open_cache(config, ranks, model, samples, used["vision_encoder"]) if config.cache_features else None
    dataset = VLMDataset(samples, images, Renderer(tokenizer, model.config.image_tokens), config.max_seq_len, cache,
                         model.pixel_settings)  # fmt: skip
    sampler = make_sampler(config, ranks, samples, model.config, samples.epoch_size,
                           lambda epoch: samples.order(config.seed, epoch))  # fmt: skip
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == "float16")
    learning = sum(parameter.numel() for parameter in trained)
    ranks.print(f"model: {model.num_parameters() / 1e6:.2f}M parameters, {learning / 1e6:.2f}M of them trained"
                f" ({', '.join(names_of_trained(model))});"
                f" data: {len(dataset)} samples, {samples.epoch_size} an epoch")  # fmt: skip
    warn_of_small_steps(config, ranks, config.epochs * sampler.updates_per_epoch)
    return Run(config, ranks, model, dataset, sampler, optimizer, scaler, getattr(torch, dtype), used, saved)


def load_parts(
    config: TrainConfig, ranks: Ranks, saved: tuple[dict, str | None] | None
) -> tuple[PreTrainedTokenizerBase, MiniMindVLM, Mixture, ImageSource]:
    """Tokenizer, model with the weights it starts from, samples and images; raises UsageError with all that is missing."""
    problems, fraction = [], fraction_of(config.eval_data_path)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    def attempt(make: Callable, *arguments):
        try:
            return make(*arguments)
        except UsageError as error:
            problems.append(str(error))

    scratch = config.from_resume or config.from_weight == "none"
    start = None if scratch else config.weights_of(config.from_weight)
    model = tokenizer = samples = images = random = None
    known = attempt(settings_before, start, saved)
    if known is not None:
        tokenizer = attempt(find_tokenizer, config, start, known["record"])
        encoder = attempt(find_vision_encoder, config.vision_model_path, known["record"])
        if tokenizer and encoder:
            model = attempt(build_model, config, tokenizer, encoder, known)
    try:
        samples, images = open_samples(config.data_path), open_images(config.images_path)
        if fraction and not len(samples.hold_out(fraction, config.seed)):
            problems.append(f"--eval_data_path {config.eval_data_path} holds out none of {len(samples)} samples; give more")
        if images.missing and any(isinstance(ref, str) for ref in samples[0].images):
            problems.append(f"--images_path {config.images_path}: there is no such folder or zip, and {samples.where(0)}"
                            f" names {samples[0].images[0]!r}")  # fmt: skip
    except DataError as error:
        problems.append(str(error))
    except SampleError:
        pass  # a bad first sample: the training names it
    if start and (model or not start.is_file()):
        random = attempt(load_weights, start, model, fingerprints(model, tokenizer) if model else {})
    if problems:
        raise UsageError("\n".join(problems))
    ranks.print(f"tokenizer from {tokenizer.name_or_path}")
    if start:
        ranks.print(f"weights from {start}" + (f"; {', '.join(random)} randomly initialized" if random else ""))
    return tokenizer, model, samples, images


def find_tokenizer(config: TrainConfig, start: Path | None, record: dict) -> PreTrainedTokenizerBase:
    """The tokenizer of --tokenizer_path, or that of the state or of the weights that a run starts from; this project's own for
    random weights. Raises UsageError."""
    unknown = not config.tokenizer_path and not record and (start is None or not start.is_file())
    return load_tokenizer(OWN_TOKENIZER if unknown else tokenizer_folder(start, record, config.tokenizer_path))


def settings_before(start: Path | None, saved: tuple[dict, str | None] | None) -> dict:
    """What the `saved` state or the weights that a run starts from tell of the model that flags would else have to say, and
    their `record`, which names tokenizer and vision encoder. Raises UsageError for a broken one."""
    if saved:
        return {**saved[0]["config"], "record": {"training": saved[0]["config"]}}
    if start is None or not start.is_file():
        return {"record": {}}
    record = read_sidecar(start)
    if (settings := record.get("config")) is None:
        from model.load import settings_of  # not needed with a sidecar

        settings = settings_of(read_state(start))
    try:
        config = VLMConfig.from_dict(settings)
    except Exception as error:  # of a damaged one, all kinds
        raise UsageError(f"{start.with_suffix('.json')} holds no configuration of this model: {first_line(error)}") from error
    known = {"record": record, "family": family_of(settings)}
    if "config" in record or "vision_hidden_size" in settings:  # else a language model, for which all is open
        known |= {name: getattr(config, name) for name in ("image_token_id", "projector", "image_tokens", "tiles")}
    elif known["family"] == "minimind3":
        known["image_token_id"] = config.image_token_id
    return known


def family_of(settings: dict) -> str:
    """The --family of a decoder of this configuration."""
    return "minimind3" if settings.get("qk_norm") else "minimind2"


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, known: dict) -> MiniMindVLM:
    """A randomly initialized model around the frozen vision encoder, in fp32 on the CPU. What no flag says is as `known`."""
    family, patches = config.family or known.get("family"), patches_per_image(encoder)
    settings = {}
    if family == "minimind3":
        from model.minimind3 import settings_for  # not needed for the other

        settings = settings_for(config.hidden_size)
    tokens = config.image_tokens or known.get("image_tokens") or patches
    if projector := config.projector or known.get("projector"):
        settings["projector"] = projector
    image_token_id = tokenizer.convert_tokens_to_ids(image_token_of(tokenizer))
    if known.get("image_token_id", image_token_id) != image_token_id:
        raise UsageError(f"the weights were trained with another tokenizer, one whose token for images is number"
                         f" {known['image_token_id']}; in {tokenizer.name_or_path} that is {image_token_id}. Give theirs by"
                         " --tokenizer_path")  # fmt: skip
    try:
        return MiniMindVLM(VLMConfig(
            hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers, use_moe=bool(config.use_moe),
            vocab_size=len(tokenizer), image_token_id=image_token_id,
            image_tokens=tokens, vision_hidden_size=encoder.config.hidden_size * pooling(patches, tokens) ** 2,
            tiles=config.tiles if config.tiles is not None else known.get("tiles") or 0, **settings,
        ), encoder)  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error


def freeze(model: MiniMindVLM, mode: int) -> None:
    """0: everything learns; 1: the projector; 2: projector and the decoder's last block. The vision encoder never does."""
    last = f"model.layers.{model.config.num_hidden_layers - 1}."
    for name, parameter in model.named_parameters():
        learns = mode == 0 or name.startswith("vision_proj.") or (mode == 2 and name.startswith(last))
        parameter.requires_grad_(learns)


def names_of_trained(model: MiniMindVLM) -> list[str]:
    """The modules that learn: ["vision_proj", "model.embed_tokens", "model.layers.0 to 7", "model.norm"]."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = sorted({int(name.split(".")[2]) for name in names if name.startswith("model.layers.")})
    others = dict.fromkeys(".".join(name.split(".")[:2]) for name in names if not name.startswith("model.layers."))
    return [*others, *([f"model.layers.{layers[0]} to {layers[-1]}" if layers[1:] else f"model.layers.{layers[0]}"] if layers else [])]


def choose_dtype(config: TrainConfig, ranks: Ranks, saved: tuple[dict, str | None] | None, encoder: str) -> str:
    """The number format asked for; without, that of the `saved` state's run; of the feature cache; or bf16 unless this
    device is slower at it. A measurement may come out otherwise each time, so what exists has precedence."""
    if known := config.dtype or (saved and saved[0]["config"]["dtype"]):
        return known
    chosen = None
    if ranks.is_main:  # it decides for all: two answers would be two models
        if config.cache_features:
            from dataset.features import format_of  # not needed without

            chosen = format_of(config.features_folder, encoder)
        if chosen in DTYPES:
            ranks.print(f"notice: {chosen}, as the images in the feature cache were encoded; another --dtype encodes them"
                        " again")  # fmt: skip
        else:
            chosen = "bfloat16" if bf16_is_fast(ranks.device) else "float32"
            if chosen == "float32":
                ranks.print(f"notice: {ranks.device} multiplies bfloat16 slower than float32; using float32 (set --dtype)")
    return DTYPES[int(ranks.sum([float(DTYPES.index(chosen) if chosen else 0)])[0])]


def open_cache(config: TrainConfig, ranks: Ranks, model: MiniMindVLM, samples: Mixture, encoder: str) -> "FeatureCache":
    """The feature cache of the run's data, created or reused; says how large it will grow. Raises UsageError."""
    from dataset.features import CacheKey, FeatureCache  # not needed without

    number_format = str(model.vision_encoder.dtype).removeprefix("torch.")
    key = CacheKey(encoder, number_format, model.config.image_tokens, model.config.vision_hidden_size, tiles=model.config.tiles)
    try:
        cache = FeatureCache(config.features_folder, key, samples)
    except (DataError, OSError) as error:
        raise UsageError(f"--cache_features 1: {error}") from error
    if cache.rebuilt_because:
        ranks.warn(f"notice: the feature cache in {cache.folder} starts from scratch: {cache.rebuilt_because}")
    ranks.print(f"feature cache: {cache.folder}, {cache.count:,} images, {cache.count * cache.image_bytes / 1e9:.2f} GB"
                f" when full; {cache.filled():,} filled")  # fmt: skip
    return cache


def make_sampler(config: TrainConfig, ranks: Ranks, samples: Mixture, model: VLMConfig, size: int,
                 order: Callable[[int], Order]) -> ResumableSampler:  # fmt: skip
    """The sampler of `size` of these samples in this order of an epoch, those of like lengths together."""
    return ResumableSampler(
        size, config.batch_size, config.accumulation_steps, config.seed, ranks.rank, ranks.size,
        lambda indices: samples.lengths(indices, model.image_tokens * (1 + model.tiles)).clip(max=config.max_seq_len), order,
    )  # fmt: skip


def warn_of_small_steps(config: TrainConfig, ranks: Ranks, updates: int) -> None:
    """A notice where all updates together can move a weight by less than 4% of its size at initialization.

    An update of AdamW moves a weight by about the learning rate, which is 0.55 of its peak on average.
    """
    moved, size = 0.55 * config.learning_rate * updates, config.hidden_size**-0.5  # the spread of random weights
    if moved < 0.04 * size:
        ranks.print(f"notice: {updates} updates at --learning_rate {config.learning_rate:g} can move a weight by {moved:.1g},"
                    f" where weights are about {size:.1g} large: too little to learn much. Few images need a higher rate"
                    " and more --epochs (5e-4 and 20 for a hundred images)")  # fmt: skip


def worker_count(wanted: int, ranks: Ranks) -> int:
    """Loader processes of this rank: at most its fraction of the machine's cores."""
    most = max(1, cores() // ranks.local_size)
    if wanted > most:
        ranks.print(f"notice: --num_workers {wanted} capped to {most}: {cores()} cores here")
    return min(wanted, most)


class MicroBatches:
    """The sample numbers of this rank's micro-batches in what is left of an epoch: what a DataLoader asks for."""

    def __init__(self, sampler: ResumableSampler):
        self.sampler, self.start = sampler, (0, 0)  # epoch, samples to skip

    def __iter__(self) -> Iterator[list[int]]:
        for update in self.sampler.updates(*self.start):
            yield from update


class Loader:
    """This rank's micro-batches, read by processes that live through all epochs."""

    def __init__(self, run: Run, workers: int):
        config = run.model.config
        # Not this object itself: in a circle of references, the processes would outlive the training until some garbage
        # collection, which comes at a bad moment and then waits for each of them.
        self.numbers = MicroBatches(run.sampler)
        self.batches = DataLoader(
            run.dataset,
            batch_sampler=self.numbers,
            collate_fn=partial(collate, pad_id=config.pad_token_id, image_tokens=config.image_tokens),
            num_workers=workers,
            # Started again in every epoch, they would be forks of a trainer grown by gigabytes, whose pages are copied.
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            pin_memory=run.ranks.device.type == "cuda",
            generator=torch.Generator().manual_seed(run.config.seed),  # leaves the training's own random state alone
        )

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each update that is left after `skip` samples of an epoch."""
        self.numbers.start = (epoch, skip)
        batches = iter(self.batches)
        for update in self.numbers.sampler.updates(epoch, skip):
            yield list(islice(batches, len(update)))


def _start_worker(_: int) -> None:
    # A signal to all processes of a run is the trainer's to answer: it still needs its loaders to finish the update.
    for signum in StopRequest.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    # They end when it does, however that was: a fork holds sockets open, by whose end other ranks hear of the trainer's.
    Thread(target=_end_with_trainer, daemon=True).start()
    torch.set_num_threads(1)
    # What fails in the threads that hand batches over would be printed, and the trainer wait for ever.
    Queue._on_queue_feeder_error = staticmethod(lambda error, _: _give_up(error))
    sys.excepthook = lambda _, error, __: _give_up(error)


def _end_with_trainer() -> None:
    parent_process().join()
    os._exit(1)


def _give_up(error: BaseException) -> None:
    """Says why this loader process cannot hand its batches over, and ends it: the trainer hears of that."""
    print(f"error: a loader process cannot hand its batches over: {first_line(error)}. {loader_remedy(error)}",
          file=sys.stderr, flush=True)  # fmt: skip
    os._exit(1)


def loader_remedy(error: BaseException) -> str:
    """What to do when something runs short between loader processes and trainer."""
    if getattr(error, "errno", None) == errno.EMFILE or "open files" in str(error) or "ancdata" in str(error):
        return "Too few files may be open: raise the limit by `ulimit -n 4096`, or load without processes: --num_workers 0"
    if "shared memory" in str(error) or "</torch_" in str(error):
        return ("/dev/shm is too small or full: in a container give more of it by --shm-size=2g, or take the host's by"
                " --ipc=host; or load without processes: --num_workers 0")  # fmt: skip
    return ""
