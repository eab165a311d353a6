"""What training minimises and validation measures: the loss of a batch."""

import torch

from dataset.vlm_dataset import Batch
from model.vision import normalize

from .build import Run


class Objective:
    """The loss of a run's batches: pictures encoded or taken from the run's feature cache, the decoder under autocast."""

    def __init__(self, run: Run):
        self.run, self.cache_given_up = run, False

    def __call__(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy over the batch's supervised tokens, and the auxiliary loss (0 for a dense model).

        `model` is the run's, or what distributed training wraps it in.
        """
        batch = batch.to(self.run.ranks.device)
        features = self.encode(batch)
        with self.run.autocast():
            out = model(
                batch.ids, labels=batch.labels, loss_positions=batch.loss_positions, use_cache=False, image_features=features,
                # Rows are padded on the right: causal attention needs no mask, only the routers' loss does.
                image_positions=batch.image_positions, token_mask=batch.attention_mask if self.run.config.use_moe else None,
            )  # fmt: skip
        return out.loss, out.aux_loss if out.aux_loss is not None else out.loss.new_zeros(())

    def encode(self, batch: Batch) -> torch.Tensor:
        """Features [N, P, W] of the batch's pictures; each is encoded once, those in the cache not at all.

        Rounded to bf16 whatever the run's format, as the cache keeps them: a run with the cache is the run without it.
        """
        features = batch.features
        if len(batch.pixels):
            features = self.run.model.encode_images(normalize(batch.pixels)).to(torch.bfloat16)
            cache = self.run.cache
            if cache and cache.broken is None:
                cache.write(batch.slots, batch.signatures, features)
            elif cache and not self.cache_given_up:
                self.cache_given_up = True
                self.run.ranks.warn(f"warning: the feature cache keeps no more ({cache.broken}); training goes on")
            if len(batch.features):
                features = torch.cat([features, batch.features])
        return features[batch.image_index].to(self.run.dtype)
