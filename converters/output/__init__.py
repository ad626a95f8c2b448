"""Codes in, a checkpoint folder out."""
