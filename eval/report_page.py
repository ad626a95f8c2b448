"""`mint-mlx report`: a checkpoint's page, and its pictures for the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..base.errors import MintError
from ..base.quant_config import AFFINE_BITS, KEEP
from ..base.units import both, count, human
from ..base.versions import versions
from ..rules.efforts import SPREAD, band_text
from ..runtime.kvcache import PREFILL
from ..runtime.memory import GIB, MAC_SIZES, Needs, gpu_limit, needs, smallest_mac
from .card import windows_text
from .checkpoint_facts import Expectation, Facts
from .kinds import with_error
from .measured import MeasuredTable
from .page import Cell, Page, Passage, Section, Table
from .pictures.heat_map import column_lines, heat_map
from .pictures.loss_map import loss_map, shares
from .pictures.mac_bars import Load, mac_bars
from .pictures.size_curve import Marked, UniformPoint, size_curve
from .pictures.token_histogram import token_histogram
from .protocol import context_of
from .stats import half_interval

PICTURES = {  # what a card says of them
    "report-plan": "the plan: bits of every layer",
    "report-loss": "where the expected loss sits",
    "report-size": "KL divergence against size",
    "report-tokens": "KL divergence by token",
    "report-macs": "memory that it takes, and Macs",
}
CONTEXTS = (8_192, 32_768, 131_072)


def checkpoint_page(facts: Facts) -> Page:
    """The page of a checkpoint, of all that is known of it."""
    sections = [_plan_section(facts), _loss_section(facts), _size_section(facts)]
    sections += [_token_section(facts), _mac_section(facts)]
    sections += [_further(table, i) for i, table in enumerate(facts.measured.tables)]
    sections.append(_provenance(facts))
    origin = facts.plan.origin.source if facts.plan is not None else ""
    lead = f"A quantized checkpoint of {origin} for MLX." if origin else "A checkpoint for MLX."
    return Page(facts.folder.resolve().name, lead, _facts(facts), sections)


def _facts(facts: Facts) -> list[tuple[str, str]]:
    """The figures at the top."""
    model = facts.model
    listed = [
        ("size", human(model.bytes)),
        ("bits per weight", f"{model.bits_per_weight:.2f}"),
        ("parameters", count(model.parameters)),
        ("read per token", human(model.inventory.active_bytes(model.plan.choice))),
    ]
    speed = model.plan.speed
    if speed is not None:
        where = f"predicted tokens per second, {speed.machine}, context of {_tokens(speed.context)}"
        listed.append((where, str(speed)))
    if facts.expectation is not None and facts.expectation.is_kl:
        listed.append(("expected KL, nats per token", band_text(facts.expectation.loss)))
    figures = facts.measured.figures
    if figures is not None:
        listed.append(("measured KL, nats per token", with_error(figures["kl"], figures["kl_se"])))
        listed.append(("same most likely token", f"{figures['same_top1']:.1%}"))
    context = _contexts(facts)[0]
    mac = smallest_mac(model.bytes, _needs(facts, context))
    if mac is not None:
        listed.append((f"smallest Mac, context of {_tokens(context)}", f"{mac} GiB"))
    return listed


def _plan_section(facts: Facts) -> Section:
    model = facts.model
    title = f"{facts.folder.resolve().name}: {human(model.bytes)}, {model.bits_per_weight:.2f} bpw"
    forms: dict[str, list[int]] = {}
    for layer in model.layers:
        line = forms.setdefault(str(layer.config), [0, 0, 0])
        line[0] += 1
        line[1] += layer.weights
        line[2] += layer.bytes
    lines = [
        [name, str(layers), count(weights), human(size), f"{size / model.bytes:.1%}"]
        for name, (layers, weights, size) in sorted(forms.items())
    ]
    return Section(
        "plan",
        "The plan",
        (
            "Blocks go down, projections across. Colour is bits, hatching the group size, and a "
            "bar's area its bytes. All experts of one projection in one block are one bar, since "
            "MLX stores them in one tensor.",
        ),
        (heat_map(model.layers, title),),
        (
            Table("By configuration", ("as", "layers", "weights", "bytes", "share"), lines),
            Table(
                "By projection",
                ("projection", "layers", "as", "bytes", "share"),
                column_lines(model.layers),
                folded=True,
            ),
        ),
    )


def _loss_section(facts: Facts) -> Section:
    title = "Where the expected loss sits"
    expectation = facts.expectation
    if expectation is None:
        return Section("loss", title, (f"Not known: {facts.missing}.",))
    kind = "expected KL" if expectation.is_kl else "loss"
    text = (
        f"Each layer's part of the {kind} that the objective {expectation.objective} predicts from "
        "the measured rounding errors, before anything was refined. A good plan spends bytes where "
        "the loss is: parts that are large in loss and small in bytes are what more bytes would go "
        "to first."
    )
    listed = shares(facts.model.layers, expectation.losses)
    lines = [[share.label, f"{share.loss:.1%}", f"{share.bytes:.1%}"] for share in listed]
    worst = sorted(expectation.losses.items(), key=lambda item: -item[1])[:20]
    total = sum(expectation.losses.values()) or 1.0
    layers = {layer.path: layer for layer in facts.model.layers}
    top = [
        [path, str(layers[path].config), human(layers[path].bytes), f"{loss / total:.1%}"]
        for path, loss in worst
    ]
    return Section(
        "loss",
        title,
        (text,),
        (loss_map(facts.model.layers, expectation.losses),),
        (
            Table("By projection", ("projection", "loss", "bytes"), lines, folded=True),
            Table("The 20 layers of largest loss", ("layer", "as", "bytes", "loss"), top, True),
        ),
    )


def _size_section(facts: Facts) -> Section:
    title = "Divergence against size"
    expectation = facts.expectation
    if expectation is None:
        return Section("size", title, (f"No curve is known: {facts.missing}.",))
    figures = facts.measured.figures or {}
    # A measured KL has no place on a scale of other losses.
    scored = figures if expectation.is_kl else {}
    error = scored.get("kl_se")
    half = half_interval(error, scored["windows"]) if error else None
    marked = Marked(facts.model.bytes, expectation.loss, scored.get("kl"), half)
    picture = size_curve(expectation.curve, marked, expectation.uniform)
    lines = [
        [
            f"{point.bits_per_weight:.2f} bpw",
            human(point.bytes),
            band_text(point.loss) if point.band else f"{point.loss:.3g}",
        ]
        for point in expectation.curve.points
    ]
    uniform = [[p.config, human(p.bytes), f"{p.loss:.3g}"] for p in expectation.uniform]
    head = "expected KL" if expectation.is_kl else "loss"
    return Section(
        "size",
        title,
        tuple(_size_texts(expectation, figures, facts.model.bytes)),
        (picture,),
        (
            Table("Plans of other sizes", ("bits per weight", "size", head), lines, folded=True),
            Table("Uniform, groups of 64", ("as", "size", head), uniform, folded=True),
        ),
    )


def _size_texts(expectation: Expectation, figures: Mapping[str, Any], size: int) -> list[str]:
    """What the curve says in words."""
    texts = []
    if expectation.is_kl:
        texts.append(
            "KL divergence of the source's next-token distribution from the model's, as the "
            f"model's sensitivity predicts it; on other models the true one was {SPREAD[0]} to "
            f"{SPREAD[1]} times that, more where little is lost. Plans of the curve are rounded by "
            f"`{expectation.quantizer}`, as this checkpoint is; uniform quantization is mlx-lm's, "
            "rounded to nearest."
        )
    else:
        texts.append(
            f"The loss of the objective {expectation.objective}: it ranks plans, and is no "
            "divergence. Uniform quantization is mlx-lm's, rounded to nearest."
        )
    at = uniform_at(expectation.uniform, size)
    if at is not None and expectation.loss > 0:
        texts.append(
            f"At these bytes the prediction is {expectation.loss:.2g} for this checkpoint and "
            f"{at:.2g} for uniform quantization (between its sizes by interpolation), each as "
            "uncertain as the other: `mint-mlx compare` measures both."
        )
    if len(expectation.uniform) < len(AFFINE_BITS):
        texts.append(
            "Uniform sizes are missing where the errors of some layer weren't measured: the "
            "recipe of the family rules so few bits out for it."
        )
    if figures:
        texts.append(
            f"Measured on {figures['text']}: {with_error(figures['kl'], figures['kl_se'])} nats "
            "per token."
        )
    return texts


def uniform_at(points: Sequence[UniformPoint], size: int) -> float | None:
    """Uniform quantization's loss at a size between two of its own; None outside of them."""
    ordered = sorted(points, key=lambda point: point.bytes)
    for low, high in pairwise(ordered):
        if low.bytes <= size <= high.bytes and low.loss > 0 and high.loss > 0:
            share = math.log(size / low.bytes) / math.log(high.bytes / low.bytes)
            return math.exp((1 - share) * math.log(low.loss) + share * math.log(high.loss))
    return None


