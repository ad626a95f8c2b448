"""Errors that a user meets: one sentence each, that says what is wrong and what to do.

`MintError` is raised by our own checks. `explain` puts exceptions of other libraries into words,
for causes that lie outside this program (network, disk, permissions). Whatever neither of them
knows is a bug and is reported as one."""

from __future__ import annotations

import errno

NOT_FINITE = (
    "holds NaN or infinite values: the checkpoint is damaged, download it again (or convert it as "
    "it is with --effort fast --allow-nonfinite)"
)
FULL = (
    "the disk is full{}: free some space (or choose another folder) and run the same command "
    "again; what was finished is kept"
)

NO_METAL = "No Metal back-end"  # in what MLX says of a kernel that exists for Metal alone


class MintError(Exception):
    """A refusal or a failure with a known cause. Its text is one sentence for the user."""


class UsageError(MintError):
    """The command line or an argument is malformed (exit code 2)."""


def explain(error: BaseException) -> str | None:
    """Return the sentence for an exception raised outside this package, or None where the cause
    isn't known.
    """
    if isinstance(error, MintError):
        return str(error)
    if isinstance(error, OSError):
        sentence = _explain_os(error)
        if sentence:
            return sentence
    if isinstance(error, RuntimeError) and "Unable to write" in str(error):  # by MLX
        return FULL.format("")
    if isinstance(error, RuntimeError) and NO_METAL in str(error):
        return "mlx-lm has parts of this model for Metal only: run this on a Mac"
    return _explain_hub(error)


def _explain_os(error: OSError) -> str | None:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "requested and" in str(
        error
    ):  # the latter by numpy
        return FULL.format(where)
    if error.errno == errno.ENAMETOOLONG:
        return f"a name is too long for this file system{where}: choose a shorter one"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"no permission to write or read{where}: check the folder's rights or choose another "
            "one"
        )
    return None


def _explain_hub(error: BaseException) -> str | None:
    """Sentences for huggingface_hub's errors, matched by class name so that the library need not be
    imported.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    if "GatedRepoError" in names:
        return (
            "this model is gated: accept its licence on its Hugging Face page, then run `hf auth "
            "login` with a token that may read it"
        )
    if "RevisionNotFoundError" in names:
        return "this revision does not exist on the Hugging Face Hub: check the part after '@'"
    if "RepositoryNotFoundError" in names:
        return (
            "no such model on the Hugging Face Hub, or it is private: check the name (org/name), "
            "and log in with `hf auth login` if it is private"
        )
    if "EntryNotFoundError" in names and "LocalEntryNotFoundError" not in names:
        return f"the repository lacks a file that is needed: {str(error).splitlines()[0]}"
    if "IncompleteSnapshotError" in names:
        return (
            "the model is only half downloaded: run the same command again while online; finished "
            "files are kept"
        )
    if "HFValidationError" in names:
        return (
            "that is neither a folder nor a name of the Hugging Face Hub (org/name, of letters, "
            "digits, '-', '_' and '.', no '--' or '..', no '.git' at the end): check the spelling"
        )
    if "NotASafetensorsRepoError" in names:
        return (
            "the repository's safetensors shards have no index: give a checkpoint with "
            "model.safetensors.index.json"
        )
    if names & {
        "OfflineModeIsEnabled",
        "LocalEntryNotFoundError",
        "ConnectError",
        "TimeoutException",
        "ProxyError",
    }:
        return (
            "the Hugging Face Hub cannot be reached and the model is not complete in the local "
            "cache: check the connection (or HF_HUB_OFFLINE) and run the same command again; "
            "finished files are kept"
        )
    if names & {"HfHubHTTPError", "HTTPStatusError", "TransportError"}:
        return (
            "the Hugging Face Hub answered with an error, try again later: "
            f"{str(error).splitlines()[0]}"
        )
    if "RuntimeError" in names and any(
        word in str(error) for word in ("CAS Client Error", "hf_xet", "Reqwest")
    ):
        return (
            "the transfer from or to the Hugging Face Hub broke off: check the connection and run "
            "the same command again; finished files are kept"
        )
    return None
