"""Errors that a user meets: one sentence each, that says what is wrong and what to do.

`MintError` is raised by our own checks. `explain` puts exceptions of other libraries into words,
for causes that lie outside this program (network, disk, permissions). Any other exception is a bug
and is reported as one.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

NOT_FINITE = (
    "holds NaN or infinite values: the checkpoint is damaged, download it again (or convert it as "
    "it is with --effort fast --allow-nonfinite)"
)
TAKE_BFLOAT16 = "bfloat16 can, so convert the model with --dtype bfloat16"
TOO_LARGE = f"holds weights above 65504, which float16 cannot hold: {TAKE_BFLOAT16}"
FULL = (
    "the disk is full{}: free some space (or choose another folder) and run the same command "
    "again; finished work is kept"
)
ON_GPU_ONLY = "only supported on the GPU"  # in MLX's message about what its CPU backend lacks
OPEN_FILES = (
    "too few files may be open at once for mlx-lm: raise the limit with `ulimit -n 4096`, and its "
    "hard one with `ulimit -Hn`"
)
NO_MEMORY = "there is too little memory: close other programs, or raise the limit (`ulimit -v`)"
OUTSIDE = (  # what others do to files while this program runs, and what paths can be
    *(errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.EIO, errno.ESTALE, errno.EPIPE, errno.ENXIO, errno.ENODEV, errno.EBUSY),
)
FOR_METAL = "mlx-lm has parts of this model for Metal only: run this on a Mac"
NO_SPACE = ("Unable to write", "No space left")  # in what MLX says of a full disk
NOT_COMPILED = "[Compile::eval_cpu] Failed"  # how MLX's message begins, without a compiler or room
COMPILER = (
    "MLX could not compile for this CPU: it needs g++ (on Debian: apt install g++) and some free "
    "space in the folder for temporary files (TMPDIR)"
)
# In MLX's messages about a kernel that exists for Metal only: where there is none, and on a Mac
# where it is put on the CPU.
METAL_ONLY = ("No Metal back-end", "[metal_kernel] Only supports the GPU")

UNREACHABLE = {  # what huggingface_hub and its transports raise without a network
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "ConnectError",
    "TimeoutException",
    "ProxyError",
}
AWAY = "the Hugging Face Hub cannot be reached and {} is not complete in the local cache"
TRY_AGAIN = (
    "check the connection (or HF_HUB_OFFLINE) and run the same command again; finished files are "
    "kept"
)

# What huggingface_hub and its transports raise: names of classes, and the sentence for them. The
# first line that names a class of the exception counts, so subclasses stand before their bases;
# {} takes the first line of the exception's own text.
HUB_ERRORS = (
    (
        {"GatedRepoError"},
        "this model is gated: accept its licence on its Hugging Face page, then run `hf auth "
        "login` with a token that may read it",
    ),
    (
        {"RevisionNotFoundError"},
        "this revision does not exist on the Hugging Face Hub: check the part after '@'",
    ),
    (
        {"RepositoryNotFoundError"},
        "no such model on the Hugging Face Hub, or it is private: check the name (org/name), "
        "and log in with `hf auth login` if it is private",
    ),
    (
        {"IncompleteSnapshotError"},
        "the model is only half downloaded: run the same command again while online; finished "
        "files are kept",
    ),
    (
        {"HFValidationError"},
        "this is neither a folder nor a model name of the Hugging Face Hub (org/name, of letters, "
        "digits, '-', '_' and '.', no '--' or '..', no '.git' at the end): check the spelling",
    ),
    (
        {"NotASafetensorsRepoError"},
        "the repository's safetensors shards have no index: give a checkpoint with "
        "model.safetensors.index.json",
    ),
    (UNREACHABLE, f"{AWAY.format('the model')}: {TRY_AGAIN}"),
    (
        {"EntryNotFoundError"},
        "the repository lacks a file that is needed, give another model or revision: {}",
    ),
    (
        {"HfHubHTTPError", "HTTPStatusError", "TransportError"},
        "the Hugging Face Hub answered with an error, try again later: {}",
    ),
)
TRANSFER_WORDS = ("CAS Client Error", "hf_xet", "Reqwest")  # in RuntimeErrors of hf_xet


class MintError(Exception):
    """A refusal or a failure with a known cause. Its text is one sentence for the user."""


class NeedsWeights(MintError):
    """Headers alone don't tell what a checkpoint is: its weights are needed on this machine."""


