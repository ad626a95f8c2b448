"""Reads checkpoints in foreign formats: FP8, gpt-oss in bf16; refuses the others by name."""
