"""The command that is printed last fits the model: a template, a tower, a quantized cache."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mint_mlx.checkpoint.run_command import (
    has_chat_template,
    pipeline_tag,
    python_lines,
    run_command,
)
from mint_mlx.converters.output.card import renamed

TEMPLATES = {
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": "{}",
    "tokenizer_config.json": '{"chat_template": "{{ messages }}"}',
}
PLAIN = "mlx_lm.generate --model 'my model' --prompt 'The history of the city'"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_model_with_a_chat_template_chats(name: str, tmp_path: Path) -> None:
    assert not has_chat_template(tmp_path)
    assert run_command(tmp_path, "my model") == PLAIN
    assert "apply_chat_template" not in python_lines(tmp_path, "x")
    (tmp_path / name).write_text(TEMPLATES[name])
    assert run_command(tmp_path, "my model") == "mlx_lm.chat --model 'my model'"
    assert "apply_chat_template" in python_lines(tmp_path, "x")
    for given in ("x", 'x"); evil("', "x\\"):
        tree = ast.parse(python_lines(tmp_path, given))
        assert given in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]


def test_settings_without_a_template_are_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert not has_chat_template(tmp_path)


def test_towers_are_for_mlx_vlm(tmp_path: Path) -> None:
    sees, hears = ("vision_tower.layers.0",), ("audio_tower.layers.0",)
    assert pipeline_tag(()) == "text-generation"
    assert pipeline_tag(sees) == "image-text-to-text"
    assert pipeline_tag(hears) == "audio-text-to-text"
    command = run_command(tmp_path, "x", sees)
    assert command == "mlx_vlm.generate --model x --image picture.jpg --prompt 'What is this?'"
    assert "--audio sound.wav" in run_command(tmp_path, "x", hears)
    assert "mlx_lm.generate --model x --kv-bits 8" in run_command(tmp_path, "x", sees, 8)


def test_a_card_under_another_name_names_it_in_its_commands(tmp_path: Path) -> None:
    lines = f"{PLAIN}\nmlx_lm.chat --model 'my model'\n{python_lines(tmp_path, 'my model')}\n"
    card = f"# my model\n\n- made with: x\n{lines}"
    assert renamed(card, "me/new") == card.replace("'my model'", "me/new").replace(
        "my model", "me/new"
    )
    assert renamed("# of others\n", "me/new") == "# of others\n"
