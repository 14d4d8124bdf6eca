"""Generation with a cache gives what a whole forward pass gives, and what transformers gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from converters.formats.huggingface import FORMAT
from tests.helpers.hf_models import CASES as ALL_CASES
from tests.helpers.hf_models import make_model
from tests.helpers.models import masked_model
from tests.helpers.ranks import run_ranks
from workbench.errors import ConfigError, ConversionError
from workbench.models.build import build_stage
from workbench.models.decoder import DecoderStage
from workbench.models.generate import Recalled, Sampling, choose, generate, generate_batch, load_model, outputs
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

CASES = (
    "llama, tied, grouped, llama3 rope",
    "gpt2, untied, own width, exact gelu",
    "gpt_neox, parallel, a quarter turns",
    "phi3, grouped, tied, longrope",
    "gemma2, tied, grouped, capped",
    "gemma3, tied, grouped, linear rope",
    "olmo2, tied, grouped, biased, llama3 rope",
    "deepseek_v3, no query latent, tied, linear rope",
    "qwen2_moe, untied, some layers dense",
)
# transformers keeps what it has in its cache when frequencies change (docs/decisions/0150-rope-by-length.md).
CHANGING = ("llama, rope by length", "llama, longrope")
ANSWERING = tuple(case for case in sorted(ALL_CASES) if case.startswith("t5"))
PROMPT = [5, 9, 31, 7]


def load_case(case: str, folder: Path) -> DecoderStage:
    make_model(case).save_pretrained(folder)
    opened = FORMAT.open(folder)
    return load_model(opened.model, opened.source)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path, case: str) -> None:
    ours = list(generate(load_case(case, tmp_path), PROMPT, max_new_tokens=40))
    model = make_model(case)
    theirs = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours == theirs[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("case", (*CASES, *CHANGING))
def test_a_cached_step_equals_a_whole_forward_pass(tmp_path: Path, case: str) -> None:
    stage = load_case(case, tmp_path)
    tokens = list(PROMPT)
    for token in generate(stage, PROMPT, max_new_tokens=24):
        assert token == int(outputs(stage, {"input_ids": tokens})[-1].argmax())
        tokens.append(token)


PROMPTS = ([5, 9, 31, 7], [8], [3, 4, 5, 6, 7, 8, 9, 10, 11], [2, 2])


@pytest.mark.parametrize("case", (*CASES, *CHANGING, ANSWERING[0]))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_prompt_gets_does_not_depend_on_those_beside_it(tmp_path: Path, case: str, temperature: float) -> None:
    make_model(case).save_pretrained(tmp_path)
    opened = FORMAT.open(tmp_path)
    stage = load_model(opened.model, opened.source, dtype=torch.float64)
    beside = beside_each_other(stage, PROMPTS, temperature)
    assert len({len(tokens) for tokens in beside}) > 1, "some rows end before others"
    alone = [beside_each_other(stage, [prompt] * (row + 1), temperature)[row] for row, prompt in enumerate(PROMPTS)]
    assert beside == alone


def beside_each_other(stage: DecoderStage, prompts: Sequence[Sequence[int]], temperature: float) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    limits = [14, 3, 9, 14]
    steps = generate_batch(
        stage,
        prompts,
        max_new_tokens=14,
        sampling=Sampling(temperature=temperature, seed=3),
        ends=lambda row: len(found[row]) == limits[len(prompts[row]) % 4],
    )
    for step in steps:
        for row, token in step.items():
            found[row].append(token)
    return found


@pytest.mark.parity
@pytest.mark.parametrize("layout", [ParallelLayout(tp=2), ParallelLayout(pp=2), ParallelLayout(tp=2, pp=2)], ids=str)
def test_ranks_that_share_layers_say_the_same(tmp_path: Path, layout: ParallelLayout) -> None:
    make_model(CASES[0]).save_pretrained(tmp_path)
    ranks = layout.world_size
    assert run_ranks(ranks, say_at, layout, tmp_path) == [say_at(ParallelLayout(), tmp_path)] * ranks


@pytest.mark.parity
@pytest.mark.parametrize("case", [CASES[4], CHANGING[0], ANSWERING[0]])
def test_stages_say_bit_for_bit_what_one_process_says(tmp_path: Path, case: str) -> None:
    make_model(case).save_pretrained(tmp_path)
    one, layout = say_at(ParallelLayout(), tmp_path, torch.float32), ParallelLayout(pp=2)
    assert run_ranks(2, say_at, layout, tmp_path, torch.float32) == [one, one]


def say_at(layout: ParallelLayout, folder: Path, dtype: torch.dtype = torch.float64) -> list[list[list[int]]]:
    opened = FORMAT.open(folder)
    mesh = Mesh.create(layout, torch.device("cpu"))
    stage = load_model(opened.model, opened.source, mesh=mesh, dtype=dtype)
    return [beside_each_other(stage, PROMPTS, temperature) for temperature in (0.0, 1.0)]


@pytest.mark.parametrize("case", (*CASES, *CHANGING))
def test_a_turn_computes_only_what_it_adds_and_says_the_same(tmp_path: Path, case: str) -> None:
    make_model(case).save_pretrained(tmp_path)
    opened = FORMAT.open(tmp_path)
    stage = load_model(opened.model, opened.source, dtype=torch.float64)
    computed: list[int] = []
    stage.register_forward_pre_hook(lambda module, given: computed.append(given[1].input_ids.shape[1]))
    recalled, prompt, new = Recalled(), list(PROMPT), len(PROMPT)
    for dropped, added in ((0, [3, 4, 9]), (0, [2]), (2, [8, 8, 1]), (40, [7, 6])):
        computed.clear()
        said = speak(stage, prompt, recalled)
        assert computed[0] == new or case not in CASES[:2], "what both turns begin with is not computed again"
        assert said == speak(stage, prompt, None)
        kept = [*prompt, *said]
        prompt = [*kept[: len(kept) - dropped], *added]
        # The last token that was said has not been computed yet.
        new = len(added) + (not dropped)


def speak(stage: DecoderStage, prompt: Sequence[int], recalled: Recalled | None) -> list[int]:
    steps = generate_batch(stage, [prompt], max_new_tokens=8, recalled=recalled)
    return [token for step in steps for token in step.values()]


def test_a_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    stage = load_case(CASES[0], tmp_path)

    def draw(seed: int) -> list[int]:
        return list(generate(stage, PROMPT, max_new_tokens=20, sampling=Sampling(temperature=1.0, seed=seed)))

    assert draw(1) == draw(1) != draw(2)


def test_generation_ends_at_a_stop_token_and_leaves_it_out(tmp_path: Path) -> None:
    stage = load_case(CASES[0], tmp_path)
    free = list(generate(stage, PROMPT, max_new_tokens=20))
    stop = free[6]
    assert list(generate(stage, PROMPT, max_new_tokens=20, stop={stop})) == free[: free.index(stop)]


def test_sampling_draws_in_proportion_from_what_top_k_and_top_p_leave() -> None:
    shares = torch.tensor([0.5, 0.25, 0.15, 0.1])
    generator = torch.Generator().manual_seed(0)

    def draw(sampling: Sampling) -> dict[int, float]:
        counts = Counter(choose(shares.log(), sampling, generator) for _ in range(2000))
        return {token: count / 2000 for token, count in counts.items()}

    everything = draw(Sampling(temperature=1.0))
    assert all(abs(everything[token] - share) < 0.05 for token, share in enumerate(shares.tolist()))
    assert set(draw(Sampling(temperature=1.0, top_k=2))) == {0, 1}
    assert set(draw(Sampling(temperature=1.0, top_p=0.6))) == {0, 1}
    assert set(draw(Sampling(temperature=1.0, top_p=0.01))) == {0}
    cold = draw(Sampling(temperature=0.5))
    assert abs(cold[0] - 0.25 / (0.25 + 0.0625 + 0.0225 + 0.01)) < 0.05


def test_what_cannot_be_generated_is_refused(tmp_path: Path) -> None:
    stage = load_case(CASES[0], tmp_path / "lm")
    with pytest.raises(ConfigError, match="4 tokens of prompt and 61 new ones are more than the 64 of the model"):
        generate(stage, PROMPT, max_new_tokens=61)
    with pytest.raises(ConfigError, match="token 101 of the prompt is not in the vocabulary of 101"):
        generate(stage, [101], max_new_tokens=1)
    with pytest.raises(ConfigError, match="the prompt has no tokens"):
        generate(stage, [], max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"temperature=-1.0 is negative.*top_p=0.0 is not in \(0, 1\]"):
        Sampling(temperature=-1.0, top_p=0.0)
    with pytest.raises(ConversionError, match="head of num_labels=3"):
        generate(load_case("llama classifier", tmp_path / "cls"), PROMPT, max_new_tokens=1)


@pytest.mark.parametrize("case", ANSWERING)
def test_greedy_answers_equal_those_of_transformers(tmp_path: Path, case: str) -> None:
    stage, model = load_case(case, tmp_path), make_model(case)
    theirs = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=None, decoder_start_token_id=0
    )
    assert list(generate(stage, PROMPT, max_new_tokens=20)) == theirs[0, 1:].tolist()


@pytest.mark.parametrize(("model", "words"), [(masked_model(), "causal=false")])
def test_a_model_that_cannot_go_on_with_a_text_is_refused(model: ModelConfig, words: str) -> None:
    stage = build_stage(model, Mesh.single()).module
    with pytest.raises(ConversionError, match=words):
        generate(stage, [1], max_new_tokens=2)
