"""What users of `mlx_lm.convert` type out of habit, read as this program's own words.

    convert --hf-path org/name -q --q-bits 4   ->   convert org/name --uniform 4bit-g64

None of these options is in `--help`. (`-d`, `--dtype`, `--upload-repo` are options here as well.)
"""

from __future__ import annotations

from collections.abc import Sequence

from ..base.errors import UsageError
from ..base.quant_config import MX_MODES

VALUES = {  # options that take a value, by mlx-lm's names
    "--hf-path": "model",
    "--model": "model",
    "--mlx-path": "out",
    "--q-bits": "bits",
    "--q-group-size": "group",
    "--q-mode": "mode",
    "--quant-predicate": "predicate",
}
SWITCHES = {
    "-q": "quantize",
    "--quantize": "quantize",
    "--trust-remote-code": "code",
}
SIZES = ("--budget", "--fit", "--plan", "--uniform")  # what says how to quantize here
MIXED = (
    "--quant-predicate {}: bits are mixed for each model here, give --budget 4.5bpw (and `compare "
    "--methods` for mlx-lm's own recipes)"
)


def own_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line with those of `mlx_lm.convert` translated.

    Args:
        words: what was typed after `mint-mlx`.

    Returns:
        The words to parse, and remarks for the user.

    Raises:
        UsageError: an option has no counterpart, or none beside the others; the sentence says what
            to give.
    """
    if not words or words[0] != "convert":
        return list(words), []
    others, given = _sorted(words[1:])
    if "predicate" in given:
        raise UsageError(MIXED.format(given["predicate"]))

    notes = []
    if "code" in given:
        notes.append(
            "code that a checkpoint brings is never run: --trust-remote-code has no effect"
        )
    uniform = _uniform(given)
    sized = next((word for word in others if word.partition("=")[0] in SIZES), None)
    if uniform and sized and given.keys() & {"bits", "group", "mode"}:
        raise UsageError(
            f"{sized.partition('=')[0]} says how to quantize: leave --q-bits, --q-group-size and "
            "--q-mode out"
        )
    if uniform and not sized:
        others += ["--uniform", uniform]
        notes.append(
            f"read as --uniform {uniform}, the same for every layer, as mlx-lm does; --budget "
            f"{_bits_per_weight(uniform):g}bpw gives a better model of that size"
        )
    out = ["--out", given["out"]] if "out" in given else []
    model = [given["model"]] if "model" in given else []
    return ["convert", *model, *others, *out], notes


def _sorted(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words that aren't mlx-lm's, and the values of those that are, by the names above.

    Raises:
        UsageError: an option lacks its value.
    """
    others: list[str] = []
    given: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if word in SWITCHES:
            given[SWITCHES[word]] = ""
        elif option in VALUES:
            if not equals and not rest:
                raise UsageError(f"{option} lacks its value")
            given[VALUES[option]] = value if equals else rest.pop(0)
        else:
            others.append(word)
    return others, given


def _uniform(given: dict[str, str]) -> str | None:
    """The configuration that mlx-lm's options name, with mlx-lm's own defaults; None without any.

    Raises:
        UsageError: a mode has other bits or groups.
    """
    if not given.keys() & {"quantize", "bits", "group", "mode"}:
        return None
    mode = given.get("mode", "affine")
    if mode not in MX_MODES:
        if mode != "affine":
            raise UsageError(f"--q-mode must be affine, {', '.join(MX_MODES)} (got {mode})")
        return f"{given.get('bits', '4')}bit-g{given.get('group', '64')}"
    bits, group = map(str, MX_MODES[mode])
    if given.get("bits", bits) != bits or given.get("group", group) != group:
        raise UsageError(
            f"{mode} has {bits} bits in groups of {group}: leave --q-bits and --q-group-size out"
        )
    return mode


def _bits_per_weight(uniform: str) -> float:
    """Bits of a configuration with its scales (and biases, 16 bits each; MX modes have 8)."""
    if uniform in MX_MODES:
        bits, group = MX_MODES[uniform]
        return bits + 8 / group
    bits_text, _, group_text = uniform.partition("bit-g")
    known = bits_text.isdigit() and group_text.isdigit() and int(group_text) > 0
    return int(bits_text) + 32 / int(group_text) if known else 4.5
