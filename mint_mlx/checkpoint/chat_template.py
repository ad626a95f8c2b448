"""The one place that renders chat templates: in a child process, within limits of time and memory.

A template is a stranger's program. One that fails, does not end or grows costs a few seconds and is
told; the process that converts never runs it.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.errors import MintError

LOADING = 120.0  # seconds until the tokenizer is loaded
RENDERING = 5.0  # seconds for all messages
GROWTH = 1 << 30  # bytes of memory that rendering may take
_LOOK = 0.05  # seconds between two looks at the memory
_MAX_ANSWER = 64_000_000  # bytes
EMPTY = "it turns a message into an empty prompt"


class TemplateProblem(MintError):
    """A checkpoint's chat template can't be used: it fails, doesn't end, or grows too large."""


def chat_prompts(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of users' messages through a checkpoint's chat template, each ready for a reply.

    Args:
        folder: of the checkpoint, with a tokenizer that has a template.
        texts: the messages, each the first of its own conversation.

    Raises:
        TemplateProblem: the template can't be used, or makes nothing of a message.
    """
    conversations = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    rendered = render(folder, conversations)
    for tokens in rendered:
        if isinstance(tokens, str):
            raise _problem(folder, tokens)
    return [tokens for tokens in rendered if not isinstance(tokens, str)]


def render(folder: Path, conversations: Sequence[dict[str, Any]]) -> list[list[int] | str]:
    """Token ids of conversations through a checkpoint's chat template, each ready for a reply.

    A template may refuse some of them: many know no system prompt, or no tools.

    Args:
        folder: of the checkpoint, with a tokenizer that has a template.
        conversations: for each its `messages`, and what else the template is given.

    Returns:
        For each conversation its tokens, or why the template can't render it.

    Raises:
        TemplateProblem: the template doesn't end, or grows too large.
    """
    request = json.dumps({"folder": str(folder.resolve()), "conversations": list(conversations)})
    try:
        answer = _ask(request)
    except _Stopped as stopped:
        raise _problem(folder, str(stopped)) from None
    tokens = answer.get("tokens")
    if not isinstance(tokens, list) or len(tokens) != len(conversations):
        raise _problem(folder, str(answer.get("problem", EMPTY)))
    return [prompt or EMPTY for prompt in tokens]


def as_messages(turns: Sequence[str], system: str | None = None) -> list[dict[str, Any]]:
    """Turns of user and assistant as the messages that chat templates take."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def tool_schema(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """A tool as the JSON schema that chat templates take; all its parameters are required."""
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


def _problem(folder: Path, problem: str) -> TemplateProblem:
    name = folder.name.removesuffix(".partial")
    return TemplateProblem(
        f"the chat template of {name} fails ({problem}): check its chat_template.jinja or "
        "tokenizer_config.json"
    )


class _Stopped(Exception):
    """The child was stopped, or gave no answer; the text says why."""


def _command() -> list[str]:
    """How the child is started."""
    return [sys.executable, "-m", f"{__package__}.chat_renderer"]


def _ask(request: str) -> dict[str, Any]:
    """Let a child answer a request.

    Raises:
        _Stopped: it exceeded a limit, or ended without an answer.
    """
    # It finds this package where this process did, whatever lies in the current folder.
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    with subprocess.Popen(
        _command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=root,
        env=environment,
        start_new_session=True,  # Ctrl-C is for this process, which then stops the child
    ) as process:
        try:
            assert process.stdin is not None
            with process.stdin:
                process.stdin.write(request.encode())
            data = bytearray()
            _line(process, data, LOADING, None)
            limit = _resident(process.pid) + GROWTH
            answer: dict[str, Any] = json.loads(_line(process, data, RENDERING, limit))
            return answer
        except BrokenPipeError:
            raise _Stopped("its tokenizer could not be loaded") from None
        finally:
            process.kill()


def _line(
    process: subprocess.Popen[bytes], data: bytearray, seconds: float, limit: int | None
) -> bytes:
    """The child's next line.

    Args:
        process: the child.
        data: what was read and not returned yet; this line is taken out of it.
        seconds: after which it is given up.
        limit: bytes of its memory at which it is given up, if any.

    Raises:
        _Stopped: it exceeded one of them, or ended.
    """
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while b"\n" not in data:
            if selector.select(_LOOK):
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise _Stopped("its process ended without an answer")
                data += piece
            if limit is not None and _resident(process.pid) > limit:
                raise _Stopped(f"it takes more than {GROWTH >> 20} MiB of memory")
            if time.monotonic() > deadline:
                raise _Stopped(f"it does not end within {seconds:g} seconds")
            if len(data) > _MAX_ANSWER:
                raise _Stopped("it makes a prompt without end")
    line, _, rest = bytes(data).partition(b"\n")
    data[:] = rest
    return line


def _resident(pid: int) -> int:
    """Bytes of memory that a process has; 0 where nobody can tell."""
    statm = Path(f"/proc/{pid}/statm")
    try:
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        pass
    said = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return int(said.stdout) * 1024 if said.stdout.strip().isdigit() else 0
