"""Routing policies compared in the simulator, on equal hardware and equal requests.

`cells` says what is offered, `replays` measures, `verdict` judges figures, `report` writes them down.
"""
