"""Using a trained model: prefill and decoding, sampling, text generation, and passes that record the routing."""
