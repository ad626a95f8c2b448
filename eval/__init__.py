"""Proof: WikiText-2 text, perplexity, divergence, comparison at equal bytes."""
