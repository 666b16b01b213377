"""Reads what a run has written: the files of a run folder, whichever version wrote them.

    run = read_run(Path("runs/digits"))
    steps, losses = run.metrics.series("loss")

Nothing here imports torch, and nothing is written. A damaged or missing file never stops a reader:
``Run.problems`` says what could not be read.
"""
