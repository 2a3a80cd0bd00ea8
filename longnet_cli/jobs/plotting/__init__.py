"""The job `plot`: curves of training runs (`runs.py`), and a text with the nats of each token (`surprise.py`).

Loads no torch, and matplotlib only for a picture.
"""