class UsageError(MintError):
    """The command line or an argument is malformed (exit code 2)."""


@contextmanager
def naming(model: str) -> Iterator[None]:
    """Name the model where the Hub can't be reached for it, and what else can be given.

    Raises:
        MintError: in place of such an error; any other passes through.
    """
    try:
        yield
    except Exception as error:
        if not UNREACHABLE & {cls.__name__ for cls in type(error).__mro__}:
            raise
        raise MintError(
            f"{AWAY.format(model)}: {TRY_AGAIN}, or give a folder that holds the model"
        ) from error


def explain(error: BaseException) -> str | None:
    """The sentence for an exception raised outside this package; None for an unknown cause."""
    if isinstance(error, MintError):
        return str(error)
    if isinstance(error, OSError):
        sentence = _explain_os(error)
        if sentence:
            return sentence
    if isinstance(error, MemoryError) or _lacks_memory(error):
        return NO_MEMORY
    if isinstance(error, ValueError) and "raise maximum limit" in str(error):  # as mlx-lm starts
        return OPEN_FILES
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # by pathlib
        return "this user has no home folder: set HOME, or MINT_MLX_CACHE to a folder for the cache"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"the name {error.object!r} is not valid UTF-8: choose another one"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in NO_SPACE):
        return FULL.format("")
    if isinstance(error, RuntimeError) and NOT_COMPILED in str(error):
        return COMPILER
    if is_for_metal(error):
        return FOR_METAL
    return _explain_hub(error)


def is_for_metal(error: BaseException) -> bool:
    """Whether MLX can't run a kernel because it exists for Metal only."""
    return isinstance(error, (RuntimeError, ValueError)) and any(
        words in str(error) for words in METAL_ONLY
    )


def is_passing(error: BaseException) -> bool:
    """Whether code failed for want of disk, memory or files alone: it tells nothing of a model."""
    if isinstance(error, MemoryError | OSError) or _lacks_memory(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_SPACE)


def _lacks_memory(error: BaseException) -> bool:
    """Whether a library couldn't be loaded, or a thread started, for want of memory."""
    if isinstance(error, ImportError):
        return "failed to map segment" in str(error) or _lacks_memory_beneath(error)
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


def _lacks_memory_beneath(error: BaseException) -> bool:
    """Whether that is why another import failed."""
    return error.__cause__ is not None and _lacks_memory(error.__cause__)


def _explain_os(error: OSError) -> str | None:
    """The sentence for a failure of the file system."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.EFBIG:
        return f"a file may not become so large here{where}: raise the limit with `ulimit -f`"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "requested and" in str(error):  # numpy's words for a file that was cut short
        return FULL.format(where)
    if error.errno == errno.ENAMETOOLONG:
        return f"a name is too long for this file system{where}: choose a shorter one"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"permission denied{where}: check the folder's permissions or choose another folder"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return OPEN_FILES
    if error.errno == errno.ENOMEM:
        return NO_MEMORY
    if error.errno in OUTSIDE and error.strerror:
        return f"{error.strerror.lower()}{where}: check the path and the disk"
    return None


def _explain_hub(error: BaseException) -> str | None:
    """The sentence for an error of huggingface_hub, matched by class name to avoid its import."""
    classes = {cls.__name__ for cls in type(error).__mro__}
    detail = next(iter(str(error).splitlines()), "")
    for names, sentence in HUB_ERRORS:
        if names & classes:
            return sentence.format(detail)
    if "RuntimeError" in classes and any(word in str(error) for word in TRANSFER_WORDS):
        return (
            "the transfer from or to the Hugging Face Hub broke off: check the connection and run "
            "the same command again; finished files are kept"
        )
    return None
