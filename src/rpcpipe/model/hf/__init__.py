"""Models of transformers as layers. The package needs the extra ``hf`` and is imported on first use."""
