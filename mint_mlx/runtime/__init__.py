"""Runs a stock model to measure it."""
