"""Training, inference and scoring: what ``python -m segmodels.train | evaluate | predict`` are made of."""
