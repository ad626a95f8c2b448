"""Numbers in, a plan out."""
