"""The engine that runs a model by vLLM, on one GPU or several."""
