"""Methods inside other evaluation harnesses: lmms-eval and VLMEvalKit."""