def _token_section(facts: Facts) -> Section:
    title = "Divergence by token"
    figures = facts.measured.figures
    if figures is None:
        return Section(
            "tokens",
            title,
            ("Not measured: `mint-mlx report CHECKPOINT --source SOURCE` measures it.",),
        )
    spread = figures["spread"]
    floor = figures["noise_floor"]
    text = (
        f"{figures['text']}: {windows_text(figures)} tokens, "
        f"{figures['tokens']:,} tokens, held against {figures['source']}"
        f"{'' if floor is None else f'; the noise floor is {floor:.1g}'}. Half of the whole KL is "
        f"made by {spread['half']:.2%} of the tokens."
    )
    table = [
        ("perplexity", with_error(figures["perplexity"], figures["perplexity_se"])),
        ("KL, mean", with_error(figures["kl"], figures["kl_se"])),
        *((f"KL, {name}", f"{figures[key]:.3g}") for name, key in QUANTILES),
        ("same most likely token", f"{figures['same_top1']:.2%}"),
    ]
    worst: list[list[Cell]] = [
        [
            str(i + 1),
            f"{place['kl']:.3g}",
            Passage(*(_one_line(place[key]) for key in ("before", "token", "after"))),
            f"{place['source']:.2%}",
            f"{place['model']:.2%}",
            _one_line(place["favourite"]),
        ]
        for i, place in enumerate(spread["worst"])
    ]
    columns = (
        "",
        "KL",
        "the token in its context",
        "source",
        "this model",
        "source's first choice",
    )
    caption = (
        "The tokens of largest KL: the marked token came, with these probabilities of both models"
    )
    return Section(
        "tokens",
        title,
        (text,),
        (token_histogram(spread, figures),),
        (Table(caption, columns, worst),),
        table,
    )


