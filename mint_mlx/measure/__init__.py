"""Numbers about a model: error curves and sensitivities."""
