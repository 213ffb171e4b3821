"""What a resume costs: stock DistributedOptimizer and SelectiveAdam in turn, in one run."""
