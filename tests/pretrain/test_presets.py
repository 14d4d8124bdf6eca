"""Presets are the models that they are called after: their parameters number as many as published."""

from __future__ import annotations

import pytest

from converters.family import family_for
from pretrain.presets import CATALOGUE, PRESETS
from workbench.spec.model import ModelConfig
from workbench.spec.schema import num_parameters

# The sum of the tensors in the named repository, as its page on huggingface.co or its model card gives it.
EXACT = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "pythia-14m": 14_067_712,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "phi3-mini-4k": 3_821_079_552,
    "phi4": 14_659_507_200,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
}
# (billions without the embedding, digits): the model card of Qwen3, and table 1 of the Gemma 3 report
# (arXiv:2503.19786), whose models have a part for images besides.
WITHOUT_EMBEDDING = {
    "qwen3-0.6b": (0.44, 2),
    "qwen3-1.7b": (1.4, 1),
    "gemma3-4b": (3.209, 3),
    "gemma3-12b": (10.759, 3),
    "gemma3-27b": (25.600, 3),
}
ROUNDED = {"llama3.1-405b": (405.9, 1)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_whole_model_that_a_family_can_say(name: str) -> None:
    family_for(ModelConfig.model_validate(PRESETS[name]))


@pytest.mark.parametrize("name", [name for name, preset in CATALOGUE.items() if preset.source])
def test_a_published_model_has_as_many_parameters_as_published(name: str) -> None:
    model = ModelConfig.model_validate(PRESETS[name])
    found = num_parameters(model)
    if name in EXACT:
        assert found == EXACT[name]
    elif name in WITHOUT_EMBEDDING:
        billions, digits = WITHOUT_EMBEDDING[name]
        assert round((found - model.vocab_size * model.hidden_size) / 1e9, digits) == billions
    else:
        billions, digits = ROUNDED[name]
        assert round(found / 1e9, digits) == billions
