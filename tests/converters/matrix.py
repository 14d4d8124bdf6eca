"""The table of docs/conversion.md: what goes through each format for a model of each family, as found by doing it.

Formats and families are those that the program finds; a new one needs no line here.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from converters.family import families, family_named
from converters.format import OpenedCheckpoint
from converters.job import JobOptions, make_job
from converters.open import formats, open_checkpoint
from converters.verify import changes_outputs, compute_fingerprints, model_differences
from tests.helpers.checkpoints import MemorySource, random_arrays, random_native
from tests.helpers.hf_models import CASES
from workbench.errors import ConversionError, LayoutError
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import AdapterRecord, LoraSpec, adapter_tensors
from workbench.spec.model import ModelConfig

PAGE = Path(__file__).parents[2] / "docs" / "conversion.md"
START, END = "<!-- matrix: written by `make parity`; a test keeps it current -->", "<!-- end of matrix -->"
STATES = {
    "W": "weights",
    "O": "moments of the optimizer",
    "T": "where training stood",
    "A": "LoRA adapters",
}
LAYOUT = ParallelLayout(tp=2, pp=2)


@dataclass(frozen=True)
class Outcome:
    """Which states came back bit for bit, as letters of STATES; without any, why the format refuses the model."""

    states: str
    refusal: str = ""


@cache
def family_models() -> dict[str, ModelConfig]:
    """A tiny model of each family, as transformers configures it."""
    found: dict[str, ModelConfig] = {}
    for model_class, config_class, values in CASES.values():
        given = config_class(**values, architectures=[model_class.__name__]).to_dict()
        name = next(family.name for family in families() if family.model_type == given["model_type"])
        if name not in found:
            found[name] = family_named(name).load_config(given)
    return dict(sorted(found.items()))


def outcome(format_name: str, family: str) -> Outcome:
    """What goes through a format, from a native checkpoint at tp=2 pp=2 and back."""
    model = family_models()[family]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        random_native(folder / "base", model, LAYOUT, dtype="F32")
        states, refusal = _whole_model(format_name, family, folder)
        adapter, why = _adapter(format_name, family, model, folder)
    if states or adapter:
        return Outcome(states + adapter)
    return Outcome("", why if "adapter" in refusal else refusal)  # of a format that takes nothing but adapters


def _whole_model(format_name: str, family: str, folder: Path) -> tuple[str, str]:
    opened = open_checkpoint(folder / "base", family=family)
    refusal = ""
    for optimizer in ("keep", "drop"):
        try:
            found = _through(format_name, opened, folder / optimizer, optimizer)
        except (ConversionError, LayoutError) as error:
            refusal = _reason(error, folder)
            continue
        moments = any(name.startswith("optim.") for name in found.source.schema)
        return "W" + "O" * moments + "T" * (found.training == opened.training), ""
    return "", refusal


def _adapter(format_name: str, family: str, model: ModelConfig, folder: Path) -> tuple[str, str]:
    targets = ("*.self_attn.*",) if model.moe else "all"  # peft has no adapters for our experts
    record = AdapterRecord(lora=LoraSpec(r=2, targets=targets), base=str(folder / "base"), base_fingerprint="")
    try:
        schema = adapter_tensors(model, record.lora, "F32")
        source = MemorySource(schema, random_arrays(schema))
        opened = OpenedCheckpoint("native", folder / "base", source, model, family=family, adapter=record)
        _through(format_name, opened, folder / "adapter", "keep")
    except (ConversionError, LayoutError) as error:
        return "", _reason(error, folder)
    return "A", ""


def _through(format_name: str, opened: OpenedCheckpoint, path: Path, optimizer: str) -> OpenedCheckpoint:
    """The checkpoint written and opened again, after proof that it holds the same; moments only where they are kept."""
    options = JobOptions(LAYOUT, optimizer=optimizer)  # type: ignore[arg-type]
    make_job(opened, formats()[format_name], path, options, operation="test").run(verify="crc")
    found = open_checkpoint(path, family=opened.family, vocab_size=opened.model.vocab_size)
    before = compute_fingerprints(opened.source)
    kept = {n: text for n, text in before.items() if optimizer == "keep" or not n.startswith("optim.")}
    assert compute_fingerprints(found.source) == kept
    lost = {name: both for name, both in model_differences(opened.model, found.model).items() if changes_outputs(name)}
    assert all(name.endswith("_token_id") for name in lost), lost  # which some formats leave to the tokenizer
    return found


def _reason(error: Exception, folder: Path) -> str:
    """Why, without the folder of this very try, and with the first of many tensors."""
    words = re.sub(rf"^{re.escape(str(folder))}/\w+: ", "", str(error))
    return re.sub(r"^((?:\d+ )?tensors? '[^']*'), .* (ha(?:s|ve) no place)", r"\1 and others \2", words)


def cells() -> dict[tuple[str, str], Outcome]:
    """Every outcome, by family and format."""
    return {(family, name): outcome(name, family) for family in family_models() for name in formats()}


def table(found: dict[tuple[str, str], Outcome]) -> str:
    """The matrix as Markdown, with the refusals below it."""
    names = list(formats())
    lines = [f"| family | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for family in family_models():
        lines.append(f"| {family} | {' | '.join(found[family, name].states or '–' for name in names)} |")
    lines += ["", ", ".join(f"{letter}: {words}" for letter, words in STATES.items()) + ". –: refused, since", ""]
    refused: dict[tuple[str, str], list[str]] = {}
    for (family, name), cell in found.items():
        if not cell.states:
            refused.setdefault((name, cell.refusal), []).append(family)
    for (name, why), those in sorted(refused.items()):
        lines.append(f"- {name}, {'all' if len(those) == len(family_models()) else ', '.join(those)}: {why}")
    return "\n".join(lines)


def recorded() -> str:
    """The matrix as the page has it."""
    return PAGE.read_text().partition(START)[2].partition(END)[0].strip()


def recorded_states() -> dict[tuple[str, str], str]:
    """The states of each cell of the page."""
    rows = [
        [word.strip() for word in line.strip("|").split("|")] for line in recorded().splitlines() if line[:1] == "|"
    ]
    return {
        (row[0], name): "" if cell == "–" else cell
        for row in rows[2:]
        for name, cell in zip(rows[0][1:], row[1:], strict=True)
    }


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}\n\n{table(cells())}\n\n{END}{rest.partition(END)[2]}")
