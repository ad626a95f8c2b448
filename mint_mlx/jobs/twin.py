"""A model's quantized twin, which writes the text in its place where the model itself doesn't fit.

A model that is larger than memory writes its text by streamed passes, which take long and whose
text is worse (measure/self_text.py). What `--effort fast` makes of it fits, and its text serves as
well as the source's own (docs/research-log.md). All else is measured on the source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from ..allocation.allocate import allocate
from ..allocation.plan import Plan
from ..allocation.plan_file import read_plan
from ..allocation.search_space import search_space
from ..base.distributed import ranks
from ..base.errors import MintError
from ..base.files import PLAN_FILE
from ..base.folders import CHECKPOINT, UNMARKED, WORK, is_checkpoint
from ..base.remove import Kind
from ..base.report import Part, Report
from ..base.scratch import scratch_folder
from ..base.targets import OLD, check_target
from ..base.units import Budget, both
from ..checkpoint.layers import list_layers
from ..checkpoint.source import Source, load_source, open_model
from ..checkpoint.tokenizer import has_runnable_tokenizer, load_tokenizer
from ..converters.output.conversion import Conversion
from ..converters.output.write import write
from ..measure.profile import Profile
from ..measure.self_text import room_beside
from ..rules.efforts import EFFORTS
from ..runtime.device import on_cpu
from ..runtime.memory import largest_model
from ..runtime.runner import fits
from .model import Job, other_model

NAME = "twin"  # of its folder within a temporary one
LARGEST = Decimal("8.5")  # bits per weight: text of finer ones is the source's, but for chance
STAGES = (f"{NAME}: convert", f"{NAME}: verify")
ELSEWHERE = "choose another folder with --work-dir, or give --no-twin"
TWIN = Kind(
    "a folder with a twin",
    (),
    {NAME: UNMARKED, f"{NAME}.partial": WORK, f"{NAME}{OLD}-[0-9]*": CHECKPOINT},
)


@dataclass(frozen=True)
class Wish:
    """What is asked for of a twin.

    Attributes:
        given: a checkpoint that serves as one (see `given_twin`).
        writes: whether one is written, if there is room for it.
        keep: the folder in which that one stays; None where it is dropped.
    """

    given: Source | None = None
    writes: bool = False
    keep: Path | None = None


@dataclass(frozen=True)
class Twin:
    """A twin that writes a model's text.

    Attributes:
        bytes: of its safetensors files.
        bits_per_weight: of the same.
        key: names its text in the cache.
        given: the checkpoint, where there is one already.
        plan: what it is made by, where there is none yet.
        keep: the folder in which it stays; None for one that is dropped, or given.
    """

    bytes: int
    bits_per_weight: float
    key: str
    given: Source | None = None
    plan: Plan | None = None
    keep: Path | None = None

    @property
    def dropped(self) -> int:
        """Bytes that lie in the temporary folder while the text is written."""
        return self.bytes if self.plan is not None and self.keep is None else 0

    @property
    def stays(self) -> int:
        """Bytes that are still to be written into the folder in which it stays."""
        return self.bytes if self.keep is not None and not self.keep.exists() else 0

    def __str__(self) -> str:
        return f"twin {self.bits_per_weight:.2f}bpw: {both(self.bytes)}"


def wish_of(
    job: Job, twin: str | None = None, keep: str | Path | None = None, never: bool = False
) -> Wish:
    """What words ask for of a model's twin.

    Without any, one is written for a model that doesn't fit in memory; not on a CPU, where
    quantized weights are multiplied slowly, nor with several machines.

    Args:
        job: the model.
        twin: a checkpoint that serves as one: a folder or a Hub id.
        keep: the folder in which one is written, and stays.
        never: the model writes its text itself, even by streamed passes.

    Raises:
        MintError: the checkpoint can't be one of this model.
    """
    if twin is not None:
        return Wish(given=given_twin(twin, job))
    if keep is not None:
        return Wish(writes=True, keep=Path(keep))
    return Wish(writes=not (never or on_cpu() or ranks().size > 1 or fits(job.source.path)))


def given_twin(name: str, job: Job) -> Source:
    """An existing checkpoint that is to write a model's text.

    Args:
        name: a folder or a Hub id.
        job: the model.

    Raises:
        MintError: it is not a quantized checkpoint of the same model, or doesn't fit in memory.
    """
    twin = load_source(name, weights=False)
    if twin.fingerprint == job.source.fingerprint:
        raise MintError(
            f"{name} is the model itself: give a quantized checkpoint of it, or leave --twin out"
        )
    if (difference := other_model(twin, job.source)) is not None:
        raise MintError(difference)
    plan = twin.path / PLAN_FILE
    if plan.is_file() and not (origin := read_plan(plan).origin).matches(job.source.origin):
        raise MintError(
            f"{twin.name} is no twin of {job.source.name}: it was made from other weights "
            f"({origin.source or 'unnamed'})"
        )
    _check_layers(twin, job)
    _check_vocabulary(twin, job)
    if not fits(twin.path, packed=True):
        raise MintError(
            f"the twin {twin.name} ({both(twin.weight_bytes)}) does not fit in memory either: give "
            "a smaller one, or leave --twin out"
        )
    return twin


def _check_layers(twin: Source, job: Job) -> None:
    """Refuse a twin with other layers than the model's (a MintError)."""
    theirs = {
        layer.path: layer.shape for layer in list_layers(open_model(twin), twin.config).layers
    }
    ours = {layer.path: layer.shape for layer in _text_job(job).inventory.layers}
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            raise MintError(
                f"{twin.name} is no twin of {job.source.name}: their {path} has the shapes "
                f"{theirs.get(path)} and {ours.get(path)}"
            )


