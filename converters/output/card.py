"""The model card: what the checkpoint is, what it was made from, how to run it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...allocation.plan import Plan
from ...allocation.uniform import active_ratio
from ...base.units import both, count
from ...checkpoint.known_differences import known_differences
from ...checkpoint.layers import Inventory
from ...checkpoint.run_command import pipeline_tag, python_lines, python_text, run_command
from ...checkpoint.source import Source
from ...rules.efforts import EFFORTS
from ...rules.objectives import needs_sensitivity
from ...runtime.speed_table import describe_speed
from ..quantizers.registry import needs_inputs

RESULTS = "<!-- results -->"  # before and after a card's table of what was measured
RESULTS_END = "<!-- end -->"
_SECTION = re.compile(f"{re.escape(RESULTS)}.*?{re.escape(RESULTS_END)}\n\n", re.DOTALL)
_PICTURE = re.compile(r"!\[[^\]\n]*\]\([\w.-]+\.png\)\n\n")


def config_table(plan: Plan, inventory: Inventory) -> list[tuple[str, int, int, int]]:
    """Rows of (configuration, layers, weights, bytes), fewest bits first."""
    table = []
    for config in sorted({plan.choice[layer.path] for layer in inventory.layers}):
        layers = [layer for layer in inventory.layers if plan.choice[layer.path] == config]
        weights = sum(layer.size for layer in layers)
        table.append(
            (str(config), len(layers), weights, sum(layer.bytes(config) for layer in layers))
        )
    return table


def model_card(
    plan: Plan,
    inventory: Inventory,
    total: int,
    source: Source,
    name: str,
    licence: Mapping[str, Any],
    folder: Path,
    base: str | None = None,
) -> str:
    """The text of a checkpoint's README.md.

    Args:
        plan: the plan that was carried out.
        inventory: the model's layers.
        total: bytes of all safetensors files.
        source: what was converted.
        name: of the checkpoint.
        licence: what the source's card says of its licence (card_facts.py).
        folder: that holds the checkpoint's tokenizer.
        base: the source's name on the Hub, where it isn't its own.
    """
    source_name = base or plan.origin.source
    is_on_hub = "/" in source_name

    # The metadata that the Hub shows.
    data: dict[str, Any] = {
        "library_name": "mlx",
        "pipeline_tag": pipeline_tag(inventory.towers),
        "tags": ["mlx", "mint-mlx"],
        **licence,
    }
    if is_on_hub:
        data["base_model"] = source_name
    quantized = any(config.quantized for config in plan.choice.values())
    if is_on_hub and quantized:
        data["base_model_relation"] = "quantized"

    link = f"[{source_name}](https://huggingface.co/{source_name})" if is_on_hub else source_name
    revision = f" at revision `{plan.origin.revision}`" if plan.origin.revision else ""
    saw_text = needs_sensitivity(plan.objective) or needs_inputs(plan.quantizer)
    seen = EFFORTS["balanced" if saw_text else "fast"].sees
    done = f"quantized with mint-mlx without calibration data: it saw {seen}"
    if not quantized:
        done = "written in 16 bits by mint-mlx"

    bits = total * 8 / inventory.parameters
    active = inventory.active_bytes(plan.choice)
    ratio = active_ratio(inventory, plan.choice)
    how = f"recipe `{plan.recipe}`"
    if plan.objective:
        how = f"objective `{plan.objective}`, {how}"
    tools = ", ".join(f"{tool} {number}" for tool, number in plan.versions.items())
    pace = _speed_line(plan)
    rows = "\n".join(
        f"| {config} | {layers} | {count(weights)} | {both(size)} |"
        for config, layers, weights, size in config_table(plan, inventory)
    )
    differences = "".join(
        f"- known difference: {text}\n" for text in known_differences(source.config)
    )
    return f"""---
{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---

# {name}

{link}{revision}, {done}.

- size: {both(total)}, {bits:.2f} bits per weight over {count(inventory.parameters)} parameters
- read per token when decoding: {both(active)}, {ratio:.2f}x of uniform 4bit-g64{pace}
- made with: {how}, quantizer `{plan.quantizer}` ({tools}); the whole plan is in `mint-plan.yaml`
{differences}
| configuration | layers | weights | bytes |
|---|---|---|---|
{rows}

```bash
pip install {"mlx-lm mlx-vlm" if inventory.towers else "mlx-lm"}
{run_command(folder, name, inventory.towers)}
```

```python
{python_lines(folder, name)}
```
"""


def _speed_line(plan: Plan) -> str:
    """The line of the predicted speed, where there is one."""
    if plan.speed is None:
        return ""
    goal = f" (planned for {plan.speed_goal})" if plan.speed_goal else ""
    return f"\n- decodes: {describe_speed(plan.speed)}{goal}"


def refined_card(text: str, name: str, before: float, after: float) -> str:
    """The card of a refined checkpoint: the old one with the new name and the gain.

    Args:
        text: the card of the checkpoint that it was made from; one that this program didn't write
            stays as it is.
        name: of the refined checkpoint.
        before, after: KL divergence from the source on held-out text, nats per token.
    """
    if not is_ours(text):
        return text
    # What was measured and drawn of the one before doesn't hold for the refined one.
    text = _SECTION.sub("", _PICTURE.sub("", renamed(text, name)))
    gain = (
        f"- then refined: scales and biases distilled, KL from the source {before:.4g} -> "
        f"{after:.4g} nats a token\n"
    )
    return re.sub(r"(- made with: .*\n)", lambda line: line[1] + gain, text, count=1)


def renamed(text: str, name: str) -> str:
    """A card of ours under another name of the checkpoint; any other card stays as it is.

    Args:
        text: the card.
        name: a folder's, or `org/name`.
    """
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    if title is None or not is_ours(text):
        return text
    old = title[1]
    for form, one, two in (
        ("# {}\n", old, name),
        ("load({})", *map(python_text, (old, name))),
        ("--model {} ", *map(shlex.quote, (old, name))),
        ("--model {}\n", *map(shlex.quote, (old, name))),
    ):
        text = text.replace(form.format(one), form.format(two))
    return text


def with_pictures(text: str, pictures: Mapping[str, str]) -> str:
    """A card of ours that shows pictures, before its commands; any other card stays as it is.

    Args:
        text: the card.
        pictures: by their files' names, what they show; those that it has aren't shown twice.
    """
    lines = "".join(
        f"![{alt}]({name})\n\n" for name, alt in pictures.items() if f"({name})" not in text
    )
    return text.replace("```bash\n", f"{lines}```bash\n", 1) if is_ours(text) else text


def with_results(text: str, lines: Sequence[str]) -> str:
    """A card of ours with a table of results in place of an earlier one; any other stays as it is.

    Args:
        text: the card.
        lines: of Markdown.
    """
    if not is_ours(text):
        return text
    section = "\n".join([RESULTS, "", *lines, "", RESULTS_END, "", ""])
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: section, text, count=1)
    return text.replace("```bash\n", f"{section}```bash\n", 1)


def is_ours(text: str) -> bool:
    """Whether mint-mlx wrote a card."""
    return "- made with: " in text and re.search(r"^# (.+)$", text, re.MULTILINE) is not None
