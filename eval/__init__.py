"""Evaluation: a task asks, run keeps the answers, a scorer judges them, report shows the numbers.

From the bottom up, each part importing only those before it:

    stats, files        paired statistics; reading and writing files
    scorers, picto      the benchmarks and how they judge; the bundled world of pictograph scenes
    settings            the options of an evaluation
    tasks               the images and prompts of each benchmark
    run                 plan, generate, keep answers, summarise
    bench               speed and memory of methods
    report              tables, figures and pages
    calibrate, harness  finding parameters of methods; lmms-eval and VLMEvalKit
"""
