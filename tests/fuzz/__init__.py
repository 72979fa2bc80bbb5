"""Structured fuzzing of all readers of outside data and of all operators.

A target (one file in `targets`) makes an input from a seed and runs it. The driver runs targets in processes of their
own, so that a crash or a hang is caught and reported with the seed that reproduces it:

    make fuzz                      # 1,000,000 inputs
    make fuzz FUZZ=5000            # fewer
    make fuzz SECONDS=120          # as many as fit
    PYTHONPATH=.:tests python -m fuzz --target topology --only 123
"""
