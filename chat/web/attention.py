"""Where each token of an answer looked in the images, as a piece of the page: token and image under a veil that is thin
where the attention was. page.js puts on the veil of the token that is pointed at or tapped."""

import html

import torch
from PIL import Image

from model.inference.attention_map import AnswerAttention, pixels_to_image

from .images import data_url
from .texts import Labels

DARKEST = 205  # of 255: the image stays in sight under the veil


def attention_html(seen: AnswerAttention, labels: Labels) -> str:
    """The answer's tokens over the images that it could see; at first the mean of all tokens."""
    def token(text: str, heat: torch.Tensor, chosen: bool = False) -> str:
        """`heat` [N, s, s]: a veil for each image, what part of the attention they got, and the most of a patch."""
        veils = " ".join(data_url(veil(one, float(heat.max()))) for one in heat)
        figures = f'data-part="{float(heat.sum()):.0%}" data-most="{float(heat.max()):.1%}"'
        return (f'<span tabindex="0" class="token{" chosen" * chosen}" data-veils="{veils}" {figures}>'
                f'{html.escape(text)}</span>')  # fmt: skip

    mean = seen.maps.mean(0)
    texts = [text.replace("\n", "↵\n") or "…" for text in seen.tokens]
    tokens = "".join(token(text, heat) for text, heat in zip(texts, seen.maps, strict=True))
    images = "".join(
        f'<div class="seen"><img src="{data_url(pixels_to_image(image))}" alt="{labels("look")}">'
        f'<img class="veil" src="{data_url(veil(heat, float(mean.max())))}" alt=""></div>'
        for image, heat in zip(seen.views, mean, strict=True)
    )
    most = f'<span class="most">{float(mean.max()):.1%}</span> <span>{labels("look_legend")}</span>'
    part = labels("look_part", part=f'<b class="part">{float(mean.sum()):.0%}</b>')
    return (f'<div class="looked"><p class="hint">{labels("look_hint")}</p>'
            f'<p class="tokens">{token(labels("look_all"), mean, chosen=True)} {tokens}</p>'
            f'<div class="images">{images}</div><p class="scale"><span>0%</span><i></i>{most}</p>'
            f'<p class="hint">{part}</p></div>')  # fmt: skip


def veil(heat: torch.Tensor, most: float) -> Image.Image:
    """What lies over an image, a pixel for each patch of `heat` [s, s]: clear at the weight `most`, darkest at 0."""
    alpha = (DARKEST * (1 - heat.float().cpu() / max(most, 1e-12))).round().byte().numpy()
    alpha = Image.fromarray(alpha)
    return Image.merge("LA", (Image.new("L", alpha.size, 0), alpha))