QUANTILES = (
    ("median", "kl_median"),
    ("90 %", "kl_p90"),
    ("99 %", "kl_p99"),
    ("99.9 %", "kl_p999"),
    ("largest", "kl_max"),
)


def _one_line(text: str) -> str:
    """A text whose ends of lines are shown."""
    return text.replace("\n", "↵")


def _mac_section(facts: Facts) -> Section:
    """What it takes to run it, and which Macs can."""
    title = "Sizes and Macs"
    model = facts.model
    contexts = _contexts(facts)
    running = [(context, _needs(facts, context)) for context in contexts]
    known = [(context, need) for context, need in running if need is not None]
    if not known:
        return Section("macs", title, (f"It has {both(model.bytes)}; its cache is unknown.",))

    # The source beside it, unquantized, at the shortest context.
    first = known[0][1]
    beside = first.cache + first.workspace
    sizes = [(f"context of {_tokens(context)}", model.bytes, need) for context, need in known]
    loads = [Load(label, size, need.cache + need.workspace) for label, size, need in sizes]
    plain = model.inventory.layout({layer.path: KEEP for layer in model.layers}).total
    if plain > model.bytes * 1.05:
        loads.append(Load(f"in 16 bits, {_tokens(known[0][0])}", plain, beside))
    lines = [
        [
            f"{gib} GiB",
            human(gpu_limit(gib * GIB)),
            *(
                "yes" if gpu_limit(gib * GIB) >= model.bytes + need.total else "no"
                for _, need in known
            ),
        ]
        for gib in MAC_SIZES
    ]
    text = (
        f"The weights take {both(model.bytes)}. A cache in 16 bits and the workspace of a prompt "
        f"(read {PREFILL} tokens at a time) come to that, and a reserve of 1 GiB; macOS leaves a "
        "part of the memory to the GPU, which can be raised (`mint-mlx convert --fit this-mac` "
        "says how)."
    )
    columns = (
        "Mac",
        "the GPU may use",
        *(f"context of {_tokens(context)}" for context, _ in known),
    )
    return Section(
        "macs", title, (text,), (mac_bars(loads),), (Table("Which Macs run it", columns, lines),)
    )


def _contexts(facts: Facts) -> list[int]:
    """The contexts to tell of, up to the longest that the model states."""
    longest = context_of(facts.config) or CONTEXTS[0]
    return [c for c in CONTEXTS if c <= longest] or [min(CONTEXTS[0], longest)]


def _tokens(context: int) -> str:
    """A context in words: `32K`."""
    return f"{context // 1024}K" if context % 1024 == 0 else str(context)


def _needs(facts: Facts, context: int) -> Needs | None:
    """What running it takes; None where its cache's kind is unknown."""
    try:
        return needs(facts.config, facts.model.inventory, context)
    except MintError:
        return None


def _further(table: MeasuredTable, number: int) -> Section:
    """A section of another measurement."""
    shown = Table(table.title, table.columns, table.lines)
    return Section(f"further-{number + 1}", table.title, (table.text,), (), (shown,))


def _provenance(facts: Facts) -> Section:
    """What it was made from and how."""
    model = facts.model
    items = [("model type", model.model_type), ("weights", f"fingerprint {facts.fingerprint}")]
    plan = facts.plan
    if plan is None:
        texts = ("It holds no plan of mint-mlx that fits its weights.",)
    else:
        texts = (
            "`mint-mlx convert SOURCE --plan mint-plan.yaml` carries the same plan out again.",
        )
        tools = ", ".join(f"{name} {number}" for name, number in plan.versions.items())
        items += [
            ("source", plan.origin.source or "not stated"),
            ("revision", plan.origin.revision or "not stated"),
            ("source's fingerprint", plan.origin.fingerprint),
            ("budget", plan.budget or "none"),
            ("recipe", plan.recipe),
            ("objective", plan.objective or "none"),
            ("quantizer", plan.quantizer),
            ("effort", plan.effort),
            ("parts", plan.parts),
        ]
        items += [("made with", tools)] if tools else []
        items += [("from the best choice", f"at most {plan.gap:.3%}")] if plan.gap else []
    if facts.refined:
        before, after = facts.refined["kl_before"], facts.refined["kl_after"]
        items.append(("refined", f"KL on held-out text of its own {before:.4g} -> {after:.4g}"))
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    items.append(("this report", made))
    return Section("provenance", "Provenance", texts, items=items)
