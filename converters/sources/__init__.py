"""Reads checkpoints in foreign formats, at no loss where MLX has the codes; refuses the others."""
