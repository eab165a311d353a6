"""transformers' side: importing this package teaches its Auto classes the `minimind` and `minimind-v` families."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from model.hub.modeling import MiniMindVForConditionalGeneration
from model.hub.processing import MiniMindVImageProcessor, MiniMindVProcessor
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import VLMConfig

AutoConfig.register(MiniMindConfig.model_type, MiniMindConfig, exist_ok=True)
AutoConfig.register(VLMConfig.model_type, VLMConfig, exist_ok=True)
AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(VLMConfig, MiniMindVForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(VLMConfig, MiniMindVForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(VLMConfig, slow_image_processor_class=MiniMindVImageProcessor, exist_ok=True)
# By these names transformers' Trainer knows that label smoothing has to shift the labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update({model.config_class.model_type: model.__name__
                                         for model in (MiniMindForCausalLM, MiniMindVForConditionalGeneration)})  # fmt: skip
AutoProcessor.register(VLMConfig, MiniMindVProcessor, exist_ok=True)

