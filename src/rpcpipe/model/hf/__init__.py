"""Models of transformers as layers; needs the extra ``hf`` and is imported on first use."""
