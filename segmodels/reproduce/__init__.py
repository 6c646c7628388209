"""The papers' tables as commands: ``python -m segmodels.reproduce list | run | report | findings``.

A published row is a recipe in ``segmodels/recipes/papers`` whose section ``paper`` says which number it is to give.
"""
