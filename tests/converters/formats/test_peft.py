"""Adapters leave as PEFT folders that peft itself loads whole, and come back bit for bit; what peft would pass over in
silence is found."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.family import family_for
from converters.format import OpenedCheckpoint
from converters.formats.peft import open_peft
from converters.independent.peft import PeftFiles
from converters.job import JobOptions, make_job
from converters.open import get_format, open_checkpoint
from converters.peft_proof import compare_with_peft, hugging_face_folder, silent_failures
from tests.finetune.adapters import write_adapter, write_base
from tests.helpers.models import biased_model, gated_model, latent_model, masked_model, parallel_model, sparse_model
from workbench.errors import ConversionError
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import LoraSpec
from workbench.spec.model import ModelConfig

pytestmark = pytest.mark.timeout(600)  # fresh processes that import transformers and peft, on a busy machine
OPTIONS = JobOptions(layout=ParallelLayout(), optimizer="drop")


def plain_sparse_model(**changes: Any) -> ModelConfig:
    """One that a family has: no loss but that of balance."""
    return sparse_model(**{"qk_norm": "head", **changes, "moe": {"router_z_loss_coef": 0.0, **changes.pop("moe", {})}})


Exported = tuple[OpenedCheckpoint, OpenedCheckpoint, Path]
"""A native adapter, its base as a Hugging Face folder, and the adapter as a PEFT folder."""
CASES = {
    "llama": (gated_model(tie_word_embeddings=True), LoraSpec(r=3)),
    "llama, rank-stabilised, two targets": (gated_model(), LoraSpec(r=4, rslora=True, targets=("q_proj", "down_proj"))),
    "llama, three labels": (gated_model(num_labels=3, pad_token_id=0), LoraSpec(r=2)),
    "gpt2, fused projections": (biased_model(tie_word_embeddings=True), LoraSpec(r=3, alpha=5)),
    "gpt2, part of a fused projection": (
        biased_model(tie_word_embeddings=True),
        LoraSpec(r=2, rslora=True, targets=("q_proj", "v_proj", "o_proj")),
    ),
    "gpt_neox, fused head by head": (parallel_model(), LoraSpec(r=3)),
    "llama, magnitudes": (gated_model(), LoraSpec(r=3, dora=True)),
    "llama, embedding, head and layers apart": (
        gated_model(),
        LoraSpec(
            r=3,
            targets=("embed_tokens", "lm_head", "layers.1.*"),
            rank_pattern={"q_proj": 5},
            alpha_pattern={"down_proj": 2.0},
        ),
    ),
    "llama, a tied embedding": (
        gated_model(tie_word_embeddings=True),
        LoraSpec(r=3, targets=("embed_tokens", "q_proj")),
    ),
    "qwen3_moe, experts and a dense layer": (
        plain_sparse_model(),
        LoraSpec(r=4, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 8.0}),
    ),
    "qwen3_moe, one side of experts": (
        plain_sparse_model(),
        LoraSpec(r=2, rslora=True, targets=("*.experts.*.up_proj", "q_proj")),
    ),
    "qwen2_moe, experts and a shared one": (
        plain_sparse_model(moe={"shared_expert_intermediate_size": 40, "shared_expert_gate": True}, qk_norm="none"),
        LoraSpec(r=2, targets=("down_proj", "shared_expert.up_proj")),
    ),
    "mixtral, experts": (
        plain_sparse_model(moe={"moe_intermediate_size": 48, "mlp_only_layers": ()}, qk_norm="none"),
        LoraSpec(r=2, targets=("gate_proj", "up_proj", "down_proj", "o_proj")),
    ),
    "gpt2, a tied head": (biased_model(tie_word_embeddings=True), LoraSpec(r=3, targets=("lm_head",))),
    "gpt2, magnitudes of fused projections": (
        biased_model(tie_word_embeddings=True),
        LoraSpec(r=2, dora=True, rslora=True),
    ),
    "bert, three labels": (masked_model(pad_token_id=0).with_labels(3), LoraSpec(r=2)),
    "deepseek, rows in pairs": (latent_model(), LoraSpec(r=2, targets=("q_b_proj", "kv_a_proj_with_mqa", "o_proj"))),
}


def exported(folder: Path, model: ModelConfig, lora: LoraSpec) -> Exported:
    base_model = masked_model(pad_token_id=0) if not model.causal else model.model_copy(update={"num_labels": 0})
    native = write_base(folder / "native", base_model)
    adapter = open_checkpoint(write_adapter(folder / "adapter", model, lora, native))
    base = open_checkpoint(hugging_face_folder(open_checkpoint(native), folder))
    make_job(adapter, get_format("peft"), folder / "peft", OPTIONS, operation="export").run()
    return adapter, base, folder / "peft"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    return {name: exported(tmp_path_factory.mktemp("peft"), *case) for name, case in CASES.items()}


@pytest.fixture
def llama(exports: dict[str, Exported]) -> Exported:
    return exports["llama"]


FEW = (
    "llama",
    "gpt2, fused projections",
    "llama, magnitudes",
    "bert, three labels",
    "llama, embedding, head and layers apart",
    "llama, a tied embedding",
    "gpt2, a tied head",
    "qwen3_moe, experts and a dense layer",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.exhaustive) for name in CASES]
)
def test_peft_loads_an_export_whole_and_gives_the_merged_models_logits(name: str, exports: dict[str, Exported]) -> None:
    report = compare_with_peft(*exports[name])
    assert report.difference < report.tolerance <= 1e-3


@pytest.mark.parametrize("name", CASES)
def test_an_export_read_again_holds_the_same_pairs(name: str, exports: dict[str, Exported]) -> None:
    adapter, base, folder = exports[name]
    lora = CASES[name][1]
    again = open_peft(folder, base)
    assert again.adapter is not None and again.adapter.lora.scaling == pytest.approx(lora.scaling)
    assert dict(again.source.schema) == dict(adapter.source.schema)
    for tensor in adapter.source.schema.values():
        whole = Box.whole(tensor.shape)
        np.testing.assert_array_equal(again.source.read(tensor.name, whole), adapter.source.read(tensor.name, whole))


@pytest.mark.parametrize("name", CASES)
def test_the_second_reader_finds_the_same_pairs(name: str, exports: dict[str, Exported]) -> None:
    _, base, folder = exports[name]
    assert_second_reader_agrees(open_peft(folder, base))


def assert_second_reader_agrees(opened: OpenedCheckpoint) -> None:
    reader = PeftFiles(opened.path, opened.source)
    for name, tensor in opened.source.schema.items():
        found = reader.read(tensor, slice(0, tensor.shape[0]))
        np.testing.assert_array_equal(found, opened.source.read(name, Box.whole(tensor.shape)), name)


def test_the_configuration_names_leaves_and_leaves_nothing_to_defaults(
    llama: Exported,
) -> None:
    config = json.loads((llama[2] / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["fan_in_fan_out"]) == (3, 16, False, False)
    assert config["task_type"] == "CAUSAL_LM" and not Path(config["base_model_name_or_path"]).is_absolute()


def test_what_peft_would_make_of_a_file_is_told_by_its_cause() -> None:
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    fine = {"missing": [], "unexpected": [], "other": [], "scaling": {layer: 2.0}}
    assert silent_failures(fine, {layer: 2.0}) == []
    a, b = (f"{layer}.lora_{factor}.weight" for factor in "AB")
    bare = [key.removeprefix("base_model.model.") for key in (a, b)]
    for facts, cause in (
        ({"missing": [a, b], "unexpected": bare}, r"without the prefix 'base_model.model.'"),
        ({"missing": [b]}, r"up_proj.lora_B.weight' not in the file, so peft uses a fresh one"),
        ({"unexpected": [a, b]}, r"target_modules or modules_to_save .* pass over '.*lora_A.weight' and 1 more"),
        ({"missing": [f"{layer}.lora_magnitude_vector"]}, "use_dora=true in adapter_config.json, but"),
        ({"other": [a]}, "other values than the file for"),
        ({"scaling": {layer: 4.0}}, "use_rslora, lora_alpha or alpha_pattern .* by 4, not 2"),
    ):
        (found,) = silent_failures({**fine, **facts}, {layer: 2.0})
        assert re.search(cause, found)


def test_an_adapter_made_by_peft_is_read(llama: Exported, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama[1].path)
    lora = LoraConfig(
        r=5,
        lora_alpha=7,
        target_modules=["v_proj", "gate_proj", "layers.1.self_attn.o_proj"],
        rank_pattern={"v_proj": 3},
        alpha_pattern={"layers.1.mlp.gate_proj": 2},
        use_dora=True,
        init_lora_weights=False,
    )
    get_peft_model(model, lora).save_pretrained(tmp_path / "theirs")
    opened = open_peft(tmp_path / "theirs", llama[1])
    assert opened.adapter is not None
    assert opened.adapter.lora == LoraSpec(
        r=5,
        alpha=7.0,
        dora=True,
        targets=("v_proj", "layers.1.self_attn.o_proj", "gate_proj"),
        rank_pattern={"v_proj": 3},
        alpha_pattern={"layers.1.mlp.gate_proj": 2.0},
    )
    report = compare_with_peft(opened, llama[1], tmp_path / "theirs")
    assert report.difference < report.tolerance


@pytest.mark.parametrize(
    ("case", "settings", "targets"),
    [
        (
            "mixtral, experts",
            {
                "target_modules": ["v_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                "rank_pattern": {"experts.gate_up_proj": 3},
            },
            ("v_proj", "gate_proj", "up_proj", "down_proj"),
        ),
        (
            "mixtral, experts",
            {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.down_proj"]},
            tuple(f"layers.1.mlp.experts.{expert}.down_proj" for expert in range(4)),
        ),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}, ("embed_tokens", "lm_head")),
    ],
    ids=["experts", "one side of the experts of a layer", "tied embedding and head"],
)
def test_an_adapter_that_peft_made_of_what_is_no_module_of_ours_is_read(
    case: str, settings: dict[str, Any], targets: tuple[str, ...], exports: dict[str, Exported], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = exports[case][1]
    model = AutoModelForCausalLM.from_pretrained(base.path)
    get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **settings)).save_pretrained(tmp_path / "theirs")
    opened = open_peft(tmp_path / "theirs", base)
    assert opened.adapter is not None and opened.adapter.lora.targets == targets
    assert_second_reader_agrees(opened)
    assert compare_with_peft(opened, base, tmp_path / "theirs").difference < 1e-4


@pytest.mark.parametrize("case", ["mixtral, experts", "qwen2_moe, experts and a shared one"])
def test_a_pair_for_each_expert_as_of_transformers_4_is_read(
    case: str, exports: dict[str, Exported], tmp_path: Path
) -> None:
    adapter, base, folder = exports[case]
    table = family_for(base.model).bind(base.model)
    words = re.compile(r"(.+)\.(lora_[AB]\.weight)")
    arrays, leaves = {}, set()
    for name, tensor in adapter.source.schema.items():
        weight, factor = words.fullmatch(name).groups()
        module = table[f"{weight}.weight"].foreign.removesuffix(".weight")
        arrays[f"base_model.model.{module}.{factor}"] = adapter.source.read(name, Box.whole(tensor.shape))
        leaves.add(module if "experts" not in module or "shared" in module else module.rpartition(".")[2])
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"target_modules": sorted(leaves), "target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    opened = open_peft(tmp_path, base)
    assert opened.unplaced == () and dict(opened.source.schema) == dict(adapter.source.schema)
    assert_second_reader_agrees(opened)
    for name, tensor in opened.source.schema.items():
        whole = Box.whole(tensor.shape)
        np.testing.assert_array_equal(opened.source.read(name, whole), adapter.source.read(name, whole))
    if base.family == "mixtral":  # the one that peft 0.21 turns into what transformers 5 has
        old, new = (peft_logits_of(base.path, one) for one in (tmp_path, folder))
        np.testing.assert_allclose(old, new, atol=1e-5)


def peft_logits_of(base: Path, adapter: Path) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.inference_mode():
        return model(input_ids=torch.arange(1, 9)[None]).logits.numpy()


def test_a_fused_adapter_made_by_peft_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    native = open_checkpoint(write_base(tmp_path / "native", biased_model(tie_word_embeddings=True)))
    base = open_checkpoint(hugging_face_folder(native, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(base.path)
    lora = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    get_peft_model(model, lora).save_pretrained(tmp_path / "theirs")
    opened = open_peft(tmp_path / "theirs", base)
    assert opened.adapter is not None and opened.adapter.lora.targets == ("q_proj", "k_proj", "v_proj")
    assert_second_reader_agrees(opened)
    assert compare_with_peft(opened, base, tmp_path / "theirs").difference < 1e-4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, r"lora_magnitude_vector'.* are missing"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"target_modules": ["q_proj"], "lora_alpha": 3}, "passes over what the file adapts"),
        ({"r": 5}, "has rank 3, and its configuration says 5"),
        ({"rank_pattern": {"(": 3}}, "is no regular expression"),
        ({"lora_alpha": 10**400}, "r=3 with lora_alpha=1000"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern={'q_proj': inf}"),
        ({"target_parameters": ["router.weight"], "r": 5}, "target_parameters: 'router.weight' has no place"),
    ],
)
def test_a_configuration_with_no_place_here_is_refused_by_name(
    changes: dict[str, Any], named: str, llama: Exported, tmp_path: Path
) -> None:
    config = json.loads((llama[2] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    (tmp_path / "adapter_model.safetensors").write_bytes((llama[2] / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ConversionError, match=named):
        open_peft(tmp_path, llama[1])


def test_a_whole_model_is_no_adapter(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="whole model"):
        make_job(llama[1], get_format("peft"), tmp_path / "out", OPTIONS, operation="export")


def test_an_alpha_that_scales_nothing_is_refused(llama: Exported, tmp_path: Path) -> None:
    shutil.copytree(llama[2], tmp_path / "in")
    config = json.loads((tmp_path / "in/adapter_config.json").read_text())
    (tmp_path / "in/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0}))
    with pytest.raises(ConversionError, match=r"adapter_config.json: alpha: Input should be greater than 0"):
        open_peft(tmp_path / "in", llama[1])
