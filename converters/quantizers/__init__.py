"""A plan in, codes out."""
