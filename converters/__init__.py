"""Sources in, checkpoints out: quantizers, the writer, the verifier, the model card."""