def _check_vocabulary(twin: Source, job: Job) -> None:
    """Refuse a twin whose tokenizer gives tokens other numbers (a MintError)."""
    folders = twin.path, job.source.path
    if not all(map(has_runnable_tokenizer, folders)):
        return
    theirs, ours = (load_tokenizer(folder).get_vocab() for folder in folders)
    if theirs != ours:
        raise MintError(
            f"{twin.name} is no twin of {job.source.name}: its tokenizer has other tokens"
        )


def find_twin(job: Job, wish: Wish, profile: Profile | None, tokens: int) -> Twin | None:
    """The twin that writes a model's text; None where the model does so itself.

    Args:
        job: the model.
        wish: what is asked for.
        profile: the model's; needed where a twin is written.
        tokens: of the text.

    Raises:
        MintError: one that is asked for would not fit in memory.
    """
    if wish.given is not None:
        size = wish.given.weight_bytes
        parameters = job.inventory.parameters
        return Twin(size, size * 8 / parameters, _digest(wish.given.identity), given=wish.given)
    if not wish.writes:
        return None

    assert profile is not None
    plan = _plan(job, profile, tokens)
    if plan is None:
        if wish.keep is None:
            return None
        raise MintError("the smallest twin does not fit in memory either: leave --keep-twin out")
    inventory = _text_job(job).inventory
    size = plan.layout(inventory).total
    key = _digest({path: str(config) for path, config in plan.choice.items()})
    return Twin(size, size * 8 / inventory.parameters, key, plan=plan, keep=wish.keep)


def _plan(job: Job, profile: Profile, tokens: int) -> Plan | None:
    """The largest twin that fits beside its caches, else the smallest that fits; None for none.

    No larger than LARGEST.
    """
    job = _text_job(job)
    space = search_space(job.inventory, job.recipe)
    profile = replace(profile, inventory=job.inventory)
    fast = EFFORTS["fast"]

    # On a CPU an embedding is held in float32 (runner.PACKED).
    most = largest_model()
    if on_cpu():
        most -= sum(4 * layer.size for layer in job.inventory.layers if layer.role == "embedding")
    finest = Budget("", bits_per_weight=LARGEST).resolve(job.inventory.parameters) or 0
    beside = min(most, room_beside(job.source.config, tokens), finest)

    plan = allocate(profile, Budget("smallest"), space, fast.objective)
    least = plan.layout(job.inventory).total
    if least > most:
        return None
    if least < beside:
        budget = Budget("as a twin", bytes=beside)
        plan = allocate(profile, budget, space, fast.objective)
    return replace(plan, quantizer=fast.quantizer, parts=job.parts, effort="fast")


def _text_job(job: Job) -> Job:
    """The same model without a tower or blocks for multi-token prediction, which write no text."""
    if job.parts == "text":
        return job
    inventory = list_layers(open_model(job.source), job.source.config)
    return replace(job, inventory=inventory, parts="text")


@contextmanager
def open_twin(job: Job, twin: Twin, report: Report) -> Iterator[Source]:
    """A twin's checkpoint, written first where there is none, and dropped at the end unless kept.

    Raises:
        MintError: the disk has no room for it, or something else stands where it is to be kept.
    """
    if twin.given is not None:
        source = twin.given
        name = str(source.path) if source.has_weights else f"{source.name}@{source.revision}"
        yield load_source(name)
    elif twin.keep is not None:
        write_kept(job, twin, report)
        yield load_source(str(twin.keep))
    else:
        with scratch_folder(TWIN) as folder:
            _write(job, twin, folder / NAME, report, ELSEWHERE)
            yield load_source(str(folder / NAME))


def write_kept(job: Job, twin: Twin, report: Report) -> None:
    """Write a twin that stays, unless it stands there already.

    Raises:
        MintError: something else stands there, or there is no room.
    """
    assert twin.keep is not None and twin.plan is not None
    if not twin.keep.exists():
        check_target(twin.keep, job.source.path, force=False, option="--keep-twin")
        _write(job, twin, twin.keep, report, "choose another folder with --keep-twin")
        return
    same = False
    if twin.keep.is_dir() and is_checkpoint(twin.keep) and (twin.keep / PLAN_FILE).is_file():
        plan = read_plan(twin.keep / PLAN_FILE)
        same = plan.origin.matches(job.source.origin) and plan.choice == twin.plan.choice
    if not same:
        raise MintError(
            f"{twin.keep} exists already and is not the twin that would be written: choose another "
            f"folder with --keep-twin, or use it as it is with --twin"
        )


def _write(job: Job, twin: Twin, target: Path, report: Report, elsewhere: str) -> None:
    """Write a twin's checkpoint."""
    assert twin.plan is not None
    job = _text_job(job)
    part = Part(NAME, report)
    write(
        Conversion(job.source, job.inventory, twin.plan, target, report=part, elsewhere=elsewhere)
    )


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
