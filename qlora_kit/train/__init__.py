"""Training: the objective, the step, the optimizer, what is kept or recomputed, checkpoints, the loop, evaluation."""
