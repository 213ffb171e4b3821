"""One load on its ranks: the optimizers, the merge, the moments and the guard."""
