"""Where an evaluation is put inside other harnesses: lmms-eval and VLMEvalKit."""
