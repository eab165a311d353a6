"""The model. Importing this package teaches transformers' Auto classes the `minimind` and `minimind-v` families."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .model_minimind import MiniMindConfig, MiniMindForCausalLM
from .model_vlm import MiniMindVLM, VLMConfig
from .processing import MiniMindVImageProcessor, MiniMindVProcessor

AutoConfig.register(MiniMindConfig.model_type, MiniMindConfig, exist_ok=True)
AutoConfig.register(VLMConfig.model_type, VLMConfig, exist_ok=True)
AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(VLMConfig, MiniMindVLM, exist_ok=True)
AutoModelForImageTextToText.register(VLMConfig, MiniMindVLM, exist_ok=True)
AutoImageProcessor.register(VLMConfig, slow_image_processor_class=MiniMindVImageProcessor, exist_ok=True)
AutoProcessor.register(VLMConfig, MiniMindVProcessor, exist_ok=True)

__all__ = ["MiniMindConfig", "MiniMindForCausalLM", "MiniMindVImageProcessor", "MiniMindVLM", "MiniMindVProcessor", "VLMConfig"]
