"""The model as users of transformers meet it: folders that bring the vision encoder, and `generate` with images.

Legend of shapes: B rows of a batch, T tokens, N images of the whole batch in reading order, P patches of an image,
W width of the vision encoder.
"""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from model.model_vlm import MiniMindVLM, find_image_positions
from model.vision import pixel_settings_of
from model.weights import CLASSIC_PREFIX, VISION_FOLDER, load_vision_encoder


class MiniMindVForConditionalGeneration(MiniMindVLM):
    """MiniMindVLM for transformers' Auto classes, Trainer, pipelines and PEFT."""

    _keys_to_ignore_on_load_unexpected = [r"^vision_encoder\."]  # some published checkpoints hold it

    @classmethod
    def from_pretrained(cls, name: str | Path, *args, output_loading_info: bool = False, **kwargs):
        """As transformers' own, with the vision encoder if the folder (or repository) brings one, in the number format
        it was saved in unless a `dtype` is given. Raises ValueError for weights that do not fit the configuration, and
        UsageError for a damaged encoder."""
        place = {key: kwargs[key] for key in ("cache_dir", "local_files_only", "revision", "token") if key in kwargs}
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype", "auto"))
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        # All files: those of a repository are fetched into one folder of the cache.
        files = [cached_file(name, f"{VISION_FOLDER}/{file}", _raise_exceptions_for_missing_entries=False, **place)
                 for file in ("config.json", "preprocessor_config.json", "model.safetensors")]  # fmt: skip
        if files[0] and files[2]:
            encoder = load_vision_encoder(Path(files[0]).parent).to(model.device)
            model.attach_vision_encoder(encoder.to(model.dtype) if dtype not in (None, "auto") else encoder)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """As transformers' own, with the vision encoder in a folder inside."""
        super().save_pretrained(save_directory, **kwargs)
        if self.vision_encoder is not None and kwargs.get("is_main_process", True):
            save_vision_encoder(self.vision_encoder, Path(save_directory) / VISION_FOLDER)

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, is_first_iteration=False, image_mask=None, image_features=None, **kwargs
    ):
        """As transformers' own: images enter with the prompt, or with what the cache does not hold of it; later steps
        read them from the cache. `image_mask` and `image_features` come from `_expand_inputs_for_generation`.

        Raises ValueError for a prompt with images that is read in chunks.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if image_mask is None or (kwargs.get("use_cache", True) and not is_first_iteration):
            return inputs
        if input_ids.shape[1] < image_mask.shape[1]:
            raise ValueError("prefill_chunk_size: a prompt with images is read as a whole; leave it out")
        T = inputs["input_ids"].shape[1]
        rows, columns = image_mask.nonzero(as_tuple=True)
        columns = columns - (input_ids.shape[1] - T)  # those below 0 are in the cache
        seen = columns >= 0
        features = image_features.flatten(0, 1)[seen].unsqueeze(0)
        return {**inputs, "image_features": features, "image_positions": (rows * T + columns)[seen]}

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Encodes images once, and repeats a row's images with the row, for beams and `num_return_sequences`. Their
        positions are kept as `image_mask` bool [B, T], which stays right while rows grow and repeat."""
        given = (kwargs.pop(name, None) for name in ("pixel_values", "image_positions", "image_features"))
        pixels, positions, features = given
        if features is None and pixels is not None:
            features = self.encode_images(pixels)
        if features is not None and len(features):
            P = features.shape[1]
            if positions is None:
                positions = find_image_positions(input_ids, self.config.image_token_id, self.config.image_tokens)
            mask = torch.zeros_like(input_ids, dtype=torch.bool)
            mask.view(-1)[positions] = True
            mask &= input_ids == self.config.image_token_id
            if mask.sum() != len(features) * P:
                raise ValueError(f"{len(features)} images, but image positions for {mask.sum() / P:g} among the"
                                 " placeholders of input_ids; image_positions count through all rows, so batches cannot be joined by"
                                 " their rows (as a pipeline's batch_size does)")  # fmt: skip
            rows = features.split((mask.sum(1) // P).tolist())  # the images of each row
            features = torch.cat([row for row in rows for _ in range(expand_size)])
            kwargs["image_mask"] = mask
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, "image_features": features}


def save_vision_encoder(encoder: PreTrainedModel, folder: str | Path) -> None:
    """Writes the encoder as a transformers folder, under the names that every release reads, and how it wants its images."""
    prefix = "" if "dinov2" in encoder.config.model_type else CLASSIC_PREFIX
    state = {prefix + name.removeprefix(CLASSIC_PREFIX): tensor for name, tensor in encoder.state_dict().items()}
    encoder.save_pretrained(folder, state_dict=state)
    kind = {"clip": "CLIP", "sigl": "Siglip", "dino": "Bit"}[encoder.config.model_type[:4]]
    settings = {"image_processor_type": f"{kind}ImageProcessor", **pixel_settings_of(encoder).to_dict()}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
